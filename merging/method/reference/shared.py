"""Plain formulas of the methods that merge in a basis all tasks share."""

from __future__ import annotations

import torch
from torch import Tensor

from merging.method.reference.entries import ties
from merging.method.reference.plain import TEXTBOOK, printed, procrustes, svd

ZERO = 2.0**-18  # singular values up to this share of the largest are rounding


def left(D: Tensor, k: int | None = None) -> Tensor:
    """The k leading left singular vectors of [D_1 .. D_T]: (d_out, k)."""
    U, s, _ = svd(torch.cat(list(D), dim=1))
    return U[:, s > ZERO * s[0]][:, :k]


def right(D: Tensor, k: int | None = None) -> Tensor:
    return left(D.mT, k)


def by(name: str, D: Tensor) -> Tensor:
    return D.sum(0) if name == "sum" else TEXTBOOK[name](D)


def largest_rank(D: Tensor) -> int:
    return int(torch.linalg.matrix_rank(D, rtol=ZERO).max())


@printed
def core_space(D: Tensor, of: str = "ties") -> Tensor:
    U, V = left(D), right(D)
    return U @ by(of, U.mT @ D @ V) @ V.mT


@printed
def ctm(D: Tensor, beta: float = 0.25, rank: int | None = None, of: str = "ties") -> Tensor:
    r = rank or largest_rank(D)
    norms = D.flatten(1).norm(dim=1).view(-1, 1, 1)
    M = D / norms * (beta * norms + (1 - beta) * norms.mean())
    U, V = left(M, r), right(M, r)
    for _ in range(10):
        U = left(M @ V, r)
        V = right(U.mT @ M, r)
    return U @ by(of, U.mT @ D @ V) @ V.mT


@printed
def pico(D: Tensor, of: str = "sum") -> Tensor:
    U, S, _ = svd(torch.cat(list(D), dim=1))
    a = 1 / (1 + (len(D) - 1) * S.square() / S.square().sum())
    merged = by(of, D + U @ (a - 1).diag() @ U.mT @ D)
    size: Tensor = D.flatten(1).norm(dim=1).mean() / merged.norm()
    return size * merged


@printed
def dc_merge(D: Tensor, k: float = 0.001, rank: int | None = None) -> Tensor:
    r = min(rank or max(1, min(D.shape[1:]) // len(D)), largest_rank(D))
    parts = [(U[:, :r], s[:r], Vh[:r]) for U, s, Vh in map(svd, D)]
    flat = torch.stack([s.mean() * U @ Vh for U, s, Vh in parts])
    U = procrustes(torch.cat([U for U, _, _ in parts], dim=1))
    V = procrustes(torch.cat([Vh for _, _, Vh in parts])).mT
    blocks: Tensor = torch.block_diag(*[torch.ones(r, r, dtype=D.dtype)] * len(D))
    return U @ (blocks * ties(U.mT @ flat @ V, k)) @ V.mT


@printed
def cart(D: Tensor, scale: float = 1.0, share: float = 0.08) -> Tensor:
    k = max(1, round(share * min(D.shape[1:])))
    merged = D.mean(0)
    for U, s, Vh in map(svd, D - D.mean(0)):
        merged = merged + scale * U[:, :k] @ s[:k].diag() @ Vh[:k]
    return merged


@printed
def rank_rule(D: Tensor) -> Tensor:
    s = torch.linalg.svdvals(D)
    r = min(D.shape[1:])
    rounded = s.sum(-1) ** 2 / s.square().sum(-1) < r / 10
    adapter = (s > 1e-3 * s[:, :1]).sum(-1) <= r / 2
    return (
        TEXTBOOK["tsv_m"](D)
        if (rounded | adapter).all()
        else TEXTBOOK["aswudi"](D, anchor="average")
    )

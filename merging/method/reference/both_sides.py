"""Plain formulas of the family of both sides of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from merging.method.reference.interference import balanced
from merging.method.reference.plain import eigh, pinv, printed, svd


def power(S: Tensor, exponent: float, rtol: float) -> Tensor:
    """Pseudo-inverse power of a symmetric positive semi-definite matrix."""
    l, V = eigh(S)
    kept = l > rtol * l.max()
    return V[:, kept] @ torch.diag(l[kept] ** exponent) @ V[:, kept].mT


def eps(S: Tensor) -> float:
    return len(S) * torch.finfo(torch.float32).eps


@printed
def both_sides(
    D: Tensor, a: float = 0.5, p: float = 1.0, truncate: bool = False,
    task_weight: str = "uniform",
) -> Tensor:  # fmt: skip
    k = min(D.shape[1:]) // len(D) if truncate else None
    R, C, N = torch.zeros_like(D[0] @ D[0].mT), torch.zeros_like(D[0].mT @ D[0]), 0 * D[0]
    for U, s, Vh in map(svd, D):
        U, s, Vh = U[:, :k], s[:k], Vh[:k]
        w = 1.0 if task_weight == "uniform" else 1 / s.square().sum() ** p
        R = R + w * U @ torch.diag(s ** (2 * p)) @ U.mT
        C = C + w * Vh.mT @ torch.diag(s ** (2 * p)) @ Vh
        N = N + w * U @ torch.diag(s ** (2 * p + 1)) @ Vh
    cuts = (eps(R), eps(C)) if p == 1 else (2.0**-36, 2.0**-36)
    return power(R, -a, cuts[0]) @ N @ power(C, a - 1, cuts[1])


@printed
def mirror(D: Tensor) -> Tensor:
    return pinv((D @ D.mT).sum(0)) @ (D @ D.mT @ D).sum(0)


@printed
def symmetric(D: Tensor) -> Tensor:
    return both_sides(D)


@printed
def sylvester(D: Tensor) -> Tensor:
    R, C, N = (D @ D.mT).sum(0), (D.mT @ D).sum(0), (D @ D.mT @ D).sum(0)
    l, U = eigh(R)
    m, V = eigh(C)
    sums = l[:, None] + m
    kept = (l > eps(R) * l.max())[:, None] & (m > eps(C) * m.max())
    return U @ torch.where(kept, 2 * (U.mT @ N @ V) / sums, 0) @ V.mT


@printed
def sided(D: Tensor) -> Tensor:
    w = 1 / D.square().sum((1, 2), keepdim=True)
    R, C = (w * D @ D.mT).sum(0), (w * D.mT @ D).sum(0)
    return balanced(D.mT).mT if R.norm() > (1 + 1e-5) * C.norm() else balanced(D)

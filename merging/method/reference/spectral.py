"""Plain formulas of the methods that work on singular vectors and values."""

from __future__ import annotations

import torch
from torch import Tensor

from merging.method.reference.entries import agreed, ties
from merging.method.reference.plain import printed, procrustes, svd


def side_by_side(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = zip(*parts, strict=True)
    return torch.cat(U, 1), torch.cat(s), torch.cat(Vh)


@printed
def tsv_m(D: Tensor) -> Tensor:
    k = min(D.shape[1:]) // len(D)
    parts = [(U[:, :k], s[:k], Vh[:k]) for U, s, Vh in map(svd, D)]
    U, s, Vh = side_by_side(parts)
    return procrustes(U) @ s.diag() @ procrustes(Vh)


@printed
def iso_c(D: Tensor) -> Tensor:
    U, s, Vh = svd(D.sum(0))
    return s.mean() * U @ Vh


@printed
def iso_cts(D: Tensor, common: float = 0.8) -> Tensor:
    r = min(D.shape[1:])
    n = min(round((r - int(common * r)) / len(D)), r // len(D))
    k = r - n * len(D)
    U, s, Vh = svd(D.sum(0))
    U_c = U[:, :k]
    parts = [(U_c, s[:k], Vh[:k])]
    for delta in D:
        U, s, Vh = svd(delta - U_c @ U_c.mT @ delta)
        parts.append((U[:, :n], s[:n], Vh[:n]))
    U, s, Vh = side_by_side(parts)
    return s.mean() * procrustes(U) @ procrustes(Vh)


@printed
def knots(
    D: Tensor, k: float = 0.2, merge: str = "ties", values: str = "inside", scope: str = "layer"
) -> Tensor:
    U, s, Vh = svd(torch.cat(list(D), dim=1))
    U, s, Vh = U[:, s > 1e-9 * s[0]], s[s > 1e-9 * s[0]], Vh[s > 1e-9 * s[0]]
    inside, after = (s, torch.ones_like(s)) if values == "inside" else (torch.ones_like(s), s)
    blocks = inside[:, None] * torch.stack(Vh.chunk(len(D), dim=1))
    merged = ties(blocks, k) if merge == "ties" else {"tsv_m": tsv_m, "iso_c": iso_c}[merge](blocks)
    return 0.6 * U @ after.diag() @ merged


@printed
def star(D: Tensor, eta: float = 0.4) -> Tensor:
    merged = torch.zeros_like(D[0])
    for U, s, Vh in map(svd, D):
        r = int((s.cumsum(0) < eta * s.sum()).sum()) + 1
        merged += U[:, :r] @ (s[:r] * s.sum() / s[:r].sum()).diag() @ Vh[:r]
    return merged / len(D)


@printed
def subspace_boosting(D: Tensor, beta: float = 0.01) -> Tensor:
    U, s, Vh = svd(0.3 * D.sum(0))
    floor = s[int((s.cumsum(0) < beta * s.sum()).sum())]
    return U @ s.clamp_min(floor).diag() @ Vh


@printed
def svc(D: Tensor, floor: float | None = 1.0) -> Tensor:
    floor = 1 / len(D) if floor is None else floor
    merged = D.sum(0)
    U, s, Vh = svd(merged)
    whole, parts = U.mT @ merged, U.mT @ D  # (r, d_in), (T, r, d_in)
    ratio = (parts * whole).sum(-1) / parts.square().sum(-1)  # (T, r)
    return U @ (s / ratio.clamp_min(floor).mean(0)).diag() @ Vh


@printed
def consensus(D: Tensor, lam: float = 0.4, agree: int = 2) -> Tensor:
    return agreed(tsv_m(D), D, lam, agree)

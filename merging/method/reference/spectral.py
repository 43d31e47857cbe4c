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


@printed
def ct_merging(D: Tensor, support: float = 0.5, rank: int | None = None) -> Tensor:
    r = rank or max(1, min(D.shape[1:]) // len(D))
    parts = [(U[:, :r], s[:r], Vh[:r].mT) for U, s, Vh in map(svd, D)]
    shared = []
    for side in (0, 2):
        l, E = torch.linalg.eigh(sum(part[side] @ part[side].mT for part in parts) / len(D))
        shared.append(E[:, l > support + 1e-6].flip(1))
    k = min(E.shape[1] for E in shared)
    P, Q = (E[:, :k] @ E[:, :k].mT for E in shared)
    mean = sum(U @ s.diag() @ V.mT for U, s, V in parts) / len(D)
    ones = P.new_ones(r)
    U = torch.cat([U - P @ U for U, _, _ in parts], 1)
    V = torch.cat([V - Q @ V for _, _, V in parts], 1)
    s = torch.cat([ones * s.square().mean().sqrt() for _, s, _ in parts])
    merged: Tensor = P @ mean @ Q + partial(U) @ s.diag() @ partial(V).mT
    return merged


def partial(U: Tensor) -> Tensor:
    """The polar factor on the directions that U has."""
    P, s, Qh = svd(U)
    return P[:, s > 1e-5] @ Qh[s > 1e-5]


@printed
def iso_merger(D: Tensor, base: Tensor, keep: float = 0.9) -> Tensor:
    U0, s0, Vh0 = svd(base)
    V0, S0 = Vh0.mT, s0.diag()
    mask = (torch.arange(len(s0)) < round(keep * len(s0))).to(s0).diag()

    def project(F: Tensor, Z: Tensor) -> Tensor:
        return Z - F @ (F.mT @ Z + Z.mT @ F) / 2

    X, Y = [], []
    for delta in D:
        U, _, Vh = svd(base + delta)
        signs = torch.diag((U.mT @ U0 + Vh @ V0).diagonal().sign())
        X.append(project(U0, U @ signs - U0) @ mask)
        Y.append(project(V0, Vh.mT @ signs - V0) @ mask)
    G = torch.stack([x @ S0 @ Vh0 + U0 @ S0 @ y.mT for x, y in zip(X, Y, strict=True)]).flatten(1)
    c = torch.linalg.lstsq(G @ G.mT, (G @ G.mT).diagonal()).solution.clamp(0, 1.5)
    U = procrustes(U0 + sum(x * w for x, w in zip(X, c, strict=True)))
    V = procrustes(V0 + sum(y * w for y, w in zip(Y, c, strict=True)))
    return U @ S0 @ V.mT - base


@printed
def polarised(D: Tensor, of: str = "tsv_m") -> Tensor:
    norms = torch.stack([delta.norm() for delta in D])
    merge = {"tsv_m": tsv_m, "iso_c": iso_c}[of]
    merged = merge(
        torch.stack([d * (n / norms.mean()) ** 2 for d, n in zip(D, norms, strict=True)])
    )
    columns = merged.square().sum(0).sqrt()
    return merged @ torch.diag((columns / columns.mean()) ** 2)

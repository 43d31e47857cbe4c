"""Plain formulas of the methods that look at single entries, or at a delta as one vector."""

from __future__ import annotations

import torch
from torch import Tensor

from merging.method.reference.plain import printed


@printed
def average(D: Tensor) -> Tensor:
    return D.mean(0)


@printed
def task_arithmetic(D: Tensor, alpha: float = 0.3) -> Tensor:
    return alpha * D.sum(0)


@printed
def lines(
    D: Tensor,
    depth: float = 0.0,
    start: float | None = None,
    beta: float = 0.5,
    in_block: bool = True,
    after: str = "end",
) -> Tensor:
    depth = depth if in_block or after == "end" else 0.0
    return ((1 / len(D) if start is None else start) + beta * depth) * D.sum(0)


@printed
def fisher(D: Tensor, fishers: Tensor, floor: float = 0.0) -> Tensor:
    fishers = fishers.clamp_min(floor)
    return (fishers * D).sum(0) / fishers.sum(0)


@printed
def data_free_fisher(D: Tensor) -> Tensor:
    return fisher(D, D.square())


def top(D: Tensor, share: float) -> Tensor:
    """Each task's largest entries by magnitude, the rest 0."""
    flat = D.flatten(1)
    count = max(1, int(share * flat.shape[1]))
    kept = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(D)


def elect(D: Tensor, merge: str = "mean", cancelled: str = "zero") -> Tensor:
    sign = D.sum(0).sign()
    if cancelled == "majority":
        sign[sign == 0] = sign.sum().sign()
    agree = D * sign > 0
    total = (D * agree).sum(0)
    return total if merge == "sum" else total / agree.sum(0).clamp_min(1)


@printed
def ties(
    D: Tensor, k: float = 0.2, merge: str = "mean", cancelled: str = "zero", scope: str = "model"
) -> Tensor:
    return elect(top(D, k), merge, cancelled)


@printed
def dare(D: Tensor) -> Tensor:
    return 0.3 * (D * (torch.rand_like(D) < 0.1) / 0.1).sum(0)


@printed
def dare_ties(D: Tensor) -> Tensor:
    return elect(D * (torch.rand_like(D) < 0.1) / 0.1)


@printed
def della(D: Tensor) -> Tensor:
    rank = D.abs().argsort(-1).argsort(-1)
    keep = 0.63 + 0.14 * rank / (D.shape[-1] - 1)
    return 1.1 * elect(D * (torch.rand_like(D) < keep) / keep)


@printed
def della_linear(D: Tensor) -> Tensor:
    rank = D.abs().argsort(-1).argsort(-1)
    keep = 0.63 + 0.14 * rank / (D.shape[-1] - 1)
    return 0.3 * (D * (torch.rand_like(D) < keep) / keep).sum(0)


@printed
def breadcrumbs(D: Tensor, beta: float = 0.9, gamma: float = 0.01, scope: str = "layer") -> Tensor:
    rows = D.abs().flatten(0, 1) if scope == "row" else D.abs().flatten(1)
    n = rows.shape[1]
    order = rows.argsort(1)
    kept = torch.zeros_like(rows)
    kept.scatter_(1, order[:, int(beta * n) : n - int(gamma * n)], 1.0)
    return 0.3 * (D * kept.view_as(D)).sum(0)


@printed
def breadcrumbs_ties(
    D: Tensor, beta: float = 0.9, gamma: float = 0.01, scope: str = "layer", merge: str = "mean"
) -> Tensor:
    one = [breadcrumbs(d[None], beta, gamma, scope) / 0.3 for d in D]
    return elect(torch.stack(one), merge)


def agreed(merged: Tensor, D: Tensor, lam: float, agree: int) -> Tensor:
    needed = D.abs() > lam * (merged - D).abs()
    return merged * (needed.sum(0) >= agree)


@printed
def consensus_ta(D: Tensor, lam: float = 0.4, agree: int = 2) -> Tensor:
    return 0.3 * agreed(D.sum(0), D, lam, agree)


@printed
def consensus_ties(D: Tensor, k: float = 0.2, lam: float = 0.4, agree: int = 2) -> Tensor:
    return 0.3 * agreed(ties(D, k, "sum"), D, lam, agree)


@printed
def pcb(D: Tensor, ratio: float = 0.1, clip: float = 0.0) -> Tensor:
    shape, D = D.shape[1:], D.flatten(1)
    ranked, i = D.abs().sort(1).values, max(1, int(clip * D.shape[1])) - 1
    low, high = ranked[:, i, None], ranked[:, -1 - i, None]
    size = D.abs().clamp(low, high)
    strength = ((size - low) / (high - low)).square()
    score = torch.exp(len(D) * strength) * torch.tanh(D * D.sum(0))
    cut = score.sort(1, descending=True).values[:, int(ratio * D.shape[1]) - 1, None]
    weight = (score - cut).clamp_min(0) / (score.amax(1, True) - cut)
    D = D.sign() * size
    return (1.2 * (weight * D).sum(0) / weight.sum(0).clamp_min(1e-12)).view(shape)


@printed
def sce(D: Tensor, k: float = 1.0) -> Tensor:
    variance = D.var(0, unbiased=False).flatten()
    kept = torch.zeros_like(variance)
    kept[variance.topk(int(k * (variance > 0).sum())).indices] = 1
    D = D * kept.view(D.shape[1:]) if k < 1 else D
    w = D.square().sum((1, 2), keepdim=True) * (D.sign() == D.sum(0).sign()) * (D != 0)
    return (w * D).sum(0) / w.sum(0).clamp_min(1e-300)


@printed
def ram(D: Tensor, eps: float = 1e-5, r: float = 0.0, cap: float = 0.2) -> Tensor:
    moved = D.abs() > eps
    count = moved.sum(0)
    unique, shared = moved & (count == 1), moved & (count > 1)
    rho = shared.sum((1, 2)) / unique.sum((1, 2)).clamp_min(1)
    gain = 1 + r * rho.clamp_max(cap).view(-1, 1, 1)
    return (D * unique * gain).sum(0) + (D * shared).sum(0) / count.clamp_min(1)


@printed
def karcher(D: Tensor) -> Tensor:
    norms = D.flatten(1).norm(dim=1)
    unit = D.flatten(1) / norms[:, None]
    x: Tensor = torch.nn.functional.normalize(unit.mean(0), dim=0)
    for _ in range(100):
        theta = torch.acos((unit @ x).clamp(-1, 1))[:, None]
        step = (theta / theta.sin() * (unit - theta.cos() * x)).mean(0)
        if step.norm() < 1e-12:
            break
        x = step.norm().cos() * x + step.norm().sin() / step.norm() * step
    merged: Tensor = norms.mean() * x.view_as(D[0])
    return merged


@printed
def model_stock(D: Tensor) -> Tensor:
    T = len(D)
    unit = torch.nn.functional.normalize(D.flatten(1), dim=1)
    cos = ((unit @ unit.mT).sum() - T) / (T * (T - 1))
    return T * cos.clamp_min(0) / (1 + (T - 1) * cos.clamp_min(0)) * D.mean(0)

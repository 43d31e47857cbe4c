"""Baselines that look at which tasks move an entry, and how differently: SCE and RAM.

Both accept deltas of any shape (T, *shape). Shares of entries are rounded down to a count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.method.order import largest, per_task
from merging.method.ranges import NonNegative, Share
from merging.method.registry import register
from merging.method.sparse import signs


@register(
    "sce", source="arXiv 2408.07990", rest="method", breaks=("outputs", "inputs"),
    formula="sum_t w_t D_t / sum_t w_t over the elected signs, w_t = |D_t|^2, of entries that vary",
)  # fmt: skip
def sce(deltas: Tensor, *, k: Share = 1.0) -> Tensor:
    """SCE: select, calculate, erase, (T, *shape) -> (*shape) (arXiv 2408.07990, mergekit's code).

    Of the entries that differ between tasks the share k with the largest variance is kept, all with
    k = 1; tasks are weighed by their energy |D_t|^2 there, and entries against the sign of the sum
    do not count. A sum of exactly 0 elects no sign; mergekit takes it for positive.
    """
    if k < 1:
        variance = deltas.var(0, unbiased=False).flatten()
        kept = largest(variance[None], int(k * int(variance.count_nonzero())))
        deltas = torch.where(kept.view(deltas.shape[1:]), deltas, 0)
    scale = deltas.abs().amax().clamp_min(torch.finfo(deltas.dtype).tiny)
    energy = (deltas / scale).reshape(len(deltas), -1).square().sum(1)  # small ones underflow
    weights = per_task(energy, deltas) * (deltas * signs(deltas).to(deltas) > 0)
    total = weights.sum(0)
    return (weights * deltas).sum(0) / torch.where(total > 0, total, 1)


@register(
    "ram", source="arXiv 2601.13572", rest="method", elementwise=lambda a: a["r"] == 0,
    breaks=("scale", "outputs", "inputs"),
    formula="the mean of D_t over the tasks that move an entry by more than eps",
)  # fmt: skip
def ram(deltas: Tensor, *, eps: NonNegative = 1e-5, r: float = 0.0, cap: float = 0.2) -> Tensor:
    """RAM, for agents trained by reinforcement: (T, *shape) -> (*shape) (arXiv 2601.13572).

    A task moves an entry if |D_t| > eps; an entry is the mean of the tasks that move it, so that
    what one task alone moves is kept whole. RAM+ scales that by 1 + r min(rho_t, cap), rho_t the
    task's shared over its unique entries (of the tensor, as in mergekit, where r is .1).
    """
    moved = deltas.abs() > eps
    count = moved.sum(0)
    unique, shared = moved & (count == 1), moved & (count > 1)
    merged = torch.where(shared, deltas, 0).sum(0) / count.clamp_min(1)
    shares = shared.reshape(len(deltas), -1).sum(1) / unique.reshape(len(deltas), -1).sum(
        1
    ).clamp_min(1)
    gain = per_task(1 + r * shares.clamp(0, cap), deltas)
    return merged + (gain * torch.where(unique, deltas, 0)).sum(0)

"""PCB: entries compete within their task and across tasks (arXiv 2410.02396)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merging.method.order import extremes, kth_largest, kth_largest_entry, per_task
from merging.method.ranges import Share
from merging.method.registry import Stream, register
from merging.method.sparse import whole_model


def _competition_thresholds(stream: Stream, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    if not whole_model(hyperparameters):
        return {}
    few = getattr(stream, "few", None)
    low, high = _range(stream, few, hyperparameters["clip"])
    top = torch.full_like(low, -torch.inf)

    def scores(passes: Stream) -> Iterable[Tensor]:
        for _, deltas in passes():
            score = competition(deltas, low, high)
            torch.maximum(top, extremes(score)[1].to(top), out=top)
            yield score

    ratio = hyperparameters["ratio"]
    cut = kth_largest(partial(scores, stream), ratio, few and partial(scores, few))
    return {"thresholds": torch.stack([low, high, cut.to(low), top])}


def _range(stream: Stream, few: Stream | None, clip: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest magnitude of each task (T,), a share `clip` at each end left out."""
    if not clip:
        ends = [extremes(deltas.abs()) for _, deltas in stream()]
        low, high = (torch.stack(side) for side in zip(*ends, strict=True))
        return low.amin(0).cpu(), high.amax(0).cpu()

    def magnitudes(sign: int, passes: Stream) -> Iterable[Tensor]:
        return (sign * deltas.abs() for _, deltas in passes())

    def end(sign: int) -> Tensor:
        some = None if few is None else lambda: magnitudes(sign, few)
        return sign * kth_largest(lambda: magnitudes(sign, stream), clip, some)

    return end(-1), end(1)


@register(
    "pcb",
    source="arXiv 2410.02396",
    formula="the mean weighted by exp(T self) tanh(D_t sum_t D_t), self = |D_t|^2 normalised",
    breaks=("scale", "outputs", "inputs", "expert"),
    rest="method",
    alpha=1.2,
    elementwise=whole_model,
    prepare=_competition_thresholds,
)
def pcb(
    deltas: Tensor,
    *,
    ratio: Share = 0.1,
    clip: Share = 0.0,
    scope: str = "model",
    thresholds: Tensor | None = None,
) -> Tensor:
    """Mean weighted by the entries' competition scores, (T, *shape) -> (*shape) (2410.02396).

    A task's weight is 0 up to its `ratio`-th largest score and grows linearly to 1 at the largest
    (as in the authors' code); entries that no task weighs are 0.
    clip: share of magnitudes at each end that is set to the next one within, 1e-4 in the authors'
        code. scope: as in `ties`.
    thresholds: (4, T), over the whole model, of the magnitudes their smallest and largest (within
        the clip), of the scores the cut and the largest.
    """
    if thresholds is None:
        magnitudes, share_clipped = deltas.abs(), clip
        low = -kth_largest_entry(-magnitudes, share_clipped)
        high = kth_largest_entry(magnitudes, share_clipped)
        score = competition(deltas, low, high)
        cut, top = kth_largest_entry(score, ratio), extremes(score)[1]
    else:
        low, high, cut, top = thresholds.to(deltas)
        score = competition(deltas, low, high)
    weight = (score - per_task(cut, deltas)).clamp_min(0)
    weight = weight / per_task(torch.where(top > cut, top - cut, 1), deltas)
    if clip:
        clipped = deltas.abs().clamp(per_task(low, deltas), per_task(high, deltas))
        deltas = deltas.sign() * clipped
    return (weight * deltas).sum(0) / weight.sum(0).clamp_min(1e-12)


def competition(deltas: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """exp(T self) tanh(D_t sum_t D_t), self = ((|D_t| - low) / (high - low))^2.

    deltas: (T, *shape); low, high: (T,), range of each task's magnitudes, to which they are
    clamped. Returns (T, *shape).
    """
    width = per_task(torch.where(high > low, high - low, 1), deltas)
    magnitudes = deltas.abs().clamp(per_task(low, deltas), per_task(high, deltas))
    strength = ((magnitudes - per_task(low, deltas)) / width).square()
    return torch.exp(len(deltas) * strength) * torch.tanh(deltas * deltas.sum(0))

"""Baselines that treat a weight as a vector: means, Fisher weights, depth scaling, spheres.

All accept deltas of any shape (T, *shape), so they merge biases and norms as they do matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from merging import linalg
from merging.errors import InputError
from merging.method.registry import register

_CHUNK = 2**16  # entries per task that are worked on together: they stay in a CPU's cache


@register(
    "average", source="arXiv 2203.05482", formula="mean_t D_t", rest="method",
    row_space=True, column_space=True, elementwise=True,
)  # fmt: skip
def average(deltas: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """mean_t D_t, (T, *shape) -> (*shape) (a uniform soup, arXiv 2203.05482).

    weights: (T,) what each expert counts for: sum_t w_t D_t / sum_t w_t.
    """
    return deltas.mean(0) if weights is None else combine(weights / weights.sum(), deltas)


@register(
    "task_arithmetic", source="arXiv 2212.04089", formula="alpha sum_t D_t", alpha=0.3,
    rest="method", row_space=True, column_space=True, elementwise=True,
)  # fmt: skip
def task_arithmetic(deltas: Tensor) -> Tensor:
    """alpha sum_t D_t, (T, *shape) -> (*shape) (arXiv 2212.04089)."""
    return deltas.sum(0)


@register(
    "fisher",
    source="arXiv 2111.09832",
    formula="sum_t F_t D_t / sum_t F_t, entry by entry",
    breaks=("outputs", "inputs"),
    needs="fisher",
    rest="method",
    elementwise=True,
)
def fisher(deltas: Tensor, *, fishers: Tensor, floor: float = 0.0) -> Tensor:
    """sum_t F_t D_t / sum_t F_t entry by entry, (T, *shape) -> (*shape) (arXiv 2111.09832).

    fishers: (T, *shape), diagonal Fisher of each expert, non-negative. An entry that no task
    cares about (all F_t = 0) takes the mean, the limit of equally small F_t.
    floor: smallest F_t. The authors divide each expert's Fisher by its norm over the whole model
        and take 1e-6; what is divided here is up to who gives it.
    """
    if fishers.shape != deltas.shape:
        raise InputError(
            f"expected fishers of shape {tuple(deltas.shape)}, got {tuple(fishers.shape)}"
        )
    return in_chunks(lambda D, F: _weighted_mean(D, F.to(D).clamp_min(floor)), deltas, fishers)


@register(
    "data_free_fisher",
    source="arXiv 2111.09832 with F_t = D_t^2",
    formula="sum_t D_t^3 / sum_t D_t^2, entry by entry",
    breaks=("outputs", "inputs"),
    rest="method",
    elementwise=True,
)
def data_free_fisher(deltas: Tensor) -> Tensor:
    """sum_t D_t^3 / sum_t D_t^2, (T, *shape) -> (*shape): the squared difference as the Fisher."""
    return in_chunks(_squares_mean, deltas)


def _squares_mean(deltas: Tensor) -> Tensor:
    # relative to the largest, whose square is 1 then: squares of small differences underflow
    largest = deltas.abs().amax(0).clamp_min_(_smallest(deltas))
    weights = (deltas / largest).square_()
    total = weights.sum(0).clamp_min_(1)  # less only where all differences are 0
    return weights.mul_(deltas).sum(0).div_(total)


def _weighted_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t D_t / sum_t w_t, (T, *shape) twice -> (*shape); `weights` is overwritten."""
    # relative weights: their products neither under- nor overflow, whatever the Fishers' scale
    largest = weights.amax(0)
    if largest.numel() and not largest.amin() > 0:
        weights = torch.where(largest > 0, weights / largest, 1.0)
    else:
        weights.div_(largest)
    total = weights.sum(0)
    return weights.mul_(deltas).sum(0).div_(total)


def _smallest(deltas: Tensor) -> float:
    """The smallest positive number of a dtype, below its normal ones."""
    return torch.nextafter(deltas.new_zeros(()), deltas.new_ones(())).item()


def in_chunks(merge: Callable[..., Tensor], *stacks: Tensor, size: int = _CHUNK) -> Tensor:
    """merge(*stacks), (T, *shape) each -> (*shape), of a merge that looks at single entries.

    On a CPU `size` entries at a time, so that what it makes on the way never leaves the cache.
    """
    first = stacks[0]
    if first.device.type != "cpu" or first[0].numel() <= size:
        return merge(*stacks)
    merged = torch.empty_like(first[0], memory_format=torch.contiguous_format)
    rows = [stack.reshape(len(stack), -1).split(size, dim=1) for stack in stacks]
    for part, *chunks in zip(merged.view(-1).split(size), *rows, strict=True):
        part.copy_(merge(*chunks))
    return merged


@register(
    "model_stock",
    source="arXiv 2403.19522",
    formula="r mean_t D_t, r = T cos / (1 + (T - 1) cos), cos the mean between experts",
    rest="method",
    row_space=True,
)
def model_stock(deltas: Tensor) -> Tensor:
    """r mean_t D_t, r = T cos / (1 + (T - 1) cos), (T, *shape) -> (*shape) (2403.19522).

    cos is the mean cosine between two experts' deltas (0 with a delta of 0), and at least 0: the
    paper's geometry has r in [0, 1]. One expert is returned as it is.
    """
    T = len(deltas)
    if T == 1:
        return deltas[0]
    cosines = cosines_of(task_gram(deltas))
    cos = ((cosines.sum() - cosines.trace()) / (T * (T - 1))).clamp_min(0)
    return deltas.mean(0) * (T * cos / (1 + (T - 1) * cos)).to(deltas)


def task_gram(deltas: Tensor) -> Tensor:
    """Inner products of T deltas, (T, *shape) -> (T, T), float64, in bounded memory."""
    sums = deltas.new_zeros(len(deltas), len(deltas), dtype=torch.float64)
    for chunk in deltas.reshape(len(deltas), -1).split(_CHUNK, dim=1):
        sums += linalg.gram(chunk.double().mT)
    return sums


def cosines_of(gram: Tensor) -> Tensor:
    """(T, T) inner products -> cosines; those with a delta of 0 are 0."""
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    return (scale[:, None] * gram * scale).clamp(-1, 1)


def combine(coefficients: Tensor, deltas: Tensor) -> Tensor:
    """sum_t c_t D_t, (T,) and (T, *shape) -> (*shape)."""
    return torch.einsum("t,t...->...", coefficients.to(deltas), deltas)

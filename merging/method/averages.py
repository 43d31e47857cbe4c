"""Baselines that treat a weight as a vector: means, Fisher weights, depth scaling, spheres.

All accept deltas of any shape (T, *shape), so they merge biases and norms as they do matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging import linalg
from merging.errors import InputError
from merging.method.registry import register

_CHUNK = 2**22  # entries per task that are held in float64 at a time


@register(
    "average", source="arXiv 2203.05482", rest="method",
    row_space=True, column_space=True, elementwise=True,
)  # fmt: skip
def average(deltas: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """mean_t D_t, (T, *shape) -> (*shape) (a uniform soup, arXiv 2203.05482).

    weights: (T,) what each expert counts for: sum_t w_t D_t / sum_t w_t.
    """
    return deltas.mean(0) if weights is None else _combine(weights / weights.sum(), deltas)


@register(
    "task_arithmetic", source="arXiv 2212.04089", rest="method", alpha=0.3,
    row_space=True, column_space=True, elementwise=True,
)  # fmt: skip
def task_arithmetic(deltas: Tensor) -> Tensor:
    """alpha sum_t D_t, (T, *shape) -> (*shape) (arXiv 2212.04089)."""
    return deltas.sum(0)


@register("lines", source="arXiv 2410.17146", rest="method", row_space=True, elementwise=True)
def lines(
    deltas: Tensor, *, depth: float = 0.0, start: float | None = None, beta: float = 0.5
) -> Tensor:
    """LiNeS: (start + beta depth) sum_t D_t, (T, *shape) -> (*shape) (arXiv 2410.17146).

    depth: l / (L - 1) of the tensor's block l of L; 0 for what lies before the blocks.
    start: scale of the first block, the paper's alpha; None is its choice 1 / T.
    beta: how much the scale grows to the last block; tuned on validation data in the paper.
    """
    scale = (1 / len(deltas) if start is None else start) + beta * depth
    return scale * deltas.sum(0)


@register(
    "fisher",
    source="arXiv 2111.09832",
    breaks=("outputs", "inputs"),
    needs="fisher",
    rest="method",
    elementwise=True,
)
def fisher(deltas: Tensor, *, fishers: Tensor) -> Tensor:
    """sum_t F_t D_t / sum_t F_t entry by entry, (T, *shape) -> (*shape) (arXiv 2111.09832).

    fishers: (T, *shape), diagonal Fisher of each expert, non-negative. An entry that no task
    cares about (all F_t = 0) takes the mean, the limit of equally small F_t.
    """
    if fishers.shape != deltas.shape:
        raise InputError(
            f"expected fishers of shape {tuple(deltas.shape)}, got {tuple(fishers.shape)}"
        )
    return _weighted_mean(deltas, fishers.to(deltas))


@register(
    "data_free_fisher",
    source="arXiv 2111.09832 with F_t = D_t^2",
    breaks=("outputs", "inputs"),
    rest="method",
    elementwise=True,
)
def data_free_fisher(deltas: Tensor) -> Tensor:
    """sum_t D_t^3 / sum_t D_t^2, (T, *shape) -> (*shape): the squared difference as the Fisher."""
    largest = deltas.abs().amax(0)
    # relative to the largest, since squares of small differences underflow
    return _weighted_mean(deltas, (deltas / torch.where(largest > 0, largest, 1)).square())


def _weighted_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    # relative weights: their products neither under- nor overflow, whatever the Fishers' scale
    largest = weights.amax(0)
    weights = torch.where(largest > 0, weights / largest, 1.0)
    return (weights * deltas).sum(0) / weights.sum(0)


@register("slerp", source="Shoemake 1985", rest="method", row_space=True)
def slerp(deltas: Tensor, *, t: float = 0.5) -> Tensor:
    """Spherical interpolation of two deltas, (2, *shape) -> (*shape) (Shoemake 1985).

    D = sin((1 - t) theta) / sin(theta) D_1 + sin(t theta) / sin(theta) D_2 with theta the angle
    between them; straight interpolation where they are parallel, opposite, or one is 0. The order
    of the experts matters unless t = 1/2: a merge of models takes them in the order of their
    names. One expert is returned as it is, more than two are an InputError: "karcher" is the mean
    on the sphere for any number.
    """
    if len(deltas) == 1:
        return deltas[0]
    if len(deltas) != 2:
        raise InputError(f"slerp merges 2 experts, got {len(deltas)}", "use method=karcher")
    gram = task_gram(deltas)
    theta = torch.acos(_cosines(gram)[0, 1])
    part = gram.new_tensor([1 - t, t])
    if theta.sin() > 1e-6 and gram.diagonal().all():
        part = torch.sin(part * theta) / theta.sin()
    return _combine(part, deltas)


@register("karcher", source="Karcher 1977", rest="method", row_space=True)
def karcher(deltas: Tensor, *, steps: int = 100) -> Tensor:
    """Mean direction on the sphere times the mean norm, (T, *shape) -> (*shape) (Karcher 1977).

    Gradient steps of length 1 from the normalised mean of the directions, at most `steps`, until
    the step is below 1e-12. A delta of 0 has no direction and counts for the norm alone; where
    the directions cancel the mean is not unique and the plain average is returned.
    """
    gram = task_gram(deltas)
    norms, cosines = gram.diagonal().sqrt(), _cosines(gram)
    moving = (norms > 0).to(norms)
    count = moving.sum().clamp_min(1)
    # the mean is sum_t c_t u_t over unit vectors u_t: only the T coefficients are iterated
    c = moving / count
    length = (c @ cosines @ c).clamp_min(0).sqrt()
    if length < 1e-9:
        return deltas.mean(0)
    c = c / length
    for _ in range(steps):
        angle_cosine = (cosines @ c).clamp(-1 + 1e-12, 1)
        theta = torch.acos(angle_cosine)
        pull = moving / count * torch.where(theta > 1e-9, theta / theta.sin(), 1.0)
        tangent = pull - (pull @ angle_cosine) * c
        step = (tangent @ cosines @ tangent).clamp_min(0).sqrt()
        if step < 1e-12:
            break
        c = step.cos() * c + step.sin() / step * tangent
        c = c / (c @ cosines @ c).sqrt()
    return _combine(norms.mean() * torch.where(norms > 0, c / norms, 0.0), deltas)


@register("model_stock", source="arXiv 2403.19522", rest="method", row_space=True)
def model_stock(deltas: Tensor) -> Tensor:
    """r mean_t D_t, r = T cos / (1 + (T - 1) cos), (T, *shape) -> (*shape) (2403.19522).

    cos is the mean cosine between two experts' deltas (0 with a delta of 0), and at least 0: the
    paper's geometry has r in [0, 1]. One expert is returned as it is.
    """
    T = len(deltas)
    if T == 1:
        return deltas[0]
    cosines = _cosines(task_gram(deltas))
    cos = ((cosines.sum() - cosines.trace()) / (T * (T - 1))).clamp_min(0)
    return deltas.mean(0) * (T * cos / (1 + (T - 1) * cos)).to(deltas)


def task_gram(deltas: Tensor) -> Tensor:
    """Inner products of T deltas, (T, *shape) -> (T, T), float64, in bounded memory."""
    chunks = deltas.reshape(len(deltas), -1).split(_CHUNK, dim=1)
    return sum(linalg.gram(chunk.double().mT) for chunk in chunks)


def _cosines(gram: Tensor) -> Tensor:
    """(T, T) inner products -> cosines; those with a delta of 0 are 0."""
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    return (scale[:, None] * gram * scale).clamp(-1, 1)


def _combine(coefficients: Tensor, deltas: Tensor) -> Tensor:
    """sum_t c_t D_t, (T,) and (T, *shape) -> (*shape)."""
    return torch.einsum("t,t...->...", coefficients.to(deltas), deltas)

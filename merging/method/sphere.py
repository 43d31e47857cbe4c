"""Interpolation and means on the sphere: a tensor is one direction and one length.

All accept deltas of any shape (T, *shape). Usual implementations (mergekit's) interpolate weights,
where all experts lie within a small angle and the result is hardly the average's; here it is the
differences, unless of="weights".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.method.averages import combine, cosines_of, task_gram
from merging.method.ranges import Count
from merging.method.registry import register

_STRAIGHT = 1e-6  # sine of an angle below which an arc is taken for a line


def _row_space(arguments: Mapping[str, Any]) -> bool:
    if arguments["of"] not in ("deltas", "weights"):
        raise InputError(f"unknown of {arguments['of']!r}", "known: deltas, weights")
    return arguments["of"] == "deltas" and arguments.get("by") != "column"


@register(
    "slerp", source="Shoemake 1985", rest="method", row_space=_row_space,
    formula="sin((1 - t) a) / sin(a) D_1 + sin(t a) / sin(a) D_2, a the angle between them",
)  # fmt: skip
def slerp(
    deltas: Tensor,
    *,
    t: float = 0.5,
    of: str = "deltas",
    by: str = "tensor",
    base: Tensor | None = None,
) -> Tensor:
    """Spherical interpolation of two deltas, (2, *shape) -> (*shape) (Shoemake 1985).

    D = sin((1 - t) theta) / sin(theta) D_1 + sin(t theta) / sin(theta) D_2 with theta the angle
    between them; straight interpolation where they are parallel, opposite, or one is 0. The order
    of the experts matters unless t = 1/2: a merge of models takes them in the order of their
    names. One expert is returned as it is, more than two are an InputError: "karcher" is the mean
    on the sphere for any number.
    of: "deltas" (mergekit's NuSLERP with a base) or "weights" (mergekit's SLERP, but for its
        straight line where the cosine is above .9995), W_0 + D_t with W_0 the `base` (*shape).
    by: one angle a "tensor", or one a "row" or "column" of a matrix (NuSLERP's variants).
    """
    if len(deltas) == 1:
        return deltas[0]
    if len(deltas) != 2:
        raise InputError(f"slerp merges 2 experts, got {len(deltas)}", "use method=karcher")
    points = _points(deltas, of, base)
    if by == "tensor" or deltas.ndim < 3:
        merged = combine(_arc(task_gram(points), t), points)
    elif by in ("row", "column"):
        rows = points.flatten(2) if by == "row" else points.flatten(2).mT  # (2, R, n)
        parts = [combine(_arc(task_gram(pair), t), pair) for pair in rows.transpose(0, 1)]
        joined = torch.stack(parts)
        merged = (joined if by == "row" else joined.mT).reshape(deltas.shape[1:])
    else:
        raise InputError(f"unknown by {by!r}", "known: tensor, row, column")
    return merged if base is None or of == "deltas" else (merged - base).to(deltas)


def _arc(gram: Tensor, t: float) -> Tensor:
    """(2, 2) inner products -> the two coefficients."""
    theta = torch.acos(cosines_of(gram)[0, 1])
    part = gram.new_tensor([1 - t, t])
    if theta.sin() > _STRAIGHT and gram.diagonal().all():
        part = torch.sin(part * theta) / theta.sin()
    return part


def _points(deltas: Tensor, of: str, base: Tensor | None) -> Tensor:
    """What is interpolated: the deltas, or the experts' weights in float64."""
    if of == "deltas":
        return deltas
    if base is None:
        raise InputError("of=weights needs the base's values, none were given")
    return base.double() + deltas.double()


@register(
    "karcher", source="Karcher 1977", rest="method", row_space=_row_space,
    formula="mean_t |D_t| times the point of the sphere nearest to all D_t / |D_t|",
)  # fmt: skip
def karcher(
    deltas: Tensor, *, steps: Count = 100, of: str = "deltas", base: Tensor | None = None
) -> Tensor:
    """Mean direction on the sphere times the mean norm, (T, *shape) -> (*shape) (Karcher 1977).

    Gradient steps of length 1 from the normalised mean of the directions, at most `steps`, until
    the step is below 1e-12. A delta of 0 has no direction and counts for the norm alone; where
    the directions cancel the mean is not unique and the plain average is returned.
    of: "deltas", or "weights" W_0 + D_t with W_0 the `base` (*shape), as mergekit has it.
    """
    points = _points(deltas, of, base)
    merged = _mean_on_sphere(points, steps)
    return merged if base is None or of == "deltas" else (merged - base).to(deltas)


def _mean_on_sphere(deltas: Tensor, steps: int) -> Tensor:
    """Of T points (T, *shape): their mean direction times their mean norm."""
    gram = task_gram(deltas)
    norms, cosines = gram.diagonal().sqrt(), cosines_of(gram)
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
    return combine(norms.mean() * torch.where(norms > 0, c / norms, 0.0), deltas)

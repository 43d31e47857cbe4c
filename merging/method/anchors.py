"""Anchors: what a solution of a family keeps in the directions that its filter leaves out."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from merging.method.registry import create

_LINEAR = {"zero", "sum"}  # they commute with any change of basis


def anchor_merge(name: str, deltas: Tensor, **layer: int | None) -> Tensor | None:
    """The anchor of deltas (T, d_out, d_in), (d_out, d_in): sum_t D_t for "sum", None for "zero",
    else the method of that name, told of the layer's own d_in and d_out."""
    if name == "zero":
        return None
    return deltas.sum(0) if name == "sum" else create(name)(deltas, **layer)


def anchor_commutes(name: str, flag: Literal["row_space", "column_space"]) -> bool:
    """Whether the anchor may run in a narrow basis of the deltas' rows, or columns."""
    return name in _LINEAR or bool(getattr(create(name), flag))

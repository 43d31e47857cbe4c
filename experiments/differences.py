"""Differences of experts from their base, block by block of each linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from eval import theory
from merging.factors import Factors
from merging.layers import Layer, cut


def blocks(
    base: Mapping[str, Tensor], experts: Mapping[str, Any], layers: Mapping[str, Layer]
) -> Iterator[tuple[str, str, Tensor]]:
    """(weight name, part name, differences (T, d_out, d_in)) of every block that is merged."""
    for name, layer in layers.items():
        stack = torch.stack([_difference(base[name], expert, name) for expert in experts.values()])
        for part, deltas in zip(theory.part_names(name, layer), cut(stack, layer), strict=True):
            yield name, part, deltas


def _difference(W0: Tensor, expert: Any, name: str) -> Tensor:
    if isinstance(expert, Mapping):
        return expert[name].float() - W0.float()
    if (factors := expert.factors(name)) is None:
        return torch.zeros_like(W0)
    dense = Factors(*factors).dense()
    return dense if dense.shape == W0.shape else dense.mT  # a layer that is stored transposed

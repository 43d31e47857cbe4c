"""Differences of experts from their base, block by block of each linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from eval import theory
from merging.experts import Expert, difference
from merging.layers import Layer, cut


def blocks(
    base: Mapping[str, Tensor], experts: Mapping[str, Expert], layers: Mapping[str, Layer]
) -> Iterator[tuple[str, str, Tensor]]:
    """(weight name, part name, differences (T, d_out, d_in)) of every block that is merged."""
    for name, layer in layers.items():
        stack = torch.stack([difference(base[name], expert, name) for expert in experts.values()])
        for part, deltas in zip(theory.part_names(name, layer), cut(stack, layer), strict=True):
            yield name, part, deltas

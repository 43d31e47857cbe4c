"""How a layer's matrix is laid out, and how it is cut into the matrices that are merged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """How one linear layer's matrix is laid out.

    parts: number of equal blocks of output rows that are merged separately (3 for packed q, k, v),
        or the number of rows of each.
    transposed: stored as (d_in, d_out), as Hugging Face's Conv1D does.
    groups: so many times the parts follow one another (one q, k, v for every head).
    kernel: the trailing dimensions of a convolution (out, in, *kernel), a matrix (out, in k k).
    experts: so many matrices lie in the leading dimension, each a layer of its own; 0: none does.
    """

    parts: int | tuple[int, ...] = 1
    transposed: bool = False
    groups: int = 1
    kernel: tuple[int, ...] = ()
    experts: int = 0

    @property
    def blocks(self) -> int:
        """How many matrices of one expert are merged separately."""
        return self.parts if isinstance(self.parts, int) else len(self.parts)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be cut in this way."""
        dimensions = 2 + bool(self.experts) + len(self.kernel)
        if len(shape) != dimensions or (self.experts and shape[0] != self.experts):
            return False
        matrix = shape[bool(self.experts) :]
        if self.kernel and tuple(matrix[2:]) != self.kernel:
            return False
        wide = torch.Size(self.kernel).numel() if self.kernel else 1
        rows = matrix[1] * wide if self.transposed else matrix[0]
        if isinstance(self.parts, int):
            return rows % (self.parts * self.groups) == 0
        return rows == sum(self.parts) * self.groups


def whole(layer: Layer) -> Layer:
    """The same layout with all its output rows merged as one matrix (split_qkv=False)."""
    return Layer(1, layer.transposed, kernel=layer.kernel, experts=layer.experts)


def cut(stack: Tensor, layer: Layer) -> list[Tensor]:
    """(..., *stored shape) -> the (..., rows, d_in) matrices to merge one by one.

    Their order is that of the experts, within each that of its parts.
    """
    if layer.kernel:
        stack = stack.flatten(-len(layer.kernel) - 1)
    rows = stack.mT if layer.transposed else stack  # (..., [experts,] d_out, d_in)
    experts = rows.unbind(-3) if layer.experts else [rows]
    return [block for expert in experts for block in _parts(expert, layer)]


def of_outputs(moments: Tensor, layer: Layer, i: int) -> Tensor:
    """The i-th block's own part of moments of a layer's outputs, (..., d_out, d_out)."""
    rows = replace(layer, transposed=False, kernel=())
    return cut(cut(moments, rows)[i].mT, rows)[i].mT


def _parts(rows: Tensor, layer: Layer) -> list[Tensor]:
    """(..., d_out, d_in) -> (..., d_out / parts, d_in) each."""
    grouped = rows.unflatten(-2, (layer.groups, -1)) if layer.groups > 1 else rows
    if isinstance(layer.parts, int):
        parts = grouped.chunk(layer.parts, -2)
    else:
        parts = grouped.split(layer.parts, -2)
    return [part.flatten(-3, -2) for part in parts] if layer.groups > 1 else list(parts)


def join(blocks: list[Tensor], layer: Layer) -> Tensor:
    """Undo `cut` on merged blocks (rows, d_in): a tensor of the stored shape."""
    if layer.experts:
        each, count = replace(layer, experts=0), layer.blocks
        joined = [join(blocks[i : i + count], each) for i in range(0, len(blocks), count)]
        return torch.stack(joined)
    if layer.groups > 1:
        grouped = [block.unflatten(0, (layer.groups, -1)) for block in blocks]
        merged = torch.cat(grouped, 1).flatten(0, 1)
    else:
        merged = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    merged = merged.mT if layer.transposed else merged
    return merged.unflatten(-1, (-1, *layer.kernel)) if layer.kernel else merged

"""MXFP4 (OCP Microscaling v1.0): 32 numbers of 4 bits share a power of two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from merging.errors import InputError
from merging.formats.slots import OpenFiles, Slot

# E2M1, by its four bits: sign, two of exponent, one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127  # of the shared exponent, E8M0


@dataclass(frozen=True)
class Experts:
    """Fused experts (E, d_in, d_out) of gpt-oss, stored (E, d_out, d_in / 32, 16 bytes)."""

    blocks: Slot
    scales: Slot
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        count, rows, groups, size = self.blocks.shape
        return count, groups * size * 2, rows

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.blocks.files, *self.scales.files)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes

    def rows(self, rows: slice) -> Experts:
        return replace(self, blocks=self.blocks.rows(rows), scales=self.scales.rows(rows))

    def load(self, files: OpenFiles) -> Tensor:
        codes, scales = self.blocks.load(files), self.scales.load(files)
        table = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
        pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)  # (E, d_out, groups, 32)
        values = torch.ldexp(table[pairs.int()], scales.int().unsqueeze(-1) - _BIAS)
        return values.flatten(-2).mT.contiguous()


def experts(name: str, blocks: Slot, scales: Slot, path: Path) -> Experts:
    """The weights of `name`_blocks and _scales; InputError where the two do not fit."""
    if (
        len(blocks.shape) != 4
        or blocks.shape[:-1] != scales.shape
        or blocks.shape[-1] != 16
        or {blocks.dtype, scales.dtype} != {torch.uint8}
    ):
        raise InputError(
            f"{path}: tensor {name!r} has shape {list(blocks.shape)} and its scales "
            f"{list(scales.shape)}, expected bytes (experts, d_out, d_in / 32, 16) in MXFP4"
        )
    return Experts(blocks, scales)

"""The formats that bitsandbytes saves: 4 bits (NF4, FP4) in blocks, and 8 bits a row.

Rules of bitsandbytes.functional (dequantize_4bit, QuantState.from_dict, int8_vectorwise_dequant).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.formats.slots import OpenFiles, Slot, shape_of

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class FourBit:
    """quant_map[code] * absmax of the code's block; the absmax may be quantised in turn."""

    codes: Slot  # bytes, the first of two codes in the high half
    absmax: Slot
    table: Slot
    shape: tuple[int, ...]
    block: int
    nested: tuple[Slot, Slot] | None  # absmax and table of the absmax
    nested_block: int
    offset: float
    dtype = torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        parts = (self.codes, self.absmax, self.table, *(self.nested or ()))
        return tuple(file for part in parts for file in part.files)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def rows(self, rows: slice) -> Rows:
        return Rows(self, *rows.indices(self.shape[0])[:2])

    def load(self, files: OpenFiles) -> Tensor:
        codes = self.codes.load(files).reshape(-1)
        codes = torch.stack([codes >> 4, codes & 15], 1).reshape(-1)
        count = torch.Size(self.shape).numel()
        values = self.table.load(files).float()[codes[:count].int()]
        scale = self._scales(files).repeat_interleave(self.block)[:count]
        return values.mul_(scale).reshape(self.shape)

    def _scales(self, files: OpenFiles) -> Tensor:
        absmax = self.absmax.load(files).reshape(-1)
        if self.nested is None:
            return absmax.float()
        outer, table = (part.load(files).float().reshape(-1) for part in self.nested)
        spread = outer.repeat_interleave(self.nested_block)[: len(absmax)]
        return table[absmax.int()] * spread + self.offset


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix whose blocks do not end with its rows: all is worked out, some is kept."""

    whole: FourBit
    start: int
    stop: int
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(self.stop - self.start, 0), *self.whole.shape[1:])

    @property
    def files(self) -> tuple[Path, ...]:
        return self.whole.files

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    def rows(self, rows: slice) -> Rows:
        start, stop, _ = rows.indices(self.shape[0])
        return Rows(self.whole, self.start + start, self.start + stop)

    def load(self, files: OpenFiles) -> Tensor:
        return self.whole.load(files)[self.start : self.stop].clone()


@dataclass(frozen=True)
class EightBit:
    """code * SCB of its row / 127."""

    codes: Slot  # (d_out, d_in)
    scale: Slot  # (d_out,)
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.codes.files, *self.scale.files)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def rows(self, rows: slice) -> EightBit:
        return EightBit(self.codes.rows(rows), self.scale.rows(rows))

    def load(self, files: OpenFiles) -> Tensor:
        scale = self.scale.load(files).float() / 127
        return self.codes.load(files).float().mul_(scale[:, None])


def four_bit(
    name: str, slots: Mapping[str, Slot], path: Path
) -> tuple[FourBit, tuple[str, ...]] | None:
    """A weight in 4 bits and the names of the tensors it is made of; None if `name` is no such."""
    states = [n for n in (f"{name}{_STATE}nf4", f"{name}{_STATE}fp4") if n in slots]
    if not states:
        return None
    parts = {part: slots.get(f"{name}.{part}") for part in _PARTS}
    state = _state(states[0], slots[states[0]], path)
    shape, block = shape_of(state.get("shape")), state.get("blocksize", 0)
    scales, levels = parts["nested_absmax"], parts["nested_quant_map"]
    nested = (scales, levels) if scales and levels else None
    inner, offset = state.get("nested_blocksize", 1), state.get("nested_offset", 0.0)
    sizes = all(type(n) is int and n > 0 for n in (block, inner))
    codes, absmax, table = slots[name], parts["absmax"], parts["quant_map"]
    count = torch.Size(shape or ()).numel()
    if (
        not (shape and sizes and absmax and table)
        or codes.dtype != torch.uint8
        or torch.Size(codes.shape).numel() != -(-count // 2)
        or torch.Size(absmax.shape).numel() != -(-count // block)
        or torch.Size(table.shape).numel() != 16
        or (absmax.dtype == torch.uint8) != bool(nested)
        or not isinstance(offset, float | int)
    ):
        raise InputError(
            f"{path}: tensor {name!r} is no weight that bitsandbytes saved in 4 bits: "
            "shape, block size, absmax and codes do not fit",
        )
    slot = FourBit(codes, absmax, table, shape, block, nested, inner, float(offset))
    used = [name, states[0], *(f"{name}.{part}" for part, stored in parts.items() if stored)]
    return slot, tuple(used)


def eight_bit(name: str, codes: Slot, scale: Slot, path: Path) -> EightBit:
    """A weight in 8 bits; InputError where it has not one scale a row."""
    if len(codes.shape) != 2 or scale.shape != codes.shape[:1]:
        raise InputError(
            f"{path}: tensor {name!r} has shape {list(codes.shape)} and SCB {list(scale.shape)}, "
            "expected one scale for each row"
        )
    return EightBit(codes, scale)


def _state(name: str, slot: Slot, path: Path) -> dict[str, Any]:
    """The JSON that bitsandbytes packs into a tensor of bytes."""
    file = os.open(slot.files[0], os.O_RDONLY)
    try:
        data = slot.load(lambda _: file)
        state = json.loads(data.to(torch.uint8).numpy().tobytes())
    except (ValueError, RecursionError):
        state = None
    finally:
        os.close(file)
    if not isinstance(state, dict):
        raise InputError(
            f"{path}: tensor {name!r} is no description of a quantised weight",
            hint="load the model with bitsandbytes, dequantise it and save it again",
        )
    return state

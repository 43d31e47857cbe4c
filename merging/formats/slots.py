"""Where tensors lie in files: headers are read, tensors are mapped only when asked for."""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
MAPPED_BYTES = 1 << 22  # below this, copying is faster than setting up pages
MAPPED_LIMIT = 256  # mappings alive at once: each holds a file descriptor
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor: `offset` in bytes from the file's start, `strides` in elements."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def rows(self, rows: slice | None) -> Slot:
        """The place of `rows` (step 1) of the first dimension."""
        if rows is None:
            return self
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows are read in steps of 1, not {step}")
        return Slot(
            self.path,
            self.dtype,
            (max(stop - start, 0), *self.shape[1:]),
            self.strides,
            self.offset + start * self.strides[0] * self.dtype.itemsize,
        )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements between the first and the last one, both included; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def load(self, file: int) -> Tensor:
        """The tensor from the open `file`, in memory of its own that goes when the tensor goes.

        A large one is a private mapping of its pages: nothing is copied, rows never touched are
        never read, and writing to the tensor does not reach the file. Small ones are copied.
        """
        size = self.span * self.dtype.itemsize
        skip = self.offset % mmap.ALLOCATIONGRANULARITY
        if size >= MAPPED_BYTES and skip % self.dtype.itemsize == 0 and len(_mapped) < MAPPED_LIMIT:
            start = self.offset - skip
            pages = mmap.mmap(file, skip + size, access=mmap.ACCESS_COPY, offset=start)
            _mapped.add(pages)
            flat = torch.frombuffer(pages, dtype=self.dtype, count=self.span, offset=skip)
        else:
            flat = torch.empty(self.span, dtype=self.dtype)
            rest = memoryview(flat.view(torch.uint8).numpy()) if size else b""
            while rest:
                count = os.preadv(file, [rest], self.offset + size - len(rest))
                if not count:
                    raise InputError(f"{self.path} ends before byte {self.offset + size}")
                rest = rest[count:]
        return flat.as_strided(self.shape, self.strides)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, as `torch.empty(shape).stride()`."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def integers(value: Any) -> tuple[int, ...] | None:
    """`value` as a short tuple of non-negative 62-bit integers, or None."""
    if not isinstance(value, list | tuple) or len(value) > 64:
        return None
    return tuple(value) if all(type(n) is int and 0 <= n < 2**62 for n in value) else None


def shape_of(value: Any) -> tuple[int, ...] | None:
    """`value` as a shape that torch can take, or None."""
    shape = integers(value)
    return shape if shape is not None and math.prod(max(n, 1) for n in shape) < 2**60 else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if path.stat().st_size > HEADER_LIMIT:
        raise InputError(f"{path} is larger than {HEADER_LIMIT} bytes, expected a small JSON file")
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object; a repeated key, of which parsers take one or the other, is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for text in (text for pair in pairs for text in pair if isinstance(text, str)):
            text.encode()  # a lone surrogate can be neither printed nor looked up
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return table

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def safetensors_slots(path: Path) -> dict[str, Slot]:
    """The tensors of a safetensors file in file order, from its header alone.

    The checks are those of the safetensors library (header length, known dtypes, offsets that
    cover the data without hole or overlap), told with the tensor's name. Raises InputError.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise InputError(
                f"{path} is no safetensors file or is truncated: "
                f"its header should have {length} bytes, the file has {size}"
            )
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    slots = {name: _slot(path, name, entry, start) for name, entry in header.items()}
    slots = dict(sorted(slots.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end, previous = start, "the header"
    for name, slot in slots.items():
        if slot.offset != end:
            kind = "overlaps" if slot.offset < end else "leaves a hole after"
            raise InputError(f"{path}: the data of tensor {name!r} {kind} {previous}")
        end, previous = end + slot.nbytes, repr(name)
        if end > size:
            raise InputError(
                f"{path} is truncated: tensor {name!r} ends at byte {end}, the file has {size}",
                hint="download or copy the file again",
            )
    if end != size:
        raise InputError(f"{path} has {size - end} bytes after its last tensor, expected none")
    return slots


def _slot(path: Path, name: str, entry: Any, start: int) -> Slot:
    """One entry of a safetensors header: {"dtype", "shape", "data_offsets"}."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{path}: tensor {name!r} should have a dtype, a shape and data_offsets in the header"
        )
    dtype = SAFETENSORS_DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise InputError(f"{path}: tensor {name!r} has the unsupported dtype {entry['dtype']!r}")
    shape, offsets = shape_of(entry["shape"]), integers(entry["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:
        raise InputError(f"{path}: tensor {name!r} has an impossible shape or impossible offsets")
    slot = Slot(path, dtype, shape, contiguous_strides(shape), start + offsets[0])
    if slot.nbytes != offsets[1] - offsets[0]:
        raise InputError(
            f"{path}: tensor {name!r} has {offsets[1] - offsets[0]} bytes, "
            f"its shape {list(shape)} and dtype {entry['dtype']} need {slot.nbytes}"
        )
    return slot

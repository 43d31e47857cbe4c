"""Where tensors lie in files: headers are read, tensors are mapped only when asked for.

A file format is a function from a path to slots by name. A `Slot` may be bytes of a file as they
are (`Strided`) or something that has to be worked out of one or more places when it is read.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from merging.errors import InputError

MAPPED_BYTES = 1 << 22  # below this, copying is faster than setting up pages
MAPPED_LIMIT = 256  # mappings alive at once: each holds a file descriptor
_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


OpenFiles = Callable[[Path], int]  # an open descriptor of a file


class Slot(Protocol):
    """One tensor that a checkpoint can give: equal slots are one tensor under several names."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is read from; the first is where it belongs."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes that reading it takes from its files."""
        ...

    def rows(self, rows: slice) -> Slot:
        """Those rows (step 1) of the first dimension."""
        ...

    def load(self, files: OpenFiles) -> Tensor:
        """The tensor, on the CPU, in memory of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Strided:
    """Numbers as they lie in a file: `offset` in bytes from its start, `strides` in elements."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def rows(self, rows: slice) -> Strided:
        """The place of `rows` (step 1) of the first dimension."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows are read in steps of 1, not {step}")
        return Strided(
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

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def load(self, files: OpenFiles) -> Tensor:
        """The tensor from its open file, in memory of its own that goes when the tensor goes.

        A large one is a private mapping of its pages: nothing is copied, rows never touched are
        never read, and writing to the tensor does not reach the file. Small ones are copied.
        """
        file, size = files(self.path), self.span * self.dtype.itemsize
        skip = self.offset % mmap.ALLOCATIONGRANULARITY
        if size >= MAPPED_BYTES and skip % self.dtype.itemsize == 0 and len(_mapped) < MAPPED_LIMIT:
            start = self.offset - skip
            pages = mmap.mmap(file, skip + size, access=mmap.ACCESS_COPY, offset=start)
            _mapped.add(pages)
            flat = torch.frombuffer(pages, dtype=self.dtype, count=self.span, offset=skip)
        else:
            flat = torch.empty(self.span, dtype=self.dtype)
            rest = bytes_of(flat)
            while rest:
                count = os.preadv(file, [rest], self.offset + size - len(rest))
                if not count:
                    raise InputError(f"{self.path} ends before byte {self.offset + size}")
                rest = rest[count:]
        return flat.as_strided(self.shape, self.strides)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, as `torch.empty(shape).stride()`."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, as they lie in memory."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def integers(value: Any) -> tuple[int, ...] | None:
    """`value` as a short tuple of non-negative 62-bit integers, or None."""
    if not isinstance(value, list | tuple) or len(value) > 64:
        return None
    return tuple(value) if all(type(n) is int and 0 <= n < 2**62 for n in value) else None


def shape_of(value: Any) -> tuple[int, ...] | None:
    """`value` as a shape that torch can take, or None."""
    shape = integers(value)
    return shape if shape is not None and math.prod(max(n, 1) for n in shape) < 2**60 else None

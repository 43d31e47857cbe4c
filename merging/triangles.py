"""Symmetric matrices stored as their upper triangle, half the size on disk.

Copied row by row: the index pairs of a triangle would take four times its own memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from merging.errors import InputError


def pack(matrix: Tensor) -> Tensor:
    """Upper triangle of a symmetric (d, d), row by row: (d (d + 1) / 2,)."""
    d = len(matrix)
    packed = matrix.new_empty(d * (d + 1) // 2)
    for i, start in enumerate(_starts(d)):
        packed[start : start + d - i] = matrix[i, i:]
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The symmetric (d, d) that `pack` took apart."""
    d = int((8 * len(packed) + 1) ** 0.5) // 2
    if d * (d + 1) // 2 != len(packed):
        raise InputError(f"{len(packed)} numbers are no upper triangle of a square matrix")
    matrix = packed.new_empty(d, d)
    for i, start in enumerate(_starts(d)):
        matrix[i, i:] = matrix[i:, i] = packed[start : start + d - i]
    return matrix


def _starts(d: int) -> Iterator[int]:
    """Where each row of a packed triangle begins."""
    start = 0
    for i in range(d):
        yield start
        start += d - i

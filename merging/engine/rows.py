"""Blocks of rows: how a tensor is cut where each entry is merged by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def row_blocks(shape: Sequence[int], row_bytes: int, limit: int) -> Iterator[slice | None]:
    """Blocks of rows of about `limit` bytes; None for all where one block is enough."""
    step = max(1, limit // max(1, row_bytes))
    if not shape or shape[0] <= step:
        yield None
        return
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))

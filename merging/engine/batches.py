"""Layers of one shape that a GPU merges in one call: small matrices alone do not fill it.

What goes together is settled before devices share the work, so that it does not depend on their
number: results of a batch may depend on what else is in it, in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merging.engine.job import Job
from merging.engine.plan import Item, Piece, Work, pieces
from merging.engine.routes import DENSE

BATCH_BYTES = 1 << 30  # of the differences in a batch; a merge takes some six times as much
_PART = 16  # of the free memory that a batch may have at most, two of which are on the device


def limit(devices: Sequence[str]) -> int:
    """Bytes of the differences that are merged at once: 0 on a CPU, where nothing is gained.

    A power of two, so that what else is on a device seldom decides it.
    """
    if not all(torch.device(device).type == "cuda" for device in devices):
        return 0
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    return min(BATCH_BYTES, 1 << max(0, (free // _PART).bit_length() - 1))


def together(job: Job, items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Items that are merged in batches, and each other one by itself; in order of the first."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        kind: object = item.name
        if _size(job, item, limit) > 1 and not (item.layer and item.layer.experts):
            dtypes = job.base.dtype(item.name), job.output_dtype(item.name)
            kind = (id(item.method), item.shape, item.layer, dtypes, job.adapted(item.name))
        groups.setdefault(kind, []).append(item)
    return [part for group in groups.values() for part in _cut(group, _size(job, group[0], limit))]


def batches(job: Job, items: Sequence[Item], limit: int) -> Iterator[list[Piece]]:
    """The pieces of items that go together, so many at a time as are merged at once."""
    todo = [piece for item in items for piece in pieces(job, item)]
    yield from _cut(todo, _size(job, items[0], limit))


def _size(job: Job, item: Item, limit: int) -> int:
    """How many pieces like an item's are merged at once."""
    if item.route is not DENSE or not item.layer or not item.merger.batched or item.merger.needs:
        return 1
    experts = item.layer.experts or 1
    return max(1, limit // (4 * len(job.experts) * max(1, item.numel // experts)))


def _cut(sequence: Sequence[Work], size: int) -> list[list[Work]]:
    return [list(sequence[i : i + size]) for i in range(0, len(sequence), size)]

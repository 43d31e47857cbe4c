"""Passes over the whole model before the merge itself, for methods that need one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from merging.engine.job import Job
from merging.engine.plan import Item, Piece, pieces
from merging.engine.routes import (
    ENTRIES,
    FACTORS,
    TO_FACTORS,
    Loaded,
    check_deltas,
    differences,
    entry_block,
    entry_rows,
    read_deltas,
    read_factors,
    upright,
)
from merging.experts import lift
from merging.factors import narrowed
from merging.layers import cut
from merging.progress import track

Contexts = Mapping[int, Mapping[str, Any]]  # of each method, by its id
Question = TypeVar("Question")
Answer = TypeVar("Answer")
_SAMPLE = 256  # one row in so many is a sample
_SMALL = 1 << 22  # entries that a sample has at most; a model of fewer is kept, not read again
_FEW = 1 << 17  # entries that a sample has at least
_PLACES = 16  # of a tensor that a sample is taken from


def contexts(job: Job, items: Sequence[Item]) -> Contexts:
    """What each method gathers in a pass of its own over all that it will merge."""
    methods = {id(item.method): item.merger for item in items if item.rule == "method"}
    return {
        key: method.prepare(Passes(job, [item for item in items if item.method is method]))
        for key, method in methods.items()
    }


@dataclass(frozen=True)
class Passes:
    """The `Stream` of what one method merges: tensor by tensor, or in blocks of rows where it looks
    at single entries. What is small is kept and not read again."""

    job: Job
    items: Sequence[Item]

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._kept) if self.small else self._pass()

    @property
    def numel(self) -> int:
        return sum(item.numel for item in self.items)

    @property
    def small(self) -> bool:
        return self.numel <= _SMALL

    @cached_property
    def _kept(self) -> list[tuple[str, Tensor]]:
        return [(name, deltas.clone()) for name, deltas in self._pass()]

    @property
    def few(self) -> Callable[[], Iterator[tuple[str, Tensor]]] | None:
        """A pass through some rows of each tensor; None where a method looks at whole ones."""
        if self.small:
            return self
        return self._sample if all(item.route is ENTRIES for item in self.items) else None

    def _pass(self) -> Iterator[tuple[str, Tensor]]:
        todo = [
            piece
            for item in self.items
            for piece in (pieces(self.job, item) if item.route is ENTRIES else [Piece(item, None)])
        ]
        for (item, _), loaded in track(ahead(self._load, todo), "first pass", len(todo)):
            if item.route is not ENTRIES:
                yield from ((item.name, deltas) for deltas in _blocks(self.job, item))
                continue
            yield from _entries(self.job, item, loaded)

    def _load(self, piece: Piece) -> tuple[Piece, Any]:
        return piece, piece.item.route is ENTRIES and ENTRIES.load(self.job, piece)

    def _sample(self) -> Iterator[tuple[str, Tensor]]:
        share = _share(self.numel)
        for item in self.items:
            for rows in sample_rows(item.shape, share):
                W0 = self.job.base.read(item.name, rows)
                yield item.name, read_deltas(W0, self.job.experts, item.name, rows)


def of_tensor(job: Job, piece: Piece, loaded: Loaded) -> dict[str, Any]:
    """What a tensor's method gathers in a pass over it alone, whose first piece was read."""
    item = piece.item
    if item.route is not ENTRIES or not item.merger.one_tensor:
        return {}
    return item.merger.prepare_tensor(_OneTensor(job, item, None if piece.rows else loaded))


@dataclass(frozen=True)
class _OneTensor:
    """The `Stream` of one tensor, in blocks of rows."""

    job: Job
    item: Item
    whole: Loaded | None  # what was read of it, if that is all

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        job, item = self.job, self.item
        windows = ahead(lambda piece: item.route.load(job, piece), list(pieces(job, item)))
        for loaded in [self.whole] if self.whole else windows:
            yield from _entries(job, item, loaded)

    @property
    def numel(self) -> int:
        return self.item.numel

    def few(self) -> Iterator[tuple[str, Tensor]]:
        """A pass through some rows."""
        job, item = self.job, self.item
        for rows in sample_rows(item.shape, _share(item.numel)):
            if self.whole is None:
                W0 = job.base.read(item.name, rows)
                yield item.name, read_deltas(W0, job.experts, item.name, rows)
            else:
                W0 = lift(self.whole.W0 if rows is None else self.whole.W0[rows])
                stack = W0.new_empty(len(job.experts), *W0.shape)
                yield item.name, differences(W0, self.whole.experts, rows, stack)


def _entries(job: Job, item: Item, loaded: Loaded) -> Iterator[tuple[str, Tensor]]:
    """The differences in what was read, in blocks of rows."""
    for rows in entry_rows(*loaded):
        _, deltas = entry_block(*loaded, rows)
        check_deltas(deltas, item.name, job.experts)
        yield item.name, deltas


def _share(numel: int) -> float:
    """How much of so many entries is a sample."""
    return min(1.0, max(1 / _SAMPLE, _FEW / max(1, numel)), _SMALL / max(1, numel))


def _blocks(job: Job, item: Item) -> Iterator[Tensor]:
    """A tensor's differences (T, ...), block by block.

    Of what has thresholds bit by bit as its method will see them: those are some of their values.
    """
    inside = item.merger.space != "full"
    if item.route is TO_FACTORS or (inside and item.route is FACTORS):
        factors, layer = read_factors(job.experts, item.name), upright(item.layer)
        if inside and item.merger.row_space:
            yield from (block.deltas for block in narrowed(factors, item.merger, layer))
        else:
            yield from cut(torch.stack([f.dense() for f in factors]), layer)
        return
    deltas = read_deltas(job.base.read(item.name), job.experts, item.name)
    yield from cut(deltas, item.layer) if item.layer else [deltas]


def sample_rows(shape: Sequence[int], share: float) -> Iterator[slice | None]:
    """That share of a tensor's rows, one at least, in a few runs; None: all of a single number."""
    if not shape:
        yield None
        return
    rows = min(shape[0], max(1, round(shape[0] * share)))
    runs = min(rows, _PLACES)
    for i in range(runs):
        start = (2 * i + 1) * (shape[0] - rows // runs) // (2 * runs)
        yield slice(start, start + rows // runs)


def ahead(load: Callable[[Question], Answer], items: Sequence[Question]) -> Iterator[Answer]:
    """load(item) for each item, the next one loading while the current one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(load, item) for item in items[:1]]
        for following in itertools.chain(items[1:], [None] if items else []):
            result = waiting.pop().result()
            if following is not None:
                waiting.append(pool.submit(load, following))
            yield result
            del result

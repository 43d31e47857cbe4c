"""The ways on which a tensor is merged: kept, entry by entry, in the rank of adapters, or dense.

Each reads a piece of a tensor from the base and all experts (`load`, in a thread of its own, ahead)
and merges it (`merge`). Which way a tensor takes is planned before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from merging.engine.rows import row_blocks
from merging.errors import InputError
from merging.experts import Expert, Values, lift
from merging.factors import Factors, factorise, merge_factors
from merging.formats.checks import check_finite
from merging.layers import Layer, cut, join, of_outputs

if TYPE_CHECKING:
    from merging.engine.job import Job
    from merging.engine.plan import Piece

# What looks at single entries is computed on blocks of rows that stay in a CPU's last-level cache.
BLOCK_BYTES = 1 << 23
_SAMPLE = 32  # rows


class Loaded(NamedTuple):
    """A piece of a tensor as it was read."""

    W0: Tensor  # the base's values; of no entries where they are not needed
    experts: Any  # as the route merges them


class Route(Protocol):
    """A way of merging."""

    windows: bool  # it may be merged some rows at a time

    def load(self, job: Job, piece: Piece) -> Loaded:
        """Read it."""
        ...

    def merge(
        self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any], device: str
    ) -> Tensor | Factors:
        """The merged piece on the CPU in the base's dtype; or the difference as factors."""
        ...

    def sample(self, loaded: Loaded) -> Tensor | None:
        """(T, rows, ...) some of the differences, where they lie open."""
        ...


class Kept:
    """The base's values."""

    windows = True

    def load(self, job: Job, piece: Piece) -> Loaded:
        W0 = job.base.read(piece.item.name, piece.rows)
        return Loaded(W0.to(job.output_dtype(piece.item.name)), None)

    def merge(
        self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any], device: str
    ) -> Tensor:
        return loaded.W0

    def sample(self, loaded: Loaded) -> None:
        return None


class Entries:
    """Entry by entry: bound by memory, and so on the CPU whatever the device."""

    windows = True

    def load(self, job: Job, piece: Piece) -> Loaded:
        W0 = job.base.read(piece.item.name, piece.rows)
        return Loaded(W0, read_values(job.experts, piece.item.name, piece.rows, W0))

    def merge(
        self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any], device: str
    ) -> Tensor:
        item = piece.item
        statistics = job.context(item.name, item.merger, piece.rows)
        merged = torch.empty_like(loaded.W0, dtype=job.output_dtype(item.name))
        for rows, base, deltas in entry_blocks(*loaded):
            if not item.merger.row_space:  # what is linear shows it in its result
                check_deltas(deltas, item.name, job.experts)
            arguments = {k: v if rows is None else v[:, rows] for k, v in statistics.items()}
            arguments |= {"base": base} if "base" in item.merger.context else {}
            moved = item.merger(deltas, **arguments, **context)
            part = merged if rows is None else merged[rows]
            add(base, moved, item.name, merged.dtype, out=part)
        return merged

    def sample(self, loaded: Loaded) -> Tensor:
        W0 = lift(loaded.W0[:_SAMPLE])
        stack = W0.new_empty(len(loaded.experts), *W0.shape)
        return differences(W0, loaded.experts, slice(_SAMPLE), stack)


class Dense:
    """The whole matrix of all experts' differences, on the device."""

    windows = False

    def load(self, job: Job, piece: Piece) -> Loaded:
        W0 = job.base.read(piece.item.name, piece.rows)
        return Loaded(W0, read_deltas(W0, job.experts, piece.item.name, piece.rows))

    def merge(
        self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any], device: str
    ) -> Tensor:
        W0, item = loaded.W0, piece.item
        deltas, dtype = loaded.experts.to(device), job.output_dtype(item.name)
        statistics = on(job.context(item.name, item.merger, piece.rows), device)
        statistics |= {"base": lift(W0).to(device)} if "base" in item.merger.context else {}
        if item.layer is None:
            return add(W0, item.merger(deltas, **statistics, **context).cpu(), item.name, dtype)
        layer, merged = item.layer, []
        if piece.rows is not None:  # some of its experts
            layer = replace(layer, experts=len(W0))
        for block, arguments in blocks(deltas, layer, statistics):
            merged.append(item.merger(block, **arguments, **context))
        return add(W0, join(merged, layer).cpu(), item.name, dtype)

    def sample(self, loaded: Loaded) -> Tensor:
        deltas: Tensor = loaded.experts
        return deltas[:, :_SAMPLE]


class InFactors:
    """Adapters in their own rank, by a method that commutes with a basis of their rows."""

    windows = False

    def load(self, job: Job, piece: Piece) -> Loaded:
        W0 = job.base.read(piece.item.name)
        check_finite(W0, piece.item.name, job.base.path)
        return Loaded(W0, read_factors(job.experts, piece.item.name))

    def merge(
        self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any], device: str
    ) -> Tensor:
        item, factors = piece.item, [f.to(device) for f in loaded.experts]
        merged = merge_factors(factors, item.merger, upright(item.layer), **context).dense()
        merged = merged.mT if item.layer and item.layer.transposed else merged
        merged = merged.reshape(loaded.W0.shape).cpu()
        return add(loaded.W0, merged, item.name, job.output_dtype(item.name))

    def sample(self, loaded: Loaded) -> None:
        return None


class ToFactors:
    """Adapters merged into one: the difference as factors of at most the sum of the ranks."""

    windows = False

    def load(self, job: Job, piece: Piece) -> Loaded:
        return Loaded(torch.empty(0), read_factors(job.experts, piece.item.name))

    def merge(
        self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any], device: str
    ) -> Factors:
        item, factors = piece.item, [f.to(device) for f in loaded.experts]
        layer = upright(item.layer)
        if item.merger.row_space:
            return merge_factors(factors, item.merger, layer, **context).to("cpu")
        deltas = torch.stack([f.dense() for f in factors])
        statistics, merged = on(job.context(item.name, item.merger), device), []
        for block, arguments in blocks(deltas, layer, statistics):
            merged.append(item.merger(block, **arguments, **context))
        rank = sum(len(f.A) for f in factors)
        factored = factorise(join(merged, layer), rank)
        if factored is None:
            raise InputError(
                f"method {item.merger.name!r} makes a difference of {item.name!r} that no adapter "
                f"of rank {rank} holds",
                hint="use form=dense",
            )
        return factored.to("cpu")

    def sample(self, loaded: Loaded) -> None:
        return None


KEPT, ENTRIES, DENSE, FACTORS, TO_FACTORS = Kept(), Entries(), Dense(), InFactors(), ToFactors()


# --- tensors in -----------------------------------------------------------------------------------


def read_values(
    experts: Mapping[str, Expert], name: str, rows: slice | None, W0: Tensor
) -> list[Values | None]:
    """What each expert says of the base's `rows` W0; None: all."""
    start = rows.start if rows else 0
    wanted = slice(start, start + len(W0)) if W0.ndim else None
    return [expert.values(name, wanted) for expert in experts.values()]


def differences(
    W0: Tensor, experts: Sequence[Values | None], rows: slice | None, out: Tensor
) -> Tensor:
    """Write the experts' differences to W0 in `rows` of what was read of them to `out` (T, ...)."""
    for delta, values in zip(out, experts, strict=True):
        if values is None:
            delta.zero_()
            continue
        tensor = values.tensor if rows is None or not W0.ndim else values.tensor[rows]
        values._replace(tensor=tensor).difference(W0, out=delta)
    return out


def entry_blocks(
    W0: Tensor, values: Sequence[Values | None]
) -> Iterator[tuple[slice | None, Tensor, Tensor]]:
    """Rows (None: all), the base's values there and the experts' differences (T, ...), in turn.

    The differences lie in one buffer: they hold until the next are asked for.
    """
    row, stack = 4 * W0.shape[1:].numel() * (len(values) + 2), None
    for rows in row_blocks(W0.shape, row, BLOCK_BYTES):
        base = lift(W0 if rows is None else W0[rows])
        if stack is None or stack.shape[1:] != base.shape:
            stack = base.new_empty(len(values), *base.shape)
        yield rows, base, differences(base, values, rows, stack)


def read_deltas(
    W0: Tensor, experts: Mapping[str, Expert], name: str, rows: slice | None = None
) -> Tensor:
    """(T, *shape) differences to W0, the base's `rows` (None: all); an expert that lacks rows or a
    tensor has 0 there."""
    if any(expert.partial for expert in experts.values()):
        check_finite(W0, name, "the base")  # a difference to a dense expert shows it by itself
    stack = lift(W0).new_empty(len(experts), *W0.shape)
    differences(lift(W0), read_values(experts, name, rows, W0), None, stack)
    check_deltas(stack, name, experts)
    return stack


def read_factors(experts: Mapping[str, Expert], name: str) -> list[Factors]:
    """Each adapter's factors of a tensor, of rank 0 where it leaves the tensor alone."""
    moved = {t: e.factors(name) for t, e in experts.items() if e.rank(name)}
    for task, factors in moved.items():
        for factor in factors[:2]:
            check_finite(factor, name, f"expert {task!r} ({experts[task].path})")
    A, B, _ = next(iter(moved.values()))
    still = Factors(A[:0], B[:, :0], 1.0)
    return [moved.get(task, still) for task in experts]


def upright(layer: Layer | None) -> Layer:
    """How the rows of a layer's factors are cut: their product is (d_out, d_in) in any case."""
    return replace(layer or Layer(), transposed=False, kernel=())


def check_deltas(deltas: Tensor, name: str, experts: Mapping[str, Expert]) -> None:
    """NotFinite, naming the expert, if a difference has a value that is not finite."""
    for delta, (task, expert) in zip(deltas, experts.items(), strict=True):
        check_finite(delta, name, f"expert {task!r} ({expert.path}) or the base")


# --- tensors out ----------------------------------------------------------------------------------


def blocks(
    deltas: Tensor, layer: Layer, statistics: Mapping[str, Tensor]
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The blocks of a layer that are merged one by one (T, d_out / parts, d_in), each with its
    statistics."""
    return [
        (block, {kind: _of_block(kind, stack, layer, i) for kind, stack in statistics.items()})
        for i, block in enumerate(cut(deltas, layer))
    ]


def _of_block(kind: str, stack: Tensor, layer: Layer, i: int) -> Tensor:
    """The statistics of the i-th of a layer's blocks: inputs are those of its expert's layer."""
    if kind == "fishers":
        return cut(stack, layer)[i]
    if kind == "base":
        return cut(stack[None], layer)[i][0]
    if kind == "gradients":  # (T, d_out, d_out): the block's own outputs on either side
        return of_outputs(stack, layer, i)
    return stack[:, i // layer.blocks] if layer.experts else stack  # (T, [E,] d_in, d_in)


def add(
    W0: Tensor, delta: Tensor, name: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """W0 + delta, rounded once."""
    merged = torch.empty_like(W0, dtype=dtype) if out is None else out
    torch.add(lift(W0), delta, out=merged)
    hint = f"the method diverged, or its result leaves {merged.dtype}'s range"
    check_finite(merged, name, "the merge", hint)
    return merged


def on(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """The tensors on a device."""
    return {k: v.to(device) for k, v in tensors.items()}

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
from merging.engine.transfers import Send, stay
from merging.errors import InputError
from merging.experts import Expert, Values, lift
from merging.factors import Factors, factorise, merge_factors
from merging.formats.checks import check_finite
from merging.layers import Layer, cut, join, of_outputs
from merging.method.registry import Method
from merging.threads import each

if TYPE_CHECKING:
    from merging.engine.job import Job
    from merging.engine.plan import Piece

# What looks at single entries is computed on blocks of rows that stay in a CPU's last-level cache.
BLOCK_BYTES = 1 << 22
_SAMPLE = 32  # rows


class Loaded(NamedTuple):
    """A piece of a tensor as it was read."""

    W0: Tensor  # the base's values; of no entries where they are not needed
    experts: Any  # as the route merges them


class Deltas(NamedTuple):
    """What the experts moved, and what of the statistics the method needs, on the device."""

    stack: Tensor  # (T, *shape)
    statistics: dict[str, Tensor]


class Route(Protocol):
    """A way of merging."""

    windows: bool  # it may be merged some rows at a time

    def load(self, job: Job, piece: Piece, send: Send = stay) -> Loaded:
        """Read it and send it to the device, where the route merges on one."""
        ...

    def merge(
        self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any]
    ) -> Tensor | Factors:
        """The merged piece where it was sent, in the base's dtype; or the difference as factors."""
        ...

    def sample(self, loaded: Loaded) -> Tensor | None:
        """(T, rows, ...) some of the differences, where they lie open."""
        ...


class Kept:
    """The base's values."""

    windows = True

    def load(self, job: Job, piece: Piece, send: Send = stay) -> Loaded:
        W0 = job.base.read(piece.item.name, piece.rows)
        return Loaded(W0.to(job.output_dtype(piece.item.name)), None)

    def merge(self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any]) -> Tensor:
        return loaded.W0

    def sample(self, loaded: Loaded) -> None:
        return None


class Entries:
    """Entry by entry: bound by memory, and so on the CPU whatever the device."""

    windows = True

    def load(self, job: Job, piece: Piece, send: Send = stay) -> Loaded:
        W0 = job.base.read(piece.item.name, piece.rows)
        return Loaded(W0, read_values(job.experts, piece.item.name, piece.rows, W0))

    def merge(self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any]) -> Tensor:
        item = piece.item
        statistics = job.context(item.name, item.merger, piece.rows)
        merged = torch.empty_like(loaded.W0, dtype=job.output_dtype(item.name))

        def merge_block(rows: slice | None) -> None:
            base, deltas = entry_block(*loaded, rows)
            if not item.merger.row_space:  # what is linear shows it in its result
                check_deltas(deltas, item.name, job.experts)
            arguments = {k: v if rows is None else v[:, rows] for k, v in statistics.items()}
            arguments |= {"base": base} if "base" in item.merger.context else {}
            moved = item.merger(deltas, **arguments, **context)
            part = merged if rows is None else merged[rows]
            add(base, moved, item.name, merged.dtype, out=part)

        in_order = "draws" in context  # which threads of their own make
        for _ in (map if in_order else each)(merge_block, entry_rows(*loaded)):
            pass
        return merged

    def sample(self, loaded: Loaded) -> Tensor:
        W0 = lift(loaded.W0[:_SAMPLE])
        stack = W0.new_empty(len(loaded.experts), *W0.shape)
        return differences(W0, loaded.experts, slice(_SAMPLE), stack)


class Dense:
    """The whole matrix of all experts' differences, on the device."""

    windows = False

    def load(self, job: Job, piece: Piece, send: Send = stay) -> Loaded:
        item, rows = piece
        W0 = send(job.base.read(item.name, rows))
        stack = read_deltas(W0, job.experts, item.name, rows, send)
        statistics = job.context(item.name, item.merger, rows)
        return Loaded(W0, Deltas(stack, {kind: send(t) for kind, t in statistics.items()}))

    def merge(self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any]) -> Tensor:
        item, (deltas, statistics) = piece.item, loaded.experts
        statistics = statistics | _base(item.merger, loaded.W0)
        if item.layer is None:
            merged = item.merger(deltas, **statistics, **context)
        else:
            layer, parts = _layer(piece, loaded), []
            for block, arguments in blocks(deltas, layer, statistics):
                parts.append(item.merger(block, **arguments, **context))
            merged = join(parts, layer)
        return add(loaded.W0, merged, item.name, job.output_dtype(item.name))

    def together(
        self, job: Job, pieces: Sequence[Piece], loads: Sequence[Loaded], context: Mapping[str, Any]
    ) -> list[Tensor]:
        """Pieces of one shape, layout and method, without statistics, in one call of the method."""
        layers = [_layer(*each) for each in zip(pieces, loads, strict=True)]
        cuts = [cut(x.experts.stack, layer) for x, layer in zip(loads, layers, strict=True)]
        merged = iter(_many(pieces[0].item.merger, [b for own in cuts for b in own], context))
        results = []
        for (item, _), loaded, layer, own in zip(pieces, loads, layers, cuts, strict=True):
            delta = join([next(merged) for _ in own], layer)
            results.append(add(loaded.W0, delta, item.name, job.output_dtype(item.name)))
        return results

    def sample(self, loaded: Loaded) -> Tensor:
        deltas: Tensor = loaded.experts.stack
        return deltas[:, :_SAMPLE]


def _many(method: Method, blocks: Sequence[Tensor], context: Mapping[str, Any]) -> Iterator[Tensor]:
    """Merged blocks (T, rows, d_in), those of one shape in one call."""
    merged: dict[int, Tensor] = {}
    for shape in dict.fromkeys(block.shape for block in blocks):
        places = [i for i, block in enumerate(blocks) if block.shape == shape]
        stack = torch.stack([blocks[i] for i in places])  # (B, T, rows, d_in)
        merged |= zip(places, method.many(stack, **context), strict=True)
    return (merged[i] for i in range(len(blocks)))


def _base(method: Method, W0: Tensor) -> dict[str, Tensor]:
    """The base's own values, for methods that ask for them."""
    return {"base": lift(W0)} if "base" in method.context else {}


def _layer(piece: Piece, loaded: Loaded) -> Layer:
    """How a piece is laid out: it may be some of a layer's fused experts."""
    layer = piece.item.layer or Layer()
    return layer if piece.rows is None else replace(layer, experts=len(loaded.W0))


class InFactors:
    """Adapters in their own rank, by a method that commutes with a basis of their rows."""

    windows = False

    def load(self, job: Job, piece: Piece, send: Send = stay) -> Loaded:
        W0 = send(job.base.read(piece.item.name))
        check_finite(W0, piece.item.name, job.base.path)
        return Loaded(W0, read_factors(job.experts, piece.item.name, send))

    def merge(self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any]) -> Tensor:
        item, factors = piece.item, loaded.experts
        merged = merge_factors(factors, item.merger, upright(item.layer), **context).dense()
        merged = merged.mT if item.layer and item.layer.transposed else merged
        merged = merged.reshape(loaded.W0.shape)
        return add(loaded.W0, merged, item.name, job.output_dtype(item.name))

    def sample(self, loaded: Loaded) -> None:
        return None


class ToFactors:
    """Adapters merged into one: the difference as factors of at most the sum of the ranks."""

    windows = False

    def load(self, job: Job, piece: Piece, send: Send = stay) -> Loaded:
        return Loaded(torch.empty(0), read_factors(job.experts, piece.item.name, send))

    def merge(self, job: Job, piece: Piece, loaded: Loaded, context: Mapping[str, Any]) -> Factors:
        item, factors = piece.item, loaded.experts
        layer = upright(item.layer)
        if item.merger.row_space:
            return merge_factors(factors, item.merger, layer, **context)
        deltas = torch.stack([f.dense() for f in factors])
        statistics = job.context(item.name, item.merger)
        statistics = {kind: stack.to(deltas.device) for kind, stack in statistics.items()}
        merged = []
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
        return factored

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


def entry_rows(W0: Tensor, values: Sequence[Values | None]) -> Iterator[slice | None]:
    """Blocks of rows that are computed on at a time (None: all)."""
    row = 4 * W0.shape[1:].numel() * (len(values) + 2)
    return row_blocks(W0.shape, row, BLOCK_BYTES)


def entry_block(
    W0: Tensor, values: Sequence[Values | None], rows: slice | None
) -> tuple[Tensor, Tensor]:
    """The base's values in some rows and the experts' differences (T, ...) there."""
    base = lift(W0 if rows is None else W0[rows])
    return base, differences(base, values, rows, base.new_empty(len(values), *base.shape))


def read_deltas(
    W0: Tensor,
    experts: Mapping[str, Expert],
    name: str,
    rows: slice | None = None,
    send: Send = stay,
) -> Tensor:
    """(T, *shape) differences to W0, the base's `rows` (None: all); an expert that lacks rows or a
    tensor has 0 there.

    send: what brings values to where W0 lies: as they are stored, which takes half of what their
        differences in float32 would.
    """
    if any(expert.partial for expert in experts.values()):
        check_finite(W0, name, "the base")  # a difference to a dense expert shows it by itself
    stack = lift(W0).new_empty(len(experts), *W0.shape)
    values = [
        said and said._replace(tensor=send(said.tensor))
        for said in read_values(experts, name, rows, W0)
    ]
    differences(lift(W0), values, None, stack)
    check_deltas(stack, name, experts)
    return stack


def read_factors(experts: Mapping[str, Expert], name: str, send: Send = stay) -> list[Factors]:
    """Each adapter's factors of a tensor, of rank 0 where it leaves the tensor alone.

    send: what brings them to the device.
    """
    moved = {t: e.factors(name) for t, e in experts.items() if e.rank(name)}
    for task, factors in moved.items():
        for factor in factors[:2]:
            check_finite(factor, name, f"expert {task!r} ({experts[task].path})")
    moved = {t: Factors(send(f.A), send(f.B), f.scale) for t, f in moved.items()}
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

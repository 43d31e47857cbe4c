"""Streams a merge tensor by tensor: read, apply the method, write. Knows files, no formula."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import psutil
import torch
from torch import Tensor

from merging.errors import InputError
from merging.factors import Factors, factorise, merge_factors
from merging.formats.checkpoints import Adapter, Checkpoint, Source, StateDict, open_checkpoint
from merging.formats.checks import NotFinite, check_finite, not_finite, problems
from merging.formats.peft import joint_settings
from merging.formats.writer import Writer, write_adapter
from merging.layers import Layer, Layers, choose_layers, cut, join, whole
from merging.method.registry import Method, create
from merging.progress import track
from merging.triangles import unpack

# Rules that look at single entries read windows of rows of about this size from all files together,
# which bounds the memory of merging a 100,000-row embedding, and compute on blocks of them that
# stay in a CPU's last-level cache.
WINDOW_BYTES = 1 << 27
BLOCK_BYTES = 1 << 23
# Pieces of names of what comes before the first block: embeddings, patches, a first norm.
_STEM = re.compile(
    r"embed(?!_out)|wte|wpe|shared|position|token|conv1|stem|patch|ln_pre|norm_pre|pre_layrnorm"
)

Statistics = Mapping[str, Mapping[str, Tensor]]
Vocabulary = Literal["refuse", "common_rows"]
Form = Literal["dense", "adapter"]
Files = Mapping[str, bytes | Path]


@dataclass
class Report:
    """What a merge did and what it cost."""

    seconds: float = 0.0
    peak_bytes: int = 0  # resident memory of the process, or allocated memory of the GPUs
    bytes_read: int = 0
    rules: dict[str, str] = field(default_factory=dict)  # tensor name -> the rule applied to it

    def summary(self) -> dict[str, int]:
        """How many tensors each rule was applied to."""
        return dict(Counter(self.rules.values()))


class Sink(Protocol):
    """Where merged tensors go; `done` holds what an interrupted merge finished before."""

    done: set[str]

    def write(self, name: str, tensor: Tensor, rows: slice | None = None) -> None: ...


class _Memory:
    """A sink that keeps the merged tensors."""

    def __init__(self, base: StateDict) -> None:
        self.base, self.done, self.tensors = base, set(), {}

    def write(self, name: str, tensor: Tensor, rows: slice | None = None) -> None:
        if rows is None:
            self.tensors[name] = tensor
            return
        if name not in self.tensors:
            self.tensors[name] = torch.empty(self.base.shape(name), dtype=tensor.dtype)
        self.tensors[name][rows] = tensor


@dataclass(frozen=True)
class _Item:
    name: str
    rule: Literal["layer", "rest", "average", "base"]
    layer: Layer | None
    numel: int


class _Piece(NamedTuple):
    """What is read, merged and written at a time."""

    item: _Item
    rows: slice | None  # of the base's tensor; None: all


class _Values(NamedTuple):
    """What an expert says of a piece of a tensor."""

    tensor: Tensor  # may lack the last rows: the expert does not have them
    moved: bool  # the tensor is the difference to the base already


class _Loaded(NamedTuple):
    W0: Tensor
    # factors or differences where the piece is merged as one matrix; the experts' own values, None
    # of those that do not touch it, where entry by entry; no experts' where the base's values stay
    experts: Tensor | list[Factors] | list[_Values | None]


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor] | Adapter],
    method: Method,
    *,
    layers: Layers = None,
    statistics: Statistics | None = None,
    device: str | Sequence[str] = "cpu",
    split_qkv: bool = True,
    vocabulary: Vocabulary = "refuse",
    report: Report | None = None,
) -> dict[str, Tensor]:
    """Merge experts in memory into one state dict with the base's keys, shapes and dtypes.

    experts: task name -> state dict, or an opened `Adapter`. They are stacked in the order of their
        names, so that the order they come in changes no bit.
    layers: the linear layers: a model, the folder of one (a Path), {weight name: Layer}, weight
        names, or None: told by the base's own config.json, or else by names and shapes.
    statistics: task name -> {weight name: tensor}, for methods that need them.
    device: where matrices are merged; several devices share the work.
    split_qkv: merge packed q, k, v rows as three matrices.
    vocabulary: "common_rows" admits experts with more or fewer rows in an embedding or head:
        the rows both have are merged, the base's other rows kept.
    report: filled in, if given.
    Raises InputError naming every key, shape or value at fault.
    """
    source = StateDict(base, "the base")
    sink = _Memory(source)
    opened = {
        task: expert if isinstance(expert, Adapter) else StateDict(expert, "a state dict")
        for task, expert in sorted(experts.items())
    }
    options = _options(source, opened, method, layers, statistics, device, split_qkv, vocabulary)
    _run(source, opened, method, sink, options, report or Report())
    return {name: sink.tensors[source.tied.get(name, name)] for name in base}


def merge_checkpoints(
    base: str | Path,
    experts: Mapping[str, str | Path],
    method: Method,
    output: str | Path,
    *,
    layers: Layers = None,
    statistics: Mapping[str, str | Path] | Statistics | None = None,
    device: str | Sequence[str] = "cpu",
    split_qkv: bool = True,
    vocabulary: Vocabulary = "refuse",
    form: Form = "dense",
    overwrite: bool = False,
    extra: Files | Callable[[], Files] | None = None,
) -> Report:
    """Merge checkpoint files into one safetensors checkpoint, streamed, atomic and resumable.

    base, experts: whatever `open_checkpoint` reads; the output takes the base's shards.
    form: "adapter" writes the merge of adapters as one PEFT adapter folder, of at most the sum of
        their ranks in each layer. Interference and spectral methods make such merges, as do
        averages; what changes single entries (TIES, DARE, ...) does not and is refused.
    output: a `.safetensors` file or a folder; it appears when it is whole, and an interrupted
        merge continues from the last whole tensor.
    statistics: task name -> safetensors file of {weight name: tensor}, or the tensors.
    extra: further files of an output folder, by name (config, tokenizer, model card); a function
        that makes them is called when all is merged.
    Other arguments as in `merge_state_dicts`. Returns the report.
    """
    report = Report()
    source = open_checkpoint(base)
    if isinstance(source, Adapter):
        raise InputError(f"base {base} is an adapter, expected a whole checkpoint")
    opened = {task: open_checkpoint(path) for task, path in sorted(experts.items())}
    if statistics is not None:
        statistics = {
            task: s if isinstance(s, Mapping) else _Lazy(open_checkpoint(s))
            for task, s in statistics.items()
        }
    options = _options(
        source, opened, method, layers, statistics, device, split_qkv, vocabulary, base
    )
    _check_choice("form", form, Form)
    if form == "adapter":
        _check_adapter_output(opened, method, Path(output), overwrite)
        settings = joint_settings(opened, str(base))
        factors, whole = _run_factored(source, opened, method, options, report)
        pairs = {name: (f.A, f.B) for name, f in factors.items()}
        files = extra() if callable(extra) else extra
        write_adapter(output, pairs, settings, dense=whole, extra=files, overwrite=overwrite)
    else:
        writer = Writer(
            output,
            {name: (source.shape(name), source.dtype(name)) for name in source.keys()},
            shards=_shards(source),
            key=_key(source, opened, method, options),
            overwrite=overwrite,
        )
        with writer:
            _run(source, opened, method, writer, options, report)
            writer.finish(extra() if callable(extra) else extra)
    for finished in (source, *opened.values()):
        finished.close()
    return report


def _shards(base: Checkpoint) -> dict[str, str] | None:
    """{name: file name} where the base has several files, so that the output has the same."""
    files = {name: base.file(name).with_suffix(".safetensors").name for name in base.keys()}
    return files if len(set(files.values())) > 1 else None


@dataclass(frozen=True)
class _Options:
    layers: dict[str, Layer]
    statistics: Statistics | None
    devices: tuple[str, ...]
    vocabulary: Vocabulary


class _Lazy(Mapping):
    """A checkpoint of statistics as a mapping that reads a tensor when it is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, name: str) -> Tensor:
        return self.source.read(name)

    def __contains__(self, name: object) -> bool:  # without reading it, as Mapping's own would
        return name in self.source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.keys())

    def __len__(self) -> int:
        return len(self.source.keys())


def _options(
    base: Source,
    experts: Mapping[str, Source | Adapter],
    method: Method,
    layers: Layers,
    statistics: Statistics | None,
    device: str | Sequence[str],
    split_qkv: bool,
    vocabulary: Vocabulary,
    folder: str | Path | None = None,
) -> _Options:
    """Everything checked that headers can tell, before any tensor is read."""
    if not experts:
        raise InputError("no experts were given, expected at least one")
    _check_choice("vocabulary", vocabulary, Vocabulary)
    shapes = {name: base.shape(name) for name in base.keys()}
    resolved = choose_layers(layers, shapes, folder).layers
    if not split_qkv:
        resolved = {name: whole(layer) for name, layer in resolved.items()}
    if found := problems(base, experts, common_rows=vocabulary == "common_rows"):
        raise InputError("; ".join(found), hint="nothing was merged")
    if method.needs:
        _check_statistics(statistics, experts, resolved, method)
    devices = (device,) if isinstance(device, str) else tuple(device)
    return _Options(resolved, statistics, devices, vocabulary)


def _check_choice(name: str, given: str, known: Any) -> None:
    if given not in get_args(known):
        raise InputError(f"{name} is {given!r}, expected one of: {', '.join(get_args(known))}")


def _check_adapter_output(
    experts: Mapping[str, Checkpoint | Adapter], method: Method, output: Path, overwrite: bool
) -> None:
    hint = "use form=dense"
    for task, expert in experts.items():
        if not isinstance(expert, Adapter):
            raise InputError(
                f"expert {task!r} ({expert.path}) is a dense checkpoint, "
                "only a merge of adapters can be written as an adapter",
                hint,
            )
    if method.rest == "method" and not method.row_space:
        raise InputError(
            f"method {method.name!r} changes single entries: the rank of what it makes of "
            "adapters is too high for an adapter",
            hint,
        )
    if output.suffix == ".safetensors":
        raise InputError(f"an adapter is a folder, the output is to be the file {output}")
    if output.exists() and not overwrite:  # told before the merge, not after
        raise InputError(f"{output} exists already", hint="remove it or allow overwriting")


def _check_statistics(
    statistics: Statistics | None, tasks: Iterable[str], layers: Iterable[str], method: Method
) -> None:
    for task in tasks:
        if statistics is None or task not in statistics:
            raise InputError(
                f"method {method.name!r} needs {method.needs} statistics of task {task!r}",
                hint="collect them with: python -m experiments.statistics",
            )
        missing = [name for name in layers if name not in statistics[task]]
        if missing:
            raise InputError(
                f"the {method.needs} statistics of task {task!r} lack {missing[0]!r}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )


def _key(
    base: Checkpoint, experts: Mapping[str, Checkpoint | Adapter], method: Method, options: _Options
) -> str:
    """What the output depends on: a partial output is continued only under the same key."""
    inputs = {task: expert.stamp() for task, expert in experts.items()}
    layers = sorted((name, *astuple(layer)) for name, layer in options.layers.items())
    hyperparameters = sorted(method.hyperparameters.items())
    used = options.statistics if method.needs else {}
    statistics = {task: _stamp(found) for task, found in sorted(used.items())}
    return repr(
        (base.stamp(), inputs, method.name, hyperparameters, layers, options.vocabulary, statistics)
    )


def _stamp(statistics: Mapping[str, Tensor]) -> object:
    """What tells a task's statistics from others: the file's stamp, or a hash of the tensors."""
    if isinstance(statistics, _Lazy):
        return statistics.source.stamp()
    content = blake2b()
    for name, tensor in sorted(statistics.items()):
        content.update(name.encode() + str(tensor.dtype).encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


# --- the run --------------------------------------------------------------------------------------


def _run(
    base: Source,
    experts: Mapping[str, Source | Adapter],
    method: Method,
    sink: Sink,
    options: _Options,
    report: Report,
) -> None:
    items = _plan(base, experts, method, options)
    report.rules.update({item.name: _rule(item, method) for item in items})
    depths = _depths([item.name for item in items])
    # a file cannot share memory between names, so tied tensors are written under each
    copies = {i.name: [n for n, first in base.tied.items() if first == i.name] for i in items}
    todo = [i for i in items if not {i.name, *copies[i.name]} <= sink.done]

    def pieces(item: _Item) -> Iterator[_Piece]:
        return _pieces(base, item, method, len(experts))

    def load(piece: _Piece) -> _Loaded:
        return _load(base, experts, method, piece)

    def write(piece: _Piece, merged: Tensor) -> None:
        for name in (piece.item.name, *copies[piece.item.name]):
            sink.write(name, merged, piece.rows)

    with _measured(report, base, experts, options), _all_told(base, experts), _behind(write) as put:
        context = method.prepare(lambda: _stream(base, experts, items, options))

        def merge(piece: _Piece, loaded: _Loaded, device: str) -> None:
            extra = context | {"depth": depths[piece.item.name]}
            put(piece, _merge(experts, method, piece, loaded, options, device, extra))

        _each(todo, options.devices, pieces, load, merge)


def _run_factored(
    base: Source,
    experts: Mapping[str, Adapter],
    method: Method,
    options: _Options,
    report: Report,
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """A merge of adapters: factors of what they hold as factors, whole tensors of the rest."""
    items = _plan(base, experts, method, options)
    report.rules.update({item.name: _rule(item, method) for item in items})
    depths = _depths([item.name for item in items])
    merged, whole = {}, _Memory(base)

    def pieces(item: _Item) -> Iterable[_Piece]:
        if _factored(experts, item.name):
            return [_Piece(item, None)]
        return _pieces(base, item, method, len(experts))

    def load(piece: _Piece) -> _Loaded | list[Factors]:
        return _factors(experts, piece.item.name) or _load(base, experts, method, piece)

    def merge(piece: _Piece, loaded: _Loaded | list[Factors], device: str) -> None:
        item, context = piece.item, {"depth": depths[piece.item.name]}
        if isinstance(loaded, list):
            stats = _statistics(options, method, experts, item, None)
            found = _merge_factors(item, loaded, method, stats, device, context)
            merged[item.name] = Factors(found.A.cpu(), found.B.cpu(), 1.0)
        else:
            tensor = _merge(experts, method, piece, loaded, options, device, context)
            whole.write(item.name, tensor, piece.rows)

    with _measured(report, base, experts, options), _all_told(base, experts):
        _each([i for i in items if i.rule != "base"], options.devices, pieces, load, merge)
    return {i.name: merged[i.name] for i in items if i.name in merged}, whole.tensors


@contextmanager
def _measured(
    report: Report, base: Source, experts: Mapping[str, Source | Adapter], options: _Options
) -> Iterator[None]:
    """Add what the block costs to a report."""
    start, read = time.perf_counter(), _bytes_read(base, experts)
    _reset_peak()
    yield
    report.seconds += time.perf_counter() - start
    report.peak_bytes = _peak(options.devices)
    report.bytes_read += _bytes_read(base, experts) - read


@contextmanager
def _all_told(base: Source, experts: Mapping[str, Source | Adapter]) -> Iterator[None]:
    """Where one value is not finite, look at all tensors before saying so: one report for all."""
    try:
        yield
    except NotFinite as error:
        sources = {"the base": base} | {f"expert {task!r}": e for task, e in experts.items()}
        found = [told for label, source in sources.items() for told in not_finite(source, label)]
        raise InputError("; ".join(found) or error.message, error.hint) from None


def _each(
    items: Sequence[_Item],
    devices: Sequence[str],
    pieces: Callable[[_Item], Iterable[_Piece]],
    load: Callable[[_Piece], Any],
    merge: Callable[[_Piece, Any, str], None],
) -> None:
    """merge(piece, load(piece), device) for the pieces of all items, loaded ahead.

    Items are dealt out to the devices; the pieces of one item keep their order.
    """

    def work(device: str, share: Sequence[_Item]) -> None:
        todo = [piece for item in share for piece in pieces(item)]
        loaded = _ahead(lambda piece: (piece, load(piece)), todo)
        for piece, given in track(loaded, f"merging on {device}", len(todo)):
            merge(piece, given, device)

    if len(devices) == 1:
        work(devices[0], items)
    else:
        shares = _share(items, len(devices))
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(work, devices, shares))


def _plan(
    base: Source, experts: Mapping[str, Source | Adapter], method: Method, options: _Options
) -> list[_Item]:
    """One item per tensor of the base, in file order; tied copies are merged with their first."""
    touched = set().union(*(_names(expert) for expert in experts.values()))
    items = []
    for name in base.keys():
        if name in base.tied:
            continue
        shape = base.shape(name)
        rule = {"average": "average", "base": "base", "method": "rest"}[method.rest]
        if name in options.layers:
            rule = "layer"
        if not base.dtype(name).is_floating_point or name not in touched:
            rule = "base"
        if rule == "rest" and method.needs and not _has_statistic(options.statistics, name):
            rule = "average"
        if rule == "rest" and not all(_covers(e, name, shape) for e in experts.values()):
            rule = "average"  # only averaging has a meaning for rows that some experts lack
        items.append(_Item(name, rule, options.layers.get(name), _numel(shape)))
    return items


def _has_statistic(statistics: Statistics | None, name: str) -> bool:
    return statistics is not None and all(name in s for s in statistics.values())


def _names(expert: Source | Adapter) -> set[str]:
    return {*expert.keys(), *(expert.dense if isinstance(expert, Adapter) else ())}


def _covers(expert: Source | Adapter, name: str, shape: tuple[int, ...]) -> bool:
    """Whether an expert has all rows of a tensor, or does not touch it."""
    return isinstance(expert, Adapter) or name not in expert or expert.shape(name) == shape


def _rule(item: _Item, method: Method) -> str:
    if item.rule in {"average", "base"}:
        return item.rule
    parts = item.layer.blocks if item.rule == "layer" and item.layer else 1
    return f"{method.name} ({parts} parts)" if parts > 1 else method.name


def _pieces(base: Source, item: _Item, method: Method, experts: int) -> Iterator[_Piece]:
    """Windows of rows where the rule looks at single entries, else the whole tensor."""
    if not _by_entry(item, method):
        yield _Piece(item, None)
        return
    shape = base.shape(item.name)
    row_bytes = base.dtype(item.name).itemsize * _numel(shape[1:]) * (experts + 2)
    for rows in _row_blocks(shape, row_bytes, WINDOW_BYTES):
        yield _Piece(item, rows)


def _by_entry(item: _Item, method: Method) -> bool:
    return item.rule in {"average", "base"} or method.elementwise


def _load(
    base: Source, experts: Mapping[str, Source | Adapter], method: Method, piece: _Piece
) -> _Loaded:
    """The base's values, and the experts' in the form in which they will be merged."""
    item, rows = piece
    W0 = base.read(item.name, rows)
    if item.rule == "base":
        return _Loaded(W0, [])
    if _by_entry(item, method):
        return _Loaded(W0, _values(experts, item.name, rows, W0))
    if item.rule == "layer" and method.row_space and (factors := _factors(experts, item.name)):
        check_finite(W0, item.name, base.path)
        return _Loaded(W0, factors)
    return _Loaded(W0, _deltas(W0, experts, item.name))


def _factored(experts: Mapping[str, Source | Adapter], name: str) -> bool:
    """Whether all experts are adapters, and none has saved the tensor in full."""
    return all(isinstance(e, Adapter) and name not in e.dense for e in experts.values())


def _factors(experts: Mapping[str, Source | Adapter], name: str) -> list[Factors] | None:
    """Each adapter's factors of a tensor, of rank 0 where it leaves the tensor alone.

    None where an expert is dense or saved the tensor in full.
    """
    if not _factored(experts, name):
        return None
    adapters = list(experts.values())
    d_out, d_in = next(e.shape(name) for e in adapters if name in e)
    still = Factors(torch.zeros(0, d_in), torch.zeros(d_out, 0), 1.0)
    found = [Factors(*e.factors(name)) if name in e else still for e in adapters]
    for (task, expert), factors in zip(experts.items(), found, strict=True):
        for factor in factors[:2]:
            check_finite(factor, name, f"expert {task!r} ({expert.path})")
    return found


def _merge(
    experts: Mapping[str, Source | Adapter],
    method: Method,
    piece: _Piece,
    loaded: _Loaded,
    options: _Options,
    device: str,
    context: dict[str, Any],
) -> Tensor:
    """The merged piece, on the CPU in the base's dtype."""
    item, W0 = piece.item, loaded.W0
    if item.rule == "base":
        return W0
    if _by_entry(item, method):
        return _merge_entries(experts, method, piece, loaded, options, context)
    stats = _statistics(options, method, experts, item, None)
    if isinstance(loaded.experts, list):
        merged = _merge_factors(item, loaded.experts, method, stats, device, context).dense()
        merged = (merged.mT if item.layer.transposed else merged).reshape(W0.shape)
    else:
        deltas, stats = loaded.experts.to(device), _on(stats, device)
        if item.rule == "rest":
            merged = method(deltas, **stats, **context)
        else:
            merged = _merge_layer(deltas, method, item.layer, stats, context)
    return _add(W0, merged.cpu(), item.name)


def _merge_entries(
    experts: Mapping[str, Source | Adapter],
    method: Method,
    piece: _Piece,
    loaded: _Loaded,
    options: _Options,
    context: dict[str, Any],
) -> Tensor:
    """The same block by block of rows: bound by memory, and so on the CPU whatever the device."""
    item, W0 = piece.item, loaded.W0
    stats = _statistics(options, method, experts, item, piece.rows)
    # what is linear shows values that are not finite in its result
    linear = item.rule == "average" or method.row_space
    merged, stack = torch.empty_like(W0), None
    for rows in _row_blocks(W0.shape, 4 * _numel(W0.shape[1:]) * (len(experts) + 2), BLOCK_BYTES):
        base = _lift(W0 if rows is None else W0[rows])
        if stack is None or stack.shape[1:] != base.shape:
            stack = base.new_empty(len(experts), *base.shape)
        deltas = _differences(base, loaded.experts, rows, stack)
        if not linear:
            _check_deltas(deltas, item.name, experts)
        if item.rule == "average":
            moved = deltas.mean(0)
        else:
            own = {k: v if rows is None else v[:, rows] for k, v in stats.items()}
            moved = method(deltas, **own, **context)
        _add(base, moved, item.name, out=merged if rows is None else merged[rows])
    return merged


def _merge_factors(
    item: _Item,
    factors: Sequence[Factors],
    method: Method,
    stats: dict[str, Tensor],
    device: str,
    context: dict[str, Any],
) -> Factors:
    """The merged difference (d_out, d_in) as factors of at most the sum of the ranks."""
    factors = [Factors(f.A.to(device), f.B.to(device), f.scale) for f in factors]
    layer = replace(item.layer or Layer(), transposed=False, kernel=())  # factors never are
    if item.rule == "average":
        return merge_factors(factors, create("average"))
    if method.row_space:
        return merge_factors(factors, method, layer, **context)
    deltas = torch.stack([f.dense() for f in factors])
    merged = _merge_layer(deltas, method, layer, _on(stats, device), context)
    rank = sum(len(f.A) for f in factors)
    found = factorise(merged, rank)
    if found is None:
        raise InputError(
            f"method {method.name!r} makes a difference of {item.name!r} that no adapter of "
            f"rank {rank} holds",
            hint="use form=dense",
        )
    return found


def _merge_layer(
    deltas: Tensor, method: Method, layer: Layer, stats: dict[str, Tensor], context: dict[str, Any]
) -> Tensor:
    """(T, *stored shape) -> merged difference of the stored shape, block by block."""
    merged = []
    for i, block in enumerate(cut(deltas, layer)):
        own = {k: _of_block(k, v, layer, i) for k, v in stats.items()}
        merged.append(method(block, **own, **context))
    return join(merged, layer)


def _of_block(kind: str, stack: Tensor, layer: Layer, i: int) -> Tensor:
    """The statistics of the i-th of a layer's blocks: inputs are those of its expert's layer."""
    if kind == "fishers":
        return cut(stack, layer)[i]
    return stack[:, i // layer.blocks] if layer.experts else stack  # (T, [E,] d_in, d_in)


def _statistics(
    options: _Options,
    method: Method,
    experts: Iterable[str],
    item: _Item,
    rows: slice | None,
) -> dict[str, Tensor]:
    if not method.needs or item.rule == "average":
        return {}
    tensors = [options.statistics[task][item.name] for task in experts]
    for task, tensor in zip(experts, tensors, strict=True):
        check_finite(tensor, item.name, f"the {method.needs} statistics of task {task!r}", "")
    if method.needs == "fisher":
        return {"fishers": torch.stack([t if rows is None else t[rows] for t in tensors])}
    return {"covariances": torch.stack([t if t.ndim > 1 else unpack(t) for t in tensors])}


def _on(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in tensors.items()}


# --- tensors in and out ---------------------------------------------------------------------------


def _lift(tensor: Tensor) -> Tensor:
    """float64 stays; everything else is computed in float32 whatever it is stored in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _deltas(W0: Tensor, experts: Mapping[str, Source | Adapter], name: str) -> Tensor:
    """(T, *shape) differences to W0; an expert that lacks rows or a tensor has 0 there."""
    if any(isinstance(expert, Adapter) for expert in experts.values()):
        check_finite(W0, name, "the base")  # a difference to a dense expert shows it by itself
    stack = _lift(W0).new_empty(len(experts), *W0.shape)
    _differences(_lift(W0), _values(experts, name, None, W0), None, stack)
    _check_deltas(stack, name, experts)
    return stack


def _values(
    experts: Mapping[str, Source | Adapter], name: str, rows: slice | None, W0: Tensor
) -> list[_Values | None]:
    """What each expert says of the base's `rows` W0; None: all."""
    start = rows.start if rows else 0

    def values(expert: Source | Adapter) -> _Values | None:
        if isinstance(expert, Adapter):
            own = rows or slice(None)
            if name in expert:
                return _Values(expert.delta(name, own), moved=True)
            return _Values(expert.dense[name][own], moved=False) if name in expert.dense else None
        if name not in expert:
            return None
        shape = expert.shape(name)
        if not shape:
            return _Values(expert.read(name), moved=False)
        stored = slice(min(start, shape[0]), min(start + len(W0), shape[0]))
        return _Values(expert.read(name, stored), moved=False)

    return [values(expert) for expert in experts.values()]


def _differences(
    W0: Tensor, experts: Sequence[_Values | None], rows: slice | None, out: Tensor
) -> Tensor:
    """Write the experts' differences to W0 in `rows` of what was read of them to `out` (T, ...)."""
    for delta, given in zip(out, experts, strict=True):
        if given is None:
            delta.zero_()
            continue
        values, ours = given.tensor if rows is None else given.tensor[rows], W0
        if values.shape != W0.shape:  # the expert lacks the last rows
            delta[len(values) :].zero_()
            delta, ours = delta[: len(values)], W0[: len(values)]
        if given.moved:
            delta.copy_(values)
        else:
            torch.sub(values.to(W0.dtype), ours, out=delta)
    return out


def _check_deltas(deltas: Tensor, name: str, experts: Mapping[str, Source | Adapter]) -> None:
    for delta, (task, expert) in zip(deltas, experts.items(), strict=True):
        check_finite(delta, name, f"expert {task!r} ({expert.path}) or the base")


def _add(W0: Tensor, delta: Tensor, name: str, out: Tensor | None = None) -> Tensor:
    """W0 + delta in the dtype of `out`, or else of W0, rounded once."""
    merged = torch.empty_like(W0) if out is None else out
    torch.add(_lift(W0), delta, out=merged)
    told = f"the method diverged, or its result leaves {merged.dtype}'s range"
    check_finite(merged, name, "the merge", told)
    return merged


def _row_blocks(shape: Sequence[int], row_bytes: int, limit: int) -> Iterator[slice | None]:
    """Blocks of rows of about `limit` bytes; None for all where one block is enough."""
    step = max(1, limit // max(1, row_bytes))
    if not shape or shape[0] <= step:
        yield None
        return
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _stream(
    base: Source, experts: Mapping[str, Source | Adapter], items: Sequence[_Item], options: _Options
) -> Iterator[tuple[str, Tensor]]:
    """All that the method itself will merge, for methods that look at the whole model first."""
    for item in track(items, "first pass"):
        if item.rule in {"layer", "rest"}:
            yield item.name, _deltas(base.read(item.name), experts, item.name)


# --- small helpers --------------------------------------------------------------------------------

Given, Result = TypeVar("Given"), TypeVar("Result")


def _ahead(load: Callable[[Given], Result], items: Sequence[Given]) -> Iterator[Result]:
    """load(item) for each item, the next one loading while the current one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(load, item) for item in items[:1]]
        for following in itertools.chain(items[1:], [None] if items else []):
            result = waiting.pop().result()
            if following is not None:
                waiting.append(pool.submit(load, following))
            yield result
            del result


@contextmanager
def _behind(write: Callable[..., None], waiting: int = 2) -> Iterator[Callable[..., None]]:
    """`write` as another thread does it, in order; what it raises, a later call or the end does.

    waiting: so many calls may be outstanding before the next one waits.
    """
    outstanding, lock = deque(), threading.Lock()
    with ThreadPoolExecutor(1) as pool:

        def put(*arguments: Any) -> None:
            with lock:
                outstanding.append(pool.submit(write, *arguments))
                while len(outstanding) > waiting:
                    outstanding.popleft().result()

        yield put
        while outstanding:
            outstanding.popleft().result()


def _share(items: Sequence[_Item], workers: int) -> list[list[_Item]]:
    """Items dealt out largest first, each to the worker with the least work so far."""
    shares, loads = [[] for _ in range(workers)], [0] * workers
    for item in sorted(items, key=lambda item: item.numel, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(item)
        loads[least] += item.numel
    return shares


def _depths(names: Iterable[str]) -> dict[str, float]:
    """Each tensor's place along the model in [0, 1], from the block number in its name.

    Without a number it is 0 if the name says that it comes before the blocks (`_STEM`), else 1; in
    a model without blocks it is 0. From names alone: the order of tensors in a file is often
    alphabetical, and says nothing.
    """
    found = {name: re.search(r"\.(\d+)\.", f".{name}") for name in names}
    blocks = {name: int(match[1]) for name, match in found.items() if match}
    last = max(blocks.values(), default=0) or 1
    after = {name: float(bool(blocks) and not _STEM.search(name)) for name in found}
    return after | {name: block / last for name, block in blocks.items()}


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _bytes_read(base: Source, experts: Mapping[str, Source | Adapter]) -> int:
    return base.bytes_read + sum(expert.bytes_read for expert in experts.values())


def _reset_peak() -> None:
    with suppress(OSError):  # Linux: start the high-water mark of resident memory anew
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)


def _peak(devices: Sequence[str]) -> int:
    gpus = [d for d in devices if d.startswith("cuda")]
    if gpus:
        return sum(torch.cuda.max_memory_allocated(d) for d in gpus)
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        return psutil.Process().memory_info().rss

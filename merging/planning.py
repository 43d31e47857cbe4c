"""Will these experts merge, and how? Answered from headers, then from the weights, without data.

`plan` reads headers first (what is missing, what the method will reach, what it costs), then
streams the weights once and returns a `Plan`: norms, cosines, overlap and conflict of the task
vectors, and the residuals of several merges of all experts and of subsets: `merging.diagnosis`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from merging.diagnosis import LayerDiagnosis, diagnose, residual
from merging.engine.report import BY_PROTOCOL
from merging.engine.routes import read_deltas as differences
from merging.errors import InputError
from merging.experts import Expert, Source
from merging.formats.checkpoints import open_base, open_checkpoint
from merging.formats.checks import problems
from merging.formats.fit import fit
from merging.formats.readers import READERS
from merging.layers import Layer, Layers, choose_layers, cut, parts
from merging.method.registry import Method, create
from merging.progress import track

PLANNED = ("average", "task_arithmetic", "ties", "iso_c", "tsv_m", "actmat", "rank_rule")
Experts = Mapping[str, Expert]


@dataclass
class Group:
    """The layers of one kind in one block, summed."""

    kind: str
    block: int | None
    layers: int
    diagnosis: LayerDiagnosis
    residual: dict[str, Tensor]  # method -> (2, T) numerators, see `diagnosis.residual`


@dataclass
class Plan:
    """What was found; tensors are (T, T) in the order of `tasks`, ratios as in diagnosis."""

    tasks: list[str]
    problems: list[str]  # a sentence each; where there are any, no weights were read
    bytes: int = 0  # of the base and the experts
    largest: int = 0  # bytes of the largest matrix in float32: a merge holds T + 2 of them
    matrices: int = 0  # entries of all matrices
    covered: int = 0  # of them, those that a method for matrices reaches
    groups: list[Group] = field(default_factory=list)
    # (method, merged tasks) -> {task: (r_t of the inputs' side, of the outputs' side)}
    residuals: dict[tuple[str, tuple[str, ...]], dict[str, tuple[float, float]]] = field(
        default_factory=dict
    )

    @property
    def cosine(self) -> Tensor:
        return _normalised(_total(g.diagnosis.inner for g in self.groups))

    @property
    def overlap(self) -> Tensor:
        return _normalised(_total(g.diagnosis.shared for g in self.groups))

    @property
    def conflict(self) -> Tensor:
        opposed = _total(g.diagnosis.opposed for g in self.groups)
        return opposed / _total(g.diagnosis.common for g in self.groups).clamp_min(1e-300)

    @property
    def movement(self) -> dict[str, float]:
        """|D_t| / |W_0| over all layers, per task."""
        moved = _total(g.diagnosis.inner.diagonal() for g in self.groups)
        base = sum(g.diagnosis.base for g in self.groups)
        return dict(zip(self.tasks, (moved / base).sqrt().tolist(), strict=True))

    @property
    def ranking(self) -> list[tuple[str, float]]:
        """(method, mean residual of the inputs' side over all experts), best first."""
        every = tuple(self.tasks)
        rows = [(m, mean_residual(r)) for (m, tasks), r in self.residuals.items() if tasks == every]
        return sorted(rows, key=lambda row: row[1])


def plan(
    base: str | Path,
    experts: Mapping[str, str | Path],
    *,
    methods: Sequence[str | Method] = PLANNED,
    layers: Layers = None,
    into: Mapping[str, str] | None = None,
    subsets: bool = True,
) -> Plan:
    """Diagnose a merge of checkpoints; nothing is written.

    methods: what r_t is computed for; those that need statistics are refused.
    layers, into: as in `merge_checkpoints`.
    subsets: the best method on all pairs and on all experts but one, too.
    Raises InputError for unreadable files and unknown methods; what does not fit is in `problems`.
    """
    if not methods:
        raise InputError("no methods were given", hint=f"for example {', '.join(PLANNED)}")
    named = [create(m) if isinstance(m, str) else m for m in methods]
    for method in named:
        if method.needs or method.sequential:
            raise InputError(f"method {method.name!r} needs statistics, a plan has none")
    source = open_base(base)
    opened: dict[str, Expert] = {t: open_checkpoint(path) for t, path in sorted(experts.items())}
    try:
        shapes = {name: source.shape(name) for name in source.keys()}
        resolved, reasons = choose_layers(layers, shapes, base)
        opened = fit(source, opened, resolved, into, layers if isinstance(layers, Path) else None)
        outcome = Plan(list(opened), problems(source, opened))
        _count(outcome, source, opened, resolved, reasons)
        if not outcome.problems:
            _read(outcome, source, opened, resolved, named, subsets)
    finally:
        source.close()
        for expert in opened.values():
            expert.close()
    return outcome


def mean_residual(residuals: Mapping[str, tuple[float, float]]) -> float:
    """Of the inputs' side, over all tasks."""
    return sum(inputs for inputs, _ in residuals.values()) / len(residuals)


def _count(
    outcome: Plan, source: Source, experts: Experts, layers: Mapping[str, Layer],
    reasons: Mapping[str, str],
) -> None:  # fmt: skip
    """Bytes, the largest matrix and coverage as a merge reports it, from headers."""
    sizes = {name: torch.Size(source.shape(name)).numel() for name in source.keys()}
    matrices = [n for n in sizes if len(source.shape(n)) > 1 and source.dtype(n).is_floating_point]
    matrices = [n for n in matrices if reasons.get(n) not in BY_PROTOCOL]
    paths = [source.path, *(expert.path for expert in experts.values())]
    outcome.bytes = sum(_weight_bytes(Path(path)) for path in paths)
    outcome.largest = 4 * max((sizes[n] for n in layers if n in sizes), default=0)
    outcome.matrices = sum(sizes[n] for n in matrices)
    outcome.covered = sum(sizes[n] for n in matrices if n in layers)


def _weight_bytes(path: Path) -> int:
    """Of a checkpoint's weight files."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in READERS]
    return sum(file.stat().st_size for file in files)


def _read(
    outcome: Plan, source: Source, experts: Experts, layers: Mapping[str, Layer],
    methods: Sequence[Method], subsets: bool,
) -> None:  # fmt: skip
    """Stream the layers that any expert moved and sum what is found by kind and block."""
    names = [n for n in layers if n not in source.tied and _touched(experts, n)]

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, differences(source.read(name), experts, name)

    contexts = [method.prepare(stream) for method in methods]
    chosen = list(_subsets(len(experts))) if subsets else [tuple(range(len(experts)))]
    sums: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    groups: dict[tuple[str, int | None], Group] = {}
    for name, stack in track(stream(), "reading the differences", len(names)):
        W0, adapted = source.read(name), [e.adapted(name) for e in experts.values()]
        for part, deltas in zip(cut(W0, layers[name]), cut(stack, layers[name]), strict=True):
            residuals = {}
            for method, context in zip(methods, contexts, strict=True):
                # what was prepared is of all experts together
                for subset in chosen[:1] if context else chosen:
                    merging = deltas[list(subset)]
                    adapters = all(adapted[i] for i in subset)
                    merged = method(merging, adapters=adapters, **context)
                    numerators = residual(merging, merged)
                    key = (method.name, subset)
                    sums[key] = sums.get(key, 0) + numerators
                    if len(subset) == len(experts):
                        residuals[method.name] = numerators
            kind, block = _place(name)
            group = Group(kind, block, 1, diagnose(part, deltas), residuals)
            groups[kind, block] = _merged(groups.get((kind, block)), group)
    outcome.groups = sorted(groups.values(), key=lambda g: (g.block is None, g.block or 0, g.kind))
    if not outcome.groups:
        return
    energies = _total(g.diagnosis.shared.diagonal() for g in outcome.groups)  # (T,)
    for (name, subset), numerators in sums.items():
        tasks = tuple(outcome.tasks[i] for i in subset)
        ratios = (numerators / energies[list(subset)].clamp_min(1e-300)).T.tolist()
        outcome.residuals[name, tasks] = dict(zip(tasks, map(tuple, ratios), strict=True))


def _subsets(T: int) -> Iterator[tuple[int, ...]]:
    """All experts, all but one, and all pairs where they are few."""
    smaller = {T - 1} | ({2} if T <= 5 else set())
    for size in sorted({T} | {n for n in smaller if 1 < n < T}, reverse=True):
        yield from itertools.combinations(range(T), size)


def _touched(experts: Experts, name: str) -> bool:
    return any(name in expert.names() for expert in experts.values())


def _merged(one: Group | None, other: Group) -> Group:
    """The sums of two groups."""
    if one is None:
        return other
    a, b = one.diagnosis, other.diagnosis
    sums = {f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(a)}
    residuals = {m: one.residual[m] + other.residual[m] for m in one.residual}
    return Group(one.kind, one.block, one.layers + 1, LayerDiagnosis(**sums), residuals)


def _place(name: str) -> tuple[str, int | None]:
    """(attention, mlp or other; number of the block), from a tensor's name."""
    kind = parts.kind(name)
    return kind if kind in {"attention", "mlp"} else "other", parts.block(name)


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _normalised(square: Tensor) -> Tensor:
    """(T, T) divided by the root of its diagonal on both sides."""
    scale = square.diagonal().sqrt().clamp_min(1e-300)
    return square / scale / scale[:, None]

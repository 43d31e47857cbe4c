"""What is to be merged, and everything that can be checked of it before a tensor is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from merging.engine.choices import (
    Part,
    WeightsOn,
    at_depth,
    check_choices,
    check_gradients,
    check_task_weights,
    read_bytes,
    read_dtype,
    read_parts,
    weigh,
)
from merging.errors import HOW_TO_MEASURE, InputError, several
from merging.experts import Expert, Source
from merging.formats.checks import check_finite, problems
from merging.formats.fit import fit, still_tied
from merging.formats.united import Rows, united
from merging.layers import Layer, Layers, choose_layers, whole
from merging.method.registry import OUTPUTS, Method
from merging.method.space import Space, check_space
from merging.triangles import unpack

log = logging.getLogger(__name__)
Statistics = Mapping[str, Mapping[str, Tensor]]
Vocabulary = Literal["refuse", "common_rows", "union"]
Form = Literal["dense", "adapter"]


class Options(TypedDict, total=False):
    """What may be said of a merge beside its base, experts and method."""

    # the linear layers: a model, the folder of one (a Path), {weight name: Layer}, weight names, or
    # None: told by the base's own config.json, or else by names and shapes
    layers: Layers
    statistics: Statistics | None  # task -> {weight name: tensor}, for methods that need them
    device: str | Sequence[str]  # where matrices are merged; several devices share the work
    split_qkv: bool  # merge packed q, k, v rows as three matrices; the default
    # "common_rows" admits experts with more or fewer rows in an embedding or head: the rows that
    # both have are merged, the base's other rows kept. "union" tells rows by the tokens of the
    # tokenizer.json beside the files: what only experts have gets rows of its own, the mean of
    # theirs, and the tokenizer of all is written. "refuse" is the default
    vocabulary: Vocabulary
    # task -> the part of the base that the expert is one of: "language_model" for a language model
    # into a vision-language base, or a module's name; the base's config.json or `layers` tells them
    into: Mapping[str, str] | None
    # task -> number, 1 for those not named; an expert of weight 0 is left out. On "delta" it is a
    # factor on the expert's differences D_t before any method sees them, negative ones too; on
    # "task" it is what the expert counts for (> 0): a factor on w_t in the interference family, the
    # weights of the mean in an average. "task" is the default of method "average", else "delta"
    weights: Mapping[str, float] | None
    weights_on: WeightsOn | None
    # [{match, method, hyperparameters}]: methods of parts of the model; the first that matches a
    # tensor wins, what none matches is merged by the merge's own method. match: a kind (attention,
    # mlp, embedding, norm, head), "blocks 0-5", or a glob of names. Matrices of a part "embedding"
    # or "head" are merged as layers are. A list as a hyperparameter's value is interpolated from
    # the first block to the last, here and in the merge's own method
    parts: Sequence[Mapping[str, Any]]
    # of adapters, where methods look at single entries or count ranks: on the layers' own axes
    # ("full", the default), in the "core" space of all adapters' rows and columns, or in the left
    # basis of all differences side by side ("knots"); see `merging.method.space`
    space: Space
    dtype: str | torch.dtype | None  # of the output's floating-point tensors; None: the base's


class FileOptions(Options, total=False):
    """What may be said besides of a merge of files; statistics may be safetensors files."""

    # "adapter" writes the merge of adapters as one PEFT adapter folder, of at most the sum of
    # their ranks in each layer. Interference and spectral methods make such merges, as do averages;
    # what changes single entries (TIES, DARE, ...) does not and is refused. "dense" is the default
    form: Form
    rank: int | None  # of an adapter, at most: the nearest of that rank is written
    shard_size: str | int | None  # such as "5GB", of the output's files; None: as the base's are


@dataclass(frozen=True, kw_only=True)
class Job:
    """One merge."""

    base: Source
    experts: Mapping[str, Expert]  # in the order of their names, so that theirs changes no bit
    method: Method
    layers: Mapping[str, Layer]
    reasons: Mapping[str, str] = field(default_factory=dict)  # why a matrix is no layer
    statistics: Statistics | None = None
    devices: tuple[str, ...] = ("cpu",)
    vocabulary: Vocabulary = "refuse"
    task_weights: tuple[float, ...] | None = None  # (T,)
    parts: tuple[Part, ...] = ()
    dtype: torch.dtype | None = None
    form: Form = "dense"
    space: Space = "full"
    rank: int | None = None
    shard_bytes: int | None = None
    rows: Rows | None = None  # of a union of vocabularies
    notes: tuple[str, ...] = ()  # what its choices come to, for a person

    def output_dtype(self, name: str) -> torch.dtype:
        """Of a merged tensor."""
        stored = self.base.dtype(name)
        return self.dtype if self.dtype and stored.is_floating_point else stored

    def measured(self, name: str) -> bool:
        """Whether every task has a statistic of a tensor."""
        return self.statistics is not None and all(name in s for s in self.statistics.values())

    def adapted(self, name: str) -> bool:
        """Whether all experts' files say that adapters moved a tensor."""
        return all(expert.adapted(name) for expert in self.experts.values())

    def context(self, name: str, method: Method, rows: slice | None = None) -> dict[str, Tensor]:
        """The statistics of a tensor (T, ...), or of some rows of it, that a method needs."""
        if not method.needs:
            return {}
        statistics = self.statistics or {}
        tensors = [statistics[task][name] for task in self.experts]
        for task, tensor in zip(self.experts, tensors, strict=True):
            check_finite(tensor, name, f"the {method.needs} statistics of task {task!r}", "")
        if method.needs == "fisher":
            return {"fishers": torch.stack([t if rows is None else t[rows] for t in tensors])}
        # (T, d, d), or (T, E, d, d) of fused experts
        moments = [t if t.ndim > 1 else unpack(t) for t in tensors]
        selected = [m[rows] if m.ndim == 3 and rows is not None else m for m in moments]
        context = {"covariances": torch.stack(selected)}
        if method.needs == "kfac":
            outputs = [statistics[task][name + OUTPUTS] for task in self.experts]
            context["gradients"] = torch.stack(outputs)
        return context

    def key(self) -> str:
        """What the output depends on: a partial output is continued only under the same key."""
        methods = [self.method, *(part.method for part in self.parts)]
        used = (self.statistics or {}) if any(method.needs for method in methods) else {}
        return repr(
            (
                self.base.stamp(),
                {task: expert.stamp() for task, expert in self.experts.items()},
                [(m.name, sorted(m.hyperparameters.items())) for m in methods],
                [part.match for part in self.parts],
                sorted((name, *astuple(layer)) for name, layer in self.layers.items()),
                {task: _stamp(tensors) for task, tensors in sorted(used.items())},
                (self.vocabulary, self.task_weights, self.dtype, self.space),
            )
        )


class LazyStatistics(Mapping[str, Tensor]):
    """A checkpoint of statistics as a mapping that reads a tensor when it is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, name: str) -> Tensor:
        return self.source.read(name)

    def __contains__(self, name: object) -> bool:  # without reading it, as Mapping's own would
        return isinstance(name, str) and name in self.source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.keys())

    def __len__(self) -> int:
        return len(self.source.keys())


def prepare(
    base: Source,
    experts: Mapping[str, Expert],
    method: Method,
    *,
    folder: str | Path | None = None,
    **options: Unpack[FileOptions],
) -> Job:
    """The job, with everything checked that headers can tell; folder: where the base lies."""
    if not experts:
        raise InputError("no experts were given, expected at least one")
    settings = _read(options)
    shapes = {name: base.shape(name) for name in base.keys()}
    if not shapes:
        raise InputError(f"{base.path} holds no tensors", hint="nothing was merged")
    matrices = not options.get("split_qkv", True) and max(map(len, shapes.values())) <= 2
    if _alike([method, *(part.method for part in settings["parts"])], experts, matrices):
        folder = None  # what is a layer changes no entry: loading the model's library would be vain
    layers = options.get("layers")
    resolved, reasons = choose_layers(layers, shapes, folder)
    if not options.get("split_qkv", True):
        resolved = {name: whole(layer) for name, layer in resolved.items()}
    vocabulary = settings.get("vocabulary", "refuse")
    model = layers if isinstance(layers, nn.Module | Path) else None
    experts = fit(base, dict(sorted(experts.items())), resolved, options.get("into"), model)
    if faults := problems(base, experts, common_rows=vocabulary != "refuse"):
        raise InputError(several(faults), hint="nothing was merged")
    base = base.with_ties(still_tied(base, experts))
    check_gradients(method)
    taking, task_weights = weigh(experts, options.get("weights"), options.get("weights_on"), method)
    rows = None
    if vocabulary == "union":
        base, taking, rows = united(base, taking)
    note = check_space(at_depth(method, 0.0), settings.get("space", "full"), len(taking))
    job = Job(
        base=base, experts=taking, method=method, layers=resolved, reasons=reasons,
        task_weights=task_weights, rows=rows,
        notes=tuple(x for x in (note, rows and rows.note()) if x), **settings,
    )  # fmt: skip
    _check_forms(job)
    return job


def _alike(methods: Iterable[Method], experts: Mapping[str, Expert], matrices: bool) -> bool:
    """Whether layers and all else are merged alike, entry by entry, of experts stored in full.

    matrices: every tensor is one matrix at most; then a method may look at whole tensors.
    """
    entries = all(
        (method.elementwise or (matrices and method.one_tensor)) and method.rest == "method"
        for method in methods
    )
    return entries and not any(expert.is_adapter for expert in experts.values())


def _read(options: FileOptions) -> dict[str, Any]:
    """The options of a `Job`, checked and in its own terms."""
    known = {"vocabulary", "form", "space", "statistics"}
    check_choices(
        vocabulary=(options.get("vocabulary"), Vocabulary),
        form=(options.get("form"), Form),
        space=(options.get("space"), Space),
        weights_on=(options.get("weights_on"), WeightsOn),
    )
    device, size = options.get("device") or "cpu", options.get("shard_size")
    rank = options.get("rank")
    if options.get("vocabulary") == "union" and options.get("form") == "adapter":
        raise InputError("vocabulary=union makes a whole model", hint="use form=dense")
    if options.get("into") and options.get("form") == "adapter":
        raise InputError(
            "into= makes a whole model of the base, not an adapter of it", hint="use form=dense"
        )
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise InputError(f"rank is {rank!r}, expected a whole number of 1 or more")
    return {k: v for k, v in options.items() if k in known and v is not None} | {
        "devices": (device,) if isinstance(device, str) else tuple(device),
        "parts": read_parts(options.get("parts") or ()),
        "dtype": read_dtype(options.get("dtype")),
        "rank": rank,
        "shard_bytes": None if size is None else read_bytes(size),
    }


def _check_forms(job: Job) -> None:
    """InputError for choices that exclude each other."""
    if job.rank and job.form != "adapter":
        raise InputError("rank is that of an adapter", hint="add form=adapter")
    if job.form == "adapter" and (job.dtype or job.shard_bytes):
        raise InputError("dtype and shard_size are those of a dense output", hint="use form=dense")
    if job.form == "dense" and job.base.quantised and not job.dtype:
        raise InputError(
            f"base {job.base.path} is quantised ({job.base.quantised}): its merge is written in "
            "numbers of another kind",
            hint="say which: dtype=bfloat16, float16 or float32",
        )
    for task, expert in job.experts.items():
        dense = f"expert {task!r} ({expert.path}) is a dense checkpoint"
        if job.form == "adapter" and not expert.is_adapter:
            raise InputError(
                f"{dense}, only a merge of adapters can be written as an adapter",
                hint="use form=dense",
            )
        if job.space != "full" and not expert.is_adapter:
            raise InputError(
                f"{dense}, space={job.space} is that of adapters' factors",
                hint="use space=full, or make an adapter of it: experiments.extract",
            )


def check_method(job: Job, method: Method, layers: Iterable[str], factored: bool) -> None:
    """InputError if a method lacks the statistics of its layers, or cannot make what is asked.

    factored: some of what it merges is to be written as factors.
    """
    if method.needs:
        _check_statistics(job.statistics, job.experts, layers, method)
    if job.task_weights:
        check_task_weights([method])
    if factored and method.rest == "method" and not method.row_space:
        raise InputError(
            f"method {method.name!r} changes single entries: the rank of what it makes of "
            "adapters is too high for an adapter",
            hint="use form=dense",
        )


def check_values(method: Method, experts: int) -> None:
    """InputError for values that a method refuses, by a small merge: none waits for the last block.

    experts: how many it merges.
    """
    if method.needs:
        return
    g = torch.Generator().manual_seed(0)
    deltas, base = torch.randn(experts, 3, 4, generator=g), torch.randn(3, 4, generator=g)
    try:
        method(deltas, base=base)
    except InputError:
        raise
    except Exception as error:  # it may ask for larger tensors: the merge itself will tell
        log.debug("method %s of a small merge: %s", method.name, error)


def _check_statistics(
    statistics: Statistics | None, tasks: Iterable[str], layers: Iterable[str], method: Method
) -> None:
    for task in tasks:
        if statistics is None or task not in statistics:
            raise InputError(
                f"method {method.name!r} needs {method.needs} statistics of task {task!r}",
                hint=HOW_TO_MEASURE,
            )
        ends = ("", OUTPUTS) if method.needs == "kfac" else ("",)
        wanted = [name + end for name in layers for end in ends]
        missing = [name for name in wanted if name not in statistics[task]]
        if missing:
            raise InputError(
                f"the {method.needs} statistics of task {task!r} lack {missing[0]!r}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )


def _stamp(statistics: Mapping[str, Tensor]) -> object:
    """What tells a task's statistics from others: the file's stamp, or a hash of the tensors."""
    if isinstance(statistics, LazyStatistics):
        return statistics.source.stamp()
    content = blake2b()
    for name, tensor in sorted(statistics.items()):
        content.update(name.encode() + str(tensor.dtype).encode())
        content.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
    return content.hexdigest()

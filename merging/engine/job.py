"""What is to be merged, and everything that can be checked of it before a tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from merging.errors import InputError
from merging.experts import Expert, Source
from merging.formats.checks import check_finite, problems
from merging.layers import Layer, Layers, choose_layers, whole
from merging.method.registry import Method
from merging.triangles import unpack

Statistics = Mapping[str, Mapping[str, Tensor]]
Vocabulary = Literal["refuse", "common_rows"]
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
    # both have are merged, the base's other rows kept. "refuse" is the default
    vocabulary: Vocabulary


class FileOptions(Options, total=False):
    """What may be said besides of a merge of files; statistics may be safetensors files."""

    # "adapter" writes the merge of adapters as one PEFT adapter folder, of at most the sum of
    # their ranks in each layer. Interference and spectral methods make such merges, as do averages;
    # what changes single entries (TIES, DARE, ...) does not and is refused. "dense" is the default
    form: Form


@dataclass(frozen=True)
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
    form: Form = "dense"

    def measured(self, name: str) -> bool:
        """Whether every task has a statistic of a tensor."""
        return self.statistics is not None and all(name in s for s in self.statistics.values())

    def context(self, name: str, method: Method, rows: slice | None = None) -> dict[str, Tensor]:
        """The statistics of a tensor (T, ...), or of some rows of it, that a method needs."""
        if not method.needs:
            return {}
        tensors = [self.statistics[task][name] for task in self.experts]
        for task, tensor in zip(self.experts, tensors, strict=True):
            check_finite(tensor, name, f"the {method.needs} statistics of task {task!r}", "")
        if method.needs == "fisher":
            return {"fishers": torch.stack([t if rows is None else t[rows] for t in tensors])}
        return {"covariances": torch.stack([t if t.ndim > 1 else unpack(t) for t in tensors])}

    def key(self) -> str:
        """What the output depends on: a partial output is continued only under the same key."""
        inputs = {task: expert.stamp() for task, expert in self.experts.items()}
        layers = sorted((name, *astuple(layer)) for name, layer in self.layers.items())
        hyperparameters = sorted(self.method.hyperparameters.items())
        used = self.statistics if self.method.needs else {}
        statistics = {task: _stamp(tensors) for task, tensors in sorted(used.items())}
        choices = self.method.name, hyperparameters, layers, self.vocabulary
        return repr((self.base.stamp(), inputs, *choices, statistics))


class LazyStatistics(Mapping):
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


def prepare(
    base: Source,
    experts: Mapping[str, Expert],
    method: Method,
    *,
    layers: Layers = None,
    statistics: Statistics | None = None,
    device: str | Sequence[str] = "cpu",
    split_qkv: bool = True,
    vocabulary: Vocabulary = "refuse",
    form: Form = "dense",
    folder: str | Path | None = None,
) -> Job:
    """The job, with everything checked that headers can tell; folder: where the base lies."""
    if base.partial:
        raise InputError(f"base {base.path} is an adapter, expected a whole checkpoint")
    if not experts:
        raise InputError("no experts were given, expected at least one")
    experts = dict(sorted(experts.items()))
    _check_choices(vocabulary=(vocabulary, Vocabulary), form=(form, Form))
    resolved, reasons = choose_layers(layers, {n: base.shape(n) for n in base.keys()}, folder)
    if not split_qkv:
        resolved = {name: whole(layer) for name, layer in resolved.items()}
    if found := problems(base, experts, common_rows=vocabulary == "common_rows"):
        raise InputError("; ".join(found), hint="nothing was merged")
    if method.needs:
        _check_statistics(statistics, experts, resolved, method)
    if form == "adapter":
        _check_adapter_output(experts, method)
    return Job(
        base=base,
        experts=experts,
        method=method,
        layers=resolved,
        reasons=reasons,
        statistics=statistics,
        devices=(device,) if isinstance(device, str) else tuple(device),
        vocabulary=vocabulary,
        form=form,
    )


def _check_choices(**choices: tuple[str, Any]) -> None:
    for name, (choice, known) in choices.items():
        if choice not in get_args(known):
            raise InputError(f"{name} is {choice!r}, expected one of: {', '.join(get_args(known))}")


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


def _check_adapter_output(experts: Mapping[str, Expert], method: Method) -> None:
    hint = "use form=dense"
    for task, expert in experts.items():
        if not expert.partial:
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


def _stamp(statistics: Mapping[str, Tensor]) -> object:
    """What tells a task's statistics from others: the file's stamp, or a hash of the tensors."""
    if isinstance(statistics, LazyStatistics):
        return statistics.source.stamp()
    content = blake2b()
    for name, tensor in sorted(statistics.items()):
        content.update(name.encode() + str(tensor.dtype).encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()

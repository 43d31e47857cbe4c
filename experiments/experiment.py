"""One run: merge the experts of a suite by one method, score the result, leave a record."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, get_args

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

import merging
from eval.regmean_pp import merge_blocks
from eval.suite import Finetuning, Split, Statistic, Suite, Unsupported
from eval.training import expert_state
from experiments import cli
from experiments.report import records
from experiments.report.records import Record
from merging.errors import InputError
from merging.formats.checkpoints import Adapter, open_checkpoint
from merging.progress import track

log = logging.getLogger(__name__)
REFERENCES = ("zero_shot", "experts")  # what every run is compared with
UNMERGED = (*REFERENCES, "multi_task")  # rows of a table that merge nothing


@dataclass
class Selection:
    """A hyperparameter chosen by validation accuracy; None: nothing is chosen."""

    parameter: str | None = None
    values: list[Any] = field(default_factory=list)
    split: str = "validation"


@dataclass
class Statistics:
    """How many training inputs per task a method that needs statistics may see."""

    batches: int = 10
    batch_size: int = 32


class HasStatistics(Protocol):
    """Settings that say through which experts, and how many inputs, statistics are measured."""

    finetuning: str
    seed: int
    statistics: Statistics


@dataclass
class Experiment:
    """The keys of configs/experiment.yaml."""

    suite: dict[str, Any]
    method: dict[str, Any]
    tracker: dict[str, Any]
    selection: Selection = field(default_factory=Selection)
    statistics: Statistics = field(default_factory=Statistics)
    finetuning: str = "full"
    seed: int = 0
    protocol: str | None = None
    tasks: list[str] | None = None
    split: str = "test"
    limit: int | None = None
    device: str = "auto"
    records: str = "runs/records"
    force: bool = False


@dataclass(frozen=True)
class Merge:
    """What a merge of all tasks gave and cost."""

    state: Mapping[str, Tensor]
    rules: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    statistics_seconds: float = 0.0
    peak_bytes: int = 0


def resolve_device(name: str) -> str:
    """ "auto" is the first GPU, else the CPU; a GPU that is not there is an InputError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}", "known: auto, cpu, cuda, cuda:1") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name!r} was asked for, but this machine has {count} usable GPUs")
    return name


@functools.lru_cache(maxsize=2)
def _suite(config: str) -> Suite:
    return cli.build(json.loads(config))


def load_suite(config: Mapping[str, Any], device: str) -> Suite:
    """The suite of a configuration; the same object each time, so that a sweep loads data once."""
    own = {"device": resolve_device(device)} if "device" in config else {}
    return _suite(json.dumps(dict(config) | own))


def under_protocol(config: Mapping[str, Any], protocol: str | None) -> Mapping[str, Any]:
    """A suite's configuration under one of its protocols (None: the configured one).

    Raises InputError where the suite has no choice of them.
    """
    if protocol is None:
        return config
    if "protocol" not in config:
        raise InputError(
            f"suite {config.get('name')!r} has no choice of protocols", "leave protocol=null"
        )
    return dict(config) | {"protocol": protocol}


def measure(settings: Experiment) -> Record:
    """The record of a run: found when the run was done before, else made now.

    Raises InputError, before any heavy work, for whatever is wrong with the settings.
    """
    _check(settings)
    suite = load_suite(under_protocol(settings.suite, settings.protocol), settings.device)
    key = _key(settings, suite)
    path = records.record_path(Path(settings.records), key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")):  # a second process waits and finds it
        if path.exists() and not settings.force:
            if key["method"] not in UNMERGED:
                log.info("%s: already done; force=true does it again", path.stem)
            return records.load(path)
        record = _run(settings, suite, key)
        records.save(path, record)
    return record


def references(settings: Experiment) -> dict[str, Record]:
    """Records of zero_shot and experts under the same settings, measured when absent."""
    return {name: _reference(settings, name) for name in REFERENCES}


def _reference(settings: Experiment, name: str) -> Record:
    plain = {"method": {"name": name}, "selection": Selection(), "force": False}
    return measure(replace(settings, **plain))


def check_choices(settings: object) -> None:
    """InputError for settings whose value is none of the few that exist."""
    for name, known in (("finetuning", get_args(Finetuning)), ("split", get_args(Split))):
        if (value := getattr(settings, name, known[0])) not in known:
            raise InputError(f"{name} is {value!r}, expected one of: {', '.join(known)}")


def pick_tasks(suite: Suite, names: Sequence[str] | None) -> list[str]:
    """The named tasks in the suite's order, all of them for None."""
    if unknown := sorted(set(names or ()) - set(suite.tasks)):
        raise InputError(
            f"suite {suite.name} has no task {unknown[0]!r}", f"known: {', '.join(suite.tasks)}"
        )
    return [task for task in suite.tasks if names is None or task in names]


def _check(settings: Experiment) -> None:
    check_choices(settings)
    chosen = settings.selection
    if chosen.parameter is None:
        return
    if not chosen.values:
        raise InputError("selection.values is empty, expected values to choose from")
    if chosen.split != "validation":
        raise InputError(
            f"selection.split is {chosen.split!r}: a hyperparameter is chosen on validation only",
            hint="leave selection.split=validation",
        )
    if settings.split == "validation":
        raise InputError(
            "split=validation would report the very examples that the selection has used",
            hint="report on split=test, or set selection=none",
        )
    if settings.method["name"] in UNMERGED:
        raise InputError(f"{settings.method['name']} has no hyperparameter to select")


def _key(settings: Experiment, suite: Suite) -> dict[str, Any]:
    """All that a run's scores depend on; see experiments/report/records.py."""
    name, chosen = settings.method["name"], settings.selection
    hyperparameters, needs = {}, None
    if name not in UNMERGED:
        method = _methods(settings)[0]
        hyperparameters, needs = dict(method.hyperparameters), method.needs
        hyperparameters.pop(chosen.parameter, None)
    elif extra := sorted(set(settings.method) - {"name"}):
        raise InputError(f"{name} has no hyperparameter {extra[0]!r}")
    protocol = suite.protocol_key(statistics=bool(needs))
    return {
        "suite": suite.name,
        "experts": suite.identity(finetuning=settings.finetuning, seed=settings.seed),
        "method": name,
        "hyperparameters": hyperparameters,
        "finetuning": settings.finetuning,
        "seed": settings.seed,
        "split": settings.split,
        "tasks": pick_tasks(suite, settings.tasks),
        "limit": settings.limit,
        "statistics": asdict(settings.statistics) if needs else None,
        "selection": asdict(chosen) if chosen.parameter else None,
    } | ({"protocol": protocol} if protocol else {})


def _methods(settings: Experiment) -> list[merging.Method]:
    """The method with each value of the selection, or as it stands."""
    chosen = settings.selection
    candidates = [{chosen.parameter: value} for value in chosen.values] or [{}]
    return [merging.create(**dict(settings.method) | candidate) for candidate in candidates]


def _run(settings: Experiment, suite: Suite, key: dict[str, Any]) -> Record:
    name, tasks = key["method"], key["tasks"]
    merge, data, selection = Merge({}), "none", None
    if name in UNMERGED:
        states = _unmerged(settings, suite, tasks)
    else:
        method, selection = _select(settings, suite, tasks)
        merge = merge_suite(settings, suite, tasks, method)
        data = _data_use(method, selection)
        states = [(merge.state, tasks)]
    start, scores = time.perf_counter(), {}
    for state, judged in states:
        scores |= _score(settings, suite, state, settings.split, judged)
    evaluation = time.perf_counter() - start
    experts = scores if name == "experts" else _reference(settings, "experts")["scores"]
    return {
        "schema": records.SCHEMA,
        "key": key,
        "family": suite.family,
        "metric": suite.metric,
        "data": data,
        "selection": selection,
        "scores": scores,
        "mean": _mean_accuracy(scores),
        "normalised": _normalised(scores, experts),
        "rules": merge.rules,
        "seconds": {
            "merge": merge.seconds,
            "statistics": merge.statistics_seconds,
            "evaluation": evaluation,
        },
        "peak_bytes": merge.peak_bytes,
        "versions": records.versions(),
        "machine": records.machine(resolve_device(settings.device)),
    } | ({"sources": sources} if (sources := suite.sources()) else {})


def _select(
    settings: Experiment, suite: Suite, tasks: list[str]
) -> tuple[merging.Method, dict[str, Any] | None]:
    """The method to report, and how its hyperparameter was chosen (None: it was not)."""
    candidates, chosen = _methods(settings), settings.selection
    if chosen.parameter is None:
        return candidates[0], None
    tried = []
    for method in track(candidates, f"selecting {chosen.parameter} on {chosen.split}"):
        state = merge_suite(settings, suite, tasks, method).state
        tried.append(_mean_accuracy(_score(settings, suite, state, chosen.split, tasks)))
    best = tried.index(max(tried))
    outcome = asdict(chosen) | {"accuracy": tried, "chosen": chosen.values[best]}
    return candidates[best], outcome


def merge_suite(
    settings: Experiment, suite: Suite, tasks: list[str], method: merging.Method
) -> Merge:
    """Merge the experts of some tasks, with the statistics that the method needs."""
    own = {"finetuning": settings.finetuning, "seed": settings.seed}
    paths = {task: suite.expert(task, **own) for task in tasks}
    if method.sequential:
        return _merge_sequentially(settings, suite, paths, method)
    experts = {task: load_expert(path) for task, path in paths.items()}
    collected, seconds = {}, 0.0
    if method.needs:
        for task in track(tasks, f"{method.needs} statistics"):
            path, spent = collect(settings, suite, task, method.needs)
            collected[task] = load_file(path)
            seconds += spent
    report = merging.Report()
    state = merging.merge_state_dicts(
        suite.base(),
        experts,
        method,
        layers=suite.layers(),
        statistics=collected or None,
        device=resolve_device(settings.device),
        vocabulary=getattr(suite, "vocabulary", "refuse"),  # of language models only
        report=report,
    )
    return Merge(state, report.summary(), report.seconds, seconds, report.peak_bytes)


def _merge_sequentially(
    settings: Experiment, suite: Suite, paths: Mapping[str, Path], method: merging.Method
) -> Merge:
    if not hasattr(suite, "second_moments"):
        raise Unsupported(
            f"suite {suite.name} cannot measure through a half-merged model, "
            f"which method {method.name!r} needs"
        )
    base, report = suite.base(), merging.Report()
    state, seconds = merge_blocks(
        suite,
        base,
        {task: expert_state(base, path) for task, path in paths.items()},
        method,
        **asdict(settings.statistics),
        device=resolve_device(settings.device),
        report=report,
    )
    return Merge(state, report.summary(), report.seconds, seconds, report.peak_bytes)


@functools.lru_cache(maxsize=40)  # two seeds of the largest suite; memory-mapped, so cheap
def load_expert(path: Path) -> Mapping[str, Tensor] | Adapter:
    """An expert's tensors, or its adapter."""
    source = open_checkpoint(path)
    if isinstance(source, Adapter):
        return source
    return {name: source.read(name) for name in source.keys()}


def collect(
    settings: HasStatistics, suite: Suite, task: str, kind: Statistic
) -> tuple[Path, float]:
    """The file of a task's statistics, and the seconds it took when it was collected."""
    start = time.perf_counter()
    path = suite.statistics(
        task,
        kind,
        finetuning=settings.finetuning,
        seed=settings.seed,
        **asdict(settings.statistics),
    )
    spent = path.with_suffix(".seconds")  # beside it, as the next run finds it collected
    if not spent.exists():
        spent.write_text(f"{time.perf_counter() - start:.3f}")
    return path, float(spent.read_text())


def _unmerged(
    settings: Experiment, suite: Suite, tasks: list[str]
) -> Iterator[tuple[Mapping[str, Tensor], list[str]]]:
    """States that no merge made, each with the tasks it is judged on."""
    name, own = settings.method["name"], {"finetuning": settings.finetuning, "seed": settings.seed}
    if name == "zero_shot":
        yield suite.base(), tasks
    elif name == "experts":
        for task in track(tasks, "evaluating experts"):
            yield expert_state(suite.base(), suite.expert(task, **own)), [task]
    elif not hasattr(suite, "multi_task"):
        raise Unsupported(f"suite {suite.name} has no model trained on all tasks at once")
    else:
        yield expert_state(suite.base(), suite.multi_task(**own)), tasks


def _score(
    settings: Experiment, suite: Suite, state: Mapping[str, Tensor], split: str, tasks: list[str]
) -> dict[str, Any]:
    """{task, or benchmark of a task: {accuracy, count, constant}}"""
    scores = suite.evaluate(state, split, tasks, settings.limit)
    return {column: score._asdict() for column, score in scores.items()}


def _mean_accuracy(scores: Mapping[str, Any]) -> float:
    return fmean(score["accuracy"] for score in _single(scores).values())


def _single(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Without the columns "name@k", which repeat a benchmark with k attempts."""
    return {column: score for column, score in scores.items() if "@" not in column}


def _normalised(scores: Mapping[str, Any], experts: Mapping[str, Any]) -> float | None:
    """Mean over tasks of accuracy / expert's accuracy; None where an expert is never right."""
    own = _single(scores)
    pairs = [(score["accuracy"], experts[task]["accuracy"]) for task, score in own.items()]
    return fmean(a / e for a, e in pairs) if all(e for _, e in pairs) else None


def _data_use(method: merging.Method, selection: object | None) -> str:
    used = ["training inputs"] * bool(method.needs) + ["validation"] * bool(selection)
    return ", ".join(used) or "none"

"""One run: merge the experts of a suite by one method, score the result, leave a record."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock
from torch import Tensor

import merging
from eval.language import heldout
from eval.suite import Suite
from eval.training import expert_state
from experiments.report import records
from experiments.report.records import Record
from experiments.settings import (
    REFERENCES,
    UNMERGED,
    Experiment,
    Selection,
    check_choices,
    resolve_device,
)
from experiments.suite_merge import Merge, prepare
from experiments.suites import load_suite, pick_tasks, under_protocol
from merging.errors import InputError
from merging.progress import track

log = logging.getLogger(__name__)
# Hyperparameters that are younger than the first records of their method, which lack them.
LATER: dict[str, dict[str, Any]] = {"both_sides": {"estimator": "delta"}}


def measure(settings: Experiment) -> Record:
    """The record of a run: found when the run was done before, else made now.

    Raises InputError, before any heavy work, for whatever is wrong with the settings.
    """
    suite = check(settings)
    key = _key(settings, suite)
    path = records.record_path(Path(settings.records), key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")):  # a second process waits and finds it
        if path.exists() and not settings.force:
            if key["method"] not in UNMERGED:
                log.info("%s: already done; force=true does it again", path.stem)
            return records.load(path)
        merge, method, selection = Merge({}), None, None
        if key["method"] not in UNMERGED:
            method, selection = _select(settings, suite, key["tasks"])
            with prepare(settings, suite, key["tasks"], method) as prepared:
                merge = prepared.finish(prepared.call())
        try:
            record = _record(settings, suite, key, merge) | {
                "data": _data_use(method, selection),
                "selection": selection,
            }
        finally:
            merge.discard()
        records.save(path, record)
        return records.load(path)  # in the order in which it is found the next time


def is_done(settings: Experiment) -> bool:
    """Whether there is a record of this run; costs no download."""
    if settings.force:
        return False
    return records.record_path(Path(settings.records), _key(settings, check(settings))).exists()


def found(settings: Experiment) -> Record | None:
    """The record of a run that is done together with its references; costs no download."""
    folder, names = Path(settings.records) / settings.suite["name"], REFERENCES
    if not all(any(folder.glob(f"{n}-*.json")) for n in (settings.method["name"], *names)):
        return None  # nor a look at the checkpoints, which decide a key
    if settings.force or not all(is_done(_as_reference(settings, name)) for name in names):
        return None
    path = records.record_path(Path(settings.records), _key(settings, check(settings)))
    return records.load(path) if path.exists() else None


def references(settings: Experiment) -> dict[str, Record]:
    """Records of zero_shot and experts under the same settings, measured when absent."""
    return {name: _reference(settings, name) for name in REFERENCES}


def _reference(settings: Experiment, name: str) -> Record:
    return measure(_as_reference(settings, name))


def _as_reference(settings: Experiment, name: str) -> Experiment:
    plain = {"method": {"name": name}, "selection": Selection(), "force": False}
    plain |= {"weights": {}, "weights_on": None}
    return replace(settings, **plain)


def check(settings: Experiment) -> Suite:
    """InputError for whatever can be known to be wrong before anything is computed; the suite."""
    check_choices(settings)
    _check_selection(settings)
    suite = load_suite(under_protocol(settings.suite, settings.protocol), settings.device)
    _check_heldout(settings, suite)
    _check_weights(settings, pick_tasks(suite, settings.tasks))
    name = settings.method["name"]
    if name not in UNMERGED:
        _methods(settings)
    elif extra := sorted(set(settings.method) - {"name"}):
        raise InputError(f"{name} has no hyperparameter {extra[0]!r}")
    return suite


def _check_weights(settings: Experiment, tasks: Collection[str]) -> None:
    """InputError for weights of experts that take no part, or that the merge would refuse."""
    if unknown := sorted(set(settings.weights) - set(tasks)):
        raise InputError(
            f"weights names {unknown[0]!r}, which is no task of this run",
            f"tasks: {', '.join(tasks)}",
        )
    if settings.weights and settings.method["name"] in UNMERGED:
        raise InputError(f"{settings.method['name']} merges nothing that could be weighted")


def _check_heldout(settings: Experiment, suite: Suite) -> None:
    merged = pick_tasks(suite, settings.tasks)
    own, beside = _heldout(suite, settings.heldout)
    if beside:
        heldout.check(suite, beside)
    for task in own:
        if task in merged:
            raise InputError(
                f"task {task!r} is held out and merged too",
                hint=f"merge the others with tasks=[{','.join(t for t in merged if t != task)}]",
            )


def _heldout(suite: Suite, names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Tasks of the suite, in its order, and others, which are lm-eval's."""
    asked = set(names or ())
    return [task for task in suite.tasks if task in asked], sorted(asked - set(suite.tasks))


def _check_selection(settings: Experiment) -> None:
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
    tasks = pick_tasks(suite, settings.tasks)
    suite.backend.check(tasks)
    hyperparameters, needs = {}, None
    if name not in UNMERGED:
        method = _methods(settings)[0]
        hyperparameters, needs = dict(method.hyperparameters), method.needs
        hyperparameters.pop(chosen.parameter, None)
        for later, default in LATER.get(name, {}).items():
            if hyperparameters.get(later) == default:
                del hyperparameters[later]
    optional: dict[str, Any] = {}  # absent from records made before there was a choice
    if protocol := suite.backend.protocol_key(statistics=bool(needs)):
        optional["protocol"] = protocol
    if not settings.split_qkv and name not in UNMERGED:
        optional["split_qkv"] = False
    if settings.weights and name not in UNMERGED:
        optional["weights"] = dict(sorted(settings.weights.items()))
        optional["weights_on"] = settings.weights_on
    if settings.heldout:
        optional["heldout"] = [*chain(*_heldout(suite, settings.heldout))]
    return {
        "suite": suite.name,
        "experts": suite.identity(finetuning=settings.finetuning, seed=settings.seed),
        "method": name,
        "hyperparameters": hyperparameters,
        "finetuning": settings.finetuning,
        "seed": settings.seed,
        "split": settings.split,
        "tasks": tasks,
        "limit": settings.limit,
        "statistics": asdict(settings.statistics) if needs else None,
        "selection": asdict(chosen) if chosen.parameter else None,
    } | optional


def _given(**parts: Any) -> dict[str, Any]:
    """Those that say something; the records of before they existed lack the others."""
    return {name: part for name, part in parts.items() if part}


def _methods(settings: Experiment) -> list[merging.Method]:
    """The method with each value of the selection, or as it stands."""
    chosen = settings.selection
    candidates: list[dict[str, Any]] = [{}]
    if chosen.parameter is not None:
        candidates = [{chosen.parameter: value} for value in chosen.values]
    return [merging.create(**dict(settings.method) | candidate) for candidate in candidates]


def _record(settings: Experiment, suite: Suite, key: dict[str, Any], merge: Merge) -> Record:
    """What a merge scores and cost; how it was chosen is for the caller to add."""
    name = key["method"]
    judged = [(merge.state, key["tasks"])]
    if name in UNMERGED:
        judged = _unmerged(settings, suite, key["tasks"])
    start, scores, beside = time.perf_counter(), {}, []
    for state, tasks in judged:
        scores |= _score(settings, suite, state, settings.split, tasks)
        if key.get("heldout"):
            beside.append(_score_heldout(settings, suite, state, key["heldout"]))
    evaluation = time.perf_counter() - start
    packed = {column: score.pop("correct") for column, score in scores.items()}
    experts = scores if name == "experts" else _reference(settings, "experts")["scores"]
    return {
        "schema": records.SCHEMA,
        "key": key,
        "family": suite.family,
        "metric": suite.metric,
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
    } | _given(
        sources=suite.backend.sources(),
        heldout=_mean_scores(beside),
        correct=_given(**packed),
    )


def _select(
    settings: Experiment, suite: Suite, tasks: list[str]
) -> tuple[merging.Method, dict[str, Any] | None]:
    """The method to report, and how its hyperparameter was chosen (None: it was not)."""
    candidates, chosen = _methods(settings), settings.selection
    if chosen.parameter is None:
        return candidates[0], None
    tried = []
    for method in track(candidates, f"selecting {chosen.parameter} on {chosen.split}"):
        with prepare(settings, suite, tasks, method) as prepared:
            merge = prepared.finish(prepared.call())
        tried.append(_mean_accuracy(_score(settings, suite, merge.state, chosen.split, tasks)))
        merge.discard()
    best = tried.index(max(tried))
    outcome = asdict(chosen) | {"accuracy": tried, "chosen": chosen.values[best]}
    return candidates[best], outcome


def _unmerged(
    settings: Experiment, suite: Suite, tasks: list[str]
) -> Iterator[tuple[Mapping[str, Tensor] | Path, list[str]]]:
    """States that no merge made, each with the tasks it is judged on."""
    name, own = settings.method["name"], {"finetuning": settings.finetuning, "seed": settings.seed}
    disk = suite.on_disk
    if name == "zero_shot":
        yield disk.checkpoint() if disk else suite.base(), tasks
    elif name == "experts":
        for task in track(tasks, "evaluating experts"):
            path = suite.expert(task, **own)
            yield path if disk else expert_state(suite.base(), path), [task]
    else:
        yield expert_state(suite.base(), suite.multi_task(**own)), tasks


def _score(
    settings: Experiment,
    suite: Suite,
    state: Mapping[str, Tensor] | Path,
    split: str,
    tasks: list[str],
) -> dict[str, Any]:
    """{task, or benchmark of a task: {accuracy, count, constant, correct}}"""
    scores = suite.evaluate(state, split, tasks, settings.limit)
    return {column: score._asdict() for column, score in scores.items()}


def _score_heldout(
    settings: Experiment, suite: Suite, state: Mapping[str, Tensor] | Path, names: list[str]
) -> dict[str, Any]:
    own, beside = _heldout(suite, names)
    scores = _score(settings, suite, state, settings.split, own) if own else {}
    found = heldout.evaluate(suite, state, beside, settings.limit) if beside else {}
    return scores | {column: score._asdict() for column, score in found.items()}


def _mean_scores(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one state as they are; of several (every expert), the mean accuracy of each column."""
    return {
        column: {
            "accuracy": fmean(scores[column]["accuracy"] for scores in found),
            "count": score["count"],
            "constant": score["constant"],
        }
        for column, score in (found[0] if found else {}).items()
    }


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


def _data_use(method: merging.Method | None, selection: object | None) -> str:
    needs = method is not None and method.needs
    used = ["training inputs"] * bool(needs) + ["validation"] * bool(selection)
    return ", ".join(used) or "none"

"""Suites from their configurations, and what commands ask of them: tasks, experts, statistics."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.backend import Statistic
from eval.registry import KINDS
from experiments.errors import did_you_mean
from experiments.settings import HasStatistics, resolve_device
from merging.errors import InputError
from merging.experts import Expert
from merging.formats.checkpoints import open_checkpoint
from merging.formats.disk import write_synced

if TYPE_CHECKING:
    from eval.suite import Suite


def load_suite(config: Mapping[str, Any], device: str) -> Suite:
    """The suite of a configuration; the same object each time, so that a sweep loads data once."""
    own = {"device": resolve_device(device)} if "device" in config else {}
    return _suite(json.dumps(dict(config) | own))


@functools.lru_cache(maxsize=2)
def _suite(config: str) -> Suite:
    return build(json.loads(config))


def build(config: Mapping[str, Any]) -> Suite:
    """The suite of a configuration; InputError for what it does not have, or lacks."""
    from eval.suite import Suite

    check_suite(config)
    backend = KINDS[config["kind"]].load()
    return Suite(backend(**{key: value for key, value in config.items() if key != "kind"}))


def check_suite(config: Mapping[str, Any]) -> None:
    """InputError for a suite of no known kind, or with settings that its kind does not have."""
    if (kind := config.get("kind")) not in KINDS:
        raise InputError(f"suite.kind is {kind!r}", f"expected one of: {', '.join(KINDS)}")
    known = {field.name: field for field in fields(KINDS[kind].load())}
    if unknown := sorted(set(config) - set(known) - {"kind"}):
        raise InputError(f"suite has no setting {unknown[0]!r}", did_you_mean(unknown[0], known))
    required = [n for n, f in known.items() if f.default is f.default_factory is MISSING]
    if missing := [name for name in required if name not in config]:
        raise InputError(f"a suite of kind {kind!r} needs {missing[0]!r}")


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


def pick_tasks(suite: Suite, names: Sequence[str] | None) -> list[str]:
    """The named tasks in the suite's order, all of them for None."""
    if unknown := sorted(set(names or ()) - set(suite.tasks)):
        raise InputError(
            f"suite {suite.name} has no task {unknown[0]!r}", did_you_mean(unknown[0], suite.tasks)
        )
    return [task for task in suite.tasks if names is None or task in names]


@functools.lru_cache(maxsize=40)  # two seeds of the largest suite; memory-mapped, so cheap
def load_expert(path: Path) -> Expert:
    """An expert, opened once."""
    return open_checkpoint(path)


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
        write_synced(spent, f"{time.perf_counter() - start:.3f}")
    return path, float(spent.read_text())

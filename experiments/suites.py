"""Suites from their configurations, and what commands ask of them: tasks, experts, statistics."""

from __future__ import annotations

import functools
import importlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from eval.suite import Statistic, Suite
from experiments.errors import did_you_mean
from experiments.settings import HasStatistics, resolve_device
from merging.errors import InputError
from merging.experts import Expert
from merging.formats.checkpoints import open_checkpoint
from merging.formats.disk import write_synced


def load_suite(config: Mapping[str, Any], device: str) -> Suite:
    """The suite of a configuration; the same object each time, so that a sweep loads data once."""
    own = {"device": resolve_device(device)} if "device" in config else {}
    return _suite(json.dumps(dict(config) | own))


@functools.lru_cache(maxsize=2)
def _suite(config: str) -> Suite:
    return build(json.loads(config))


def build(node: Mapping[str, Any]) -> Any:
    """Instantiate a configuration that `check_targets` has admitted."""
    check_targets(node)
    return instantiate(OmegaConf.create(dict(node)), _convert_="all")


def check_targets(node: Any, where: str = "config") -> None:
    """Refuse a `_target_` that is not a dataclass of eval/, and settings it does not have."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            known = {field.name for field in fields(_declared(node["_target_"], where))}
            if unknown := sorted(set(node) - known - {"_target_", "_convert_"}):
                raise InputError(
                    f"{where} has no setting {unknown[0]!r}", did_you_mean(unknown[0], known)
                )
        for key, value in node.items():
            check_targets(value, f"{where}.{key}" if where != "config" else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            check_targets(value, f"{where}[{i}]")


def _declared(target: Any, where: str) -> type:
    """The class a `_target_` names, if it is one that configs may construct."""
    if isinstance(target, str) and re.fullmatch(r"eval(\.[a-z_0-9]+)+\.[A-Za-z_0-9]+", target):
        module, _, name = target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            found = None
        # defined there, not merely imported there
        if isinstance(found, type) and is_dataclass(found) and found.__module__ == module:
            return found
    raise InputError(
        f"{where}._target_ is {target!r}, expected a suite of this project",
        hint="configs may construct only the dataclasses that modules of eval/ define",
    )


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

"""`python -m experiments.statistics suite=... kind=...`: collect statistics ahead of the runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, get_args

from eval.suite import Statistic
from experiments.hydra_run import Command
from experiments.settings import Statistics, check_choices
from experiments.suites import collect, load_suite, pick_tasks, under_protocol
from merging.errors import InputError
from merging.progress import track

log = logging.getLogger(__name__)


@dataclass
class Collect:
    """The keys of configs/statistics.yaml."""

    suite: dict[str, Any]
    kind: str = "covariance"
    task: str = "all"
    finetuning: str = "full"
    seed: int = 0
    protocol: str | None = None
    device: str = "auto"
    statistics: Statistics = field(default_factory=Statistics)


def collect_statistics(settings: Collect) -> None:
    """Second moments of every layer's inputs, or the Fisher diagonal, through each expert."""
    check_choices(settings)
    if settings.kind not in get_args(Statistic):
        raise InputError(
            f"kind is {settings.kind!r}, expected one of: {', '.join(get_args(Statistic))}"
        )
    suite = load_suite(under_protocol(settings.suite, settings.protocol), settings.device)
    tasks = pick_tasks(suite, None if settings.task == "all" else [settings.task])
    for task in track(tasks, f"{settings.kind} statistics"):
        suite.expert(task, finetuning=settings.finetuning, seed=settings.seed)
        path, seconds = collect(settings, suite, task, settings.kind)
        log.info("%s: %s, %.1f s, %.1f MB", task, path, seconds, path.stat().st_size / 1e6)


COMMAND = Command("statistics", Collect, task=collect_statistics)

"""`python -m experiments.statistics ...`: what methods with data see, measured ahead of a merge."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from eval.backend import Statistic
from experiments.hydra_run import Command
from experiments.settings import Statistics, check_choices, resolve_device
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
    checkpoint: str | None = None
    base: str | None = None
    texts: str | None = None
    images: str | None = None
    output: str | None = None


def collect_statistics(settings: Collect) -> None:
    """Second moments of every layer's inputs, or the Fisher diagonal, through each expert."""
    check_choices(settings)
    if settings.kind not in get_args(Statistic):
        raise InputError(
            f"kind is {settings.kind!r}, expected one of: {', '.join(get_args(Statistic))}"
        )
    if settings.checkpoint is not None:
        _of_checkpoint(settings)
        return
    suite = load_suite(under_protocol(settings.suite, settings.protocol), settings.device)
    tasks = pick_tasks(suite, None if settings.task == "all" else [settings.task])
    for task in track(tasks, f"{settings.kind} statistics"):
        suite.expert(task, finetuning=settings.finetuning, seed=settings.seed)
        path, seconds = collect(settings, suite, task, settings.kind)
        log.info("%s: %s, %.1f s, %.1f MB", task, path, seconds, path.stat().st_size / 1e6)


def _of_checkpoint(settings: Collect) -> None:
    """Of the user's own checkpoint, on inputs of the user's own."""
    from eval import own_inputs  # transformers, for those who asked for it

    if settings.kind != "covariance":
        raise InputError(
            f"kind={settings.kind} of a checkpoint of your own needs labels and a loss",
            hint="only suites have them; kind=covariance is what RegMean and its kin read",
        )
    if (settings.texts is None) == (settings.images is None):
        raise InputError("checkpoint= needs inputs", "add texts=FILE, or images=FOLDER")
    if settings.output is None or not settings.output.endswith(".safetensors"):
        raise InputError(f"output is {settings.output!r}, expected the name of a .safetensors file")
    size, count = settings.statistics.batch_size, settings.statistics.batches
    report = own_inputs.measure(
        Path(settings.checkpoint),
        Path(settings.output),
        base=Path(settings.base) if settings.base else None,
        texts=Path(settings.texts) if settings.texts else None,
        images=Path(settings.images) if settings.images else None,
        batches=count,
        batch_size=size,
        device=resolve_device(settings.device),
    )
    print(f"second moments of {report.layers} layers' inputs over {report.inputs} inputs")
    print(f"written to {settings.output}: give it to a merge as statistics.NAME={settings.output}")


COMMAND = Command("statistics", Collect, task=collect_statistics)

"""`python -m experiments.finetune suite=... task=all`: train experts ahead of the runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from experiments.hydra_run import Command
from experiments.settings import check_choices
from experiments.suites import load_suite, pick_tasks, under_protocol
from merging.progress import track

log = logging.getLogger(__name__)


@dataclass
class Finetune:
    """The keys of configs/finetune.yaml."""

    suite: dict[str, Any]
    task: str = "all"
    finetuning: str = "full"
    seed: int = 0
    protocol: str | None = None
    device: str = "auto"


def finetune(settings: Finetune) -> None:
    """Train (or find) the experts of one task or all, full or LoRA."""
    check_choices(settings)
    suite = load_suite(under_protocol(settings.suite, settings.protocol), settings.device)
    tasks = pick_tasks(suite, None if settings.task == "all" else [settings.task])
    for task in track(tasks, "fine-tuning"):
        path = suite.expert(task, finetuning=settings.finetuning, seed=settings.seed)
        log.info("%s: %s", task, path)


COMMAND = Command("finetune", Finetune, task=finetune)

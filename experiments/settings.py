"""Settings that several commands share. In a module of their own, so that other processes of a
sweep, and whoever imports a command, find the same classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from eval.backend import Finetuning, Split
from merging.errors import InputError

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
    split_qkv: bool = True
    weights: dict[str, float] = field(default_factory=dict)
    weights_on: str | None = None
    tasks: list[str] | None = None
    heldout: list[str] | None = None
    split: str = "test"
    limit: int | None = None
    device: str = "auto"
    records: str = "runs/records"
    force: bool = False


def check_choices(settings: object) -> None:
    """InputError for settings whose value is none of the few that exist."""
    for name, known in (("finetuning", get_args(Finetuning)), ("split", get_args(Split))):
        if (value := getattr(settings, name, known[0])) not in known:
            raise InputError(f"{name} is {value!r}, expected one of: {', '.join(known)}")


def resolve_device(name: str) -> str:
    """ "auto" is a GPU, else the CPU; a GPU that is not there is an InputError.

    Jobs that a launcher runs side by side on one machine take its GPUs in turn.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        number = _parallel_job()
        return "cuda" if number is None else f"cuda:{number % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}", "known: auto, cpu, cuda, cuda:1") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name!r} was asked for, but this machine has {count} usable GPUs")
    return name


def _parallel_job() -> int | None:
    """The number of this job of a sweep whose jobs run in processes of their own."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    hydra = HydraConfig.get()
    return None if "BasicLauncher" in hydra.launcher._target_ else int(hydra.job.num)

"""What a table will take, found out from headers alone before anything heavy starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from eval.cache import cache_root
from eval.data.hub import Unreachable
from eval.requirements import Requirement
from eval.suite import Suite
from experiments.measurement import is_done
from experiments.report.paper import Cost, Paper
from experiments.settings import UNMERGED, Experiment, resolve_device
from experiments.suites import load_suite, under_protocol
from merging import create
from merging.errors import InputError

GB = 1e9
SHOWN = 3  # problems told apart; more are counted


@dataclass(frozen=True)
class Row:
    """One line of the table: what is said of it, the run behind it, and whether that is done."""

    name: str
    settings: Experiment
    done: bool


@dataclass
class Survey:
    """What was found: `problems` are (what is wrong, what to do), and empty if all holds."""

    rows: list[Row]
    requirements: list[Requirement] = field(default_factory=list)
    room: list[tuple[str, float, float]] = field(default_factory=list)  # what, needed, free bytes
    minutes: float | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)


def survey(paper: Paper, named: Sequence[tuple[str, Experiment]]) -> Survey:
    """Everything a table needs that is not done yet: files, disk, memory, a GPU, time."""
    suite = _suite(named[0][1])
    tasks = list(named[0][1].tasks or suite.tasks)
    found = Survey([])
    _find_records(found, named)
    left = [row.settings for row in found.rows if not row.done]
    if not left:
        return found
    inputs = any(_needs_inputs(settings) for settings in left)
    found.requirements = suite.backend.requirements(
        tasks,
        finetuning=left[0].finetuning,
        inputs=inputs,
        validation=any(settings.selection.parameter is not None for settings in left),
    )
    found.problems += [(r.problem, r.hint) for r in found.requirements if r.problem]
    own: Mapping[str, int] = {}
    try:
        own = suite.backend.footprint(tasks, paper.cost.images, inputs)
    except InputError as error:
        found.problems.append((error.message, error.hint))
    _measure_room(found, own, paper.cost)
    found.minutes = _minutes(paper.cost, len(left), resolve_device(left[0].device))
    return found


def _find_records(found: Survey, named: Sequence[tuple[str, Experiment]]) -> None:
    """Add every row, and what keeps one from being looked up: then it is not done."""
    silent = False
    for name, run in named:
        done = False
        try:
            done = not silent and is_done(run)
        except InputError as error:
            silent |= isinstance(error, Unreachable)  # it would be silent for every other row too
            found.problems.append((error.message, error.hint))
        found.rows.append(Row(name, run, done))


def _suite(settings: Experiment) -> Suite:
    return load_suite(under_protocol(settings.suite, settings.protocol), settings.device)


def _needs_inputs(settings: Experiment) -> bool:
    name = settings.method["name"]
    return name not in UNMERGED and create(**dict(settings.method)).needs is not None


def _measure_room(found: Survey, own: Mapping[str, int], cost: Cost) -> None:
    """Add what disks, memory and GPU have beside what they must have.

    own: the suite's footprint.
    """
    fetched = sum(requirement.bytes for requirement in found.requirements)
    disks: dict[int, tuple[Path, float]] = {}  # one disk may hold both caches
    for folder, needed in ((Path(constants.HF_HUB_CACHE), fetched), (cache_root(), fetched)):
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        device = place.stat().st_dev
        disks[device] = (place, disks.get(device, (place, 0.0))[1] + needed)
    cache = next(p for p in (cache_root(), *cache_root().absolute().parents) if p.exists())
    place, needed = disks[cache.stat().st_dev]
    disks[cache.stat().st_dev] = (place, needed + own.get("disk", 0))
    for place, needed in disks.values():
        _room(found, f"disk of {place}", needed, shutil.disk_usage(place).free, _DISK)
    memory = max(own.get("memory", 0), cost.memory_gb * GB)
    _room(found, "memory", memory, psutil.virtual_memory().available, _MEMORY)
    if cost.gpu_gb:
        here = torch.cuda.is_available()
        free = torch.cuda.get_device_properties(0).total_memory if here else 0
        _room(found, "memory of a GPU", cost.gpu_gb * GB, free, _GPU)


_DISK = "free some, or point HF_HOME and MODEL_MERGING_CACHE elsewhere"
_MEMORY = "stop what else runs here, or take a machine with more"
_GPU = "take a machine with such a GPU, or say paper.cost.gpu_gb=0 if you know better"


def _room(found: Survey, what: str, needed: float, free: float, hint: str) -> None:
    found.room.append((what, needed, free))
    if needed > free:
        told = f"{what}: {needed / GB:.1f} GB are needed and {free / GB:.1f} GB are free"
        found.problems.append((told, hint))


def _minutes(cost: Cost, rows: int, device: str) -> float | None:
    each = cost.cpu_minutes if device == "cpu" else cost.gpu_minutes
    return None if each is None else cost.once_minutes + rows * each


def show(found: Survey, paper: Paper, console: Console) -> None:
    """Print what is there, what is fetched, and what it will take."""
    done = [row for row in found.rows if row.done]
    console.print(f"{paper.title}: {len(found.rows)} rows, {len(done)} of them done")
    for row in found.rows:
        console.print(f"  {'done ' if row.done else 'to do'}  {row.name}")
    if len(done) == len(found.rows):
        return
    table = Table("needed", "from", "files to fetch", "GB")
    for item in found.requirements:
        amount = ["", ""] if item.problem else [str(item.files), f"{item.bytes / GB:.2f}"]
        table.add_row(item.what, item.place, *(["cannot be had", ""] if item.problem else amount))
    if found.requirements:
        total = sum(item.bytes for item in found.requirements)
        table.add_section()
        table.add_row("all", "", str(sum(i.files for i in found.requirements)), f"{total / GB:.2f}")
        console.print(table)
    for what, needed, free in found.room:
        console.print(f"{what}: {needed / GB:.1f} GB needed, {free / GB:.1f} GB free")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    console.print(f"GPU: {gpu}")
    device = resolve_device(found.rows[0].settings.device)
    where = "without a GPU" if device == "cpu" else "on one GPU"
    console.print(f"estimated time: {_duration(found.minutes)} {where}")
    if paper.cost.note:
        console.print(paper.cost.note)


def _duration(minutes: float | None) -> str:
    if minutes is None:
        return "no sensible one"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def refuse(found: Survey, name: str) -> None:
    """One InputError for all that does not hold."""
    problems = list(dict.fromkeys(found.problems))
    if not problems:
        return
    told = "; ".join(problem for problem, _ in problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    hints = "; ".join(dict.fromkeys(hint for _, hint in problems[:SHOWN] if hint))
    raise InputError(f"{name} cannot start: {told}{more}", hints)

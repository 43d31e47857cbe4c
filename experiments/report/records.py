"""One JSON record per finished run: what it depended on, what it measured, on what machine.

A record is a dictionary with these fields:

    schema      version of this layout
    key         all that determines the scores: suite, experts (the suite's identity of them),
                method, hyperparameters, finetuning, seed, split, tasks, limit, statistics,
                selection; protocol (see `eval.backend.Backend.protocol_key`) where it has
                one: without the field, the one its code had before there were several
    family      checkpoint family; figures of different families are never compared
    metric      what "accuracy" is on this suite
    data        what the method saw beside the checkpoints: none, validation, training inputs
    selection   null, or {parameter, split, values, accuracy on that split for each value, chosen}
    scores      {task: {accuracy in [0, 1], count, constant}}
    mean        mean accuracy over the tasks
    normalised  mean over the tasks of accuracy / the expert's accuracy; null for a zero expert
    rules       how many tensors were merged by which rule
    seconds     {merge, statistics, evaluation}, wall clock
    peak_bytes  highest resident memory while merging (on a GPU: of its allocator)
    versions    python, torch, transformers, merging
    machine     cpu, cores, ram_gb, gpu, device
    heldout     scores of tasks that no merged expert has learnt; of "experts", the mean over
                them; absent where none was asked for
    correct     {task: which examples were right, as `eval.suite.bits` writes it}; absent in records
                made before it was kept, and where a figure is not of single examples
    sources     {repository: commit} that was downloaded; absent where nothing was
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eval.cache import digest
from merging.errors import InputError
from merging.formats.disk import write_synced

SCHEMA = 1
FIELDS = frozenset(
    {
        "schema", "key", "family", "metric", "data", "selection", "scores", "mean", "normalised",
        "rules", "seconds", "peak_bytes", "versions", "machine",
    }
)  # fmt: skip
OPTIONAL = frozenset({"heldout", "sources", "correct"})
REMOVE = "remove it and run again"
Record = dict[str, Any]


def record_path(root: Path, key: Mapping[str, Any]) -> Path:
    """Where the record of these settings lives: `root/<suite>/<method>-<digest of key>.json`."""
    return root / key["suite"] / f"{key['method']}-{digest(key)}.json"


def save(path: Path, record: Record) -> None:
    """Write a record so that it is there whole or not at all."""
    write_synced(path, json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")


def load(path: Path) -> Record:
    """Read a record back; InputError when it is damaged or of another schema."""
    return _parse(path.read_text(errors="replace"), str(path))


def load_all(folder: Path) -> list[Record]:
    """Every record below a folder, in the order of their file names."""
    return [load(path) for path in sorted(folder.glob("*.json"))]


def save_lines(path: Path, records: Iterable[Record]) -> None:
    """Write records as sorted JSON lines: the same records always give the same bytes."""
    lines = sorted(json.dumps(r, sort_keys=True, allow_nan=False) for r in records)
    write_synced(path, "".join(line + "\n" for line in lines))


def load_lines(path: Path) -> list[Record]:
    """Records of a JSON lines file, which `save_lines` wrote."""
    lines = path.read_text(errors="replace").splitlines()
    return [_parse(line, f"{path}, line {i},") for i, line in enumerate(lines, 1)]


def merged(*groups: Iterable[Record]) -> list[Record]:
    """Records of all groups; where two have the same key, the later group's."""
    return list({digest(r["key"]): r for group in groups for r in group}.values())


def _parse(text: str, where: str) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise InputError(f"record {where} is damaged: {error}", REMOVE) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise InputError(
            f"record {where} has schema {schema!r}, expected {SCHEMA}",
            hint="remove it and run again with this version",
        )
    if wrong := sorted((set(record) - OPTIONAL) ^ FIELDS):
        raise InputError(f"record {where} is damaged: field {wrong[0]!r}", REMOVE)
    return record


def versions() -> dict[str, str]:
    """Versions of what computes, as far as it is installed."""
    found = {"python": platform.python_version()}
    packages = {"torch": "torch", "transformers": "transformers", "merging": "model-merging"}
    for name, package in packages.items():
        with suppress(PackageNotFoundError):
            found[name] = version(package)
    return found


def machine(device: str) -> dict[str, Any]:
    """The hardware, without anything that names the computer or its user."""
    import psutil

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_gb": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": device,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""`python -m experiments.merge base=... experts.NAME=... output=...`: merge your checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import merging
from eval.cache import file_sha256
from eval.language.checkpoints import companions, require_mergeable
from experiments.hydra_run import Command
from experiments.report.markup import markdown
from experiments.report.records import versions
from experiments.settings import resolve_device
from merging.errors import InputError
from merging.progress import track

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


PATHS = r"\+*((?:experts|statistics)\.[^=]+|base|expert|output|architecture)=(.*)"


@dataclass
class MergeCheckpoints:
    """The keys of configs/merge.yaml."""

    base: str
    experts: dict[str, str]
    method: dict[str, Any]
    output: str
    statistics: dict[str, str] = field(default_factory=dict)
    architecture: str | None = None
    split_qkv: bool = True
    vocabulary: str = "refuse"
    form: str = "dense"
    device: Any = "auto"
    seed: int = 0
    overwrite: bool = False
    strict: bool = False


def quote_paths(overrides: list[str]) -> list[str]:
    """Spare users Hydra's grammar: experts and statistics need no `+`, paths no quotes."""
    prepared = []
    for override in overrides:
        match = re.fullmatch(PATHS, override)
        if match:
            key, path = match.groups()
            plus = "++" if "." in key else ""
            quoted = path[:1] in {"'", '"'} or path == "null"
            override = f"{plus}{key}=" + (path if quoted else "'" + path.replace("'", r"\'") + "'")
        prepared.append(override)
    return prepared


def merge(settings: MergeCheckpoints) -> merging.Report:
    """Merge checkpoints into one."""
    method = merging.create(**settings.method)
    base, output = Path(settings.base), Path(settings.output)
    if not settings.experts:
        raise InputError("no experts were given", hint="add experts.NAME=PATH for each of them")
    devices = settings.device if isinstance(settings.device, list) else [settings.device]
    devices = [resolve_device(device) for device in devices]
    experts = {task: Path(path) for task, path in settings.experts.items()}
    require_mergeable(base, experts, vocabulary=settings.vocabulary, name=settings.base)

    def extra() -> dict[str, bytes | Path]:
        if output.suffix == ".safetensors":
            return {}
        files = companions(base) if settings.form == "dense" else {}
        return files | {"README.md": model_card(settings, method).encode()}

    return merging.merge_checkpoints(
        base,
        experts,
        method,
        output,
        layers=Path(settings.architecture) if settings.architecture else None,
        statistics=settings.statistics or None,
        device=devices,
        split_qkv=settings.split_qkv,
        vocabulary=settings.vocabulary,
        form=settings.form,
        overwrite=settings.overwrite,
        strict=settings.strict,
        extra=extra,
    )


def show(settings: MergeCheckpoints, report: merging.Report) -> None:
    """Print what the method reached, what it did not, and where the result lies."""
    print(f"{report.text()}\nwritten to {settings.output}")


def model_card(settings: MergeCheckpoints, method: merging.Method) -> str:
    """What the output is made of: inputs with their SHA-256, method, hyperparameters, versions."""
    inputs = {"base": settings.base} | settings.experts
    hashes = {name: weights_sha256(Path(path)) for name, path in track(inputs.items(), "hashing")}
    rows = [[name, Path(path).name, hashes[name]] for name, path in inputs.items()]
    own = json.dumps(dict(method.hyperparameters), sort_keys=True)
    packed = "apart" if settings.split_qkv else "together"
    return f"""---
tags: [merge]
---
# A merge by {method.name}

Method: {method.name} ({method.source}), hyperparameters `{own}`.
Data beside the checkpoints: {method.data}. Packed q, k, v were merged {packed}. Rule for
vocabularies of different sizes: {settings.vocabulary}.

{markdown(["role", "checkpoint", "SHA-256 of its weights"], rows)}
Made with {", ".join(f"{name} {version}" for name, version in versions().items())}.
"""


def weights_sha256(path: Path) -> str:
    """Of a weight file; of a folder, the SHA-256 over its weight files' own, in order of name."""
    if path.is_file():
        return file_sha256(path)
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
    hashes = [file_sha256(file) for file in files]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


COMMAND = Command("merge", MergeCheckpoints, task=merge, show=show, prepare=quote_paths)

"""`python -m experiments.merge base=... experts.NAME=... output=...`: merge your checkpoints."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import merging
from eval.cache import hub_sha256
from eval.companions import companions, home, weighted_modules, with_config
from eval.configurations import differences
from eval.language.checkpoints import require_mergeable
from experiments import recipes
from experiments.hydra_run import Command
from experiments.report.markup import markdown
from experiments.report.records import versions
from experiments.settings import resolve_device
from merging.errors import InputError
from merging.formats.hashes import Hashes
from merging.progress import track

log = logging.getLogger(__name__)
PATHS = (
    r"\+*((?:experts|statistics|weights|into)\.[^=]+|base|expert|output|architecture|recipe)=(.*)"
)
_PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_]\w*", re.ASCII | re.IGNORECASE)
_ENCODED = "name_"  # before names that Hydra's grammar has no way to write


@dataclass
class MergeCheckpoints:
    """The keys of configs/merge.yaml."""

    base: str
    experts: dict[str, str]
    method: dict[str, Any]
    output: str
    into: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    weights_on: str | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, str] = field(default_factory=dict)
    architecture: str | None = None
    split_qkv: bool = True
    vocabulary: str = "refuse"
    form: str = "dense"
    space: str = "full"
    rank: int | None = None
    dtype: str | None = None
    shard_size: Any = None
    device: Any = "auto"
    share: str | None = None
    seed: int = 0
    overwrite: bool = False
    strict: bool = False


def read_recipe(overrides: list[str]) -> list[str]:
    """The command line, with what a recipe=FILE on it says before all else."""
    files = [text.partition("=")[2] for text in overrides if text.startswith("recipe=")]
    recipe = recipes.overrides(Path(files[-1].strip("'\"")), overrides) if files else []
    options = [text for text in overrides if text.startswith("-")]
    return quote_paths([*options, *recipe, *(text for text in overrides if text not in options)])


def quote_paths(overrides: list[str]) -> list[str]:
    """Spare users Hydra's grammar: experts, weights and the like need no `+`, paths no quotes.

    Names of any characters are allowed: those that Hydra would take apart travel as hexadecimals.
    """
    prepared = []
    for override in told_parts(overrides):
        if re.match(r"(experts|statistics|weights|into)=\{", override):
            override = f"++{override}"  # names that the configuration cannot know
        match = re.fullmatch(PATHS, override)
        if match:
            key, path = match.groups()
            group, _, name = key.partition(".")
            if name and not re.fullmatch(
                r"(?!null$|true$|false$|nan$|inf$)[A-Za-z_]\w*", name, re.A | re.I
            ):
                key = f"{group}.{_ENCODED}{name.encode().hex()}"
            plus = "++" if "." in key else ""
            quoted = path[:1] in {"'", '"'} or path == "null" or group == "weights"
            override = f"{plus}{key}=" + (path if quoted else "'" + path.replace("'", r"\'") + "'")
        prepared.append(override)
    return prepared


def told_parts(overrides: list[str]) -> list[str]:
    """experts.NAME.into=PART as into.NAME=PART, where experts.NAME is an expert."""
    named = {text.lstrip("+").partition("=")[0] for text in overrides}
    matches = [re.fullmatch(r"\+*(experts\.(.+))\.into=(.*)", text) for text in overrides]
    return [
        f"into.{match[2]}={match[3]}" if match and match[1] in named else text
        for match, text in zip(matches, overrides, strict=True)
    ]


def plain_names(paths: Mapping[str, Any]) -> dict[str, Any]:
    """Paths or weights by the names that `quote_paths` may have encoded, in the names' order."""
    encoded = re.compile(rf"{_ENCODED}((?:[0-9a-f]{{2}})+)")
    found = {}
    for name, path in paths.items():
        match = encoded.fullmatch(name)
        found[bytes.fromhex(match[1]).decode() if match else name] = path
    return dict(sorted(found.items()))


def merge(settings: MergeCheckpoints) -> merging.Report:
    """Merge checkpoints into one."""
    settings.experts = plain_names(settings.experts)
    settings.statistics = plain_names(settings.statistics)
    settings.weights = plain_names(settings.weights)
    settings.into = plain_names(settings.into)
    method = merging.create(**settings.method)
    base, output = Path(settings.base), Path(settings.output)
    if not settings.experts:
        raise InputError("no experts were given", hint="add experts.NAME=PATH for each of them")
    devices = settings.device if isinstance(settings.device, list) else [settings.device]
    devices = [resolve_device(device) for device in devices]
    experts = {task: Path(path) for task, path in settings.experts.items()}
    changes = require_mergeable(
        base, experts, vocabulary=settings.vocabulary, name=settings.base, into=settings.into
    )
    for told in differences(base, experts, settings.into):
        log.warning("%s", told)
    parts = shared_modules(base, experts)
    for part in parts:
        inner = {task: path / part for task, path in experts.items()}
        require_mergeable(base / part, inner, vocabulary="refuse", name=settings.base)
    hashes = Hashes(known=hub_sha256)
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), settings.dtype) if settings.dtype else {}

    def extra() -> dict[str, bytes | Path]:
        if output.suffix == ".safetensors":
            return {}
        card = {"README.md": model_card(settings, method, hashes).encode()}
        if settings.form != "dense":
            return card
        files = with_config(companions(base), dtypes, drop=("quantization_config",), add=changes)
        for part in parts:
            files |= merged_module(settings, method, part)
        return files | card

    return merging.merge_checkpoints(
        base,
        experts,
        method,
        output,
        into=settings.into or None,
        parts=settings.parts,
        shard_size=settings.shard_size,
        rank=settings.rank,
        **_everywhere(settings),
        layers=Path(settings.architecture) if settings.architecture else None,
        statistics=settings.statistics or None,
        device=devices,
        share=settings.share,
        split_qkv=settings.split_qkv,
        vocabulary=settings.vocabulary,
        form=settings.form,
        space=settings.space,
        overwrite=settings.overwrite,
        strict=settings.strict,
        hashes=None if output.suffix == ".safetensors" else hashes,
        extra=extra,
    )


def _everywhere(settings: MergeCheckpoints) -> dict[str, Any]:
    """What holds for the model and for the modules beside it alike."""
    return {
        "weights": settings.weights or None,
        "weights_on": settings.weights_on,
        "dtype": settings.dtype,
    }


def show(settings: MergeCheckpoints, report: merging.Report) -> None:
    """Print what the method reached, what it did not, and where the result lies."""
    notes = report.notes
    for note in notes[:5]:
        print(f"note: {note}")
    if len(notes) > 5:
        print(f"note: and {len(notes) - 5} more of them")
    print(report.text())
    if report.pending:
        print(f"share {settings.share} is merged: {report.pending}")
        return
    print(f"written to {settings.output}")
    if line := loading(Path(settings.output), settings.base):
        print(f"load it with: {line}")


def loading(output: Path, base: str) -> str | None:
    """The line of Python that loads a merge, where its folder says what it is."""
    if (output / "adapter_config.json").is_file():
        return f"PeftModel.from_pretrained(base, {str(output)!r}), base loaded from {base}"
    if (output / "modules.json").is_file():
        return f"SentenceTransformer({str(output)!r})"
    if not (output / "config.json").is_file():
        return None
    architectures = json.loads((output / "config.json").read_text()).get("architectures")
    return f"{(architectures or ['AutoModel'])[0]}.from_pretrained({str(output)!r})"


def shared_modules(base: Path, experts: Mapping[str, Path]) -> list[str]:
    """Modules of sentence-transformers with weights of their own, of the base and all experts.

    Where an expert comes without one, the base's is taken over, and a warning says so.
    """
    found = []
    for part in weighted_modules(home(base)):
        lacking = [task for task, path in experts.items() if not (path / part).is_dir()]
        if lacking:
            log.warning("experts %s have no module %s: the base's is kept", lacking, part)
        else:
            found.append(part)
    return found


def merged_module(
    settings: MergeCheckpoints, method: merging.Method, part: str
) -> dict[str, bytes | Path]:
    """The files of a merged module of sentence-transformers, by name in the output folder."""
    with tempfile.TemporaryDirectory() as folder:
        merging.merge_checkpoints(
            Path(settings.base) / part,
            {task: Path(path) / part for task, path in settings.experts.items()},
            method,
            Path(folder) / "out",
            **_everywhere(settings),
        )
        file = Path(folder) / "out" / "model.safetensors"
        return {f"{part}/model.safetensors": file.read_bytes()}


def model_card(settings: MergeCheckpoints, method: merging.Method, hashes: Hashes) -> str:
    """What the output is made of: inputs with their SHA-256, method, hyperparameters, versions."""
    inputs = {"base": settings.base} | settings.experts
    hashed = track(inputs.items(), "hashing what was not read")
    rows = [[name, Path(path).name, hashes.sha256(Path(path))] for name, path in hashed]
    own = json.dumps(dict(method.hyperparameters), sort_keys=True)
    packed = "apart" if settings.split_qkv else "together"
    return f"""---
tags: [merge]
---
# A merge by {method.name}

Method: {method.name} ({method.source}), hyperparameters `{own}`.
Data beside the checkpoints: {method.data}. Packed q, k, v were merged {packed}. Rule for
vocabularies of different sizes: {settings.vocabulary}.
{_choices(settings)}
{markdown(["role", "checkpoint", "SHA-256 of its weights"], rows)}
Made with {", ".join(f"{name} {version}" for name, version in versions().items())}.
"""


def _choices(settings: MergeCheckpoints) -> str:
    """What differs from a merge of all experts alike by one method, a line each."""
    lines = [] if settings.space == "full" else [f"- merged in {settings.space} space"]
    if settings.weights:
        on = f" on {settings.weights_on}" if settings.weights_on else ""
        lines.append(f"- weights{on}: `{json.dumps(settings.weights, sort_keys=True)}`")
    lines += [f"- expert {task} into {part}" for task, part in settings.into.items()]
    lines += [f"- part: `{json.dumps(part, sort_keys=True)}`" for part in settings.parts]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


COMMAND = Command("merge", MergeCheckpoints, task=merge, show=show, prepare=read_recipe)

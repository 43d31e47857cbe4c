"""What a model folder holds beside its weights: configuration, tokenizers, templates, modules."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.errors import InputError
from merging.formats.json_files import read_json
from merging.formats.readers import READERS

log = logging.getLogger(__name__)
# What is left behind: weights of every library, what training keeps, what people put beside.
_WEIGHTS = {*READERS, ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".npy", ".tflite", ".pb", ".gguf"}
_LEFT = {
    ".pkl", ".pickle", ".joblib", ".log", ".out", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl",
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".pdf", ".md", ".ipynb", ".sh",
    ".zip", ".gz", ".tar", ".tgz", ".xz", ".zst", ".lock", ".metadata", ".incomplete", ".index",
}  # fmt: skip
_TRAINING = {
    "trainer_state.json", "adapter_config.json", "all_results.json", "train_results.json",
    "eval_results.json", "optimizer.json", "global_step.txt", "latest",
}  # fmt: skip
_FOLDERS = {"additional_chat_templates", "tokenizer", "processor", "image_processor"}
_HOMES = ("config.json", "open_clip_config.json", "modules.json", "params.json")
_LARGEST = 1 << 28  # bytes; tokenizers of large vocabularies take some tens of megabytes


def home(path: Path) -> Path | None:
    """The model folder that a checkpoint is or, given as a file, lies in; None: a lone file."""
    if path.is_dir():
        return path
    return path.parent if any((path.parent / name).is_file() for name in _HOMES) else None


def companions(path: Path) -> dict[str, bytes | Path]:
    """The files that belong to a model folder beside its weights, by name within it.

    path: the folder, or a weight file in it. All of its top level but weights and what training
    or people leave there, and the folders that libraries make of their own accord.
    """
    if path.suffix == ".gguf":
        return _of_gguf(path)
    folder = home(path)
    if folder is None:
        return {}
    inner = [folder / name for name in (*_FOLDERS, *modules(folder)) if (folder / name).is_dir()]
    files = [file for place in (folder, *inner) for file in sorted(place.iterdir())]
    return {file.relative_to(folder).as_posix(): file for file in files if _belongs(file)}


def _of_gguf(path: Path) -> dict[str, bytes | Path]:
    """Configuration and tokenizer that a GGUF file holds, as transformers writes them."""
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        ).save_pretrained(folder)
        try:
            AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            ).save_pretrained(folder)
        except Exception as error:  # of the library, given a vocabulary it does not know
            log.warning("%s: its tokenizer is left out: %s", path, type(error).__name__)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def _belongs(file: Path) -> bool:
    name = file.name
    return (
        file.is_file()
        and not name.startswith((".", "events.out.", "rng_state", "training_args"))
        and file.suffix not in _WEIGHTS | _LEFT
        and name not in _TRAINING
        and not name.endswith(".index.json")
        and file.stat().st_size <= _LARGEST
    )


def modules(folder: Path) -> list[str]:
    """The sub-folders of sentence-transformers' modules, in the order of modules.json."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text())
        paths = [entry["path"] for entry in entries]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{file} is no list of sentence-transformers' modules") from None
    for path in paths:
        if not isinstance(path, str) or path != Path(path).name.replace("..", "/"):
            raise InputError(f"{file} places a module in {path!r}, expected a folder beside it")
    return [path for path in paths if path]


def weighted_modules(folder: Path | None) -> list[str]:
    """Those of `modules` that hold weights of their own, such as a trained Dense layer."""
    return [
        name
        for name in (modules(folder) if folder else [])
        if any(file.suffix in READERS for file in (folder / name).iterdir())
    ]


def with_config(
    files: dict[str, bytes | Path],
    changes: dict[str, Any],
    *,
    drop: tuple[str, ...] = (),
    add: Mapping[str, Any] | None = None,
) -> dict[str, bytes | Path]:
    """The files with another config.json: keys `drop` gone, `changes` made where a key is.

    add: what it says in any case.
    """
    config = files.get("config.json")
    if not isinstance(config, Path):
        return files
    content = read_json(config)
    changed = {k: changes.get(k, v) for k, v in content.items() if k not in drop} | (add or {})
    if changed == content:
        return files
    return files | {"config.json": (json.dumps(changed, indent=2) + "\n").encode()}

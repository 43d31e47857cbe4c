"""Language-model checkpoints as suites name them: a folder, a file, or a name on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from eval.cache import file_sha256
from merging.errors import InputError

# What a merge and lm-eval read of a repository; never its code.
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


def local(name: str) -> Path:
    """Where a checkpoint is on this machine: a path as it is, a hub name downloaded once.

    Raises InputError when it is neither here nor on the hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"checkpoint {name} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # huggingface_hub has a dozen kinds for "not reachable"
        raise InputError(
            f"checkpoint {name} is no path here and could not be had from the hub: "
            f"{type(error).__name__}",
            hint="download it and give its folder",
        ) from error


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's weight files, by name."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    return {file.name: file_sha256(file) for file in files}


def require_same(state: Mapping[str, Tensor], base: Mapping[str, Tensor], suite: str) -> None:
    """InputError unless a state has every tensor of the base in its shape."""
    for name, tensor in base.items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise InputError(
                f"tensor {name!r} of a state for suite {suite!r} is {found}, "
                f"expected shape {tuple(tensor.shape)}"
            )


def require_same_tokenizers(base: Path, experts: Mapping[str, Path]) -> None:
    """InputError for an expert whose tokenizer gives one of the base's numbers another token.

    Tokens that an expert adds beyond the base's are admitted: they are rows of the embedding
    that the merge's rule for vocabularies decides about.
    """
    ours = _tokens(base)
    for task, folder in experts.items():
        for number, token in _tokens(folder).items():
            if ours.get(number, token) != token:
                raise InputError(
                    f"the tokenizer of expert {task!r} ({folder}) differs from the base's: "
                    f"token {number} is {token!r}, expected {ours[number]!r}",
                    hint="merge models that share a tokenizer",
                )


def _tokens(folder: Path) -> dict[int, str]:
    """{number: token} of a checkpoint's tokenizer, empty where it comes without one."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return {}
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    return {number: token for token, number in vocabulary.items()}

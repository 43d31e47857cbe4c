"""Language-model checkpoints as suites name them: a folder, a file, or a name on the hub."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import merging
from eval.cache import (
    cache_root,
    cached,
    checkpoints_root,
    digest,
    file_sha256,
    hub_sha256,
)
from eval.companions import companions
from eval.data import hub
from eval.tokenizers import require_same_tokenizers
from merging.errors import InputError, several
from merging.experts import Expert
from merging.formats.checkpoints import Checkpoint, open_checkpoint
from merging.formats.checks import model_name, problems
from merging.formats.fit import fit, still_tied
from merging.formats.writer import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a merge and lm-eval read of a repository; never its code.
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "config.json",
)  # fmt: skip
WRAPPER = "transformer."  # before each name in the ACTMat authors' pickled language models
LENGTH = "tokenizer_length"  # beside the weights in their later ones


def local(name: str) -> Path:
    """Where a checkpoint is on this machine: a path as it is, a hub name downloaded once.

    name: a path, or OWNER/NAME[@REVISION] of the hub.
    Raises InputError when it is neither here nor on the hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise InputError(f"checkpoint {name} does not exist")
    return hub.folder(repository, revision or None, FILES)


def fetched(name: str, commits: dict[str, str]) -> Path:
    """As `local`; its commit is noted, under its repository, where it came from the hub."""
    path = local(name)
    if commit := hub.commit(path):
        commits[name.partition("@")[0]] = commit
    return path


def unpacked(pattern: str, origin: str | None) -> str:
    """The first file that a pattern with `*` finds below $MODEL_MERGING_CHECKPOINTS.

    origin: for people: where it is downloaded from. Raises InputError where nothing is found.
    """
    if found := sorted(checkpoints_root().glob(pattern)):
        return str(found[0])
    raise InputError(
        f"checkpoint {checkpoints_root() / pattern} is not there",
        hint=f"download {origin or 'it'}, or set MODEL_MERGING_CHECKPOINTS to the folder that "
        f"holds {pattern.partition('/')[0]}",
    )


def part(name: str, files: Sequence[str]) -> Path:
    """Where some small files of a checkpoint are; of a hub name no others are fetched."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise InputError(f"checkpoint {name} does not exist")
    return hub.folder(repository, revision or None, files)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in the cache for a model that is judged, removed afterwards."""
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix="judged-") as folder:
        yield Path(folder)


def require_disk(base: Path) -> None:
    """InputError where the cache's disk cannot hold another model of the base's size."""
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    cache_root().mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(cache_root()).free) < size:
        raise InputError(
            f"a merge of {size / 1e9:.1f} GB is judged from {cache_root()}, whose disk has "
            f"{free / 1e9:.1f} GB left",
            hint="free some, or point MODEL_MERGING_CACHE elsewhere",
        )


def dense(expert: Path, output: Path, *, base: Path) -> None:
    """Write an adapter, or a bare weight file, as a model folder: the base moved by it alone."""
    merging.merge_checkpoints(
        base, {"expert": expert}, merging.create("average"), output, extra=companions(base)
    )


def stamp(path: Path) -> str:
    """16 hex digits of a checkpoint's content: a folder name for its samples."""
    return digest(file_digests(path))


@functools.cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(part(name, TOKENIZER), trust_remote_code=False)


def chat_template(name: str) -> str:
    """The chat template that a model's tokenizer brings; InputError where it brings none."""
    if not (found := _tokenizer(name).chat_template):
        raise InputError(
            f"the tokenizer of {name} has no chat template",
            hint="name a model that has one: suite.tokenizer=OWNER/NAME, or "
            "suite.chat_template=false",
        )
    return found


def wrapped(text: str | Sequence[Mapping[str, str]], name: str) -> str:
    """A text of the user, or messages, as the chat template of a model's tokenizer puts it."""
    chat_template(name)
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    return _tokenizer(name).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def unwrapped(path: Path, base: Mapping[str, Tensor], suite: str) -> Path:
    """A checkpoint under the base's names: the file itself, or a copy in the cache.

    The ACTMat authors pickle a wrapper whose tensors are called `transformer.<name>` or, later, the
    bare state dict with the tokenizer's length in it; a copy of the base's tensors alone,
    safetensors in their own dtypes, is made once.
    """
    source = open_checkpoint(path)
    names = set(source.keys())
    if not isinstance(source, Checkpoint):
        return path
    wrapped = all(name.startswith(WRAPPER) for name in names if name.removeprefix(WRAPPER) in base)
    prefix = WRAPPER if wrapped else ""
    if not wrapped and LENGTH not in names:
        return path
    if missing := sorted(name for name in base if prefix + name not in names):
        raise InputError(
            f"checkpoint {path} is no expert of suite {suite!r}: it has no tensor "
            f"{missing[0]!r}, with or without {WRAPPER!r}, and {len(missing) - 1} others"
        )

    def build(folder: Path) -> None:
        tensors = {name: source.read(prefix + name).contiguous() for name in base}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    key = {"of": file_digests(path), "without": prefix, "names": digest({"names": sorted(base)})}
    return cached("experts", key, build) / "model.safetensors"


def file_digests(path: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's weight files, by name."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {file.name: _digest(file, file.stat().st_mtime_ns) for file in files}


def digests(name: str) -> dict[str, str]:
    """As `file_digests`, of a path or a hub name: the hub states what its large files hold, so that
    a checkpoint is known before it is fetched and after it was removed."""
    if Path(name).expanduser().exists():
        return file_digests(Path(name).expanduser())
    try:
        own = _stated(name)
    except hub.Unreachable:
        own = {}
    known = {file: sha256 for file, (sha256, _) in own.items() if sha256}
    return known if known and len(known) == len(own) else file_digests(local(name))


def size(name: str) -> int:
    """Bytes of a checkpoint's weights: of the files here, or as the hub states them."""
    path = Path(name).expanduser()
    if path.exists():
        files = [path] if path.is_file() else path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)
    try:
        return sum(bytes_ for _, bytes_ in _stated(name).values())
    except hub.Unreachable:
        return size(str(local(name)))


def _stated(name: str) -> dict[str, tuple[str | None, int]]:
    """{weight file: (SHA-256, bytes)} as the hub states them, of a folder's top level alone."""
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise InputError(f"checkpoint {name} does not exist")
    listed = hub.checksums(repository, revision or None)
    return {f: v for f, v in listed.items() if f.endswith(".safetensors") and "/" not in f}


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a model folder's tokenizer files, by name."""
    files = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    return {file.name: _digest(file, file.stat().st_mtime_ns) for file in files}


@functools.cache  # a sweep asks for the same 15 GB again and again
def _digest(file: Path, _modified: int) -> str:
    return hub_sha256(file) or file_sha256(file)


def write(state: Mapping[str, Tensor], folder: Path, *, like: Path) -> None:
    """Write a model folder with the shards, configuration and tokenizer of the folder `like`."""
    shards = getattr(open_checkpoint(like), "shards", None)
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    with Writer(folder, layout, shards=shards, metadata={"format": "pt"}) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor.cpu())
        writer.finish(companions(like))


def load_into(model: nn.Module, expert: Expert) -> None:
    """Give a model that holds the base's weights those of an expert."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in expert.names():
            if name in parameters:
                weight = parameters[name]
                values = expert.values(name, slice(0, len(weight)) if weight.ndim else None)
                own = values.weight(weight)
                (weight[: len(own)] if weight.ndim else weight).copy_(own)


def require_mergeable(
    base: Path,
    experts: Mapping[str, Path],
    *,
    vocabulary: str,
    name: str,
    into: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that headers and tokenizers can tell, before a merge reads any weight.

    name: of the base, as adapters call it. into: as in `merge_checkpoints`.
    Raises one InputError with every problem found: damaged, missing or superfluous files and
    tensors, shapes, adapters of another base.
    Returns what the base's config.json must say otherwise for the merge.
    """
    with ExitStack() as stack:
        source = stack.enter_context(closing(open_checkpoint(base)))
        if source.partial:
            raise InputError(f"base {base} is an adapter, expected a whole checkpoint")
        opened = {t: stack.enter_context(closing(open_checkpoint(p))) for t, p in experts.items()}
        opened = fit(source, opened, into=into)
        found = problems(source, opened, common_rows=vocabulary != "refuse")
        for task, expert in opened.items():
            named = expert.hub_base and not Path(name).exists()
            if named and model_name(expert.base_name) != model_name(name):
                told = f"expert {task!r} is an adapter of {expert.base_name}, expected {name}"
                found.append(told)
        if found:
            raise InputError(several(found), hint="nothing was merged")
        untied = set(source.tied) - set(still_tied(source, opened))
    if vocabulary != "union":
        require_same_tokenizers(base, experts)
    return {"tie_word_embeddings": False} if untied else {}


def require_same(state: Mapping[str, Tensor], base: Mapping[str, Tensor], suite: str) -> None:
    """InputError unless a state has every tensor of the base in its shape."""
    for name, tensor in base.items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise InputError(
                f"tensor {name!r} of a state for suite {suite!r} is {found}, "
                f"expected shape {tuple(tensor.shape)}"
            )

"""The Hugging Face hub: files and data sets fetched once, every refusal told in one sentence."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from eval.cache import cache_root, digest
from merging.errors import InputError

Kind = Literal["model", "dataset"]
# What the client's HTTP library, whichever it is, calls a server that does not answer.
_SILENCE = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError"}


class Unreachable(InputError):
    """The hub gave no answer at all: what is in a cache may still do."""


def file(repository: str, name: str, revision: str | None = None, kind: Kind = "model") -> Path:
    """One file of a repository, from the hub's cache once it is there."""
    with refusals(repository, revision, name):
        return Path(hf_hub_download(repository, name, revision=revision, repo_type=kind))


def folder(
    repository: str, revision: str | None = None, patterns: Sequence[str] | None = None
) -> Path:
    """A model repository, or the files of it that match one of `patterns`."""
    with refusals(repository, revision):
        given = list(patterns) if patterns is not None else None
        return Path(snapshot_download(repository, revision=revision, allow_patterns=given))


def information(repository: str, revision: str | None = None, kind: Kind = "model") -> Any:
    """What the hub says of a repository: `sha`, `gated`, and `siblings` with name and size.

    One small request; nothing is downloaded.
    """
    with refusals(repository, revision):
        return HfApi().repo_info(
            repository, revision=revision, repo_type=kind, files_metadata=True, timeout=20
        )


def checksums(repository: str, revision: str | None = None) -> dict[str, tuple[str | None, int]]:
    """{file: (SHA-256, bytes)} of a model repository, as the hub states them of large files.

    One small request; None for files that are small enough to be kept without a checksum.
    """
    listed = information(repository, revision).siblings
    return {s.rfilename: (s.lfs.sha256 if s.lfs else None, s.size or 0) for s in listed}


def commit(path: Path) -> str | None:
    """The commit that a file or folder of the hub's cache belongs to."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


@contextmanager
def refusals(repository: str, revision: str | None = None, name: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into an InputError of one sentence and what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise _refusal(error, repository, revision, name) from error


def _refusal(error: Exception, repository: str, revision: str | None, name: str) -> InputError:
    from datasets.exceptions import DatasetNotFoundError

    where = f"{repository}/{name}" if name else repository
    login = "log in with `hf auth login` or set HF_TOKEN"
    hidden = isinstance(error, DatasetNotFoundError) and "gated" in str(error)  # without its cause
    if isinstance(error, GatedRepoError) or hidden:
        return InputError(
            f"{repository} is gated: its licence has to be accepted before {name or 'it'} "
            "can be downloaded",
            hint=f"accept it at {constants.ENDPOINT}/{repository}, then {login}",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{repository} has no revision {revision!r} on the hub",
            hint=f"its branches and tags: {constants.ENDPOINT}/{repository}/tree/main",
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"the hub has no repository {repository}, or it is private",
            hint=f"check the name; if it is private, {login}",
        )
    silent = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError)
    if silent or type(error).__name__ in _SILENCE:
        if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE forbids to ask the hub for it"
        else:
            reason = f"the hub ({constants.ENDPOINT}) cannot be reached: no network"
        return Unreachable(
            f"{where} is not on this machine, and {reason}",
            hint="download it where there is a network; HF_HOME names the folder to copy",
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(
            f"{repository} has no file {name or 'of those asked for'} on the hub",
            hint=f"what it has: {constants.ENDPOINT}/{repository}/tree/{revision or 'main'}",
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return InputError(
            f"the hub refuses {where}: it does not accept the token it was given",
            hint=f"{login}, with a token that may read",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return InputError(
            f"no space left on the disk of {constants.HF_HOME} for {where}",
            hint="free some, or point HF_HOME elsewhere",
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"{where} could not be had from the hub: {reason}")


# --- data sets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A split of a data set on the hub, or all: which files hold it and how they are read.

    builder: of `datasets`, "parquet" or "webdataset". files: names in the repository.
    bytes: their sizes together. features: columns and types, where the repository states them.
    """

    commit: str
    builder: str
    files: tuple[str, ...]
    bytes: int
    features: dict[str, Any] | None


def rows(repository: str, config: str | None, revision: str | None, split: str | None) -> Rows:
    """Which files hold a split: asked of the hub, or as it answered last where it is silent.

    split: None for every one of the configuration.
    Raises InputError for a split or configuration that is not there. Downloads a data card.
    """
    key = {"repository": repository, "config": config, "revision": revision, "split": split}
    kept = cache_root() / "hub" / f"{digest(key)}.json"
    try:
        found = _ask(repository, config, revision, split)
    except Unreachable:
        if not kept.exists():
            raise
        answer = json.loads(kept.read_text())
        return Rows(**answer | {"files": tuple(answer["files"])})
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(asdict(found)))
    partial.replace(kept)
    return found


def _ask(repository: str, config: str | None, revision: str | None, split: str | None) -> Rows:
    import datasets

    about = information(repository, revision, "dataset")
    with refusals(repository, revision):
        try:
            builder = datasets.load_dataset_builder(
                repository, config, revision=about.sha, cache_dir=str(cache_root() / "datasets")
            )
        except (ValueError, RuntimeError) as error:  # a configuration it lacks, or a script
            raise InputError(f"data set {repository}: {str(error).splitlines()[0]}") from error
    splits = builder.config.data_files or {}
    if split is not None and split not in splits:
        raise InputError(
            f"data set {repository} has no split {split!r}", hint=f"known: {', '.join(splits)}"
        )
    parts = splits.values() if split is None else [splits[split]]
    named = (str(file).partition("@")[2].partition("/")[2] for part in parts for file in part)
    files = tuple(dict.fromkeys(named))
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in about.siblings}
    features = builder.info.features.to_dict() if builder.info.features else None
    name = type(builder).__module__.rpartition(".")[2]
    return Rows(about.sha, name, files, sum(sizes.get(f, 0) for f in files), features)


def load(repository: str, found: Rows, split: str) -> Any:
    """A `datasets.Dataset` of one split: its own files are fetched, no other split's."""
    import datasets

    paths = [str(file(repository, name, found.commit, "dataset")) for name in found.files]
    return datasets.load_dataset(
        found.builder,
        data_files={split: paths},
        split=split,
        features=datasets.Features.from_dict(found.features) if found.features else None,
        cache_dir=str(cache_root() / "datasets"),
    )

"""What a run reads from elsewhere: which files, how large, whether they are here or can be had.

Only headers are read, so that a table can say what it will take before anything is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

from eval.data import hub
from merging.errors import InputError

_SHARD = re.compile(r"(.*)-\d+-of-(\d+)(\.[a-z.]+)")  # model-00001-of-00005.safetensors


@dataclass(frozen=True)
class Requirement:
    """One thing that a run needs.

    what: for people, e.g. "expert dtd". place: where it is, or is fetched from.
    files, bytes: still to be fetched. problem, hint: why it cannot be had and what to do.
    """

    what: str
    place: str
    files: int = 0
    bytes: int = 0
    problem: str = ""
    hint: str = ""


def of_file(
    what: str, repository: str, name: str, revision: str | None, kind: hub.Kind = "model"
) -> Requirement:
    """A file on the hub: one request for its header, none where it is in the cache."""
    return _of_files(what, repository, [name], revision, kind)


def of_folder(
    what: str, repository: str, revision: str | None = None, patterns: Sequence[str] = ("*",)
) -> Requirement:
    """The files of a model repository that match one of the patterns."""
    try:
        listed = hub.information(repository, revision).siblings
    except hub.Unreachable as error:
        return _offline_folder(what, repository, revision, error)
    except InputError as error:
        return _refused(what, repository, error)
    names = [s.rfilename for s in listed if any(fnmatch(s.rfilename, p) for p in patterns)]
    if shards := _missing_shards(names):
        problem = f"{repository} has no file {shards[0]} on the hub, one of its shards"
        hint = f"what it has: {constants.ENDPOINT}/{repository}/tree/{revision or 'main'}"
        return Requirement(what, repository, problem=problem, hint=hint)
    return _of_files(what, repository, names, revision, "model")


def _missing_shards(names: Sequence[str]) -> list[str]:
    """Those of "model-00001-of-00005.safetensors" and its like that are not among the names."""
    found = (_SHARD.fullmatch(name) for name in names)
    sets = {(match[1], match[2], match[3]) for match in found if match}
    every = [
        f"{start}-{i:0{len(count)}}-of-{count}{end}"
        for start, count, end in sorted(sets)
        for i in range(1, int(count) + 1)
    ]
    return [name for name in every if name not in names]


def of_checkpoints(named: Mapping[str, str], patterns: Sequence[str]) -> list[Requirement]:
    """Of checkpoints as language suites name them, {what: path here, or OWNER/NAME[@REVISION]}."""
    found = []
    for what, name in named.items():
        repository, _, revision = name.partition("@")
        if Path(name).expanduser().exists():
            found.append(Requirement(what, name))
        elif name.startswith((".", "/", "~")) or repository.count("/") != 1:
            problem = f"{what}: {name} does not exist"
            hint = "name a file or a folder that is here, or OWNER/NAME of the hub"
            found.append(Requirement(what, name, problem=problem, hint=hint))
        else:
            found.append(of_folder(what, repository, revision or None, patterns))
    return found


def of_rows(
    what: str,
    repository: str,
    config: str | None,
    revision: str | None,
    splits: Sequence[str] | None = None,
) -> Requirement:
    """Splits of a data set on the hub, all of them by default; downloads its card, a few kB."""
    names: list[str] = []
    commit = revision
    for split in [None] if splits is None else dict.fromkeys(splits):
        try:
            found = hub.rows(repository, config, revision, split)
        except InputError as error:
            return _refused(what, repository, error)
        names, commit = names + list(found.files), found.commit
    return _of_files(what, repository, names, commit, "dataset")


def _of_files(
    what: str, repository: str, names: Sequence[str], revision: str | None, kind: hub.Kind
) -> Requirement:
    missing, size = 0, 0
    for name in names:
        here = try_to_load_from_cache(repository, name, revision=revision, repo_type=kind)
        if isinstance(here, str):
            continue
        try:
            with hub.refusals(repository, revision, name):
                address = hf_hub_url(repository, name, revision=revision, repo_type=kind)
                size += get_hf_file_metadata(address, timeout=20).size or 0
        except InputError as error:
            return _refused(what, repository, error)
        missing += 1
    return Requirement(what, repository, missing, size)


def _offline_folder(
    what: str, repository: str, revision: str | None, error: InputError
) -> Requirement:
    """Whatever of it is in the cache has to do, if there is anything."""
    known = ("model.safetensors", "model.safetensors.index.json", "adapter_config.json")
    for name in known:
        if isinstance(try_to_load_from_cache(repository, name, revision=revision), str):
            return Requirement(what, repository)
    return _refused(what, repository, error)


def _refused(what: str, repository: str, error: InputError) -> Requirement:
    return Requirement(what, repository, problem=error.message, hint=error.hint)

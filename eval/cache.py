"""A cache whose key is everything the content depends on; entries appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from merging.errors import InputError
from merging.formats.disk import flush

RECORD = "key.json"  # beside the content: the key in clear, each file's SHA-256, size and time
VERIFY = "MODEL_MERGING_VERIFY"  # 1: compare checksums though sizes and times agree
_verified: set[Path] = set()  # entries that this process has already compared


def cache_root() -> Path:
    """`$MODEL_MERGING_CACHE`, or `~/.cache/model-merging`."""
    return Path(os.environ.get("MODEL_MERGING_CACHE") or "~/.cache/model-merging").expanduser()


def checkpoints_root() -> Path:
    """`$MODEL_MERGING_CHECKPOINTS`, or `checkpoints`: where people unpack what they download."""
    return Path(os.environ.get("MODEL_MERGING_CHECKPOINTS") or "checkpoints").expanduser()


def digest(key: Mapping[str, Any]) -> str:
    """16 hex digits that name a JSON-serialisable key, whatever the order of its items."""
    text = json.dumps(key, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_sha256(path: Path) -> str | None:
    """The hub's cache names a large file's content by its SHA-256: that need not be read."""
    content = path.resolve()
    named = content.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", content.name)
    return content.name if named else None


def cached(
    kind: str,
    key: Mapping[str, Any],
    build: Callable[[Path], None],
    *,
    resumable: bool = False,
) -> Path:
    """The folder `cache_root()/kind/digest(key)`, filled by `build(folder)` if it is not there.

    `build` writes into a hidden sibling that is flushed to disk and renamed into place, so a
    killed build never looks finished. A second process that wants the same entry waits for the
    first. `resumable`: what a killed build left behind is handed to the next one instead of
    being removed. A finished entry is compared with what was recorded of it, once a process: sizes
    and times, and checksums where these differ or $MODEL_MERGING_VERIFY is 1. Raises InputError,
    naming the file, when it was damaged.
    """
    name = digest(key)
    entry = cache_root() / kind / name
    if not (entry / RECORD).exists():
        partial = entry.with_name(f".{name}.partial")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.with_name(f".{name}.lock")):
                if not (entry / RECORD).exists():
                    if not resumable:
                        shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(exist_ok=True)
                    build(partial)
                    _seal(partial, key)
                    partial.rename(entry)
                    flush(entry.parent)
                    _verified.add(entry)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise InputError(
                    f"no space left on the disk of {entry.parent}",
                    hint="free some, or point MODEL_MERGING_CACHE elsewhere",
                ) from error
            raise
    if entry not in _verified:
        _verify(entry)
        _verified.add(entry)
    return entry


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)


def _seal(folder: Path, key: Mapping[str, Any]) -> None:
    files = _files(folder)
    for path in files:
        flush(path)
    sums = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    stamps = {path.relative_to(folder).as_posix(): _stamp(path) for path in files}
    content = {"key": key, "sha256": sums, "stamps": stamps}
    record = folder / RECORD
    record.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    flush(record)
    flush(folder)


def _stamp(path: Path) -> list[int]:
    """Size and time of a file: what a rename keeps and a write changes."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _verify(entry: Path) -> None:
    """Compare every file with what was recorded of it."""
    try:
        record = json.loads((entry / RECORD).read_text())
        sums, stamps = record["sha256"], record.get("stamps", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(entry / RECORD) from error
    always = os.environ.get(VERIFY) == "1"
    for name, expected in sums.items():
        path = entry / name
        if not path.is_file():
            raise _damaged(path)
        if (always or _stamp(path) != stamps.get(name)) and file_sha256(path) != expected:
            raise _damaged(path)


def _damaged(path: Path) -> InputError:
    return InputError(
        f"cached file {path} is missing or does not match its recorded SHA-256",
        hint=f"remove {path.parent} and run again to rebuild it",
    )

"""Files written so that a reader sees the old content or the new, also after a power cut."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from pathlib import Path

from merging.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk says that takes no more


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data`, however many calls that takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def reserve(file: int, size: int) -> None:
    """Give the file its final size, with its disk blocks where the file system can."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in FULL:
            raise
    os.ftruncate(file, size)


def check_space(output: Path, size: int) -> None:
    """InputError if the disk of `output` has less than `size` bytes free."""
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise InputError(
            f"{output} needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
            hint="free some space or choose another output",
        )


def write_synced(path: Path, data: bytes | str) -> None:
    """Write a file whole, its folder included: a reader sees the old content or the new.

    Processes that write one path at once each write all of it; the last one's content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        with open(partial, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Ask the system to put a file or folder on the disk now."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def publish(source: Path, output: Path, aside: Path) -> None:
    """Rename into place, so that at every instant the old output or the new one is there.

    Where the system cannot swap two folders in one step there is an instant without either;
    the old one is `aside` then, and a rerun puts it back.
    """
    if not (output.exists() and _swap(source, output)):
        if output.is_dir():
            os.rename(output, aside)
        os.replace(source, output)
    flush(output.parent)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; False where the system cannot (only Linux can)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(here, os.fsencode(a), here, os.fsencode(b), exchange)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

"""SHA-256 of a checkpoint's files, taken from the bytes that a merge reads of them anyway."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from merging.formats.slots import Slot, Strided, bytes_of, contiguous_strides

_GAP = 1 << 20  # bytes between tensors, a header or padding, that are fetched rather than awaited
_CHUNK = 1 << 22
_WAITING = 1  # pieces of a file that were read and are not hashed yet


class FileHash:
    """The SHA-256 of one file.

    A hash takes bytes in order. A merge reads tensors in the order of its base's file, which is
    the order of most experts' files too: what continues the file is taken, what comes out of turn
    is read again at the end.

    opened: gives an open descriptor of the file.
    thread: an executor of one, which works the hash out while the merge goes on.
    """

    def __init__(self, opened: Callable[[], int], thread: ThreadPoolExecutor) -> None:
        self._opened, self._hash, self._end = opened, hashlib.sha256(), 0
        self._thread, self._lock = thread, threading.Lock()
        self._waiting: deque[Future[None]] = deque()

    def see(self, offset: int, data: memoryview) -> None:
        """Take bytes that were read at an offset, as far as they continue what was taken."""
        with self._lock:
            self._waiting.append(self._thread.submit(self._take, offset, data))
            while len(self._waiting) > _WAITING:  # they are held in memory
                self._waiting.popleft().result()

    def hexdigest(self) -> str:
        """Of the whole file; the rest of it is read."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft().result()
            self._fetch(os.fstat(self._opened()).st_size)
            return self._hash.hexdigest()

    def _take(self, offset: int, data: memoryview) -> None:
        if self._end < offset <= self._end + _GAP:
            self._fetch(offset)
        if offset <= self._end < offset + len(data):
            self._hash.update(data[self._end - offset :])
            self._end = offset + len(data)

    def _fetch(self, end: int) -> None:
        while self._end < end:
            data = os.pread(self._opened(), min(_CHUNK, end - self._end), self._end)
            if not data:
                raise OSError(f"a file ended at byte {self._end}, expected {end}")
            self._hash.update(data)
            self._end += len(data)


class Hashes:
    """Of the files of several checkpoints.

    known: a file's SHA-256 where it need not be worked out, else None.
    """

    def __init__(self, known: Callable[[Path], str | None] = lambda file: None) -> None:
        self._known: dict[Path, str] = {}
        self._files: dict[Path, FileHash] = {}
        self._checkpoints: dict[Path, list[Path]] = {}
        self._lookup = known
        self._threads: dict[Path, ThreadPoolExecutor] = {}  # of each checkpoint

    def watch(self, path: str | Path, files: Callable[[Path], int], *names: Path) -> None:
        """Begin with the files called `names` of the checkpoint at `path`."""
        self._checkpoints[Path(path)] = sorted(names)
        thread = self._threads.setdefault(Path(path), ThreadPoolExecutor(1, "hash"))
        for name in names:
            if sha256 := self._lookup(name):
                self._known[name] = sha256
            elif name not in self._files:
                self._files[name] = FileHash(partial(files, name), thread)

    def see(self, slot: Slot, tensor: Tensor) -> None:
        """What was read of a file; of numbers that are worked out of their bytes, nothing."""
        if not isinstance(slot, Strided) or slot.strides != contiguous_strides(slot.shape):
            return
        if slot.path in self._files:
            self._files[slot.path].see(slot.offset, bytes_of(tensor))

    def sha256(self, path: str | Path) -> str:
        """Of a checkpoint's one weight file; of several, of their own hashes in order of name."""
        sums = [
            self._known.get(file) or self._files[file].hexdigest()
            for file in self._checkpoints[Path(path)]
        ]
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    def part(self, i: int, n: int) -> dict[str, str]:
        """{file: SHA-256} of every n-th file, from the i-th on; what was not read of them is."""
        return {
            str(file.absolute()): self._known.get(file) or self._files[file].hexdigest()
            for file in self._names()[i::n]
        }

    def know(self, sums: Mapping[str, str]) -> None:
        """Take what `part` gave to another process that reads the same files."""
        for file in self._names():
            if sha256 := sums.get(str(file.absolute())):
                self._known[file] = sha256

    def _names(self) -> list[Path]:
        return sorted({file for files in self._checkpoints.values() for file in files})

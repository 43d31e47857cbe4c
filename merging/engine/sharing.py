"""One merge shared by several members, processes or machines, over a common disk.

Member i of N merges its share of the tensors into a file of its own, `.NAME.shares/KEY/i-of-N`,
beside the output: streamed, atomic and resumable like any output, so that a member that is killed
loses the tensor it was at, and is started again as it was. Whichever member finds all N files whole
copies them into the output. Members need no clock and no way to reach each other; what they merge
is told apart by `KEY`, a hash of all that the output depends on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from merging.engine.job import Job
from merging.engine.passes import ahead
from merging.engine.pipeline import Put, unfinished
from merging.engine.plan import WINDOW_BYTES, Item, Piece, share
from merging.engine.report import Report, Watch
from merging.engine.routes import Loaded
from merging.engine.rows import row_blocks
from merging.engine.sinks import Sink, check_shards
from merging.engine.transfers import InPlace
from merging.errors import InputError
from merging.experts import Source
from merging.formats.checkpoints import open_base
from merging.formats.disk import remove, write_synced
from merging.formats.hashes import Hashes
from merging.formats.writer import Writer
from merging.progress import track


class Share(NamedTuple):
    """Which member of how many, from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def read_share(text: str) -> Share:
    """ "2/4" as a `Share`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text) if isinstance(text, str) else None
    chosen = Share(*map(int, match.groups())) if match else Share(0, 0)
    if not 1 <= chosen.number <= chosen.of:
        raise InputError(f"share is {text!r}, expected one of so many, such as 2/4")
    return chosen


class Shares:
    """What the members of one merge have in common.

    Raises InputError for a merge that cannot be shared.
    """

    def __init__(
        self,
        job: Job,
        items: Sequence[Item],
        output: str | Path,
        member: Share,
        overwrite: bool = False,
    ) -> None:
        if job.form == "adapter":
            raise InputError("a merge into an adapter is not shared", hint="leave share out")
        if member.of > len(items):
            raise InputError(f"share={member}: there are {len(items)} tensors to share")
        self.job, self.items, self.member = job, items, member
        self.output = Path(output).absolute()
        self.folder = self.output.with_name(f".{self.output.name}.shares")
        self.key = blake2b(f"{job.key()} {member.of}".encode(), digest_size=8).hexdigest()
        self.shares = share(items, member.of, lambda item: max(1, item.numel))  # none is idle
        self.own = self.shares[member.number - 1]
        check_shards(job, self.output)
        if self.output.exists() and not (overwrite or self.written):  # told before the merge
            raise InputError(
                f"{self.output} exists already", hint="remove it, or say overwrite=true"
            )

    def file(self, number: int) -> Path:
        """Of a member: there when it is whole."""
        return self.folder / self.key / f"{number}-of-{self.member.of}.safetensors"

    @property
    def done(self) -> bool:
        """Whether nothing is left to merge for this member."""
        return self.written or self.file(self.member.number).exists()

    @property
    def pending(self) -> str:
        """Who writes the output, where some members' files are not there yet; else ""."""
        numbers = range(1, self.member.of + 1)
        missing = [f"share={i}/{self.member.of}" for i in numbers if not self.file(i).exists()]
        if self.written or not missing:
            return ""
        beside = self.folder.iterdir() if self.folder.is_dir() else ()
        strange = any(other.is_dir() and other.name != self.key for other in beside)
        told = f"the last of {', '.join(missing)} writes {self.output}"
        return f"{told}; shares of other inputs or settings lie beside" if strange else told

    @property
    def written(self) -> bool:
        """Whether the output is there that these members made."""
        try:
            return self._mark.read_text() == self._written()
        except OSError:
            return False

    @property
    def _mark(self) -> Path:
        return self.folder / "written"

    def _written(self) -> str:
        """Of the merge and its files: another may have come in their place, or into it."""
        folder = self.output.is_dir()
        files = sorted(self.output.glob("*.safetensors")) if folder else [self.output]
        stats = [(file.name, file.stat()) for file in files]
        told = [(name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats]
        return json.dumps([self.key, told])

    def sink(self) -> Writer:
        """Takes this member's own tensors."""
        base, job = self.job.base, self.job
        names = [name for item in self.own for name in (item.name, *item.copies)]
        layout = {name: (base.shape(name), job.output_dtype(name)) for name in names}
        return Writer(self.file(self.member.number), layout, key=job.key())

    @contextmanager
    def writing(self, report: Report) -> Iterator[bool]:
        """Whether it falls to this member to write the output: one at a time does, and once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "lock", timeout=0):
                yield not self.written
        except Timeout:
            report.pending = f"another member is writing {self.output}"
            yield False

    def copy(self, sink: Sink, put: Put, watch: Watch) -> None:
        """All members' tensors into the output, looking on the way whether any was changed."""
        for number, own in enumerate(self.shares, 1):
            with closing(open_base(self.file(number))) as source:
                todo = [p for item in unfinished(own, sink) for p in self._windows(item)]
                loads = ahead(lambda piece: (piece, _read(source, piece)), todo)
                for piece, merged in track(loads, f"copying share {number}", len(todo)):
                    if not watch.changed:
                        W0 = _read(self.job.base, piece)
                        watch.compare(piece.item, Loaded(W0, None), merged)
                    put(piece, InPlace().back(merged))

    def _windows(self, item: Item) -> Iterator[Piece]:
        row = torch.Size(item.shape[1:]).numel() * self.job.output_dtype(item.name).itemsize
        for rows in row_blocks(item.shape, row, WINDOW_BYTES):
            yield Piece(item, rows)

    def conclude(self) -> None:
        """The output is there: the members' files go, a mark of what they made stays."""
        write_synced(self._mark, self._written())
        for path in self.folder.iterdir():
            if path.is_dir():
                remove(path)

    # --- the inputs' hashes, which the members share too ------------------------------------------

    def put_hashes(self, hashes: Hashes) -> None:
        """Work out this member's part of the input files' SHA-256 and leave them to the last."""
        part = hashes.part(self.member.number - 1, self.member.of)
        write_synced(self._hashes(self.member.number), json.dumps(part))

    def take_hashes(self, hashes: Hashes) -> None:
        """What the members have worked out."""
        for number in range(1, self.member.of + 1):
            if self._hashes(number).exists():
                hashes.know(json.loads(self._hashes(number).read_text()))

    def _hashes(self, number: int) -> Path:
        return self.file(number).with_suffix(".json")


def _read(source: Source, piece: Piece) -> Tensor:
    return source.read(piece.item.name, piece.rows)

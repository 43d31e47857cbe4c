"""Where merged tensors go: into memory, into a checkpoint, into an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from merging.engine.job import Job
from merging.engine.plan import Item
from merging.engine.report import Report
from merging.errors import InputError
from merging.experts import Source
from merging.factors import Factors, truncate
from merging.formats.adapter import Adapter, joint_settings
from merging.formats.folders import output_files
from merging.formats.writer import Writer, write_adapter

Files = Mapping[str, bytes | Path]


class Sink(Protocol):
    """`done` holds the names that need not be written: an interrupted merge finished them."""

    done: set[str]

    def write(self, name: str, merged: Any, rows: slice | None = None, /) -> None:
        """A tensor, or those rows of it; where the sink takes them, a difference as `Factors`."""
        ...


class FileSink(Sink, Protocol):
    """A sink whose output appears when it is whole."""

    def finish(self, extra: Files | None = None) -> None: ...


class Memory:
    """Keeps the merged tensors."""

    def __init__(self, base: Source) -> None:
        self.base = base
        self.done: set[str] = set()
        self.tensors: dict[str, Tensor] = {}

    def write(self, name: str, merged: Tensor, rows: slice | None = None) -> None:
        if rows is None:  # what came from a GPU lies in pinned memory, which is for few tensors
            self.tensors[name] = merged.clone() if merged.is_pinned() else merged
            return
        if name not in self.tensors:
            self.tensors[name] = torch.empty(self.base.shape(name), dtype=merged.dtype)
        self.tensors[name][rows] = merged


class AdapterFolder:
    """Factors, and tensors in full where there are none, written as one PEFT adapter."""

    def __init__(
        self, job: Job, items: Sequence[Item], report: Report, output: Path, overwrite: bool
    ) -> None:
        if output.suffix == ".safetensors":
            raise InputError(f"an adapter is a folder, the output is to be the file {output}")
        if output.exists() and not overwrite:  # told before the merge, not after
            raise InputError(f"{output} exists already", hint="remove it, or say overwrite=true")
        self.output, self.overwrite = output, overwrite
        self.rank, self.report = job.rank, report
        # as the adapters say: peft reads names as a model has them in memory
        adapters = cast(Mapping[str, Adapter], job.experts)  # nothing else has this form
        self.own_names = {k: v for e in adapters.values() for k, v in e.own_names.items()}
        self.settings = joint_settings(adapters, job.base.path)
        self.order = [item.name for item in items if item.method]
        self.done = {name for i in items if not i.method for name in (i.name, *i.copies)}
        self.factors: dict[str, Factors] = {}
        self.whole = Memory(job.base)

    def write(self, name: str, merged: Tensor | Factors, rows: slice | None = None) -> None:
        if name not in self.order:
            return  # tied to one that is
        if isinstance(merged, Factors):
            self.factors[name] = self._of_rank(name, merged)
        else:
            self.whole.write(name, merged, rows)

    def _of_rank(self, name: str, merged: Factors) -> Factors:
        if not self.rank:
            return merged
        if len(merged.A) <= self.rank:
            kept, lost = merged.dense().double().square().sum().item(), 0.0
        else:
            merged, kept, lost = truncate(merged, self.rank)
        self.report.energies[name] = kept, lost
        return merged

    def finish(self, extra: Files | None = None) -> None:
        named = {name: self.own_names.get(name, name) for name in self.order}
        pairs = {named[n]: self.factors[n][:2] for n in self.order if n in self.factors}
        write_adapter(
            self.output,
            pairs,
            self.settings,
            dense={named[name]: tensor for name, tensor in self.whole.tensors.items()},
            extra=extra,
            overwrite=self.overwrite,
        )


def file_sink(
    job: Job, items: Sequence[Item], report: Report, output: str | Path, overwrite: bool
) -> AbstractContextManager[FileSink]:
    """The sink that writes a job's form."""
    if job.form == "adapter":
        return nullcontext(AdapterFolder(job, items, report, Path(output), overwrite))
    check_shards(job, Path(output))
    base = job.base
    layout = {name: (base.shape(name), job.output_dtype(name)) for name in base.keys()}
    return Writer(
        output,
        layout,
        shards=output_files({n: file for n in base.keys() if (file := base.file(n))})
        if job.shard_bytes is None
        else _cut(layout, job.shard_bytes),
        key=job.key(),
        overwrite=overwrite,
    )


def check_shards(job: Job, output: Path) -> None:
    """InputError for files of a size where there is to be one."""
    if job.shard_bytes and output.suffix == ".safetensors":
        raise InputError(
            f"shard_size splits the weights of a folder, the output is to be the file {output}",
            hint="give the name of a folder, or no shard_size",
        )


def _cut(
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], size: int
) -> dict[str, str] | None:
    """{name: file name} of shards of at most `size` bytes, in order; a larger tensor has its own.

    None where one file is enough.
    """
    number, room, shards = 0, 0, {}
    for name, (shape, dtype) in layout.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes > room:
            number, room = number + 1, size
        room -= nbytes
        shards[name] = number
    if number == 1:
        return None
    return {name: f"model-{i:05d}-of-{number:05d}.safetensors" for name, i in shards.items()}

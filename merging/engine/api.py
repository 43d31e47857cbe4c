"""The public calls: merge what is in memory, merge what is in files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Unpack

from torch import Tensor

from merging.engine import passes, pipeline
from merging.engine.job import FileOptions, Job, LazyStatistics, Options, prepare
from merging.engine.plan import Item, outside, plan
from merging.engine.report import UNCHANGED, Report, Watch
from merging.engine.sharing import Shares, read_share
from merging.engine.sinks import Files, Memory, Sink, file_sink
from merging.engine.transfers import stated
from merging.errors import InputError
from merging.experts import Expert
from merging.formats.checkpoints import StateDict, open_base, open_checkpoint
from merging.formats.checks import check_apart
from merging.formats.fit import notes
from merging.formats.hashes import Hashes
from merging.method.registry import Method

log = logging.getLogger(__name__)


class MergedState(dict[str, Tensor]):
    """A merged state dict with the `report` of its merge."""

    def __init__(self, tensors: Mapping[str, Tensor], report: Report) -> None:
        super().__init__(tensors)
        self.report = report


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor] | Expert],
    method: Method,
    *,
    report: Report | None = None,
    strict: bool = False,
    **options: Unpack[Options],
) -> MergedState:
    """Merge experts in memory into one state dict with the base's keys, shapes and dtypes.

    experts: task name -> state dict, or an opened checkpoint or adapter. They are stacked in the
        order of their names, so that the order they come in changes no bit.
    options: layers, statistics, device, split_qkv, vocabulary: see `Options`.
    strict: refuse what the report would warn of: a method that misses a tenth of the matrices'
        weights, or some layers of a kind.
    report: added to, and its warnings left to the caller; without it the result's is a new one.
    Raises InputError naming every key, shape or value at fault.
    """
    shown, report = report is None, Report() if report is None else report
    source = StateDict(base, "the base")
    opened = {
        task: StateDict(expert, "a state dict") if isinstance(expert, Mapping) else expert
        for task, expert in experts.items()
    }
    job = prepare(source, opened, method, **options)
    items, sink, watch = plan(job), Memory(source), Watch(job.experts, report)
    report.cover(items, strict)
    report.notes += _notes(job, items)
    _merge(job, items, items, sink, watch, report)
    report.unchanged = not watch.changed
    if shown:
        show_warnings(report)
    return MergedState({name: sink.tensors[job.base.tied.get(name, name)] for name in base}, report)


def merge_checkpoints(
    base: str | Path,
    experts: Mapping[str, str | Path],
    method: Method,
    output: str | Path,
    *,
    overwrite: bool = False,
    extra: Files | Callable[[], Files] | None = None,
    strict: bool = False,
    hashes: Hashes | None = None,
    share: str | None = None,
    **options: Unpack[FileOptions],
) -> Report:
    """Merge checkpoint files into one safetensors checkpoint, streamed, atomic and resumable.

    base, experts: whatever `open_checkpoint` reads; the output takes the base's shards.
    output: a `.safetensors` file or a folder; it appears when it is whole, and an interrupted
        merge continues from the last whole tensor.
    extra: further files of an output folder, by name (config, tokenizer, model card); a function
        that makes them is called when all is merged.
    hashes: takes the SHA-256 of base and experts while they are read; `extra` may ask it.
    share: "2/4" merges this process's share of the tensors, one of four, and writes the output
        where the three others are merged already; else the report's `pending` names them.
    options: layers, statistics (files too), device, split_qkv, vocabulary, form: see `Options`.
    Other arguments as in `merge_state_dicts`. A merge that changes nothing is an InputError.
    """
    report, member = Report(), read_share(share) if share is not None else None
    check_apart(output, {"the base": base} | {f"expert {t!r}": p for t, p in experts.items()})
    with ExitStack() as stack:
        job = _open(stack, base, experts, method, hashes, options)
        if job.rows:
            job.rows.check_output(Path(output))
        items, watch = plan(job), Watch(job.experts, report)
        report.cover(items, strict)
        report.notes += _notes(job, items)
        shares = Shares(job, items, output, member, overwrite) if member else None
        if shares and not stack.enter_context(_finishing(shares, hashes, report)):
            return report
        sink = stack.enter_context(file_sink(job, items, report, output, overwrite))
        todo = pipeline.unfinished(items, sink)
        _merge(job, items, todo, sink, watch, report, shares)
        grown = bool(job.rows and job.rows.union.new)
        if not (watch.changed or grown or any(i.method and i not in todo for i in items)):
            raise InputError(f"{UNCHANGED}: {output} was not written", "are the experts trained?")
        show_warnings(report)
        files = (extra() if callable(extra) else extra) or {}
        if job.rows:
            files = job.rows.files(files)
        sink.finish(files)
        if shares:
            shares.conclude()
    return report


def _notes(job: Job, items: Sequence[Item]) -> list[str]:
    """What is to be said of a merge before it begins."""
    return [*job.notes, *notes(job.experts), *outside(job, items), *stated(job.devices)]


def _merge(
    job: Job,
    items: Sequence[Item],
    todo: Sequence[Item],
    sink: Sink,
    watch: Watch,
    report: Report,
    shares: Shares | None = None,
) -> None:
    """Merge those of all items that are to do, or take what members of a shared merge have."""
    with pipeline.running(job, sink, report) as put:
        if shares:
            shares.copy(sink, put, watch)
            return
        contexts = passes.contexts(job, items)
        pipeline.merge(job, todo, contexts, put, watch, *job.devices)


@contextmanager
def _finishing(shares: Shares, hashes: Hashes | None, report: Report) -> Iterator[bool]:
    """Merge this member's share; whether it is then for this member to write the output."""
    if not shares.done:
        with shares.sink() as sink:
            todo = pipeline.unfinished(shares.own, sink)
            _merge(shares.job, shares.items, todo, sink, Watch(shares.job.experts, report), report)
            if hashes:
                shares.put_hashes(hashes)
            sink.finish()
    report.pending = shares.pending
    with nullcontext() if report.pending or shares.written else shares.writing(report) as ours:
        if ours and hashes:
            shares.take_hashes(hashes)
        yield bool(ours)


def _open(
    stack: ExitStack,
    base: str | Path,
    experts: Mapping[str, str | Path],
    method: Method,
    hashes: Hashes | None,
    options: FileOptions,
) -> Job:
    """The job on files, which the stack closes, also after a failure."""

    source = stack.enter_context(closing(open_base(base)))
    sources = {t: stack.enter_context(closing(open_checkpoint(p))) for t, p in experts.items()}
    if hashes:
        source.hash_files(base, hashes)
        for task, expert in sources.items():
            expert.hash_files(experts[task], hashes)
    if (statistics := options.get("statistics")) is not None:
        options["statistics"] = {
            task: tensors
            if isinstance(tensors, Mapping)
            else LazyStatistics(stack.enter_context(closing(open_base(tensors))))
            for task, tensors in statistics.items()
        }
    return prepare(source, sources, method, folder=base, **options)


def show_warnings(report: Report) -> None:
    """Log what a report warns of."""
    for warning in report.warnings:
        log.warning("%s", warning)

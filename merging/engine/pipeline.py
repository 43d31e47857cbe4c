"""Read ahead, merge, write behind: the threads of a merge, one for each of the three at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from merging.engine import passes
from merging.engine.job import Job
from merging.engine.memory import measured
from merging.engine.passes import Contexts, ahead
from merging.engine.plan import Item, Piece, pieces, share
from merging.engine.report import Report, Watch
from merging.engine.sinks import Sink
from merging.errors import InputError
from merging.factors import Factors
from merging.formats.checks import DAMAGED, NotFinite, not_finite
from merging.progress import track

Put = Callable[[Piece, Tensor | Factors], None]


def merge(
    job: Job, items: Sequence[Item], contexts: Contexts, put: Put, watch: Watch, *devices: str
) -> None:
    """Merge tensors and put them; the pieces of one keep their order.

    devices: what computes; where there are several, they share the tensors.
    """
    if len(devices) > 1:
        shares = share(items, len(devices))
        with ThreadPoolExecutor(len(shares)) as pool:
            runs = [
                pool.submit(merge, job, part, contexts, put, watch, device)
                for device, part in zip(devices, shares, strict=True)
            ]
        for run in runs:
            run.result()
        return
    weights = None if job.task_weights is None else torch.tensor(job.task_weights)
    todo, own = [piece for item in items for piece in pieces(job, item)], {}
    loads = ahead(lambda piece: (piece, piece.item.route.load(job, piece)), todo)
    for piece, loaded in track(loads, f"merging on {devices[0]}", len(todo)):
        watch.look(piece, loaded)
        item = piece.item
        place = {"depth": item.depth, "in_block": item.in_block, "weights": weights}
        if piece.first:
            own = passes.of_tensor(job, piece, loaded)
        context = {**place, **contexts.get(id(item.method), {}), **own}
        merged = item.route.merge(job, piece, loaded, context, devices[0])
        watch.compare(item, loaded, merged)
        put(piece, merged)


@contextmanager
def running(job: Job, sink: Sink, report: Report) -> Iterator[Put]:
    """What surrounds a merge: its costs are measured, a thread writes, bad values are told."""

    def write(piece: Piece, merged: Tensor | Factors) -> None:
        for name in (piece.item.name, *piece.item.copies):
            sink.write(name, merged, piece.rows)

    with measured(report, job), all_told(job), behind(write) as put:
        yield put


def unfinished(items: Sequence[Item], sink: Sink) -> list[Item]:
    """The tensors that an interrupted merge did not finish."""
    return [i for i in items if not {i.name, *i.copies} <= sink.done]


@contextmanager
def all_told(job: Job) -> Iterator[None]:
    """Where one value is not finite, look at all tensors before saying so: one report for all."""
    try:
        yield
    except NotFinite as error:
        sources = {"the base": job.base} | {f"expert {t!r}": e for t, e in job.experts.items()}
        sentences = []
        for label, source in track(sources.items(), "looking for values that are not finite"):
            sentences += not_finite(source, label)
        if sentences:
            raise InputError("; ".join(sentences), DAMAGED) from None
        raise InputError(error.message, error.hint) from None


@contextmanager
def behind(write: Callable[..., None], waiting: int = 2) -> Iterator[Callable[..., None]]:
    """`write` as another thread does it, in order; what it raises, a later call or the end does.

    waiting: so many calls may be outstanding before the next one waits.
    """
    outstanding: deque[Future[None]] = deque()
    lock = threading.Lock()
    with ThreadPoolExecutor(1) as pool:

        def put(*arguments: Any) -> None:
            with lock:
                outstanding.append(pool.submit(write, *arguments))
                while len(outstanding) > waiting:
                    outstanding.popleft().result()

        yield put
        while outstanding:
            outstanding.popleft().result()

"""Read ahead, merge, write behind: the threads of a merge, one for each of the three at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from merging.engine import batches, passes
from merging.engine.job import Job
from merging.engine.memory import measured
from merging.engine.passes import Contexts, ahead
from merging.engine.plan import Item, Piece, share
from merging.engine.report import Report, Watch
from merging.engine.routes import DENSE, Loaded
from merging.engine.sinks import Sink
from merging.engine.transfers import begin, full_float32, transfers
from merging.errors import InputError
from merging.factors import Factors
from merging.formats.checks import DAMAGED, NotFinite, not_finite
from merging.progress import track

Begun = tuple[list[Loaded], Any]  # loads of a batch, and what tells when they have arrived
Arriving = Callable[[], Tensor | Factors]  # a result, awaited
Put = Callable[[Piece, Arriving], None]
OutOfMemory = torch.OutOfMemoryError


def merge(
    job: Job, items: Sequence[Item], contexts: Contexts, put: Put, watch: Watch, *devices: str
) -> None:
    """Merge tensors and put them; the pieces of one keep their order.

    devices: what computes; where there are several, they share the tensors.
    """
    begin(devices)
    limit = batches.limit(devices)
    bundles = batches.together(job, items, limit)
    shares = share(bundles, len(devices), lambda bundle: sum(item.numel for item in bundle))
    parts = [
        [batch for bundle in share for batch in batches.batches(job, bundle, limit)]
        for share in (shares if len(devices) > 1 else [bundles])
    ]
    stop = threading.Event()
    workers = [Worker(job, contexts, watch, device, stop) for device in devices]
    with full_float32():
        if len(workers) == 1:  # in this thread, which an interrupt reaches
            workers[0].run(parts[0], put)
            return
        with ThreadPoolExecutor(len(workers)) as pool:
            runs = [pool.submit(w.run, own, put) for w, own in zip(workers, parts, strict=True)]
            try:
                for run in as_completed(runs):
                    run.result()
            finally:
                stop.set()  # where one fails, the others need not finish


class Worker:
    """One device at its part of a merge, in a thread of its own."""

    def __init__(
        self, job: Job, contexts: Contexts, watch: Watch, device: str, stop: threading.Event
    ) -> None:
        self.job, self.contexts, self.watch = job, contexts, watch
        self.device, self.stop = device, stop
        self.moves = transfers(device)
        self.of_tensor: dict[str, Any] = {}  # of the present one, from a pass over it alone
        self.weights = None if job.task_weights is None else torch.tensor(job.task_weights)

    def run(self, todo: Sequence[list[Piece]], put: Put) -> None:
        """Merge batches and put their pieces, in order."""
        loads = ahead(lambda batch: (batch, self._early(batch)), todo)
        for batch, begun in track(loads, f"merging on {self.device}", len(todo)):
            if self.stop.is_set():
                return
            try:  # taken out of the list, so that nothing else holds it
                merged = self._merge(batch, begun.pop() if begun else self._load(batch))
            except OutOfMemory:
                merged = None  # what is held must be let go before there is another attempt
            whole = zip(batch, merged, strict=True) if merged is not None else None
            for piece, own in whole or self._in_halves(batch):
                put(piece, self.moves.back(own))

    def _early(self, batch: list[Piece]) -> list[Begun]:
        """The next batch, begun while one is merged; none where memory does not hold two."""
        try:
            return [self._load(batch)]
        except OutOfMemory:
            return []

    def _load(self, batch: list[Piece]) -> Begun:
        return self.moves.load(
            lambda send: [piece.item.route.load(self.job, piece, send) for piece in batch]
        )

    def _in_halves(self, batch: list[Piece]) -> Iterator[tuple[Piece, Tensor | Factors]]:
        """Of each piece what it became, where memory does not hold all of the batch."""
        self.moves.free()
        item, half = batch[0].item, len(batch) // 2
        if not half:
            raise InputError(
                f"{self.device} has too little memory to merge {item.name!r} of shape "
                f"{list(item.shape)} by {item.merger.name}",
                hint="device=cpu merges it in main memory",
            )
        self.watch.tell(
            f"the memory of {self.device} did not hold {len(batch)} layers of shape "
            f"{list(item.shape)} at once: they were merged {half} at a time"
        )
        for part in (batch[:half], batch[half:]):
            try:
                merged = self._merge(part, self._load(part))
            except OutOfMemory:
                merged = None
            yield from self._in_halves(part) if merged is None else zip(part, merged, strict=True)

    def _merge(self, batch: Sequence[Piece], begun: Begun) -> Sequence[Tensor | Factors]:
        loads = self.moves.receive(begun)
        for piece, loaded in zip(batch, loads, strict=True):
            self.watch.look(piece, loaded)
        merged: Sequence[Tensor | Factors]
        if len(batch) > 1:
            merged = DENSE.together(self.job, batch, loads, self._context(batch[0].item))
        else:
            (piece,), (loaded,) = batch, loads
            if piece.first:
                self.of_tensor = passes.of_tensor(self.job, piece, loaded)
            context = self._context(piece.item) | self.of_tensor
            merged = [piece.item.route.merge(self.job, piece, loaded, context)]
        for piece, loaded, own in zip(batch, loads, merged, strict=True):
            self.watch.compare(piece.item, loaded, own)
        return merged

    def _context(self, item: Item) -> dict[str, Any]:
        place = {"depth": item.depth, "in_block": item.in_block}
        made = {"weights": self.weights, "adapters": self.job.adapted(item.name)}
        return {**place, **made, **self.contexts.get(id(item.method), {})}


@contextmanager
def running(job: Job, sink: Sink, report: Report) -> Iterator[Put]:
    """What surrounds a merge: its costs are measured, a thread writes, bad values are told."""

    def write(piece: Piece, arriving: Arriving) -> None:
        merged = arriving()
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

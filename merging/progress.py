"""Progress with time left: a live bar on a terminal, an occasional log line everywhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0

# rich admits one live display at a time, so nested loops share it, a line each.
_bars: Progress | None = None


def track(iterable: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield what `iterable` yields and show how far it is and how long it will still take.

    total: number of items, needed only where `iterable` has no length.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    show = _on_terminal if Console(stderr=True).is_terminal else _in_log
    yield from show(iterable, label, total)


def _on_terminal(iterable: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    bars, task = _open_bar(label, total)
    try:
        for item in iterable:
            yield item
            bars.advance(task)
    finally:
        _close_bar(bars, task)


def _open_bar(label: str, total: int | None) -> tuple[Progress, TaskID]:
    global _bars
    if _bars is None:
        _bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        _bars.start()
    return _bars, _bars.add_task(label, total=total)


def _close_bar(bars: Progress, task: TaskID) -> None:
    global _bars
    bars.remove_task(task)
    if not bars.tasks:
        bars.stop()
        _bars = None


def _in_log(iterable: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    start = last = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = f", {(now - start) / done * (total - done):.0f} s left" if total else ""
            log.info("%s: %d of %s%s", label, done, total or "?", left)

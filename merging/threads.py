"""Threads of operations that are too small to share: each worker computes alone.

torch divides an operation among its threads, and they wait for one another after each: on blocks
that stay in a CPU's cache the waiting costs as much as the work. Here every thread has a block of
its own instead.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Question = TypeVar("Question")
Answer = TypeVar("Answer")


def each(function: Callable[[Question], Answer], questions: Iterable[Question]) -> Iterator[Answer]:
    """function(question) for each question, in their order, on as many threads as torch has."""
    count = torch.get_num_threads()
    return map(function, questions) if count == 1 else _pool(count).map(function, questions)


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    """Workers whose own operations use one thread: in torch a thread's number is its own."""
    started = threading.Barrier(count)

    def alone() -> None:
        torch.get_num_threads()  # a thread takes over the process's number at its first operation
        torch.set_num_threads(1)
        started.wait()  # none is left to start when the process's number is put back

    pool = ThreadPoolExecutor(count, "block")
    for task in [pool.submit(alone) for _ in range(count)]:
        task.result()
    torch.set_num_threads(count)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)

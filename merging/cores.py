"""Factorisations of several matrices side by side on a CPU, each with one thread of BLAS.

Most of an eigendecomposition goes into loops and products with vectors, which more threads hardly
speed up, and threads that wait for each other lose much where a machine is busy. Matrices are
independent, so each gets a core of its own. What is computed does not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Result = TypeVar("Result")

_BYTES = 2**29  # that all threads together may take
_SQUARES = 6  # in float64, as wide as a matrix's shorter side, that one of them takes
_limiting = threading.Lock()  # how many threads BLAS has is a setting of the whole process


def each_on_a_core(function: Callable[[Tensor], Result], stack: Tensor) -> list[Result]:
    """[function(matrix) for matrix in stack], (T, m, n) on a CPU, as many at once as memory allows.

    function: mostly one LAPACK routine that lets other threads run, as SciPy's driver `evr` does.
    """
    square = 8 * min(stack.shape[1:]) ** 2
    threads = min(len(stack), torch.get_num_threads(), _BYTES // max(1, _SQUARES * square))
    if threads < 2:
        return [function(matrix) for matrix in stack]
    libraries = _libraries()
    with (
        _limiting,
        libraries.limit(limits=1, user_api="blas"),
        ThreadPoolExecutor(threads) as pool,
    ):
        return list(pool.map(function, stack))


@cache
def _libraries() -> ThreadpoolController:
    """Those loaded: finding them takes as long as a small factorisation."""
    from threadpoolctl import ThreadpoolController  # of no use to most merges

    return ThreadpoolController()

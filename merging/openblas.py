"""Makes SciPy's OpenBLAS use the AVX-512 instructions of AMD CPUs that it does not know.

OpenBLAS (0.3.31 at least) takes AMD's Zen 5 for a CPU without AVX-512, as the MKL inside torch
does: half the speed. Its kernels for Intel's AVX-512 run there as well, but it reads such a choice
from the environment once, when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CORE = "OPENBLAS_CORETYPE"
_NEEDED = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@contextmanager
def fastest_kernels() -> Iterator[None]:
    """Surrounds the first import of scipy.linalg; after another's import it has no effect."""
    if _CORE in os.environ or not _amd_with_avx512():
        yield
        return
    os.environ[_CORE] = "SkylakeX"
    try:
        yield
    finally:
        del os.environ[_CORE]


def _amd_with_avx512(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    if not cpuinfo.exists():
        return False
    text = cpuinfo.read_text().partition("\n\n")[0]  # the first of equal cores
    return "AuthenticAMD" in text and set(text.split()) >= _NEEDED

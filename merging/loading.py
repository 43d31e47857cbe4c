"""Settings that torch and SciPy's OpenBLAS read from the environment once, when they are loaded.

Merging alternates between the threads of the two. By default either's keep a core busy for a while
when they have nothing to do, which takes it from the other's. Here they go to sleep.

Besides, OpenBLAS (0.3.31 at least) takes AMD's Zen 5 for a CPU without AVX-512, as the MKL inside
torch does: half the speed. Its kernels for Intel's AVX-512 run there as well.

What the user has set is kept, and the environment is left as it was. Where another package loaded
a library before, it stays as it was loaded, and merging is only slower.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_NEEDED = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@contextmanager
def loading_torch() -> Iterator[None]:
    """Surrounds the first import of torch."""
    with _defaults({"OMP_WAIT_POLICY": "PASSIVE"}):
        yield


@contextmanager
def loading_openblas() -> Iterator[None]:
    """Surrounds the first import of scipy.linalg."""
    settings = {"OPENBLAS_THREAD_TIMEOUT": "16"}  # of 2^16 cycles instead of 2^26
    if _amd_with_avx512():
        settings["OPENBLAS_CORETYPE"] = "SkylakeX"
    with _defaults(settings):
        yield


@contextmanager
def _defaults(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while, where the user has not set them."""
    chosen = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]


def _amd_with_avx512(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    if not cpuinfo.exists():
        return False
    text = cpuinfo.read_text().partition("\n\n")[0]  # the first of equal cores
    return "AuthenticAMD" in text and set(text.split()) >= _NEEDED

"""What a merge costs: seconds, bytes read, the peak of memory."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from merging.engine.job import Job
from merging.engine.report import Report


@contextmanager
def measured(report: Report, job: Job) -> Iterator[None]:
    """Add what the block costs to a report."""
    start, read = time.perf_counter(), _bytes_read(job)
    _reset_peak()
    yield
    report.seconds += time.perf_counter() - start
    report.peak_bytes = _peak(job.devices)
    report.bytes_read += _bytes_read(job) - read


def _bytes_read(job: Job) -> int:
    return job.base.bytes_read + sum(expert.bytes_read for expert in job.experts.values())


def _reset_peak() -> None:
    with suppress(OSError):  # Linux: start the high-water mark of resident memory anew
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)


def _peak(devices: Sequence[str]) -> int:
    gpus = [d for d in devices if d.startswith("cuda")]
    if gpus:
        return sum(torch.cuda.max_memory_allocated(d) for d in gpus)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        status = ""
    if match := re.search(r"VmHWM:\s+(\d+) kB", status):
        return int(match[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

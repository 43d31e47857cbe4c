"""`make bench-gpu`: what a GPU makes of the methods, in one script of a few minutes.

    python -m experiments.bench.gpu                                    # on the first GPU
    python -m experiments.bench.gpu device=cpu scale=16 output=FOLDER  # proves it without one

It needs torch, numpy, scipy, safetensors, hydra-core and rich, no file and no network: weights are
random, of the shapes of ViT-B/32, ViT-L/14, T5-large (the models of the ACTMat paper's latency
table) and of two blocks of a 7B decoder. A layer of each shape is timed after a warm-up, and its
median counts as often as the model has such a layer. Textbook code runs on the same device in the
same run. Writes gpu.csv and gpu.md with the card's name, versions, peak memory, and the distance of
what the device merges to what the CPU merges.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import merging
from experiments.hydra_run import Command
from experiments.report.markup import comma_separated
from merging.errors import InputError
from merging.formats.disk import write_synced
from merging.method.reference import RANDOM, TEXTBOOK
from merging.progress import track

Shape = tuple[int, int, int]  # count, d_out, d_in
MODELS: dict[str, tuple[int, tuple[Shape, ...]]] = {  # experts, shapes of the linear layers
    "vit_b_32": (8, ((48, 768, 768), (12, 3072, 768), (12, 768, 3072))),
    "vit_l_14": (8, ((96, 1024, 1024), (24, 4096, 1024), (24, 1024, 4096))),
    "t5_large": (7, ((288, 1024, 1024), (48, 4096, 1024), (48, 1024, 4096))),
    "decoder_7b_two_blocks": (3, ((8, 4096, 4096), (4, 11008, 4096), (2, 4096, 11008))),
}
# Seconds on the ACTMat authors' GPU (arXiv 2604.01329, T5-large, seven tasks).
PUBLISHED = {"average": 2.7, "iso_c": 24.1, "actmat": 140.6, "tsv_m": 194.6, "regmean": 279.5}
LARGE = ("average", "actmat", "tsv_m", "iso_c", "regmean")  # what models beyond the first are given
MANY_STEPS = {"wudi": {"steps": 10}, "mats": {"steps": 10}}  # the same for both
TOLERANCE = 1e-3  # relative distance to the CPU's result that counts as agreement
TOKENS = (10, 32, 128)  # batches, examples and tokens of RegMean's statistics in the paper


@dataclass
class BenchGpu:
    """The keys of configs/bench_gpu.yaml."""

    device: str = "cuda"
    output: str = "results/bench"
    scale: int = 1  # sides of all matrices are divided by it
    minutes: float = 6.0
    models: list[str] = field(default_factory=lambda: list(MODELS))
    methods: list[str] | None = None  # null: every method on the first model, `LARGE` elsewhere
    tests: bool = True  # also run the tests that need a GPU


@dataclass(frozen=True)
class Row:
    """One method on one model; seconds of all its layers."""

    model: str
    method: str
    seconds: float
    textbook: float | None
    statistics: float  # of measuring second moments, where the method needs them
    peak_bytes: int
    distance: float | None  # to the CPU's result on one layer; None: the method draws at random


def bench_gpu(settings: BenchGpu) -> None:
    """Time the methods on a GPU beside textbook code, and write results/bench/gpu.*"""
    device = _device(settings.device)
    deadline = time.monotonic() + 60 * settings.minutes
    jobs = [(m, n) for m in settings.models for n in _methods(settings, m)]
    rows, late = [], []
    for model, name in track(jobs, f"merging on {device}"):
        if time.monotonic() < deadline:
            rows.append(measure(model, name, device, settings.scale, deadline))
        else:
            late.append(f"{name} on {model}")
    if not rows:
        raise InputError("no method was measured within the time", hint="raise minutes=")
    tests = _gpu_tests() if settings.tests and device.type == "cuda" else None
    output = Path(settings.output)
    write_synced(output / "gpu.csv", comma_separated([asdict(row) for row in rows]))
    write_synced(output / "gpu.md", page(rows, device, settings.scale, late, tests))
    print(f"written to {output / 'gpu.md'} and {output / 'gpu.csv'}")


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this machine has no usable GPU",
            hint="device=cpu scale=16 output=FOLDER proves the script without one",
        )
    torch.backends.cuda.matmul.allow_tf32 = False  # products in full float32
    return device


def _methods(settings: BenchGpu, model: str) -> Sequence[str]:
    if model not in MODELS:
        raise InputError(f"unknown model {model!r}", hint=f"known: {', '.join(MODELS)}")
    if settings.methods is not None:
        return settings.methods
    known = [n for n in merging.methods() if n in TEXTBOOK]
    return known if model == next(iter(MODELS)) else LARGE


def measure(model: str, name: str, device: torch.device, scale: int, deadline: float) -> Row:
    """Seconds of all layers of a model, from the median of each shape."""
    T, shapes = MODELS[model]
    method = merging.create(name, **MANY_STEPS.get(name, {}))
    seconds, textbook, collecting, distance = 0.0, 0.0, 0.0, None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for count, *sides in shapes:
        d_out, d_in = (max(8, side // scale) for side in sides)
        D = deltas(T, d_out, d_in, device)
        context, spent = _context(method, D, scale)
        collecting += count * spent
        seconds += count * median(partial(method, D, **context), device, count, deadline)
        if distance is None and name not in RANDOM:
            distance = _distance(method, D, context)
        if name in TEXTBOOK and time.monotonic() < deadline:
            plain = partial(TEXTBOOK[name], D, **context, **MANY_STEPS.get(name, {}))
            textbook += count * median(plain, device, 2, deadline)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Row(model, name, seconds, textbook or None, collecting, peak, distance)


def deltas(T: int, d_out: int, d_in: int, device: torch.device) -> Tensor:
    """Random differences (T, d_out, d_in) that read directions of unequal strength."""
    generator = torch.Generator().manual_seed(d_out + d_in)
    strength = torch.arange(1, d_in + 1, dtype=torch.float32).rsqrt()
    D = torch.randn(T, d_out, d_in, generator=generator) * (1e-3 * strength)
    return D.to(device)


def _context(method: merging.Method, D: Tensor, scale: int) -> tuple[dict[str, Tensor], float]:
    """Statistics of random inputs where a method needs them, and the seconds it took."""
    if method.needs == "fisher":
        return {"fishers": D.square() + D.square().mean()}, 0.0
    if method.needs != "covariance":
        return {}, 0.0
    T, d_out, d_in = D.shape
    batches, *sizes = TOKENS
    tokens = max(d_in, sizes[0] * sizes[1] // scale)
    W = torch.randn(d_out, d_in, device=D.device)
    z = torch.randn(tokens, d_in, device=D.device)
    _synchronise(D.device)
    start = time.perf_counter()
    moments = []
    for _ in range(T):  # through each expert: the layer's product and the sum z^T z
        sums = torch.zeros(d_in, d_in, device=D.device)
        for _ in range(batches):
            z @ W.mT
            sums += z.mT @ z
        moments.append(sums / (batches * tokens))
    _synchronise(D.device)
    return {"covariances": torch.stack(moments)}, time.perf_counter() - start


def median(call: Callable[[], Any], device: torch.device, most: int, deadline: float) -> float:
    """Of at most five calls after one that warms up, fewer where the time runs out."""
    spent = []
    for _ in range(1 + min(5, most)):
        _synchronise(device)
        start = time.perf_counter()
        call()
        _synchronise(device)
        spent.append(time.perf_counter() - start)
        if sum(spent) > 4 or time.monotonic() > deadline:
            break
    return statistics.median(spent[1:] or spent)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _distance(method: merging.Method, D: Tensor, context: dict[str, Tensor]) -> float:
    """Relative distance of what the device merges to what the CPU merges, on some of the rows."""
    narrow = D[:, : min(256, D.shape[1])]
    own = {k: v[:, : narrow.shape[1]] if k == "fishers" else v for k, v in context.items()}
    here = method(narrow, **own).cpu().double()
    there = method(narrow.cpu(), **{k: v.cpu() for k, v in own.items()}).double()
    return ((here - there).norm() / there.norm().clamp_min(1e-300)).item()


def _gpu_tests() -> str:
    """The last line of `pytest -m gpu`."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: the GPU tests did not run"
    line = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=0"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*line, f"--basetemp={folder}/t"], capture_output=True, text=True, timeout=300
        )
    told = [text for text in done.stdout.splitlines() if " passed" in text or " failed" in text]
    return told[-1] if told else f"the GPU tests ended with exit code {done.returncode}"


def page(
    rows: Sequence[Row], device: torch.device, scale: int, late: Sequence[str], tests: str | None
) -> str:
    """The rows as Markdown, by model."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    lines = [f"# Merging on {card or device.type}\n"]
    lines.append(
        f"torch {torch.__version__}, python {platform.python_version()}; float32, no TF32."
    )
    if scale > 1:
        lines.append(f"\n**All sides are divided by {scale}: a proof of the script, no figure.**")
    for model in dict.fromkeys(row.model for row in rows):
        lines += ["", f"## {model}, {MODELS[model][0]} experts\n", *_table(rows, model)]
    if late:
        lines += ["", f"Not measured, the time was up: {', '.join(late)}."]
    if tests:
        lines += ["", f"GPU tests: {tests}"]
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[Row], model: str) -> Iterator[str]:
    paper = " the paper's GPU, s |" if model == "t5_large" else ""
    yield f"| method | s | textbook s | ratio | statistics s | peak GB | to the CPU |{paper}"
    yield "| --- |" + " ---: |" * (6 + bool(paper))
    for row in sorted((r for r in rows if r.model == model), key=lambda r: r.seconds):
        ratio = f"{row.textbook / row.seconds:.1f}" if row.textbook else "–"
        plain = f"{row.textbook:.3g}" if row.textbook else "–"
        far = "–" if row.distance is None else f"{row.distance:.0e}"
        mark = " **differs**" if row.distance is not None and row.distance > TOLERANCE else ""
        cells = [row.method, f"{row.seconds:.3g}", plain, ratio, f"{row.statistics:.3g}"]
        cells += [f"{row.peak_bytes / 1e9:.2f}", far + mark]
        cells += [str(PUBLISHED.get(row.method, "–"))] * bool(paper)
        yield "| " + " | ".join(cells) + " |"


COMMAND = Command("bench_gpu", BenchGpu, task=bench_gpu)

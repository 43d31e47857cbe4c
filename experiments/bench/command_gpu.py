"""`make bench-gpu`: what a GPU makes of the methods, in one script of a few minutes.

    python -m experiments.bench.gpu                                    # on the first GPU
    python -m experiments.bench.gpu device=cpu scale=16 output=FOLDER  # proves it without one

It needs torch, numpy, scipy, threadpoolctl, safetensors, hydra-core and rich, no file, no network:
weights are random, of the shapes of ViT-B/32, ViT-L/14, T5-large (the models of the ACTMat paper's
latency table) and of two blocks of a 7B decoder. A layer of each shape is timed after a warm-up,
and its median counts as often as the model has such a layer; where a method has a call for several
layers, that is timed beside. Textbook code runs on the same device in the same run. Then whole
models are merged by the engine, which moves them from main memory and back. Writes gpu.csv,
gpu_engine.csv and gpu.md with the card's name, versions, peak memory, and the distance of what the
device merges to what the CPU merges, after every measurement anew: what is killed has left what it
had.

What matters most comes first, and a call that would not end in time is not begun: how long it takes
is judged from sides of a quarter. What was left out is named.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import merging
from experiments.bench.gpu_page import page
from experiments.hydra_run import Command
from experiments.report.markup import comma_separated
from merging.engine import batches
from merging.engine.transfers import full_float32
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
FIRST = ("average", "actmat", "rank_rule", "sided", "tsv_m", "iso_c", "regmean")  # of every model
ENGINE = ("actmat", "rank_rule", "tsv_m", "ties")  # merged as whole models
MANY_STEPS = {"wudi": {"steps": 10}, "mats": {"steps": 10}}  # the same for both
TESTS_SECONDS = 60  # kept for the tests that need a GPU
DEAREST = 20.0  # seconds that one call of textbook code may take
TOKENS = (10, 32, 128)  # batches, examples and tokens of RegMean's statistics in the paper


@dataclass
class BenchGpu:
    """The keys of configs/bench_gpu.yaml."""

    device: str = "cuda"
    output: str = "results/bench"
    scale: int = 1  # sides of all matrices are divided by it
    minutes: float = 5.75
    models: list[str] = field(default_factory=lambda: list(MODELS))
    methods: list[str] | None = None  # null: every method, `FIRST` before the others
    tests: bool = True  # also run the engine's tests that need a GPU


@dataclass(frozen=True)
class Row:
    """One method on one model; seconds of all its layers."""

    model: str
    experts: int
    method: str
    seconds: float
    textbook: float | None
    batched: float | None  # seconds of them, several in one call
    statistics: float  # of measuring second moments, where the method needs them
    peak_bytes: int
    distance: float | None  # to the CPU's result on one layer; None: the method draws at random


@dataclass(frozen=True)
class Engine:
    """One whole model through the engine: from main memory to the device and back."""

    model: str
    method: str
    how: str
    seconds: float
    peak_bytes: int
    same_bytes: bool  # as the first way of the same method


@dataclass
class Found:
    """What was measured so far, and what was left out."""

    settings: BenchGpu
    device: torch.device
    deadline: float
    rows: list[Row] = field(default_factory=list)
    engine: list[Engine] = field(default_factory=list)
    sent: dict[str, tuple[float, float]] = field(default_factory=dict)  # see `sending`
    late: list[str] = field(default_factory=list)
    tests: str | None = None

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return self.deadline - time.monotonic()

    def write(self) -> Path:
        """All of it."""
        output = Path(self.settings.output)
        write_synced(output / "gpu.csv", comma_separated([asdict(row) for row in self.rows]))
        if self.engine:
            rows = comma_separated([asdict(row) for row in self.engine])
            write_synced(output / "gpu_engine.csv", rows)
        write_synced(output / "gpu.md", page(self))
        return output


def bench_gpu(settings: BenchGpu) -> None:
    """Time the methods on a GPU beside textbook code, and write results/bench/gpu.*"""
    device = _device(settings.device)
    tests = settings.tests and device.type == "cuda"
    seconds = 60 * settings.minutes - TESTS_SECONDS * tests
    found = Found(settings, device, time.monotonic() + seconds)
    todo = _jobs(settings)
    with full_float32():
        for what, job in track(todo, f"merging on {device}"):
            if found.left > 0:
                job(found)
                found.write()
            else:
                found.late.append(what)
    if not found.rows:
        raise InputError("no method was measured within the time", hint="raise minutes=")
    if tests:
        found.tests = _gpu_tests(found.left + TESTS_SECONDS)
    output = found.write()
    print(f"written to {output / 'gpu.md'} and {output / 'gpu.csv'}")


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this machine has no usable GPU",
            hint="device=cpu scale=16 output=FOLDER proves the script without one",
        )
    return device


def _jobs(settings: BenchGpu) -> list[tuple[str, Callable[[Found], None]]]:
    """What there is to measure, the most important first: (its name, what measures it)."""
    if unknown := set(settings.models) - set(MODELS):
        raise InputError(f"unknown model {min(unknown)!r}", hint=f"known: {', '.join(MODELS)}")
    known = [n for n in merging.methods() if n in TEXTBOOK]
    chosen = known if settings.methods is None else settings.methods
    first, others = [n for n in FIRST if n in chosen], [n for n in chosen if n not in FIRST]
    whole = [m for m in settings.models if m != "t5_large"]  # whose shapes are ViT-L/14's

    def methods(names: Sequence[str]) -> list[tuple[str, Callable[[Found], None]]]:
        pairs = [(m, n) for m in settings.models for n in names]
        return [(f"{n} on {m}", partial(measure, model=m, name=n)) for m, n in pairs]

    engine = [
        (f"a whole {m} by {n}", partial(measure_engine, model=m, name=n))
        for m in whole
        for n in ENGINE
        if n in chosen
    ]
    return [*methods(first), *engine, *methods(others)]


def measure(found: Found, model: str, name: str) -> None:
    """Seconds of all layers of a model, from the median of each shape."""
    T, shapes = MODELS[model]
    device, scale = found.device, found.settings.scale
    steps = MANY_STEPS.get(name, {})
    method = merging.create(name, **steps)
    totals = {"ours": 0.0, "textbook": 0.0, "batched": 0.0, "statistics": 0.0}
    distance, plain = None, name in TEXTBOOK
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for count, *sides in shapes:
        d_out, d_in = (max(8, side // scale) for side in sides)
        D = deltas(T, d_out, d_in, device)
        if _expected(method, D, method) > max(0.0, found.left):
            found.late.append(f"{name} on {model}")
            return
        context, spent = _context(method, D, scale)
        totals["statistics"] += count * spent
        seconds = median(partial(method, D, **context), device, count, found.deadline)
        totals["ours"] += count * seconds
        if distance is None and name not in RANDOM:
            distance = _distance(method, D, context)
        if method.batched and not method.needs:
            totals["batched"] += _batched(method, D, count, found)
        own = partial(TEXTBOOK[name], **steps)
        if plain and _expected(own, D, method) < min(DEAREST, max(0.0, found.left)):
            totals["textbook"] += count * median(
                partial(own, D, **context), device, 2, found.deadline
            )
        elif plain:
            plain = False
            found.late.append(f"textbook {name} on {model}")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    found.rows.append(
        Row(model, T, name, totals["ours"], totals["textbook"] if plain else None,
            totals["batched"] or None, totals["statistics"], peak, distance)
    )  # fmt: skip


def _expected(call: Callable[..., Any], D: Tensor, method: merging.Method) -> float:
    """Seconds that a call should take at most, from sides of a quarter: operations are cubic."""
    small = D[:, : max(2, D.shape[1] // 4), : max(2, D.shape[2] // 4)].contiguous()
    context, _ = _context(method, small, TOKENS[1] * TOKENS[2])
    return 64 * median(partial(call, small, **context), D.device, 1, math.inf)


def _batched(method: merging.Method, D: Tensor, count: int, found: Found) -> float:
    """Seconds of `count` such layers, as many in one call as the engine gives to it."""
    size = max(1, min(count, batches.BATCH_BYTES // D.nbytes))
    stack = torch.stack([D] * size)
    return count / size * median(partial(method.many, stack), D.device, 2, found.deadline)


def measure_engine(found: Found, model: str, name: str) -> None:
    """A whole model from main memory and back: in batches, layer by layer, by two workers."""
    base, experts = whole_model(model, found.device, found.settings.scale)
    if not found.sent.get(model):
        found.sent[model] = sending(experts, found.device)
    method, first = merging.create(name), None
    device, most = str(found.device), batches.limit([str(found.device)]) or batches.BATCH_BYTES
    ways = [
        ("in batches", most, [device]),
        ("by two workers", most, [device] * 2),
        ("layer by layer", 0, [device]),
    ]
    for how, size, devices in ways:
        if found.left <= 0:
            found.late.append(f"a whole {model} by {name}, {how}")
            continue
        with patch.object(batches, "limit", lambda devices, size=size: size):
            _synchronise(found.device)
            merged = merging.merge_state_dicts(
                base, experts, method, layers=list(base), device=devices
            )
        first = first or merged
        same = all(torch.equal(first[k], merged[k]) for k in base)
        cost = merged.report
        peak = cost.peak_bytes if found.device.type == "cuda" else 0
        found.engine.append(Engine(model, name, how, cost.seconds, peak, same))


def whole_model(
    model: str, device: torch.device, scale: int
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base and experts in main memory, in bfloat16, random numbers made on the device."""
    T, shapes = MODELS[model]
    base: dict[str, Tensor] = {}
    experts: dict[str, dict[str, Tensor]] = {f"task{t}": {} for t in range(T)}
    generator = torch.Generator(device).manual_seed(0)
    for d_out, d_in, i in ((o, n, i) for count, o, n in shapes for i in range(count)):
        name = f"blocks.{i}.{d_out}_{d_in}.weight"
        shape = max(8, d_out // scale), max(8, d_in // scale)
        W0 = torch.randn(shape, generator=generator, device=device) / 30
        base[name] = W0.bfloat16().cpu()
        for expert in experts.values():
            moved = W0 + torch.randn(shape, generator=generator, device=device) / 1000
            expert[name] = moved.bfloat16().cpu()
    return base, experts


def sending(
    experts: Mapping[str, Mapping[str, Tensor]], device: torch.device
) -> tuple[float, float]:
    """Seconds that bringing all experts to the device takes, from pinned and from other memory."""
    tensors = [tensor for expert in experts.values() for tensor in expert.values()]
    spent = []
    for pinned in (True, False):
        _synchronise(device)
        start = time.perf_counter()
        for tensor in tensors:
            held = tensor.pin_memory() if pinned and device.type == "cuda" else tensor
            held.to(device, non_blocking=pinned)
        _synchronise(device)
        spent.append(time.perf_counter() - start)
    return spent[0], spent[1]


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
        if sum(spent) > 2 or time.monotonic() > deadline:
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


def _gpu_tests(seconds: float) -> str:
    """The last line of `pytest -m gpu`."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: the GPU tests did not run"
    line = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=0"]
    files = ["tests/test_gpu.py", "tests/test_transfers.py"]  # others need more than is named above
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [*line, *files, f"--basetemp={folder}/t"],
                capture_output=True, text=True, timeout=max(1.0, seconds),
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "the GPU tests did not end in time"
    told = [text for text in done.stdout.splitlines() if " passed" in text or " failed" in text]
    return told[-1] if told else f"the GPU tests ended with exit code {done.returncode}"


COMMAND = Command("bench_gpu", BenchGpu, task=bench_gpu)

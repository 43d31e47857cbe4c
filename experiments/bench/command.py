"""`python -m experiments.bench`: what every method costs, beside textbook code and the floor.

Each part leaves one CSV in <output>; summary.md and the figures are made from whatever CSVs are
there, so that a single part can be measured again. Tables of another machine are removed.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.markdown import Markdown

import merging
from experiments.bench import cost
from experiments.bench import files as bench_files
from experiments.bench import report as bench_report
from experiments.bench.cost import Cost, Rates, Repeats, in_fresh_process
from experiments.hydra_run import Command
from experiments.report import records
from merging.errors import InputError
from merging.formats.disk import write_synced
from merging.method.reference import TEXTBOOK
from merging.progress import track

log = logging.getLogger(__name__)
Row = dict[str, Any]
Shapes = list[list[int]]  # [count, d_out, d_in]


@dataclass
class Accuracy:
    experts: int
    shapes: Shapes
    methods: list[str]


@dataclass
class Model:
    experts: int
    shapes: Shapes
    methods: list[str] | None = None


@dataclass
class Lora:
    experts: int
    rank: int
    shapes: Shapes
    methods: list[str]


@dataclass
class Scaling:
    experts: list[int]
    shape: list[int]
    widths: list[int]
    at: int
    methods: list[str]


@dataclass
class Checkpoints:
    experts: int
    blocks: int
    width: int
    methods: list[str]
    repeats: Repeats


@dataclass
class Clip:
    models: list[str]
    experts: int
    images: int
    methods: list[str]


@dataclass
class DecoderRun:
    method: str
    blocks: int
    vocabulary: bool


@dataclass
class Decoder:
    experts: int
    hidden: int
    intermediate: int
    vocabulary: int
    runs: list[DecoderRun]
    repeats: Repeats


@dataclass
class Bench:
    """The keys of configs/bench.yaml."""

    parts: list[str]
    output: str
    folder: str | None
    repeats: Repeats
    hyperparameters: dict[str, dict[str, Any]]
    accuracy: Accuracy
    models: dict[str, Model]
    lora: Lora
    scaling: Scaling
    checkpoints: Checkpoints
    clip: Clip
    decoder: Decoder


@dataclass(frozen=True)
class Run:
    """What every part is measured under."""

    settings: Bench
    rates: Rates
    folder: Path

    def hyperparameters(self, name: str) -> dict[str, Any]:
        return dict(self.settings.hyperparameters.get(name, {}))

    def cost(self, *call: Any) -> Cost:
        return cost.cost(self.settings.repeats, *call)


# --- Parts: each yields the rows of its table -------------------------------------------------


def accuracy(run: Run) -> Iterator[Row]:
    """Distance to the textbook formula in float64, relative, on two spectra."""
    chosen = run.settings.accuracy
    for _, d_out, d_in in chosen.shapes:
        for spectrum in ("gap", "decaying"):
            D = cost.deltas(chosen.experts, d_out, d_in, spectrum=spectrum)
            for name in chosen.methods:
                exact = TEXTBOOK[name](D.double())
                found = {"ours": merging.create(name)(D), "textbook": TEXTBOOK[name](D)}
                errors = {
                    who: ((merged.double() - exact).norm() / exact.norm()).item()
                    for who, merged in found.items()
                }
                shape = f"{d_out} x {d_in}"
                yield {"method": name, "shape": shape, "spectrum": spectrum} | errors


def methods(run: Run) -> Iterator[Row]:
    """Every method on every shape of every model, once: models add shapes up by their counts."""
    wanted: dict[tuple[int, int, int], dict[str, None]] = {}
    for model in run.settings.models.values():
        for _, d_out, d_in in model.shapes:
            names = TEXTBOOK if model.methods is None else model.methods
            wanted.setdefault((model.experts, d_out, d_in), {}).update(dict.fromkeys(names))
    for (T, d_out, d_in), names in wanted.items():
        D = cost.deltas(T, d_out, d_in).share_memory_()
        context: dict[str, Any] = {}
        for name in sorted(names, key=_by_context):
            method = merging.create(name, **run.hyperparameters(name))
            needed = {None: [], "covariance": ["covariances"], "fisher": ["fishers"]}[method.needs]
            if list(context) != needed:
                context = cost.statistics_for(method, D)
            call = (D, name, run.hyperparameters(name), context)
            yield {
                "experts": T,
                "d_out": d_out,
                "d_in": d_in,
                "method": name,
                "floor": cost.floor(name, D, context, run.rates),
                **_columns("ours", run.cost(cost.ours, *call)),
                **_columns("textbook", run.cost(cost.textbook, *call)),
            }


def _by_context(name: str) -> str:
    """Methods that share statistics one after the other: those are large."""
    return merging.create(name).needs or ""


def _columns(who: str, found: Cost) -> Row:
    return {f"{who}_seconds": found.seconds, f"{who}_bytes": found.bytes}


def lora(run: Run) -> Iterator[Row]:
    """Adapters merged in their own rank, densely, and densely by the textbook."""
    chosen = run.settings.lora
    for count, d_out, d_in in chosen.shapes:
        factors = cost.adapters(chosen.experts, d_out, d_in, chosen.rank)
        for name in chosen.methods:
            row = {"method": name, "count": count, "d_out": d_out, "d_in": d_in}
            for route in (cost.narrow, cost.dense, cost.dense_textbook):
                row |= _columns(route.__name__, run.cost(route, factors, name))
            yield row


def scaling(run: Run) -> Iterator[Row]:
    """Seconds as the number of experts or the width grows, the other held."""
    chosen = run.settings.scaling
    sizes = [("experts", T, (T, *chosen.shape)) for T in chosen.experts]
    sizes += [("width", width, (chosen.at, width, width)) for width in chosen.widths]
    for axis, size, shape in sizes:
        D = cost.deltas(*shape).share_memory_()
        for name in chosen.methods:
            found = run.cost(cost.ours, D, name, {}, {})
            yield {"axis": axis, "size": size, "method": name} | found._asdict()


def checkpoints(run: Run) -> Iterator[Row]:
    """Whole files merged, beside reading and writing the same bytes, and beside a plain script."""
    chosen = run.settings.checkpoints
    base, experts = bench_files.vision(run.folder, chosen.blocks, chosen.width, chosen.experts)
    for name in chosen.methods:
        for who, merge in (("ours", bench_files.merge), ("textbook", bench_files.textbook_merge)):
            if who == "textbook" and name not in bench_files.SCRIPTS:
                continue
            call = (chosen.repeats, merge, base, experts, name, run.folder / "merged.safetensors")
            yield {"method": name, "who": who} | in_fresh_process(bench_files.repeatedly, *call)


def clip(run: Run) -> Iterator[Row]:
    """Whole CLIP towers at their real shapes: read, merged, written, loaded and run."""
    from experiments.bench import (
        clip as bench_clip,
    )  # open_clip would weigh on the other parts' memory

    chosen = run.settings.clip
    for model in chosen.models:
        base, experts = bench_clip.towers(run.folder, model, chosen.experts)
        for name in chosen.methods:
            output = run.folder / "merged.safetensors"
            call = (model, base, experts, name, output, chosen.images)
            row = {"model": model, "method": name, "experts": len(experts)}
            yield row | in_fresh_process(bench_clip.round_trip, *call)
            output.unlink()
        for path in (base, *experts.values()):
            path.unlink()


def decoder(run: Run) -> Iterator[Row]:
    """Blocks of a 7B model merged from bfloat16 shards; experts that no later run needs go."""
    chosen = run.settings.decoder
    files = bench_files.Decoder(
        run.folder, chosen.experts, chosen.hidden, chosen.intermediate, chosen.vocabulary
    )
    for i, this in enumerate(chosen.runs):
        files.keep([(r.blocks, r.vocabulary) for r in chosen.runs[i:]])
        base, experts = files.models(this.blocks, this.vocabulary)
        call = (bench_files.merge, base, experts, this.method, run.folder / "merged")
        yield asdict(this) | in_fresh_process(bench_files.repeatedly, chosen.repeats, *call)


PARTS = {p.__name__: p for p in (accuracy, methods, lora, scaling, checkpoints, clip, decoder)}


# --- The command ------------------------------------------------------------------------------


def bench(settings: Bench) -> None:
    """Measure the chosen parts, render all of them and show the summary."""
    Console().print(Markdown(measure(settings)))


def measure(settings: Bench) -> str:
    """Write the tables of the chosen parts, the figures and the summary; the summary's text."""
    check(settings)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=settings.folder) as temporary:
        rates = in_fresh_process(cost.rates, Path(temporary))
        describe(rates, output, settings.parts)
        run = Run(settings, rates, Path(temporary))
        for name in settings.parts:
            start = time.perf_counter()
            rows = list(track(PARTS[name](run), name))
            write_synced(
                output / f"{name}.csv",
                pd.DataFrame(rows).to_csv(index=False, float_format="%.6g", lineterminator="\n"),
            )
            log.info("%s took %.0f s", name, time.perf_counter() - start)
    models = {name: (model.experts, model.shapes) for name, model in settings.models.items()}
    return bench_report.render(output, models)


def check(settings: Bench) -> None:
    """Refuse parts and methods that do not exist before anything is measured."""
    for part in settings.parts:
        if part not in PARTS:
            raise InputError(f"unknown part {part!r}", f"known: {', '.join(PARTS)}")
    named = {
        "accuracy": settings.accuracy.methods,
        "lora": settings.lora.methods,
        **{f"models.{key}": model.methods or [] for key, model in settings.models.items()},
    }
    for where, names in named.items():
        for name in names:
            if name not in TEXTBOOK:
                raise InputError(
                    f"{where}.methods: no textbook implementation of {name!r}",
                    f"known: {', '.join(TEXTBOOK)}",
                )
    merged = [*settings.scaling.methods, *settings.checkpoints.methods, *settings.clip.methods]
    for name in [*merged, *(run.method for run in settings.decoder.runs)]:
        if merging.create(name).needs:
            raise InputError(f"method {name!r} needs statistics, expected one that needs none")


def describe(rates: Rates, output: Path, parts: Sequence[str]) -> None:
    """Write machine.json; tables that another machine measured are removed.

    The rates are those of the run that measured the methods, whose floors follow from them.
    """
    packages = {name: version(name) for name in ("numpy", "scipy")}
    machine = records.machine("cpu") | {"threads": torch.get_num_threads()}
    machine["versions"] = records.versions() | packages
    path, known = output / "machine.json", rates._asdict()
    if path.exists():
        before = json.loads(path.read_text())
        if {k: before.get(k) for k in machine} != machine:
            for table in output.glob("*.csv"):
                table.unlink()
        elif "methods" not in parts:
            known = before["rates"]
    write_synced(path, json.dumps(machine | {"rates": known}, indent=1) + "\n")


COMMAND = Command("bench", Bench, task=bench)

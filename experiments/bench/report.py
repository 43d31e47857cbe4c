"""Tables, figures and targets from the CSVs of `experiments.bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.report.figures import LINES, STYLE, save
from experiments.report.markup import markdown
from merging.formats.disk import write_synced

Tables = Mapping[str, pd.DataFrame]
# model -> experts, [count, d_out, d_in] of its layers
Models = Mapping[str, tuple[int, Sequence[Sequence[int]]]]

EXACT = 1e-4


def render(folder: Path, models: Models) -> str:
    """Write summary.md and the figures from the tables that are there; the summary's text."""
    tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    machine = json.loads((folder / "machine.json").read_text())
    sections = ["# Cost of merging\n", _machine(machine)]
    if "methods" in tables:
        tables = tables | {"models": whole_models(tables["methods"], models)}
    reached = targets(tables)
    if reached:
        sections += ["## Targets\n", markdown(["", "target", "measured", ""], reached)]
    for name, section in SECTIONS.items():
        if name in tables:
            sections += section(tables[name])
    if "models" in tables:
        save(speedups(tables["models"]), folder / "speed")
    if "scaling" in tables:
        save(curves(tables["scaling"]), folder / "scaling")
    text = "\n".join(sections)
    write_synced(folder / "summary.md", text)
    return text


def _machine(machine: Mapping) -> str:
    rates, versions = machine["rates"], machine["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB, "
        f"{machine['threads']} threads; {packages}.\n\n"
        f"Measured with the methods' floors: matrix products {rates['flops32'] / 1e9:.0f} GFLOP/s "
        f"in float32 and {rates['flops64'] / 1e9:.0f} in float64; symmetric matrix by vector "
        f"{rates['vector32'] / 1e9:.0f} and {rates['vector64'] / 1e9:.0f}; memory copied at "
        f"{rates['copied'] / 1e9:.1f} GB/s; files read (from the system's cache) at "
        f"{rates['read'] / 1e9:.1f} and written to the disk at {rates['written'] / 1e9:.2f} GB/s. "
        "Weights are synthetic.\n"
    )


# --- Whole models -----------------------------------------------------------------------------


def whole_models(measured: pd.DataFrame, models: Models) -> pd.DataFrame:
    """Seconds of all layers of each model, peak memory of the largest: one row per method."""
    rows = []
    for model, (experts, shapes) in models.items():
        counts = pd.DataFrame(shapes, columns=["count", "d_out", "d_in"])
        layers_of = measured[measured.experts == experts].merge(counts, on=["d_out", "d_in"])
        for method, layers in layers_of.groupby("method", sort=False):
            if len(layers) == len(counts):
                seconds = layers[["ours_seconds", "textbook_seconds", "floor"]]
                rows.append(
                    {"model": model, "experts": experts, "method": method}
                    | seconds.mul(layers["count"], axis=0).sum().to_dict()
                    | layers[["ours_bytes", "textbook_bytes"]].max().to_dict()
                )
    table = pd.DataFrame(rows)
    return table.assign(
        ratio=table.textbook_seconds / table.ours_seconds,
        over_floor=table.ours_seconds / table.floor,
    )


# --- Targets ----------------------------------------------------------------------------------


def targets(tables: Tables) -> list[list[str]]:
    """What was asked for, what was measured, and whether it was reached."""
    lines: list[list[str]] = []

    def add(what: str, bound: float, value: float, at_least: bool, form: str = "{:.1f}") -> None:
        reached = value >= bound if at_least else value <= bound
        sign = "at least" if at_least else "at most"
        number = form.format(value)
        lines.append([what, f"{sign} {bound:g}", number, "reached" if reached else "**missed**"])

    if "models" in tables:
        vit = tables["models"].query("model == 'vit_b_32'").set_index("method")
        if "actmat" in vit.index:
            pinv = vit.textbook_seconds["actmat"]
            add("ACTMat, textbook / ours (ViT-B/32)", 2.5, vit.ratio["actmat"], True)
            for name in ("ridge", "oas", "ledoit_wolf"):
                if name in vit.index:
                    value = pinv / vit.ours_seconds[name]
                    add(f"{name}, textbook ACTMat / ours", 5, value, True)
            add("ACTMat, ours / floor", 2, vit.over_floor["actmat"], False)
        for name, title in (("tsv_m", "TSV-M"), ("iso_c", "Iso-C")):
            if name in vit.index:
                add(f"{title}, textbook / ours (ViT-B/32)", 2, vit.ratio[name], True)
    if "accuracy" in tables:
        part = tables["accuracy"].query("method == 'actmat'")
        if len(part):
            worst = (part.ours / part.textbook).max()
            add("ACTMat, error ours / textbook, worst", 1, worst, False, "{:.2g}")
            gap = part.query("spectrum == 'gap'").ours.max()
            add("ACTMat, error with nothing at the cut", EXACT, gap, False, "{:.1e}")
    if "lora" in tables:
        part = tables["lora"].query("method == 'actmat'")
        sums = part.filter(like="seconds").mul(part["count"], axis=0).sum()
        if len(part):
            narrow = sums["narrow_seconds"]
            add("ACTMat on LoRA, dense / narrow", 50, sums["dense_seconds"] / narrow, True)
            add("... textbook / narrow", 200, sums["dense_textbook_seconds"] / narrow, True)
    if "checkpoints" in tables:
        own = tables["checkpoints"].query("who == 'ours'").set_index("method")
        for name in ("average", "task_arithmetic"):
            if name in own.index:
                value = own.seconds[name] / own.read_and_write_seconds[name]
                add(f"{name}, seconds / (read + write)", 1.5, value, False)
    if "decoder" in tables:
        part = tables["decoder"]
        add("7B slice, peak memory in GB", 6, part.peak_bytes.max() / 1e9, False)
        for value in _doublings(part):
            add("7B slice, twice the blocks, times the seconds", 2.1, value, False, "{:.2f}")
    if "scaling" in tables:
        slopes = exponents(tables["scaling"])["experts"]
        add(f"exponent of T, largest ({slopes.idxmax()})", 1.1, slopes.max(), False, "{:.2f}")
    return lines


def _doublings(runs: pd.DataFrame) -> list[float]:
    """Seconds of 2 n blocks over those of n blocks, wherever both were run."""
    found = []
    for _, part in runs.groupby(["method", "vocabulary"]):
        seconds = part.set_index("blocks").seconds.sort_index()
        found += [seconds[2 * n] / seconds[n] for n in seconds.index if 2 * n in seconds.index]
    return found


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Slope of log seconds over log size, least squares: method x axis."""

    def slope(part: pd.DataFrame) -> float:
        return np.polyfit(np.log(part["size"]), np.log(part.seconds), 1)[0]

    grouped = table.groupby(["method", "axis"], sort=False)[["size", "seconds"]]
    return grouped.apply(slope).unstack("axis")


# --- Tables -----------------------------------------------------------------------------------


def _models_section(table: pd.DataFrame) -> list[str]:
    header = ["method", "s", "textbook s", "ratio", "floor s", "s / floor", "MB", "textbook MB"]
    sections = []
    for (model, experts), part in table.groupby(["model", "experts"], sort=False):
        rows = [
            [r.method, _s(r.ours_seconds), _s(r.textbook_seconds), f"{r.ratio:.1f}", _s(r.floor),
             f"{r.over_floor:.1f}", _mb(r.ours_bytes), _mb(r.textbook_bytes)]
            for r in part.sort_values("method").itertuples()
        ]  # fmt: skip
        title = f"## All linear layers of {model}, {experts} experts\n"
        sections += [title, markdown(header, rows)]
    note = (
        "Seconds are sums over the layers, memory is the highest beyond the inputs. WUDI and MaTS "
        "take 10 steps. The floor counts operations for the interference family, TSV-M and Iso-C, "
        "and the bytes of inputs and output for all.\n"
    )
    return [*sections, note]


def _accuracy_section(table: pd.DataFrame) -> list[str]:
    rows = [
        [r.method, r.shape, r.spectrum, f"{r.ours:.1e}", f"{r.textbook:.1e}"]
        for r in table.itertuples()
    ]
    header = ["method", "shape", "spectrum", "ours", "textbook"]
    return ["## Distance to the formula in float64\n", markdown(header, rows)]


def _lora_section(table: pd.DataFrame) -> list[str]:
    rows = []
    for name, part in table.groupby("method", sort=False):
        sums = part.filter(like="seconds").mul(part["count"], axis=0).sum()
        narrow, dense, textbook = sums
        ratios = [f"{dense / narrow:.0f}", f"{textbook / narrow:.0f}"]
        peaks = [_mb(part.narrow_bytes.max()), _mb(part.dense_bytes.max())]
        rows.append([name, _s(narrow), _s(dense), _s(textbook), *ratios, *peaks])
    header = ["method", "own rank s", "dense s", "textbook s", "dense / own", "textbook / own",
              "MB", "dense MB"]  # fmt: skip
    return ["## Adapters in their own rank\n", markdown(header, rows)]


def _scaling_section(table: pd.DataFrame) -> list[str]:
    slopes = exponents(table)
    rows = [[name, *(f"{value:.2f}" for value in line)] for name, line in slopes.iterrows()]
    header = ["method", *(f"exponent of {axis}" for axis in slopes)]
    return ["## Growth of the cost\n", markdown(header, rows), "![cost](scaling.png)\n"]


def _checkpoints_section(table: pd.DataFrame) -> list[str]:
    rows = [
        [r.method, r.who, _s(r.seconds), _s(r.read_and_write_seconds), _mb(r.peak_bytes),
         _mb(r.bytes_read)]
        for r in table.itertuples()
    ]  # fmt: skip
    header = ["method", "", "s", "read + write s", "peak MB", "MB read"]
    return ["## From files to a file\n", markdown(header, rows)]


def _clip_section(table: pd.DataFrame) -> list[str]:
    rows = [
        [r.model, r.method, str(r.experts), str(r.tensors), str(r.layers), _s(r.seconds),
         _mb(r.peak_bytes), _mb(r.bytes_read), _s(r.load_seconds), _s(r.embed_seconds)]
        for r in table.itertuples()
    ]  # fmt: skip
    header = ["model", "method", "experts", "tensors", "by the method", "s", "peak MB", "MB read",
              "loaded in s", "images in s"]  # fmt: skip
    return ["## CLIP vision towers, from files to embeddings\n", markdown(header, rows)]


def _decoder_section(table: pd.DataFrame) -> list[str]:
    rows = [
        [r.method, str(r.blocks), "yes" if r.vocabulary else "no", _s(r.seconds),
         _s(r.seconds / r.blocks), _mb(r.peak_bytes), _mb(r.bytes_read)]
        for r in table.itertuples()
    ]  # fmt: skip
    header = ["method", "blocks", "vocabulary", "s", "s per block", "peak MB", "MB read"]
    return ["## Blocks of a 7B model, bfloat16 shards\n", markdown(header, rows)]


SECTIONS: Mapping[str, Callable[[pd.DataFrame], list[str]]] = {
    "models": _models_section,
    "accuracy": _accuracy_section,
    "lora": _lora_section,
    "scaling": _scaling_section,
    "checkpoints": _checkpoints_section,
    "clip": _clip_section,
    "decoder": _decoder_section,
}


def _s(seconds: float) -> str:
    return f"{seconds:.3g}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}"


# --- Figures ----------------------------------------------------------------------------------


def speedups(table: pd.DataFrame) -> Figure:
    """Ours, the textbook and the floor, seconds per model; a panel per model."""
    models = list(dict.fromkeys(table.model))
    most = table.groupby("model").size().max()
    with rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(models), 0.2 * most + 1.0), layout="constrained")
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            part = table[table.model == model].sort_values("ours_seconds", ascending=False)
            kinds = (("textbook_seconds", "|", "textbook"), ("ours_seconds", "o", "ours"),
                     ("floor", "<", "floor"))  # fmt: skip
            for (column, marker, label), colour in zip(kinds, LINES, strict=False):
                axes.plot(part[column], part.method, marker, color=colour, label=label, ms=4)
            axes.hlines(
                part.method, part.ours_seconds, part.textbook_seconds, color="#bbbbbb", lw=1
            )
            axes.set(title=model, xscale="log", xlabel="seconds")
        panels[0].legend(frameon=False, fontsize=7)
    return figure


def curves(table: pd.DataFrame) -> Figure:
    """Seconds over the number of experts and over the width, a line per method."""
    axis_names = {"experts": "experts T", "width": "width of a square matrix"}
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (axis, label) in zip(panels, axis_names.items(), strict=True):
            part = table[table.axis == axis]
            for (name, own), colour in zip(part.groupby("method", sort=False), LINES, strict=False):
                axes.plot(own["size"], own.seconds, marker=".", color=colour, label=name)
            axes.set(xscale="log", yscale="log", xlabel=label)
        panels[0].set_ylabel("seconds per matrix")
        panels[1].legend(frameon=False, fontsize=7)
    return figure

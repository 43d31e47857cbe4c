"""results/bench/gpu.md: what `make bench-gpu` measured, as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from experiments.bench.command_gpu import Engine, Found, Row

# Seconds on the ACTMat authors' GPU (arXiv 2604.01329, T5-large, seven tasks).
PUBLISHED = {"average": 2.7, "iso_c": 24.1, "actmat": 140.6, "tsv_m": 194.6, "regmean": 279.5}
TOLERANCE = 1e-3  # relative distance to the CPU's result that counts as agreement


def page(found: Found) -> str:
    """The rows as Markdown, by model."""
    device, scale = found.device, found.settings.scale
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    lines = [f"# Merging on {card or device.type}\n"]
    lines.append(
        f"torch {torch.__version__}, python {platform.python_version()}; float32, no TF32. Results "
        f"that lie further than {TOLERANCE:g} from the CPU's, relatively, are marked."
    )
    if scale > 1:
        lines.append(f"\n**All sides are divided by {scale}: a proof of the script, no figure.**")
    for model, experts in dict.fromkeys((row.model, row.experts) for row in found.rows):
        lines += ["", f"## {model}, {experts} experts\n", *_table(found.rows, model)]
    if found.engine:
        lines += ["", "## Whole models through the engine, bfloat16 from main memory and back\n"]
        lines += [*_engine_table(found.engine), ""]
    for model, (pinned, pageable) in found.sent.items():
        lines.append(
            f"- bringing all experts of {model} to the device: {pinned:.3g} s through pinned "
            f"memory, {pageable:.3g} s from other memory"
        )
    if found.late:
        lines += ["", f"Not measured, there was no time: {', '.join(found.late)}."]
    if found.tests:
        lines += ["", f"GPU tests: {found.tests}"]
    return "\n".join(lines) + "\n"


def _engine_table(rows: Iterable[Engine]) -> Iterator[str]:
    yield "| model | method | how | s | peak GB | the bytes of batches |"
    yield "| --- | --- | --- | ---: | ---: | --- |"
    for row in rows:
        same = "yes" if row.same_bytes else "no"
        numbers = f"{row.seconds:.3g} | {row.peak_bytes / 1e9:.2f}"
        yield f"| {row.model} | {row.method} | {row.how} | {numbers} | {same} |"


def _table(rows: Iterable[Row], model: str) -> Iterator[str]:
    paper = " the paper's GPU, s |" if model == "t5_large" else ""
    yield "| method | s | in batches s | textbook s | ratio | statistics s | peak GB |" + (
        f" to the CPU |{paper}"
    )
    yield "| --- |" + " ---: |" * (7 + bool(paper))
    for row in sorted((r for r in rows if r.model == model), key=lambda r: r.seconds):
        ratio = f"{row.textbook / row.seconds:.1f}" if row.textbook else "–"
        plain = f"{row.textbook:.3g}" if row.textbook else "–"
        far = "–" if row.distance is None else f"{row.distance:.0e}"
        mark = " **differs**" if row.distance is not None and row.distance > TOLERANCE else ""
        many = f"{row.batched:.3g}" if row.batched else "–"
        cells = [row.method, f"{row.seconds:.3g}", many, plain, ratio, f"{row.statistics:.3g}"]
        cells += [f"{row.peak_bytes / 1e9:.2f}", far + mark]
        cells += [str(PUBLISHED.get(row.method, "–"))] * bool(paper)
        yield "| " + " | ".join(cells) + " |"

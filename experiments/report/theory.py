"""What `experiments.analyse` measured, beside what the paper reports: summary.md and figures."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.report import theory_figures
from experiments.report.figures import save
from experiments.report.markup import markdown
from merging.errors import InputError
from merging.formats.disk import write_synced

RARE = 0.05  # a share of random matrices below which a spectrum is called not random
RHO = "energy_rho"  # the one quantity along the training that is not a cosine
FRAMES = ("conditions", "estimates", "scale", "interference")
OPTIONAL = ("sides", "adapters")  # of suites that measure gradients, of adapters
ORDER = ("cross_term", "correlation", "drift", "optimiser", "alignment", RHO, "delta", "identity")


def read_published(path: Path) -> pd.DataFrame:
    """Published means by quantity: columns low, high, source, and what they were measured on."""
    if not path.exists():
        raise InputError(f"{path} does not exist, expected the published means")
    return pd.read_csv(path).set_index("quantity")


def render(folder: Path, published: pd.DataFrame) -> Path:
    """Write the figures and summary.md of the tables in a folder; returns summary.md."""
    frames = {name: pd.read_csv(folder / f"{name}.csv") for name in FRAMES}
    for name, figure in theory_figures.draw(frames, published).items():
        save(figure, folder / name)
    about = json.loads((folder / "about.json").read_text())
    text = (
        f"# The conditions behind D^T D on {about['suite']}\n\nCheckpoints: {about['family']}. "
        "Means over layers and tasks; angular distance is arccos(cosine) / pi.\n\n"
    )
    parts = [_quantities(frames["conditions"], frames["estimates"], published)]
    parts += [_by_type(frames["estimates"]), _scales(frames["scale"])]
    if len(frames["interference"]):
        parts.append(_interference(frames["interference"]))
    extra = {name: folder / f"{name}.csv" for name in OPTIONAL}
    described = {"sides": _sides, "adapters": _adapters}
    parts += [described[name](pd.read_csv(x)) for name, x in extra.items() if x.exists()]
    path = folder / "summary.md"
    write_synced(path, text + "\n".join(parts))
    return path


def _quantities(conditions: pd.DataFrame, estimates: pd.DataFrame, published: pd.DataFrame) -> str:
    """Paper and ours: drift over all steps but the last, other conditions at the last."""
    lines = []
    for name, part in [*conditions.groupby("quantity"), *estimates.groupby("estimate")]:
        if "step" in part and name not in {"drift", RHO}:
            part = part[part.step == part.groupby("task").step.transform("max")]
        paper = "–"
        if name in published.index:
            low, high = published.loc[name, ["low", "high"]]
            paper = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        overlap = part.overlap.mean() if "overlap" in part else math.nan
        figures = [part.cosine.mean(), part.angular.mean(), overlap]
        lines.append([name, paper, *("–" if math.isnan(x) else f"{x:.3f}" for x in figures)])
    lines.sort(key=lambda line: ORDER.index(line[0]) if line[0] in ORDER else len(ORDER))
    on = ", ".join(published.backbone.unique())
    return markdown(["quantity", f"paper ({on})", "cosine", "angular", "overlap"], lines)


def _by_type(estimates: pd.DataFrame) -> str:
    table = estimates.pivot_table("cosine", "type", "estimate", sort=False)
    lines = [[str(kind), *(f"{x:.3f}" for x in row)] for kind, *row in table.itertuples()]
    return "Cosine with the true second moment by type of layer:\n\n" + markdown(
        ["layer", *table.columns], lines
    )


def _sides(sides: pd.DataFrame) -> str:
    """Which side of a layer its difference knows better."""
    columns = list(itertools.product(("inputs", "outputs"), ("delta", "identity")))
    table = sides.pivot_table("cosine", "type", ["side", "estimate"], sort=False)[columns]
    overlap = sides[sides.estimate == "delta"].pivot_table("overlap", "type", "side", sort=False)
    lines = [
        [str(kind), *(f"{x:.3f}" for x in (*table.loc[kind], *overlap.loc[kind]))]
        for kind in table.index
    ]
    lines.append(["all", *(f"{x:.3f}" for x in (*table.mean(), *overlap.mean()))])
    return (
        "Both sides of a layer: cosine of D^T D with the measured second moment of the inputs and "
        "of D D^T with that of the output gradients, beside what the identity has, and the overlap "
        "of their leading directions:\n\n"
    ) + markdown(
        ["layer", "D^T D, inputs", "identity", "D D^T, output gradients", "identity",
         "overlap, inputs", "overlap, outputs"],
        lines,
    )  # fmt: skip


def _adapters(adapters: pd.DataFrame) -> str:
    """Whether the factors of adapters are what they were drawn as."""
    lines = []
    for side, part in adapters.groupby("side"):
        random = (part.randomness > RARE).mean()
        figures = (100 * random, part.overlap.mean(), part.chance.mean())
        lines.append([f"{side} ({'A' if side == 'inputs' else 'B'})", f"{figures[0]:.0f} %",
                      *(f"{x:.3f}" for x in figures[1:])])  # fmt: skip
    return (
        "Adapters B A: factors whose spectrum is one of 95 % of random matrices' (by its distance "
        "to the Marchenko-Pastur law), and the overlap of the spaces that two tasks' factors span:"
        "\n\n"
    ) + markdown(["side", "random spectra", "overlap between tasks", "of random spaces"], lines)


def _scales(scale: pd.DataFrame) -> str:
    """How unequal the tasks' factors between D^T D and C are, layer by layer."""
    by_layer = scale.groupby("layer").ratio
    spread = by_layer.max() / by_layer.min()
    deviation = by_layer.apply(lambda ratios: np.log(ratios).std())
    return (
        f"Scale |D|^2 / tr C between tasks: largest over smallest {spread.median():.2f} in the "
        f"median layer, {spread.max():.2f} in the worst; standard deviation of its logarithm "
        f"{deviation.mean():.2f}.\n\n" + _ranks(scale)
    )


def _ranks(scale: pd.DataFrame) -> str:
    """What `rank_rule` looks at: the widest expert of a layer."""
    columns = ["effective_rank", "effective_rank_bfloat16"]
    exact, rounded = (scale.groupby("layer")[column].max() for column in columns)
    return (
        "Effective rank (sum s)^2 / sum s^2 of D_t, of the layer's, in the task where it is "
        f"highest: {exact.min():.3f} in the least layer, {exact.median():.3f} in the median one, "
        f"{exact.max():.3f} in the most; of weights stored in bfloat16 {rounded.min():.3f}, "
        f"{rounded.median():.3f}, {rounded.max():.3f}.\n"
    )


def _interference(frame: pd.DataFrame) -> str:
    """What each merge leaves of the interference that the base model has."""
    total = frame.groupby(["method", "layer"], sort=False)[["before", "after"]].sum()
    left = (total.after / total.before).groupby("method", sort=False)
    lines = [
        [str(name), *(f"{x:.3g}" for x in (part.median(), part.min(), part.max()))]
        for name, part in left
    ]
    return "Interference after merging / before, over layers:\n\n" + markdown(
        ["method", "median", "least", "most"], lines
    )

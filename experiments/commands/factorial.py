"""`python -m experiments.factorial suite=...`: every choice of the interference family, compared.

Writes results/<suite>/factorial_<finetuning>/: records.jsonl, cells.csv and table.md (paired
differences with standard errors over seeds), effects.csv (one factor at a time), directions.csv
(which eigen-directions of S = sum_t D_t^T D_t a merge overshoots) and figures. With `together` it
sets several such tables side by side, for a choice that must hold in all of them
(results/factorial.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.markdown import Markdown
from safetensors.torch import load_file

import merging
from eval import theory
from eval.suite import Suite
from experiments.differences import blocks
from experiments.hydra_run import Command
from experiments.measurement import measure
from experiments.report import records, theory_figures
from experiments.report.figures import save
from experiments.report.markup import markdown
from experiments.report.records import Record
from experiments.settings import Experiment, Statistics, check_choices
from experiments.suites import collect, load_expert, load_suite
from merging.errors import InputError
from merging.formats.disk import write_synced
from merging.method.interference import interference
from merging.progress import track

FACTORS = ("estimator", "task_weight", "filter", "anchor")
BINS = np.arange(-8, 0.5, 0.5)  # of log10 of an eigenvalue relative to the largest


@dataclass
class Factorial:
    """The keys of configs/factorial.yaml."""

    suite: dict[str, Any]
    finetuning: str = "full"
    seeds: list[int] = field(default_factory=list)
    limit: int | None = 100
    cells: list[dict[str, list[str]]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    baseline: str = "actmat"
    directions: list[str] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    run: bool = True
    together: list[str] | None = None
    records: str = "runs/records"
    output: str = "results"
    device: str = "auto"


def factorial(settings: Factorial) -> None:
    """Run what has no record yet, then tabulate and draw."""
    check_choices(settings)
    console = Console()
    if settings.together:
        written = side_by_side(Path(settings.output), settings.together, settings.baseline)
        console.print(Markdown(written.read_text()))
        return
    folder = Path(settings.output) / settings.suite["name"] / f"factorial_{settings.finetuning}"
    methods = [*grid(settings.cells), *({"name": name} for name in settings.beside)]
    for method in methods:
        merging.create(**method)
    if settings.run:
        found = [measure(run) for run in track(list(_runs(settings, methods)), "factorial")]
        split = directions(settings, load_suite(settings.suite, settings.device))
        folder.mkdir(parents=True, exist_ok=True)
        records.save_lines(folder / "records.jsonl", found)
        _write_csv(split, folder / "directions.csv")
    written = render(folder, settings.baseline)
    console.print(Markdown(written.read_text()))
    console.print(f"written to {folder}")


# --- the runs -------------------------------------------------------------------------------------


def grid(cells: Sequence[Mapping[str, Sequence[str]]]) -> list[dict[str, Any]]:
    """Settings of a method for every cell, by the method's own name where the cell has one."""
    names = {tuple(factors.values()): name for name, factors in members().items()}
    methods: dict[tuple[str, ...], dict[str, Any]] = {}
    for block in cells:
        if set(block) != set(FACTORS):
            raise InputError(f"an entry of cells has {sorted(block)}, expected {list(FACTORS)}")
        for levels in itertools.product(*(block[factor] for factor in FACTORS)):
            own = {"name": "interference", **dict(zip(FACTORS, levels, strict=True))}
            methods[levels] = {"name": names[levels]} if levels in names else own
    return list(methods.values())


def members() -> dict[str, dict[str, str]]:
    """The registered members of the family that have no hyperparameter: name -> their factors."""
    found = {}
    for name in merging.methods():
        method = merging.create(name)
        free = set(method.hyperparameters) <= {"alpha", "rtol", *FACTORS} and not method.needs
        if method.function is interference and free:
            found[name] = {factor: method.arguments[factor] for factor in FACTORS}
    return found


def _runs(settings: Factorial, methods: Sequence[dict[str, Any]]) -> Iterator[Experiment]:
    """Seed by seed, so that one seed's experts are in memory at a time."""
    for seed, method in itertools.product(settings.seeds, methods):
        yield Experiment(
            suite=settings.suite,
            method=method,
            tracker={},
            finetuning=settings.finetuning,
            seed=seed,
            split="validation",
            limit=settings.limit,
            statistics=settings.statistics,
            device=settings.device,
            records=settings.records,
        )


# --- the comparison -------------------------------------------------------------------------------


def render(folder: Path, baseline: str) -> Path:
    """Tables and figures of a factorial from its records and directions; returns table.md."""
    frame = _frame(folder)
    table, effects = compare(frame, baseline), main_effects(frame)
    _write_csv(table, folder / "cells.csv")
    _write_csv(effects, folder / "effects.csv")
    split = pd.read_csv(folder / "directions.csv")
    save(theory_figures.factorial(table, baseline), folder / "factorial")
    save(theory_figures.directions(split), folder / "directions")
    write_synced(folder / "table.md", _text(table, effects, baseline))
    return folder / "table.md"


def _frame(folder: Path) -> pd.DataFrame:
    path = folder / "records.jsonl"
    if not path.exists():
        raise InputError(
            f"{path} does not exist", "run the factorial of that suite first, without run=false"
        )
    return to_frame(records.load_lines(path))


def to_frame(found: Sequence[Record]) -> pd.DataFrame:
    """One line per record: row, factors (empty for methods beside the grid), seed, mean in %."""
    named = members()
    lines = []
    for record in found:
        key = record["key"]
        given = named.get(key["method"], key["hyperparameters"])
        inside = key["method"] in named or key["method"] == "interference"
        factors = {factor: given[factor] if inside else "" for factor in FACTORS}
        label = key["method"]
        if label == "interference":
            label = " + ".join(factors.values())
        lines.append({"row": label, **factors, "seed": key["seed"], "mean": 100 * record["mean"]})
    return pd.DataFrame(lines)


def compare(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """One line per row, best first: mean over seeds and paired difference to the baseline's."""
    table = frame.pivot(index="row", columns="seed", values="mean")
    if baseline not in table.index:
        raise InputError(f"there is no record of {baseline}, the baseline of the factorial")
    if table.isna().any(axis=None):
        row, seed = next((row, seed) for seed in table for row in table.index[table[seed].isna()])
        raise InputError(f"there is no record of {row}, seed {seed}", "run the factorial again")
    paired = table - table.loc[baseline]
    summary = pd.DataFrame(
        {
            "mean": table.mean(axis=1),
            "mean_se": table.sem(axis=1),
            "difference": paired.mean(axis=1),
            "difference_se": paired.sem(axis=1),
            "seeds": table.shape[1],
        }
    )
    factors = frame.drop_duplicates("row").set_index("row").filter(FACTORS)
    joined = factors.join(summary).reset_index()
    return joined.sort_values(["mean", "row"], ascending=[False, True], ignore_index=True)


def main_effects(frame: pd.DataFrame) -> pd.DataFrame:
    """What changing one factor alone does: paired over seeds and over all cells that allow it.

    Columns factor, level, to, cells, difference, difference_se (over seeds).
    """
    inside = frame[frame.estimator != ""]
    lines = []
    for factor in FACTORS:
        others = [*(f for f in FACTORS if f != factor), "seed"]
        wide = inside.pivot(index=others, columns=factor, values="mean")
        for level, to in itertools.combinations(dict.fromkeys(inside[factor]), 2):
            change = (wide[to] - wide[level]).dropna()
            if len(change):
                by_seed = change.groupby("seed").mean()
                cells = len(change) // len(by_seed)
                lines.append((factor, level, to, cells, by_seed.mean(), by_seed.sem()))
    columns = ["factor", "level", "to", "cells", "difference", "difference_se"]
    return pd.DataFrame(lines, columns=columns)


def _text(table: pd.DataFrame, effects: pd.DataFrame, baseline: str) -> str:
    rows = [
        [
            "" if "+" in row["row"] else row["row"],
            *(row[factor] or "–" for factor in FACTORS),
            f"{row['mean']:.2f} ± {row['mean_se']:.2f}",
            _difference(row),
        ]
        for row in table.to_dict("records")
    ]
    seeds = table.seeds.iloc[0]
    text = f"# The interference family, every choice\n\nValidation accuracy in percent, {seeds} "
    text += f"seeds, ± standard error; differences to {baseline} are paired by seed.\n\n"
    text += markdown(["method", *FACTORS, "mean", f"vs {baseline}"], rows)
    text += "\nOne factor changed, all else equal, mean over the cells that allow it:\n\n"
    changes = [
        [factor, f"{level} → {to}", str(cells), f"{difference:+.2f} ± {error:.2f}"]
        for factor, level, to, cells, difference, error in effects.itertuples(index=False)
    ]
    return text + markdown(["factor", "change", "cells", "difference"], changes)


def side_by_side(output: Path, folders: Sequence[str], baseline: str) -> Path:
    """results/factorial.md: each row in every table and in their mean, by its worst case.

    The worst case is how far a row is behind the best row of the same table, at most.
    """
    frames = {folder: _frame(output / folder) for folder in folders}
    tables = {folder: compare(f, baseline).set_index("row") for folder, f in frames.items()}
    behind = pd.DataFrame({folder: t["mean"].max() - t["mean"] for folder, t in tables.items()})
    behind = behind.dropna().max(axis=1).sort_values(kind="stable")
    overall = pd.concat(frames.values()).groupby(["row", "seed"])["mean"].mean()
    overall = compare(overall.reset_index(), baseline).set_index("row")
    rows = [
        [
            str(row),
            *(_difference(table.loc[row]) for table in (*tables.values(), overall)),
            f"{behind[row]:.2f}",
        ]
        for row in behind.index
    ]
    path = output / "factorial.md"
    write_synced(
        path,
        "# The interference family on several suites\n\nValidation accuracy in percent: difference "
        f"to {baseline}, paired by seed, ± standard error.\n\n"
        + markdown(["row", *folders, "mean", "behind the best, at most"], rows),
    )
    return path


def _difference(row: Mapping[str, float]) -> str:
    return f"{row['difference']:+.2f} ± {row['difference_se']:.2f}"


# --- which eigen-directions overshoot -------------------------------------------------------------


def directions(settings: Factorial, suite: Suite) -> pd.DataFrame:
    """Gains and interference of merges by eigenvalue of S, summed over layers, first seed.

    Columns method, eigenvalue (the bin's middle, relative to the layer's largest), share (of all
    directions), energy (of the experts' |D_t|^2), gain (merged |D v|^2 over the experts' mean
    |D_t v|^2), interference (in units of the base model's, so a column of a method sums to what
    its merge leaves over).
    """
    experiment = next(_runs(settings, [{}]))
    own = {"finetuning": settings.finetuning, "seed": experiment.seed}
    experts = {task: load_expert(suite.expert(task, **own)) for task in suite.tasks}
    paths = [collect(experiment, suite, task, "covariance")[0] for task in experts]
    moments = [load_file(path) for path in paths]
    methods = {name: merging.create(name) for name in settings.directions}
    lines = []
    for name, _, deltas in track(blocks(suite.base(), experts, suite.layers()), "directions"):
        C = torch.stack([found[name] for found in moments])
        before = theory.interference(torch.zeros_like(deltas[0]), deltas, C).sum().item()
        for method, function in methods.items():
            split = theory.directions(function(deltas), deltas, C)
            lines.append(_binned(split, before).assign(method=method))
    frame = pd.concat(lines).groupby(["method", "bin"], sort=False).sum().reset_index()
    layers = len(lines) / len(methods)
    return pd.DataFrame(
        {
            "method": frame.method,
            "eigenvalue": 10 ** (frame.bin + 0.25),
            "share": frame["share"] / layers,
            "energy": frame.experts / layers,
            "gain": frame.merged / frame.experts,
            "interference": frame.interference / layers,
        }
    ).sort_values(["method", "eigenvalue"], ignore_index=True)


def _binned(split: theory.Directions, before: float) -> pd.DataFrame:
    """One layer's directions summed within bins of log10 of the eigenvalue."""
    size = split.experts.sum(1).mean()  # mean |D_t|^2
    logs = split.eigenvalue.clamp_min(10.0 ** BINS[0]).log10().numpy()
    frame = pd.DataFrame(
        {
            "bin": BINS[np.digitize(logs, BINS[1:-1])],
            "share": 1 / len(logs),
            "experts": (split.experts.mean(0) / size).numpy(),
            "merged": (split.merged / size).numpy(),
            "interference": (split.interference / before).numpy(),
        }
    )
    return frame.groupby("bin").sum().reset_index()


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    write_synced(path, frame.to_csv(index=False, float_format="%.5g", lineterminator="\n"))


COMMAND = Command("factorial", Factorial, task=factorial)

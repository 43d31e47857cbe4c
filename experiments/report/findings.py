"""results/README.md: what was found, each number taken from the tables that records make.

The page is `findings.md` beside this file, in which a number is written as a question:

    {{mean text full actmat}}            mean test accuracy, ± standard error over the seeds
    {{gap text full bounded actmat}}     the first method's mean minus the second's
    {{share text full bounded}}          of the experts' mean, in percent
    {{seconds text full regmean}}        median seconds of merging, statistics included
    {{best text full}}                   the merge with the highest mean
    {{costs}}                            what data-free merging saves, as a table
    {{regime vision: actmat}}            mean validation accuracy in a regime of both_sides.md
    {{regimes actmat tsv_m}}             the same in all regimes that have these rows, as a table
    {{times rank_rule actmat}}           the first's seconds over the second's, of bench/default
    {{ranks text full}}                  effective rank of the widest expert: layers' least to most
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

import pandas as pd

from experiments.report.markup import markdown
from merging.errors import InputError

SUITES = {"text": "embedded_text", "vision": "embedded_vision", "lm": "embedded_lm"}
THEORY = {"full": "theory", "lora": "theory_lora"}
NOT_MERGED = ("experts", "zero_shot", "multi_task")
COSTS = ("actmat", "regmean", "regmean_pp", "fisher", "mats")


def page(results: Path) -> str:
    """The page with every question answered; InputError for one that has no answer."""
    template = files("experiments.report").joinpath("findings.md").read_text()
    return re.sub(r"\{\{(.*?)\}\}", lambda found: answer(found[1], results), template)


def answer(question: str, results: Path) -> str:
    """Of one question, e.g. "mean text full actmat"."""
    kind, *words = question.split()
    if kind == "costs":
        return markdown(*_costs(results))
    if kind == "regime":
        return _regime(question, results / "both_sides" / "table.csv")
    if kind == "regimes":
        return markdown(*_regimes(results / "both_sides" / "table.csv", words))
    if kind == "times":
        return _times(results / "bench" / "default" / "methods.csv", *words)
    if kind == "ranks":
        return _ranks(results / SUITES[words[0]] / THEORY[words[1]] / "scale.csv")
    suite, finetuning, *rows = words
    table = _table(results / SUITES[suite] / "table.csv", finetuning)
    if missing := [row for row in rows if row not in table.index]:
        raise InputError(f"{SUITES[suite]}, {finetuning}: there is no row {missing[0]!r}")
    if kind == "best":
        return table.drop([n for n in NOT_MERGED if n in table.index])["mean"].idxmax()
    first = table.loc[rows[0]]
    if kind == "mean":
        error = "" if pd.isna(first.mean_se) else f" ± {first.mean_se:.1f}"
        return f"{first['mean']:.1f}{error}"
    if kind == "gap":
        return f"{first['mean'] - table.loc[rows[1], 'mean']:.1f}"
    if kind == "share":
        return f"{100 * first['mean'] / table.loc['experts', 'mean']:.0f} %"
    if kind == "seconds":
        return f"{first.merge_seconds + first.statistics_seconds:.1f}"
    raise InputError(f"unknown question {question!r}")


def _regime(question: str, path: Path) -> str:
    regime, _, row = question.removeprefix("regime ").rpartition(": ")
    table = pd.read_csv(path).set_index(["regime", "row"])
    if (regime, row) not in table.index:
        raise InputError(f"{path}: there is no row {row!r} of regime {regime!r}")
    return f"{table.loc[(regime, row), 'mean']:.1f}"


def _regimes(path: Path, rows: list[str]) -> tuple[list[str], list[list[str]]]:
    """Means of the rows in every regime that has all of them, and over these regimes."""
    means = pd.read_csv(path).pivot_table("mean", "regime", "row", sort=False)[rows].dropna()
    lines = [[regime, *(f"{x:.1f}" for x in means.loc[regime])] for regime in means.index]
    lines.append(["mean", *(f"{x:.1f}" for x in means.mean())])
    return ["validation examples", *rows], lines


def _times(path: Path, first: str, second: str) -> str:
    """Of all linear layers of ViT-B/32, each shape counted as often as it is there."""
    table = pd.read_csv(path)
    counts = (table.d_out == table.d_in).map({True: 48, False: 12})
    seconds = (counts * table.ours_seconds).groupby(table.method).sum()
    return f"{seconds[first] / seconds[second]:.2f}"


def _ranks(path: Path) -> str:
    widest = pd.read_csv(path).groupby("layer").effective_rank.max()
    return f"{widest.min():.2f} to {widest.max():.2f}"


@cache
def _table(path: Path, finetuning: str) -> pd.DataFrame:
    """Rows of a suite's table by name."""
    table = pd.read_csv(path, keep_default_na=False, na_values={"mean_se": ""})
    return table[table.finetuning == finetuning].set_index("row")


def _costs(results: Path) -> tuple[list[str], list[list[str]]]:
    """Seconds with data and without, suite by suite."""

    def lines() -> Iterator[list[str]]:
        for suite in SUITES.values():
            for finetuning in ("full", "lora"):
                table = _table(results / suite / "table.csv", finetuning)
                found = [name for name in COSTS if name in table.index]
                if len(found) < 2 or "actmat" not in found:
                    continue
                free = table.loc["actmat", "merge_seconds"]
                for name in found:
                    row = table.loc[name]
                    total = row.merge_seconds + row.statistics_seconds
                    yield [f"{suite}, {finetuning}", name, f"{row.merge_seconds:.1f}",
                           f"{row.statistics_seconds:.1f}", f"{total / free:.1f}"]  # fmt: skip

    header = ["suite", "method", "merging, s", "statistics, s", "times ACTMat"]
    return header, list(lines())

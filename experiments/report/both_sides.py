"""The page on both sides of a layer: its statistics, its figure and its text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.report.bootstrap import DRAWS, LEVEL, interval, replicates
from experiments.report.figures import LINES, STYLE
from experiments.report.markup import markdown
from merging.errors import InputError

THEORY = """# Both sides of a layer

For a linear layer, expert t of T moves its weight by D_t = W_t - W_0 (d_out, d_in). Write
R = sum_t D_t D_t^T, C = sum_t D_t^T D_t and N = sum_t D_t D_t^T D_t. With pseudo-inverse powers,

    D(a) = R^-a N C^-(1-a),   0 <= a <= 1

joins methods that were proposed apart. Gradient descent makes D_t a sum of g z^T over inputs z and
gradients g at the layer's outputs, so that D_t^T D_t estimates the second moment of the inputs
(ACTMat's argument) and D_t D_t^T that of the output gradients, the two factors of K-FAC.

- **a = 0 is ACTMat**, N C^-1, the minimiser of sum_t |(D - D_t) D_t^T|^2.
- **a = 1 is its mirror** (`mirror`), R^-1 N, the minimiser of sum_t |D_t^T (D - D_t)|^2.
- **a = 1/2** (`symmetric`) treats both sides alike. Taking (D_t D_t^T)^p and (D_t^T D_t)^p for the
  moments, with p = 0 and each D_t cut to its floor(r / T) largest singular triplets, it is exactly
  **TSV-M**: with U = [U_1 .. U_T], (U U^T)^-1/2 U is the polar factor that TSV-M takes.
- In eigenbases R = U diag(l) U^T and C = V diag(m) V^T every member divides the entries of U^T N V
  by a mean of l_i and m_j: the geometric one above; the arithmetic one (`sylvester`) solves
  R D + D C = 2 N, and so minimises the sum of both interferences.

**Proposition.** D(1/2) never moves a direction further than the strongest expert does:
|D| <= max_t |D_t| in the spectral norm, for every p; and the arithmetic mean gives no more than the
geometric in any unitarily invariant norm. *Proof.* D(1/2) = sum_t X_t D_t Y_t with
X_t = R^-1/2 R_t^1/2 and Y_t = C_t^1/2 C^-1/2, and sum_t X_t X_t^T and sum_t Y_t^T Y_t are
projections: [X_1 .. X_T], diag(D_t) and the Y_t above each other multiply to D, and the outer two
have norm at most 1. The arithmetic member is the geometric one times, entry by entry,
1 / cosh((log l_i - log m_j) / 2), which is a positive definite function of the difference and 1 at
0: a Schur multiplier of norm 1. The ends a = 0 and a = 1 have no such bound. Two experts (1, e)
and (-1, e) of one output give D(0) = (0, 1/e + e).

Every member returns a single expert, averages equal ones, and adds up experts that share neither
inputs nor outputs. `merging/method/both_sides.py` holds the code, `tests/test_both_sides.py` a test
of each sentence above.
"""


def pairs(frame: pd.DataFrame, rivals: Sequence[str]) -> pd.DataFrame:
    """One line per regime, row and other row: means, difference, its standard error and interval.

    frame: lines of regime, row, seed, split, task, accuracy (percent), count, correct. Standard
    errors and 95 % intervals are `bootstrap`'s, paired over seeds and examples. Of each regime only
    what `_judged` leaves is compared.
    """
    lines = []
    for regime, part in frame.groupby("regime", sort=False):
        wide = _judged(part, rivals)
        if wide.empty:
            continue
        means = wide.mean()
        part = part[part.row.isin(wide.columns) & part.seed.isin(wide.index.unique("seed"))]
        drawn = dict(zip(wide, replicates(part, list(wide)).T, strict=True))
        about = {
            "seeds": numbered(wide.index.unique("seed")),
            "tasks": wide.index.unique("task").size,
            "count": int(part["count"].max()),
            "paired": bool((part.correct != "").all()),
            "split": part["split"].iloc[0],
        }
        for row, other in itertools.product(wide, wide):
            differences = drawn[row] - drawn[other]
            low, high = interval(differences)
            lines.append(
                {
                    "regime": regime,
                    "row": row,
                    "other": other,
                    "mean": means[row],
                    "difference": means[row] - means[other],
                    "difference_se": differences.std(),
                    "low": low,
                    "high": high,
                }
                | about
            )
    if not lines:
        raise InputError("no regime has a rival with records", f"rivals: {', '.join(rivals)}")
    return pd.DataFrame(lines)


def compare(found: pd.DataFrame, rivals: Sequence[str]) -> pd.DataFrame:
    """Of the `pairs` those of each row and its regime's best rival, which is called `best`."""
    best = {}
    for regime, part in found.groupby("regime"):
        means = part.groupby("row")["mean"].first()
        best[regime] = max((row for row in rivals if row in means), key=lambda row: means[row])
    chosen = found[found.other == found.regime.map(best)]
    return chosen.rename(columns={"other": "best"}).reset_index(drop=True)


def _judged(part: pd.DataFrame, rivals: Sequence[str]) -> pd.DataFrame:
    """Accuracies of one regime, (seed and task) x row, without holes: the seeds at which every
    rival that has records there has one, and the rows that have one at each of these seeds."""
    wide = part.pivot(index=["seed", "task"], columns="row", values="accuracy")
    measured = wide.notna().groupby("seed").all()
    measured = measured[[row for row in measured if measured[row].any()]]
    known = [rival for rival in rivals if rival in measured]
    seeds = measured.index[measured[known].all(axis=1)] if known else []
    rows = measured.columns[measured.loc[seeds].all()]
    return wide.loc[wide.index.get_level_values("seed").isin(seeds), rows]


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """Per row over its regimes: mean, wins, ties and losses against the best rival, worst case.

    Rows judged in every regime first, best mean first: means over other regimes say nothing.
    """
    grouped = judged(table).groupby("row", sort=False)
    found = grouped.agg(
        mean=("mean", "mean"), win=("win", "sum"), tie=("tie", "sum"), loss=("loss", "sum"),
        worst=("difference", "min"), regimes=("regime", "nunique"),
    )  # fmt: skip
    return found.sort_values(["regimes", "mean"], ascending=False).reset_index()


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """With columns win, tie, loss: whether the interval lies above 0, holds it or lies below."""
    win, loss = table.low > 0, table.high < 0
    return table.assign(win=win, loss=loss, tie=~win & ~loss)


def duels(found: pd.DataFrame, order: Sequence[str]) -> list[list[str]]:
    """For each pair of rows "win/tie/loss" of the first over the regimes that judged both."""
    counts = judged(found).groupby(["row", "other"])[["win", "tie", "loss"]].sum()
    cells = {
        pair: "/".join(map(str, line))
        for pair, line in zip(counts.index, counts.to_numpy(), strict=True)
    }
    return [
        [row, *("" if row == other else cells.get((row, other), "–") for other in order)]
        for row in order
    ]


def figure(table: pd.DataFrame) -> Figure:
    """Paired difference to the best rival of each regime, with 95 % intervals."""
    order = list(outcomes(table).row)[::-1]
    regimes = list(dict.fromkeys(table.regime))
    with rc_context(STYLE):
        height = max(0.28, 0.07 * len(regimes)) * len(order) + 1.0
        drawn = Figure(figsize=(6.4, height), layout="constrained")
        axes = drawn.subplots()
        for i, (regime, colour) in enumerate(zip(regimes, itertools.cycle(LINES), strict=False)):
            part = table[table.regime == regime].set_index("row").reindex(order)
            offset = 0.6 * ((i + 0.5) / len(regimes) - 0.5)
            around = [part.difference - part.low, part.high - part.difference]
            axes.errorbar(
                part.difference, np.arange(len(order)) - offset, xerr=np.clip(around, 0, None),
                fmt="o", color=colour, markersize=3.5, elinewidth=1, label=regime,
            )  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_yticks(range(len(order)), order)
        axes.set_xlabel("accuracy, points over the best rival of the regime")
        axes.legend(frameon=False, fontsize=7)
    return drawn


def page(found: pd.DataFrame, rivals: Sequence[str], missing: Sequence[str] = ()) -> str:
    """results/both_sides.md from all `pairs`; missing: what was asked for and has no record."""
    table = compare(found, rivals)
    regimes = list(dict.fromkeys(table.regime))
    cells = judged(table).set_index(["row", "regime"])
    summary = outcomes(table)
    lines = [
        [row.row, *(_cell(cells, row.row, regime) for regime in regimes),
         f"{row.mean:.1f}" if row.regimes == len(regimes) else "–",
         f"{row.win}/{row.tie}/{row.loss}", f"{row.worst:+.1f}"]
        for row in summary.itertuples()
    ]  # fmt: skip
    header = ["method", *regimes, "mean", "win/tie/loss", "worst"]
    return "\n".join(
        [
            THEORY,
            "## What it scores",
            "",
            *(_about(table[table.regime == regime]) for regime in regimes),
            "",
            f"Rivals are {', '.join(f'`{rival}`' for rival in rivals)}. {STATISTICS}",
            "",
            markdown(header, lines),
            *_gaps(missing),
            "![Differences to the best rival](both_sides/differences.png)",
            "",
            _verdict(summary, set(rivals)),
            "",
            "## Each against each",
            "",
            "In how many regimes the row's method wins, ties and loses against the column's.",
            "",
            markdown(["method", *summary.row], duels(found, list(summary.row))),
        ]
    )


STATISTICS = (
    "Mean accuracy in percent; in brackets the difference to the best rival of the regime ± its "
    f"standard error. Both are of a paired bootstrap of {DRAWS} draws over seeds and examples: a "
    "replicate draws both once for all methods. ↑ and ↓ mark a win and a loss, a difference whose "
    f"{LEVEL:.0f} % interval does not hold 0; the rest are ties, which say that these examples "
    "cannot tell two methods apart, not that they are equal. Tasks are not drawn, and nothing is "
    "corrected for the number of comparisons; the best of several rivals is picked on the same "
    "examples, which favours it."
)


def _cell(cells: pd.DataFrame, row: str, regime: str) -> str:
    if (row, regime) not in cells.index:
        return "–"
    cell = cells.loc[(row, regime)]
    if row == cell.best:
        return f"{cell['mean']:.1f} (best rival)"
    mark = " ↑" if cell.win else " ↓" if cell.loss else ""
    return f"{cell['mean']:.1f} ({cell.difference:+.1f} ± {cell.difference_se:.1f}){mark}"


def numbered(seeds: Iterable[int]) -> str:
    """ "seed 0", "seeds 0, 1"."""
    names = list(map(str, seeds))
    return f"seed{'s' * (len(names) > 1)} {', '.join(names)}"


def _about(part: pd.DataFrame) -> str:
    first = part.iloc[0]
    alone = "" if first.paired else (
        "; some records do not say which examples were right, and their accuracies are drawn "
        "unpaired, from binomials"
    )  # fmt: skip
    return (
        f"- {first.regime}: {first.tasks} tasks, {first.seeds}, at most {first['count']} "
        f"{first.split} examples a task{alone}"
    )


def _gaps(missing: Sequence[str]) -> list[str]:
    if not missing:
        return []
    lead = "No record yet, and so left out (a row is compared at the seeds that all rivals have):"
    return [lead, "", *(f"- {line}" for line in missing), ""]


def _verdict(summary: pd.DataFrame, rivals: set[str]) -> str:
    whole = summary[summary.regimes == summary.regimes.max()]
    safe = whole[whole.loss == 0]
    if safe.empty:
        best = whole.iloc[0]
        return (
            f"**No method is at least as good as the best rival in every regime.** `{best.row}` "
            f"has the highest mean, {best['mean']:.1f}, and is {-best.worst:.1f} points behind at "
            "worst."
        )
    best = safe.iloc[0]
    kind = " (a rival itself)" if best.row in rivals else ""
    lead = "" if best.row == whole.iloc[0].row else (
        f" `{whole.iloc[0].row}` has a higher mean, {whole.iloc[0]['mean']:.1f}, and loses "
        f"{whole.iloc[0].loss} times."
    )  # fmt: skip
    return (
        f"Of the methods that lose nowhere, `{best.row}`{kind} has the highest mean, "
        f"{best['mean']:.1f}.{lead}"
    )

"""Paired bootstrap of methods' accuracies over seeds and examples.

Every method was judged on the same examples, and every seed's experts too. So one replicate draws
seeds, and for each task examples, with replacement, once for all methods: what makes an example
hard, or a seed's experts good, is the same on both sides of a difference and drops out of it. Tasks
are not drawn: an interval speaks of these tasks, not of tasks like these. With one seed it speaks
of that seed's experts.

Where a record does not say which examples were right, a cell's accuracy is drawn as a binomial
share of its count, for every method by itself: differences then get wider intervals than they need.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from eval.backend import unpacked

DRAWS = 2000
LEVEL = 95.0  # percent of the replicates that an interval holds


def replicates(part: pd.DataFrame, rows: Sequence[str], draws: int = DRAWS) -> np.ndarray:
    """(draws, rows): mean accuracy over tasks, percent, in each replicate.

    part: one line per row, seed and task, each there once, with accuracy (percent), count (the same
        for all rows and seeds of a task) and correct (as records have it, or "").
    """
    rng = np.random.default_rng(0)
    seeds, tasks = list(part.seed.unique()), list(part.task.unique())
    # how often each seed was drawn, as a share: (draws, S)
    weights = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), size=draws) / len(seeds)
    cells = part.set_index(["row", "seed", "task"])[["accuracy", "count", "correct"]]
    means = np.zeros((draws, len(rows)))
    for task in tasks:
        n = int(cells.xs(task, level="task")["count"].iloc[0])
        examples = rng.multinomial(n, [1 / n] * n, size=draws) / n  # (draws, n)
        for i, row in enumerate(rows):
            for s, seed in enumerate(seeds):
                share = _drawn(cells.loc[(row, seed, task)], examples, rng)
                means[:, i] += weights[:, s] * share / len(tasks)
    return 100 * means


def _drawn(cell: pd.Series, examples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Accuracy of one cell in every replicate, (draws,)."""
    draws, n = examples.shape
    if cell.correct:
        return examples @ unpacked(cell.correct, n)
    return rng.binomial(n, cell.accuracy / 100, size=draws) / n


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The percentiles (draws,) -> (low, high) that leave out as much on either side."""
    outside = (100 - LEVEL) / 2
    low, high = np.percentile(differences, [outside, 100 - outside])
    return float(low), float(high)

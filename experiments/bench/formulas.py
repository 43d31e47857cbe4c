"""The formulas of the recipes that `experiments.bench.peers` runs, plainly: who deviates, and why.

In float64, and with the choices that mergekit makes (read in its documentation and its results):
every step in the dtype of the files; of equal magnitudes exactly as many kept as the share says; a
sum of exactly 0 elects plus. Each is a choice of its own here, so that its effect can be told.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FACTOR = 0.3  # of task arithmetic
DENSITY = 0.2  # of TIES


class Choices(NamedTuple):
    """Which of mergekit's choices a formula makes."""

    rounded: bool = False  # every step is in the dtype of the files
    exactly: bool = False  # of equal magnitudes so many are kept as make up the share
    plus: bool = False  # a sum of exactly 0 elects plus


PLAIN, THEIRS = Choices(), Choices(True, True, True)


def merged(name: str, W0: Tensor, experts: Tensor, choices: Choices = PLAIN) -> Tensor:
    """The merge of (T, *shape) weights by a recipe, (*shape) in the dtype of the base W0.

    Without choices computed in float64 and rounded once.
    """
    stored = W0.dtype
    if name == "linear":  # in float32 or better by both programs
        return experts.double().mean(0).to(stored)
    if not choices.rounded:
        W0, experts = W0.double(), experts.double()
    D = experts - W0
    moved = (D * D.new_tensor(FACTOR)).sum(0) if name == "task_arithmetic" else _ties(D, choices)
    return (W0 + moved).to(stored)


def _ties(D: Tensor, choices: Choices) -> Tensor:
    """Trim, elect, mean of what agrees, (T, *shape) -> (*shape)."""
    kept = torch.stack([_trimmed(delta, choices.exactly) for delta in D])
    sign = kept.sum(0).sign()
    if choices.plus:
        sign[sign == 0] = 1
    agree = (kept.sign() == sign) & (kept != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def _trimmed(delta: Tensor, exactly: bool) -> Tensor:
    """A task's delta with all but its largest entries at 0."""
    size = delta.abs().flatten().float().numpy()
    k = max(1, int(DENSITY * len(size)))
    last = np.partition(size, len(size) - k)[len(size) - k]
    kept = size >= last
    if exactly:  # the first of those that are equal
        kept[np.flatnonzero(size == last)[k - np.count_nonzero(size > last) :]] = False
    return delta * torch.from_numpy(kept).view_as(delta)


def distance(one: Tensor, other: Tensor, W0: Tensor) -> float:
    """|A - B| / |B - W_0|, from float64."""
    a, b, w = one.double(), other.double(), W0.double()
    return ((a - b).norm() / (b - w).norm().clamp_min(1e-12)).item()

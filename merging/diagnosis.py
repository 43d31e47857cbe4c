"""What the differences of several experts say about merging them, without any data.

All of it is read from the deltas D_t (T, d_out, d_in) of one layer and summed over layers:

    cosine      <D_s, D_t> / (|D_s| |D_t|)                how alike two task vectors are
    overlap     |D_s D_t^T|^2 / (|D_s D_s^T| |D_t D_t^T|)  the cosine of D_s^T D_s and D_t^T D_t:
                how far two tasks read the same inputs; 0: a merge can serve both exactly
    conflict    sum of min(|a|, |b|) over entries of opposite sign / the same over all entries;
                1/2 for unrelated tasks
    residual    r_t = sum_l |(D_t - D) D_t^T|^2 / sum_l |D_t D_t^T|^2 of a merge D: the interference
                with D_t^T D_t in place of the inputs' second moment; 0 where the merge acts as the
                expert does on what the expert has learnt, 1 where it does no more than the base.
                Its mirror, |D_t^T (D_t - D)|^2, has D_t D_t^T in place of the second moment of the
                gradients of the outputs. ACTMat minimises the first by construction; a large
                second tells that a merge overshoots. Neither is accuracy: how far they predict it
                is measured by `experiments.residuals`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merging.linalg import gram, product


@dataclass(frozen=True)
class LayerDiagnosis:
    """Sums over one layer's entries, all float64, from which the ratios above are formed."""

    base: float  # |W_0|^2
    inner: Tensor  # (T, T) <D_s, D_t>
    shared: Tensor  # (T, T) |D_s D_t^T|^2
    opposed: Tensor  # (T, T) sum of min(|a|, |b|) where the signs differ
    common: Tensor  # (T, T) the same over all entries
    moved: Tensor  # (T,) entries that are not 0
    entries: int


def diagnose(W0: Tensor, deltas: Tensor) -> LayerDiagnosis:
    """Of W_0 (d_out, d_in) and deltas (T, d_out, d_in)."""
    T = len(deltas)
    opposed, common = torch.zeros(T, T).double(), torch.zeros(T, T).double()
    for s in range(T):
        for t in range(s):
            common[s, t], opposed[s, t] = _conflict(deltas[s], deltas[t])
    flat = deltas.flatten(1).double()
    return LayerDiagnosis(
        base=W0.double().square().sum().item(),
        inner=flat @ flat.mT,
        shared=shared_inputs(deltas),
        opposed=opposed + opposed.mT,
        common=common + common.mT,
        moved=(deltas != 0).flatten(1).sum(1).double(),
        entries=deltas[0].numel(),
    )


def _conflict(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(all, opposed): sums of the smaller magnitude of two deltas, entry by entry."""
    smaller = torch.minimum(a.abs(), b.abs())
    opposed = smaller[(a < 0) != (b < 0)].sum(dtype=torch.float64)
    return smaller.sum(dtype=torch.float64).item(), opposed.item()


def shared_inputs(deltas: Tensor) -> Tensor:
    """|D_s D_t^T|^2 for all pairs, (T, d_out, d_in) -> (T, T) in float64."""
    T, d_out, d_in = deltas.shape
    if d_in <= d_out:  # <D_s^T D_s, D_t^T D_t>, the smaller products
        grams = torch.stack([gram(D) for D in deltas]).flatten(1).double()
        return grams @ grams.mT
    shared = torch.zeros(T, T).double()
    for s in range(T):
        for t in range(s + 1):
            shared[s, t] = shared[t, s] = product(deltas[s], deltas[t].mT).double().square().sum()
    return shared


def residual(deltas: Tensor, merged: Tensor) -> Tensor:
    """Numerators of r_t on both sides for a merge D (d_out, d_in): (2, T) in float64.

    Row 0 is |(D_t - D) D_t^T|^2, row 1 |D_t^T (D_t - D)|^2. Divide both by the diagonal of
    `shared_inputs(deltas)`, summed over layers likewise.
    """
    return torch.stack([_one_side(deltas, merged), _one_side(deltas.mT, merged.mT)])


def _one_side(deltas: Tensor, merged: Tensor) -> Tensor:
    """|(D_t - D) D_t^T|^2 for each task, (T,)."""
    _, d_out, d_in = deltas.shape
    sums = []
    for D in deltas:
        gap = D - merged
        if d_in <= d_out:  # tr(gap D^T D gap^T)
            sums.append((product(gap, gram(D)).double() * gap.double()).sum())
        else:
            sums.append(product(gap, D.mT).double().square().sum())
    return torch.stack(sums)

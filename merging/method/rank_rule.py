"""The method that suits how experts were made, told from their effective ranks.

Fine-tuning all of a layer moves it in many directions at once, and the experts' inputs overlap:
ACTMat's solution, kept where the experts' differences have most of their energy (ASWUDI), divides
them among the tasks. An adapter moves few directions; there that solution overshoots, and TSV-M,
which orthogonalises the few directions and keeps their strength, does not (results/both_sides.md).

Which of the two an expert is, its spectrum says. With singular values s of D_t,

    K_t = (sum s)^2 / sum s^2        (effective rank; ASWUDI's own measure, arXiv 2606.07289)

counts the directions that D_t moves. Rounding an adapter into bfloat16 weights adds noise to all
directions but little to K_t, which a rank counted by a cut would not survive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.linalg import by_kind, gram
from merging.method.registry import create, register

NARROW = 0.1  # of min(d_out, d_in): between adapters and fine-tuned layers, but for a few of either


def rank_rule_many(deltas: Tensor, *, d_in: int | None = None, d_out: int | None = None) -> Tensor:
    """`rank_rule` of layers of one shape, (B, T, d_out, d_in) -> (B, d_out, d_in)."""
    height, width = d_out or deltas.shape[2], d_in or deltas.shape[3]

    def merge(by_tsv: bool, own: Tensor) -> Tensor:
        method = create("tsv_m") if by_tsv else create("aswudi", anchor="average")
        return method.many(own, d_in=width, d_out=height)

    return by_kind(deltas, [is_narrow(D, height, width) for D in deltas], merge)


@register(
    "rank_rule",
    source="ours: ASWUDI, but TSV-M for adapters, told by their effective rank",
    formula="tsv_m where every (sum s)^2 / sum s^2 < min(d_out, d_in) / 10 with s the singular "
    "values of D_t, else aswudi with the average as anchor",
    row_space=True,
    column_space=True,
    batched=rank_rule_many,
)
def rank_rule(
    deltas: Tensor, *, d_in: int | None = None, d_out: int | None = None,
    layer_shape: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """`tsv_m` if all experts are narrow, else `aswudi`: (T, d_out, d_in) -> (d_out, d_in).

    layer_shape: what they are narrow in, where they come in coordinates of a space.
    """
    height, width = d_out or deltas.shape[1], d_in or deltas.shape[2]
    if len(deltas) <= min(height, width) and is_narrow(deltas, *(layer_shape or (height, width))):
        return create("tsv_m")(deltas, d_in=width, d_out=height)
    return create("aswudi", anchor="average")(deltas, d_in=width, d_out=height)


def is_narrow(deltas: Tensor, d_out: int, d_in: int) -> bool:
    """Whether a layer is TSV-M's; with more experts than ranks that has no place for each."""
    rank = min(d_out, d_in)
    return len(deltas) <= rank and narrow(deltas, NARROW * rank)


def narrow(deltas: Tensor, below: float) -> bool:
    """Whether every expert's effective rank is less than `below`; deltas (T, d_out, d_in)."""
    return all(effective_rank(delta) < below for delta in deltas)  # one wide expert ends it


def effective_rank(delta: Tensor) -> float:
    """(sum s)^2 / sum s^2 of the singular values s of (d_out, d_in), from 1 to its rank; 0 for 0.

    The shorter side's Gram matrix in float64 has their squares.
    """
    rows = delta.double()
    l = torch.linalg.eigvalsh(gram(rows if rows.shape[0] > rows.shape[1] else rows.mT)).clamp_min(0)
    energy = l.sum()
    return float(l.sqrt().sum().square() / energy) if energy > 0 else 0.0

"""The method that suits how experts were made, told from their files or their singular values.

Fine-tuning all of a layer moves it in many directions at once, and the experts' inputs overlap:
ACTMat's solution, kept where the experts' differences have most of their energy (ASWUDI), divides
them among the tasks. An adapter moves few directions; there that solution overshoots, and TSV-M,
which orthogonalises the few directions and keeps their strength, does not (results/both_sides.md).

Adapters' files say what they are. Of an expert stored in full its singular values s do: it is
narrow if half of them are nothing, as are those of any adapter of up to half the rank, or if its
effective rank

    K_t = (sum s)^2 / sum s^2        (ASWUDI's own measure, arXiv 2606.07289)

is below a tenth of the layer's: an adapter that was rounded into bfloat16 weights has noise in
every direction, which adds little to K_t. DoRA scales rows as well, which no spectrum tells from
fine-tuning: merged into a checkpoint it is taken for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.linalg import by_kind, gram, solving_dtype
from merging.method.registry import create, register

NARROW = 0.1  # of min(d_out, d_in): between rounded adapters and most fine-tuned layers
NOTHING = 1e-3  # of the largest singular value


def rank_rule_many(
    deltas: Tensor, *, adapters: bool = False, d_in: int | None = None, d_out: int | None = None
) -> Tensor:
    """`rank_rule` of layers of one shape, (B, T, d_out, d_in) -> (B, d_out, d_in)."""
    height, width = d_out or deltas.shape[2], d_in or deltas.shape[3]

    def merge(by_tsv: bool, own: Tensor) -> Tensor:
        method = create("tsv_m") if by_tsv else create("aswudi", anchor="average")
        return method.many(own, d_in=width, d_out=height)

    return by_kind(deltas, [is_narrow(D, height, width, adapters) for D in deltas], merge)


@register(
    "rank_rule",
    source="ours: ASWUDI, but TSV-M for adapters, told by their files or singular values",
    formula="tsv_m of adapters, and where every D_t has singular values s half of which are 0 "
    "or (sum s)^2 / sum s^2 < min(d_out, d_in) / 10, else aswudi with the average as anchor",
    row_space=True,
    column_space=True,
    batched=rank_rule_many,
)
def rank_rule(
    deltas: Tensor, *, adapters: bool = False, d_in: int | None = None, d_out: int | None = None,
    layer_shape: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """`tsv_m` if all experts are narrow, else `aswudi`: (T, d_out, d_in) -> (d_out, d_in).

    adapters: whether the experts' files say so; else their singular values are looked at.
    layer_shape: the layer's own (d_out, d_in), where deltas come in coordinates of a space.
    """
    height, width = layer_shape or (d_out or deltas.shape[1], d_in or deltas.shape[2])
    if is_narrow(deltas, height, width, adapters):
        return create("tsv_m")(deltas, d_in=width, d_out=height)
    return create("aswudi", anchor="average")(deltas, d_in=width, d_out=height)


def is_narrow(deltas: Tensor, d_out: int, d_in: int, adapters: bool = False) -> bool:
    """Whether a layer is TSV-M's; with more experts than ranks that has no place for each.

    deltas: (T, d_out, d_in), or narrower in a basis of their own.
    """
    rank = min(d_out, d_in)
    return len(deltas) <= rank and (adapters or all(narrow(delta, rank) for delta in deltas))


def narrow(delta: Tensor, rank: int) -> bool:
    """Whether an expert's difference (d_out, d_in) moves few of `rank` directions."""
    s = singular_values(delta)
    few = int((s > NOTHING * s[:1]).sum()) <= rank / 2
    return few or effective_rank(s) < NARROW * rank


def effective_rank(s: Tensor) -> float:
    """(sum s)^2 / sum s^2 of singular values (r,), from 1 to how many there are; 0 for none."""
    energy = s.square().sum()
    return float(s.sum().square() / energy) if energy > 0 else 0.0


def singular_values(delta: Tensor) -> Tensor:
    """Descending, of (d_out, d_in), by the shorter side's Gram matrix.

    In float64 up to a width beyond which that is slow: float32 makes singular values of some 1e-4
    of the largest out of nothing.
    """
    rows = delta if delta.shape[0] > delta.shape[1] else delta.mT
    squares: Tensor = torch.linalg.eigvalsh(gram(rows.to(solving_dtype(rows))))
    return squares.clamp_min(0).sqrt().flip(0)

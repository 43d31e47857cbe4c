"""The side of a layer on which experts overlap, chosen from their weights alone.

Interference is what experts do to each other where they overlap: in their inputs, which D_t^T D_t
estimates, or in their outputs, D_t D_t^T. Whichever side hardly overlaps adds the experts up at
full strength: the input side does so for adapters that each started from a random A of their own,
whose row spaces, those of A_t, overlap between tasks hardly more than random spaces do
(results/embedded_text_independent/theory).

    R = sum_t w_t D_t D_t^T,   C = sum_t w_t D_t^T D_t,   w_t = 1 / |D_t|^2

compare the sides without a threshold. A task's two moments have the same eigenvalues, so that

    |R|^2 - |C|^2 = sum over pairs s != t of w_s w_t (<R_s, R_t> - <C_s, C_t>)

says which side has the larger overlap (Frobenius norms and inner products).
"""

from __future__ import annotations

from torch import Tensor

from merging.linalg import by_kind, gram, working_dtype
from merging.method.equations import task_weights
from merging.method.registry import create, register

TIE = 1e-5  # sides as near as rounding can tell count as equal, as those of one expert are


def sided_many(
    deltas: Tensor,
    *,
    weights: Tensor | None = None,
    d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:
    """`sided` of layers of one shape, (B, T, d_out, d_in) -> (B, d_out, d_in)."""
    height, width = d_out or deltas.shape[2], d_in or deltas.shape[3]

    def merge(outputs: bool, own: Tensor) -> Tensor:
        if outputs:
            return create("balanced").many(own.mT, weights=weights, d_in=height, d_out=width).mT
        return create("balanced").many(own, weights=weights, d_in=width, d_out=height)

    return by_kind(deltas, [overlaps_in_outputs(D, weights) for D in deltas], merge)


@register(
    "sided",
    source="ours: balanced on the side where experts overlap more",
    formula="balanced of D_t^T where |sum_t w_t D_t D_t^T| > |sum_t w_t D_t^T D_t|, "
    "w_t = 1 / |D_t|^2, else of D_t",
    row_space=True,
    column_space=True,
    batched=sided_many,
)
def sided(
    deltas: Tensor,
    *,
    weights: Tensor | None = None,
    d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:
    """`balanced` on inputs or on outputs, (T, d_out, d_in) -> (d_out, d_in).

    weights: (T,) what each expert counts for, a factor on w_t.
    """
    height, width = d_out or deltas.shape[1], d_in or deltas.shape[2]
    balanced = create("balanced")
    if overlaps_in_outputs(deltas, weights):
        return balanced(deltas.mT, weights=weights, d_in=height, d_out=width).mT
    return balanced(deltas, weights=weights, d_in=width, d_out=height)


def overlaps_in_outputs(deltas: Tensor, weights: Tensor | None = None) -> bool:
    """Whether |sum_t w_t D_t D_t^T| > |sum_t w_t D_t^T D_t|; deltas (T, d_out, d_in)."""
    D = deltas.to(working_dtype(deltas))
    w = task_weights("inverse_norm", D)
    w = w if weights is None else w * weights.abs().to(w)
    E = w.sqrt().view(-1, 1, 1) * D
    R = gram(E.mT.reshape(-1, D.shape[1]))  # (d_out, d_out)
    C = gram(E.reshape(-1, D.shape[2]))  # (d_in, d_in)
    return bool(R.norm() > (1 + TIE) * C.norm())

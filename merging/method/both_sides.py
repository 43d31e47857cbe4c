"""Both sides of a layer: the family from ACTMat over TSV-M to ACTMat's mirror.

With D_t = W_t - W_0 (d_out, d_in), task weights w_t, and for every task the moments

    R_t = (D_t D_t^T)^p  (d_out, d_out),   C_t = (D_t^T D_t)^p  (d_in, d_in),

R = sum_t w_t R_t, C = sum_t w_t C_t, N = sum_t w_t R_t^a D_t C_t^(1-a), the family is

    D = R^-a N C^-(1-a)          (pseudo-inverse powers).

Since D_t = U_t diag(s_t) V_t^T makes R_t^a D_t C_t^(1-a) = U_t diag(s_t^(1+2p)) V_t^T, N does not
depend on a; with p = 1 it is sum_t w_t D_t D_t^T D_t, and no task needs an SVD. Moments may be
shrunk to multiples of the identity first, as `interference` shrinks the inputs'; N then does.

What the two moments estimate. Gradient descent gives D_t = -eta sum_i g_i z_i^T over inputs z_i and
gradients g_i at the outputs. So D_t^T D_t stands in for the second moment of a task's inputs, which
is ACTMat's argument (arXiv 2604.01329), and D_t D_t^T for that of its output gradients, the other
Kronecker factor of the Fisher information (K-FAC, arXiv 1503.05671). a = 0 is ACTMat, the minimiser
of sum_t |(D - D_t) D_t^T|^2; a = 1 is its mirror, that of sum_t |D_t^T (D - D_t)|^2.

In eigenbases R = U diag(l) U^T and C = V diag(m) V^T every member is one division, entry by entry,

    U^T D V = (U^T N V) / M(l_i, m_j),

by a mean M of the two eigenvalues: l^a m^(1-a) is the geometric one. The arithmetic one,
a l + (1 - a) m, solves a R D + (1 - a) D C = N, so that it minimises a times the one objective plus
1 - a times the other: both interferences at once. The maximum stays below both ends.

Laws, for every a and mean: one expert is returned, equal ones are averaged, and experts that share
neither inputs nor outputs (D_s D_t^T = 0 and D_s^T D_t = 0) are added up.

Contraction. With a = 1/2 and the geometric mean D = sum_t X_t D_t Y_t for
X_t = R^-1/2 (w_t R_t)^1/2 and Y_t = (w_t C_t)^1/2 C^-1/2, and sum_t X_t X_t^T and sum_t Y_t^T Y_t
are projections: |D| <= max_t |D_t| in the spectral norm. The arithmetic mean never gives more than
the geometric: the ratio of the two, 1 / cosh((log l_i - log m_j) / 2), is a positive definite
function of log l_i - log m_j, hence a Schur multiplier of norm 1 (Bhatia, Positive Definite
Matrices, chapter 5). The ends a = 0 and a = 1 have no such bound: they overshoot where the moment
that they invert is nearly singular.

Limits. p = 0 makes R_t and C_t projections, and with each D_t cut to its floor(r / T) largest
triplets a = 1/2 is TSV-M (arXiv 2412.00081): the polar factor of U = [U_1 .. U_T] is
(U U^T)^-1/2 U.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from merging.errors import InputError
from merging.linalg import gram, leading, product, solving_dtype, working_dtype
from merging.method import covariance
from merging.method.anchors import anchor_commutes, anchor_merge
from merging.method.equations import (
    EPS32,
    Equations,
    Filter,
    asks_for_double,
    normal_equations,
    solve,
    spectral_filter,
    task_weights,
)
from merging.method.ranges import NonNegative, Share
from merging.method.registry import register
from merging.method.spectral import RANK_RTOL, singular_triplets


class Moments(NamedTuple):
    """Sums over tasks: R (d_out, d_out), C (d_in, d_in) and N (d_out, d_in)."""

    R: Tensor
    C: Tensor
    N: Tensor


class Side(NamedTuple):
    """Eigenvalues (r,), descending, and eigenvectors (d, r) of R or C above the cut."""

    values: Tensor
    vectors: Tensor


def both_sides(
    deltas: Tensor,
    *,
    weights: Tensor | None = None,
    d_in: int | None = None,
    d_out: int | None = None,
    a: Share = 0.5,
    mean: str = "geometric",
    p: float = 1.0,
    truncate: bool = False,
    estimator: str = "delta",
    task_weight: str = "uniform",
    filter: str = "cut",
    anchor: str = "zero",
    rtol: NonNegative | None = None,
    lam: NonNegative = 1e-2,
) -> Tensor:
    """R^-a N C^-(1-a), every choice open: (T, d_out, d_in) -> (d_out, d_in).

    weights: (T,) what each expert counts for, a factor on the task weights.
    a: share of the output side in the mean M(l, m) of both sides' eigenvalues; 0 is ACTMat.
    mean: geometric (the family's), arithmetic (both interferences at once) or maximum.
    p: power of a task's moments; 0 counts each of its directions once.
    truncate: each D_t keeps its floor(min(d_out, d_in) / T) largest triplets, as in TSV-M.
    estimator: of both moments: delta, ledoit_wolf or oas, each side shrunk by itself: its samples
        are the rows of D_t for C_t and the columns for R_t.
    task_weight: uniform, or inverse_norm, moments divided by |D_t|^2p.
    filter: cut (rtol on both sides), ridge (M + lam mean M), effective_rank (the K largest of each
        side, as ASWUDI), gavish_donoho (what noise does not explain on either side), or bound: what
        cut keeps, but for rows u of U and columns v of V that the solution moves further than all
        experts together, |u^T D|^2 > l or |D v|^2 > m.
    anchor: what is kept where the filter is 0: zero, sum, or any method of the registry by name.
    rtol: eigenvalues up to rtol * the largest are cut; None is d * eps of float32, as in ACTMat,
        and for powers or truncated experts what cuts the noise of their singular values.
    """
    _check(mean, filter, estimator)
    height, width = d_out or deltas.shape[1], d_in or deltas.shape[2]
    fine = asks_for_double(Filter("cut", rtol=rtol), min(height, width))
    D = deltas.double() if fine else deltas.to(working_dtype(deltas))
    w = task_weights(task_weight, D) ** p
    w = w if weights is None else w * weights.to(w)
    plain = p == 1 and not truncate and estimator == "delta"
    if plain and (mean, filter) == ("geometric", "cut") and a in {0, 1}:
        return _one_side(D, w, a == 1, rtol, (height, width)).to(deltas.dtype)
    if plain:
        R, C, N = _gram_moments(D, w)
    else:
        R, C, N = _spectral_moments(D, w, a, p, truncate, estimator, (height, width))
    cuts = (height * EPS32, width * EPS32) if plain else 2 * (RANK_RTOL**2,)
    left, right = (
        _side(S, cut if rtol is None else rtol) for S, cut in zip((R, C), cuts, strict=True)
    )
    n = _within(N, left, right)  # (r_out, r_in)
    M = _MEANS[mean](left.values[:, None], right.values, a)
    F = _filter(filter, n / M, M, left.values, right.values, w, lam, (len(D), height, width))
    A = anchor_merge(anchor, D, d_in=d_in, d_out=d_out)
    return _assemble(n / M, F, A, left, right).to(deltas.dtype)


_MEANS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "geometric": lambda l, m, a: l**a * m ** (1 - a),
    "arithmetic": lambda l, m, a: a * l + (1 - a) * m,
    "maximum": lambda l, m, a: torch.maximum(l, m),
}
_FILTERS = ("cut", "ridge", "effective_rank", "gavish_donoho", "bound")
_ESTIMATORS = ("delta", "ledoit_wolf", "oas")  # those with D_t's own eigenvectors


def _check(mean: str, filter: str, estimator: str) -> None:
    if mean not in _MEANS:
        raise InputError(f"unknown mean {mean!r}", f"known: {', '.join(_MEANS)}")
    for kind, name, known in (("filter", filter, _FILTERS), ("estimator", estimator, _ESTIMATORS)):
        if name not in known:
            raise InputError(f"unknown {kind} {name!r}", f"known: {', '.join(known)}")


def _filter(
    name: str, solved: Tensor, M: Tensor, l: Tensor, m: Tensor, w: Tensor, lam: float,
    shape: tuple[int, int, int],
) -> Tensor | None:  # fmt: skip
    """F in [0, 1] (r_out, r_in), or None for all 1; shape: (T, d_out, d_in) of the layer."""
    if name == "ridge":
        return M / (M + lam * M.mean())
    if name in {"effective_rank", "gavish_donoho"}:
        T, height, width = shape  # samples of a side are all tasks' columns, or rows
        left = spectral_filter(name, l, d_in=height, rows=T * width)
        return left[:, None] * spectral_filter(name, m, d_in=width, rows=T * height).to(left)
    return _bounded(solved, l, m, w) if name == "bound" else None


def _one_side(
    D: Tensor, w: Tensor, outputs: bool, rtol: float | None, shape: tuple[int, int]
) -> Tensor:
    """a = 0 or 1 by the interference family's own solver, for the mirror on transposes."""
    D, width = (D.mT, shape[0]) if outputs else (D, shape[1])
    S, N = normal_equations(D, covariance.estimate("delta", D, width, 1.0), w)
    # a cut is made in whatever precision the equations have
    merged = cast(Tensor, solve(Equations(S, N, w, width), None, Filter("cut", rtol=rtol)))
    return merged.mT if outputs else merged


def _gram_moments(D: Tensor, w: Tensor) -> Moments:
    """p = 1: the shorter side's moments task by task, the longer side's in one product."""
    if D.shape[1] > D.shape[2]:
        C, R, N = _gram_moments(D.mT, w)
        return Moments(R, C, N.mT)
    R, N = D.new_zeros(2 * D.shape[1:2]), torch.zeros_like(D[0])
    for delta, weight in zip(D, w, strict=True):
        R_t = weight * gram(delta.mT)
        R += R_t
        N += product(R_t, delta)
    rows = D if (w == 1).all() else w.sqrt().view(-1, 1, 1) * D
    return Moments(R, gram(rows.reshape(-1, D.shape[2])), N)


class Shrinkage(NamedTuple):
    """One side's moments scale_t D_t^T D_t + ridge_t I (or D_t D_t^T), each (T,)."""

    scale: Tensor
    ridge: Tensor

    def powers(self, t: int, s: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues to the power p: (r,) where D_t has singular values s, and () elsewhere."""
        ridge = self.ridge[t].double()
        elsewhere = ridge**p if ridge > 0 else ridge
        return (self.scale[t].double() * s.square() + ridge) ** p, elsewhere


def _shrinkage(estimator: str, samples: Tensor, width: int) -> Shrinkage:
    """Of the moments (T, d, d) whose samples are the rows of (T, n, d)."""
    found = covariance.estimate(estimator, samples, width, 1.0)
    return Shrinkage(found.scale, found.ridge)


def _spectral_moments(
    D: Tensor, w: Tensor, a: float, p: float, truncate: bool, estimator: str, shape: tuple[int, int]
) -> Moments:
    """Any power and shrinkage, from each task's singular triplets, in float64."""
    k = min(shape) // len(D) if truncate else None
    outputs, inputs = (_shrinkage(estimator, x, d) for x, d in zip((D.mT, D), shape, strict=True))
    R, C, N = (
        D.new_zeros(shape, dtype=torch.float64)
        for shape in (2 * D.shape[1:2], 2 * D.shape[2:], D.shape[1:])
    )
    for t, (delta, weight) in enumerate(zip(D, w.double(), strict=True)):
        U, s, V = singular_triplets(delta, k)
        l, l0 = outputs.powers(t, s, p)
        m, m0 = inputs.powers(t, s, p)
        R += gram((U * (weight * (l - l0)).sqrt()).mT)
        C += gram((V * (weight * (m - m0)).sqrt()).mT)
        R.diagonal().add_(weight * l0)
        C.diagonal().add_(weight * m0)
        N += product(U * (weight * l**a * s * m ** (1 - a)), V.mT)
    return Moments(R, C, N)


def _side(S: Tensor, rtol: float) -> Side:
    S = S.to(solving_dtype(S))
    values, vectors = leading(S, lambda values: int((values > rtol * values[0]).sum()))
    kept = int((values > rtol * values[0]).sum())
    return Side(values[:kept], vectors[:, :kept])


def _within(X: Tensor, left: Side, right: Side) -> Tensor:
    """U^T X V, (d_out, d_in) -> (r_out, r_in), in the coarser precision of the two sides."""
    U, V = left.vectors, right.vectors
    if U.dtype != V.dtype:  # only one of them is narrow enough for float64
        U, V = U.float(), V.float()
    return product(product(U.mT, X.to(U)), V)


def _bounded(solved: Tensor, l: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """Entries (r_out, r_in) whose row and column both stay within what all experts do together.

    With a hair's breadth, since one task alone reaches it; in units of the mean task weight.
    """
    moved = w > 0
    unit = 1.01 / w[moved].mean() if moved.any() else 1.0
    rows = solved.square().sum(1) <= unit * l.to(solved)
    return rows[:, None] & (solved.square().sum(0) <= unit * m.to(solved))


def _assemble(
    solved: Tensor, F: Tensor | None, A: Tensor | None, left: Side, right: Side
) -> Tensor:
    """A + U ((solved - U^T A V) F) V^T with F in [0, 1], or all 1 if None."""
    change = solved if A is None else solved - _within(A, left, right)
    change = change if F is None else change * F
    U, V = left.vectors.to(change), right.vectors.to(change)
    merged = product(product(U, change), V.mT)
    return merged if A is None else A.to(merged) + merged


def _row_space(choices: Mapping[str, Any]) -> bool:
    # shrinkage looks at single rows and columns
    return choices["estimator"] == "delta" and anchor_commutes(choices["anchor"], "row_space")


def _column_space(choices: Mapping[str, Any]) -> bool:
    return choices["estimator"] == "delta" and anchor_commutes(choices["anchor"], "column_space")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A member of the family, as its choices and what stays settable."""

    source: str
    formula: str = ""
    settable: tuple[str, ...] | None = ("rtol",)
    choices: Mapping[str, Any] = field(default_factory=dict)


FAMILY = {
    "both_sides": Preset(source="ours, every choice open", settable=None),
    "mirror": Preset(
        source="ours: ACTMat's mirror, a = 1",
        formula="(sum_t R_t)^+ (sum_t R_t D_t) with R_t = D_t D_t^T",
        choices={"a": 1.0},
    ),
    "symmetric": Preset(
        source="ours: a = 1/2",
        formula="R^-1/2 (sum_t D_t D_t^T D_t) C^-1/2 with R = sum_t D_t D_t^T, C = sum_t D_t^T D_t",
    ),
    "sylvester": Preset(
        source="ours: both interferences at once",
        formula="the D of R D + D C = 2 sum_t D_t D_t^T D_t, R = sum_t D_t D_t^T, "
        "C = sum_t D_t^T D_t",
        choices={"mean": "arithmetic"},
    ),
}

for _name, _preset in FAMILY.items():
    register(
        _name,
        source=_preset.source,
        formula=_preset.formula,
        settable=_preset.settable,
        row_space=_row_space,
        column_space=_column_space,
        **_preset.choices,
    )(both_sides)

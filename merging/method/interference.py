"""ACTMat and its family: one quadratic, one solver, many settings.

ACTMat (arXiv 2604.01329, eq. 9), with D_t = W_t - W_0 of task t and alpha 1:

    D = (sum_t D_t C_t) (sum_t C_t)^+,    C_t = D_t^T D_t,

where ^+ cuts eigenvalues below d_in eps of the largest. In code, as `merging.method.reference` has
it, for deltas D (T, d_out, d_in):

    >>> C = D.mT @ D                                                # (T, d_in, d_in)
    >>> merged = (D @ C).sum(0) @ torch.linalg.pinv(C.sum(0))       # (d_out, d_in)

It minimises a merged layer's interference sum_t E|D z - D_t z|^2 over inputs z of task t, whose
second moment E[z z^T] is estimated from the weights alone: gradients are outer products with the
inputs, so the rows of D_t span them.

The family: sum_t w_t E|D z - D_t z|^2 has normal equations D S = N with S = sum_t w_t C_t and
N = sum_t w_t D_t C_t. Writing S = V diag(l) V^T, a filter F in [0, 1] per eigen-direction and an
anchor A give

    D = A + (N V / l - A V) F V^T,

so that a method is a choice of estimator C_t x task weight w_t x filter F x anchor A (`FAMILY`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from merging.linalg import in_span_of_rows_many, working_dtype
from merging.method import covariance
from merging.method.anchors import anchor_commutes, anchor_merge
from merging.method.equations import (
    Equations,
    Filter,
    asks_for_double,
    measured_normal_equations,
    normal_equations,
    normal_equations_many,
    solve,
    solve_many,
    task_weights,
)
from merging.method.ranges import NonNegative, Share
from merging.method.registry import Law, Needs, register


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published method as its choices in the family, and what stays settable."""

    formula: str
    source: str
    settable: tuple[str, ...] = ()
    estimator: str = "delta"
    task_weight: str = "uniform"
    filter: str = "cut"
    anchor: str = "zero"
    sequential: bool = False
    breaks: tuple[Law, ...] = ()

    def choices(self) -> dict[str, Any]:
        """The four factors of the family."""
        return {k: getattr(self, k) for k in ("estimator", "task_weight", "filter", "anchor")}


FAMILY = {
    "actmat": Preset(
        formula="(sum_t D_t C_t) (sum_t C_t)^+ with C_t = D_t^T D_t",
        source="arXiv 2604.01329, eq. 9",
        settable=("rtol",),
    ),
    "actmat_centred": Preset(
        formula="actmat with C_t = E_t^T E_t, E_t = D_t less the mean of its rows",
        source="arXiv 2604.01329, authors' code",
        estimator="centred",
        settable=("rtol",),
        breaks=("outputs",),
    ),
    "tact": Preset(
        formula="actmat with C_t = E_t^T E_t, E_t = the share k of D_t's largest entries",
        source="arXiv 2604.01329, authors' later code",
        estimator="trimmed",
        settable=("k", "rtol"),
        breaks=("outputs", "inputs"),
    ),
    "wudi_closed": Preset(
        formula="actmat with C_t = D_t^T D_t / |D_t|^2",
        source="arXiv 2503.08099, eq. 12 solved exactly",
        task_weight="inverse_norm",
        settable=("rtol",),
    ),
    "swudi": Preset(
        formula="wudi_closed in the ceil(rho d_in) largest directions of S, "
        "as far as a flow of time t gets from sum_t D_t",
        source="arXiv 2606.07289",
        task_weight="inverse_norm",
        filter="exponential",
        anchor="sum",
        settable=("t", "rho"),
        breaks=("scale",),
    ),
    "aswudi": Preset(
        formula="wudi_closed in the K largest directions of S, K = ceil((sum sqrt l)^2 / sum l)",
        source="arXiv 2606.07289",
        task_weight="inverse_norm",
        filter="effective_rank",
        settable=("anchor", "filter"),
    ),
    "ridge": Preset(
        formula="(sum_t D_t C_t) (sum_t C_t + lam I)^-1 with C_t = D_t^T D_t",
        source="interference with a ridge, solved exactly",
        filter="ridge",
        settable=("lam", "relative"),
        breaks=("scale",),
    ),
    "anchored": Preset(
        formula="(sum_t D_t C_t + lam A) (sum_t C_t + lam I)^-1 with C_t = D_t^T D_t",
        source="arXiv 2605.12843, data-free form",
        filter="ridge",
        anchor="tsv_m",
        settable=("lam", "relative", "anchor"),
        breaks=("scale",),
    ),
    "bounded": Preset(
        formula="actmat in the eigen-directions v of sum_t D_t^T D_t with "
        "|D v|^2 <= sum_t |D_t v|^2, TSV-M elsewhere",
        source="ours: what ACTMat does not stretch, else TSV-M",
        filter="gain",
        anchor="tsv_m",
    ),
    "balanced": Preset(
        formula="bounded with C_t = D_t^T D_t / |D_t|^2: each expert counts the same",
        source="ours: bounded, whatever the experts' sizes",
        task_weight="inverse_norm",
        filter="gain",
        anchor="tsv_m",
    ),
    "ledoit_wolf": Preset(
        formula="actmat with D_t^T D_t shrunk to a multiple of I by Ledoit and Wolf's estimator",
        source="Ledoit & Wolf 2004",
        estimator="ledoit_wolf",
        filter="none",
        breaks=("outputs",),
    ),
    "oas": Preset(
        formula="actmat with D_t^T D_t shrunk to a multiple of I by the oracle approximation",
        source="Chen et al. 2010",
        estimator="oas",
        filter="none",
    ),
    "regmean": Preset(
        formula="(sum_t D_t C_t) (sum_t C_t)^+ with C_t the measured moment of the inputs",
        source="arXiv 2212.09849, eq. 2",
        estimator="inputs",
        settable=("rtol", "gram_scale"),
    ),
    "regmean_pp": Preset(
        formula="regmean with inputs measured through the part that is merged already",
        source="arXiv 2508.03121",
        estimator="inputs",
        settable=("rtol", "gram_scale"),
        sequential=True,
    ),
}


def interference(
    deltas: Tensor,
    *,
    covariances: Tensor | None = None,
    weights: Tensor | None = None,
    d_in: int | None = None,
    d_out: int | None = None,
    estimator: str = "delta",
    task_weight: str = "uniform",
    filter: str = "cut",
    anchor: str = "zero",
    rtol: NonNegative | None = None,
    lam: NonNegative = 1e-4,
    relative: bool = False,
    t: NonNegative = 1300.0,
    rho: Share = 0.65,
    k: Share = 0.5,
    gram_scale: float = 1.0,
) -> Tensor:
    """Minimise the interference of a merged layer, (T, d_out, d_in) -> (d_out, d_in).

    covariances: (T, d_in, d_in) measured second moments, for estimator "inputs".
    weights: (T,) what each expert counts for, a factor on w_t; the anchor knows none.
    estimator: delta, centred, trimmed (k), ledoit_wolf, oas, identity, or inputs (gram_scale).
    task_weight: uniform, or inverse_norm, w_t = 1 / |D_t|^2.
    filter: cut (rtol), ridge (lam), exponential (t, rho), effective_rank, gavish_donoho, none, or
        gain: what cut keeps, but for eigen-directions v that the solution moves further than all
        experts together, |D v|^2 > sum_t |D_t v|^2 (in units of mean w_t, if they differ).
    anchor: what is kept where the filter is 0: zero, or any method of the registry by name
        ("average", "sum" for task arithmetic with alpha 1, "tsv_m", ...).
    rtol: eigenvalues up to rtol * max l are cut; None is torch.linalg.pinv's default, the
        width times the epsilon of float32 whatever dtype the solver works in.
    lam: ridge added to S; with `relative`, in units of the mean eigenvalue tr(S) / d_in.
    t, rho: time of the gradient flow and share of directions kept by the exponential filter.
    """
    width, rows = d_in or deltas.shape[-1], len(deltas) * (d_out or deltas.shape[1])
    inverse = Filter(filter, rtol=rtol, lam=lam, relative=relative, t=t, rho=rho, rows=rows)
    dtype = torch.float64 if asks_for_double(inverse, width) else working_dtype(deltas)
    A = anchor_merge(anchor, deltas.to(dtype), d_in=d_in, d_out=d_out)  # (d_out, d_in)

    for precision in (dtype, torch.float64):  # the second if the first cannot tell
        D = deltas.to(precision)  # (T, d_out, d_in)
        w = task_weights(task_weight, D)  # (T,)
        w = w if weights is None else w * weights.to(w)
        if estimator == "inputs":
            S, N = measured_normal_equations(D, covariances, w, gram_scale)
            equations = Equations(S, N, w, width)
        else:
            equations = _estimated(estimator, D, w, width, k)
        merged = solve(equations, A, inverse)
        if merged is not None:
            break
    return cast(Tensor, merged).to(deltas.dtype)  # float64 solves them all


IN_BATCHES = {"cut", "gain", "exponential", "effective_rank", "gavish_donoho"}  # filters


def interference_many(
    deltas: Tensor,
    *,
    weights: Tensor | None = None,
    d_in: int | None = None,
    d_out: int | None = None,
    **choices: Any,
) -> list[Tensor | None]:
    """`interference` of layers of one shape, (B, T, d_out, d_in) -> B of (d_out, d_in).

    Products and factorisations of all layers are one call each. None for layers that are to be
    merged by themselves: by choices that are not plain, or where float32 cannot tell.
    """
    T, height, width = deltas.shape[1], d_out or deltas.shape[2], d_in or deltas.shape[3]
    name, rtol, t, rho = (choices[key] for key in ("filter", "rtol", "t", "rho"))
    inverse = Filter(name, rtol=rtol, t=t, rho=rho, rows=T * height)
    plain = choices["estimator"] == "delta" and choices["anchor"] in {"zero", "sum", "average"}
    if not plain or name not in IN_BATCHES or asks_for_double(inverse, width):
        return [None] * len(deltas)
    D, Q = in_span_of_rows_many(deltas.to(working_dtype(deltas)))
    w = task_weights(choices["task_weight"], D.flatten(0, 1)).view(D.shape[:2])  # (B, T)
    w = w if weights is None else w * weights.to(w)
    total = None if choices["anchor"] == "zero" else D.sum(1)
    A = total / T if choices["anchor"] == "average" and total is not None else total
    merged = solve_many(Equations(*normal_equations_many(D, w), w, width), A, inverse)
    if Q is not None:
        merged = [None if x is None else x @ q.mT.to(x) for x, q in zip(merged, Q, strict=True)]
    return [None if x is None else x.to(deltas.dtype) for x in merged]


def _estimated(estimator: str, D: Tensor, w: Tensor, width: int, k: float) -> Equations:
    """S = sum_t w_t C_t and N = sum_t w_t D_t C_t with C_t estimated from the D_t themselves."""
    C = covariance.estimate(estimator, D, width, k)
    S, N = normal_equations(D, C, w)
    return Equations(S, N, w, width, regular=bool((w * C.ridge).any()))


def _needs(choices: Mapping[str, Any]) -> Needs | None:
    return "covariance" if choices["estimator"] == "inputs" else None


def _row_space(choices: Mapping[str, Any]) -> bool:
    # measured moments live in all of R^d_in, and trimming looks at single entries
    if choices["estimator"] in {"inputs", "trimmed"}:
        return False
    return anchor_commutes(choices["anchor"], "row_space")


def _column_space(choices: Mapping[str, Any]) -> bool:
    # the other estimates look at single rows, or at their number
    plain = choices["estimator"] in {"delta", "identity"}
    return plain and anchor_commutes(choices["anchor"], "column_space")


register(
    "interference",
    source="every choice open",
    formula="A + (N V / l - A V) F V^T with S = sum_t w_t C_t = V diag(l) V^T, "
    "N = sum_t w_t D_t C_t",
    needs=_needs,
    row_space=_row_space,
    column_space=_column_space,
    batched=interference_many,
)(interference)

for _name, _preset in FAMILY.items():
    register(
        _name,
        source=_preset.source,
        formula=_preset.formula,
        settable=_preset.settable,
        sequential=_preset.sequential,
        breaks=_preset.breaks,
        needs=_needs,
        row_space=_row_space,
        column_space=_column_space,
        batched=interference_many,
        **_preset.choices(),
    )(interference)

"""The interference family: one quadratic, one solver, many settings.

A merged layer's interference is sum_t w_t E|D z - D_t z|^2 with z the inputs of task t. With
C_t = E[z z^T] its normal equations are D S = N, where S = sum_t w_t C_t and N = sum_t w_t D_t C_t.
Writing S = V diag(l) V^T, a filter F in [0, 1] per eigen-direction and an anchor A give

    D = A + (N V / l - A V) F V^T,

so a method of this family is a choice of estimator x task weight x filter x anchor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.linalg import (
    eigh,
    gram,
    product,
    sharpen,
    solve_positive,
    solving_dtype,
    working_dtype,
)
from merging.method import covariance
from merging.method.registry import create, method


def _needs(arguments: Mapping[str, Any]) -> str | None:
    return "covariance" if arguments["estimator"] == "inputs" else None


def _row_space(arguments: Mapping[str, Any]) -> bool:
    # measured moments live in all of R^d_in, and trimming looks at single entries
    if arguments["estimator"] in {"inputs", "trimmed"}:
        return False
    return arguments["anchor"] in {"zero", "sum"} or create(arguments["anchor"]).row_space


def _column_space(arguments: Mapping[str, Any]) -> bool:
    # the other estimates look at single rows, or at their number
    anchor = arguments["anchor"]
    plain = arguments["estimator"] in {"delta", "identity"}
    return plain and (anchor in {"zero", "sum"} or create(anchor).column_space)


def _member(name: str, source: str, *settable: str, **choices: Any):
    """Register `interference` under a paper's name: its choices, and what stays settable."""
    return method(name, source=source, settable=settable, **_FLAGS, **choices)


_FLAGS = {"needs": _needs, "row_space": _row_space, "column_space": _column_space}
_NORM = {"task_weight": "inverse_norm"}


@_member("actmat", "arXiv 2604.01329, eq. 9", "rtol")
@_member("actmat_centred", "arXiv 2604.01329, authors' code", "rtol", estimator="centred")
@_member("tact", "arXiv 2604.01329, authors' later code", "k", "rtol", estimator="trimmed")
@_member("wudi_closed", "arXiv 2503.08099, eq. 12 solved exactly", "rtol", **_NORM)
@_member("swudi", "arXiv 2606.07289", "t", "rho", filter="exponential", anchor="sum", **_NORM)
@_member("aswudi", "arXiv 2606.07289", "anchor", filter="effective_rank", **_NORM)
@_member("ridge", "interference with a ridge, solved exactly", "lam", "relative", filter="ridge")
@_member(
    "anchored", "arXiv 2605.12843, data-free form", "lam", "relative", "anchor",
    filter="ridge", anchor="tsv_m",
)  # fmt: skip
@_member("bounded", "ours: what ACTMat does not stretch, else TSV-M", filter="gain", anchor="tsv_m")
@_member("ledoit_wolf", "Ledoit & Wolf 2004", estimator="ledoit_wolf", filter="none")
@_member("oas", "Chen et al. 2010", estimator="oas", filter="none")
@_member("regmean", "arXiv 2212.09849, eq. 2", "rtol", "gram_scale", estimator="inputs")
@method(
    "regmean_pp", source="arXiv 2508.03121", settable=("rtol", "gram_scale"),
    needs="covariance", sequential=True, estimator="inputs",
)  # fmt: skip
@method("interference", source="every choice open", **_FLAGS)
def interference(
    deltas: Tensor,
    *,
    covariances: Tensor | None = None,
    d_in: int | None = None,
    d_out: int | None = None,
    estimator: str = "delta",
    task_weight: str = "uniform",
    filter: str = "cut",
    anchor: str = "zero",
    rtol: float | None = None,
    lam: float = 1e-4,
    relative: bool = False,
    t: float = 1300.0,
    rho: float = 0.65,
    k: float = 0.5,
    gram_scale: float = 1.0,
) -> Tensor:
    """Minimise the interference of a merged layer, (T, d_out, d_in) -> (d_out, d_in).

    covariances: (T, d_in, d_in) measured second moments, for estimator "inputs".
    estimator: delta, centred, trimmed (k), ledoit_wolf, oas, identity, or inputs (gram_scale).
    task_weight: uniform, or inverse_norm, w_t = 1 / |D_t|^2.
    filter: cut (rtol), ridge (lam), exponential (t, rho), effective_rank, none, or gain: what cut
        keeps, but for directions v that the solution moves further than all experts together,
        |D v|^2 > sum_t |D_t v|^2 (in units of mean w_t, if they differ).
    anchor: what is kept where the filter is 0: zero, or any method of the registry by name
        ("average", "sum" for task arithmetic with alpha 1, "tsv_m", ...).
    rtol: eigenvalues up to rtol * max l are cut; None is torch.linalg.pinv's default, the
        width times the epsilon of float32 whatever dtype the solver works in.
    lam: ridge added to S; with `relative`, in units of the mean eigenvalue tr(S) / d_in.
    t, rho: time of the gradient flow and share of directions kept by the exponential filter.
    """
    width = d_in or deltas.shape[-1]
    work = deltas.to(working_dtype(deltas))
    weights = task_weights(task_weight, work)
    if estimator == "inputs":
        S, N = _measured_normal_equations(work, covariances, weights, gram_scale)
    else:
        S, N = _normal_equations(work, covariance.estimate(estimator, work, width, k), weights)
    S, N = S.to(solving_dtype(S)), N.to(solving_dtype(S))
    A = _anchor(anchor, work, S.dtype, d_in=d_in, d_out=d_out)
    D = None
    if filter == "cut":
        # |S| >= max l: where nothing lies below this, nothing is cut and S is inverted
        D = solve_positive(N, S, above=_cut(rtol, width) * S.norm())
    elif filter in {"ridge", "none"}:
        scale = S.diagonal().sum() / width if relative else 1.0
        ridge = lam * scale if filter == "ridge" else 0.0
        D = _damped(S, N, A, ridge, width)
    if D is None:
        spectral = partial(spectral_filter, filter, rtol=rtol, t=t, rho=rho, d_in=width)
        D = _filtered(S, N, A, spectral, _bound(weights) if filter == "gain" else math.inf)
    return D.to(deltas.dtype)


def task_weights(name: str, deltas: Tensor) -> Tensor:
    """(T, d_out, d_in) -> (T,): "uniform" 1, or "inverse_norm" 1 / |D_t|^2 (WUDI, eq. 12)."""
    if name == "uniform":
        return deltas.new_ones(len(deltas))
    if name != "inverse_norm":
        raise InputError(f"unknown task weight {name!r}", "known: uniform, inverse_norm")
    norms = deltas.square().sum((1, 2))
    return torch.where(norms > 0, 1 / norms, 0)  # a task that did not move weighs nothing


def _normal_equations(
    deltas: Tensor, est: covariance.Estimate, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """S (d_in, d_in) and N (d_out, d_in) for C_t = a_t E_t^T E_t + b_t I, by the cheaper route."""
    E, a, b = est.factor, weights * est.scale, weights * est.ridge
    d_out, d_in = deltas.shape[1:]
    if E.shape[1] < d_in:
        # (D E^T) E costs d_out n d_in; forming E^T E first would cost n d_in^2 more
        rows = E if (a == 1).all() else a.sqrt().view(-1, 1, 1) * E
        S = gram(rows.reshape(-1, d_in))  # of (T n, d_in)
        if E is deltas:
            outer = est.gram if est.gram is not None else map(gram, E.mT)
        else:
            outer = map(product, deltas, E.mT)
        cross = torch.cat([x * w for x, w in zip(outer, a, strict=True)], dim=1)  # (d_out, T n)
        N = product(cross, E.reshape(-1, d_in))
    else:
        S = deltas.new_zeros(d_in, d_in)
        N = deltas.new_zeros(d_out, d_in)
        inner = est.gram if est.gram is not None else map(gram, E)
        for x, C, w in zip(deltas, inner, a, strict=True):
            C = C * w
            S += C
            N += product(x, C)
    if b.any():
        S.diagonal().add_(b.sum())
        N = N + torch.einsum("t,tij->ij", b, deltas)
    return S, N


def _measured_normal_equations(
    deltas: Tensor, covariances: Tensor | None, weights: Tensor, gram_scale: float
) -> tuple[Tensor, Tensor]:
    """The same from measured second moments, their off-diagonals scaled (RegMean, section 4)."""
    if covariances is None or covariances.shape != (len(deltas), *2 * deltas.shape[-1:]):
        got = "none" if covariances is None else f"shape {tuple(covariances.shape)}"
        raise InputError(
            f"expected covariances of shape {(len(deltas), *2 * deltas.shape[-1:])}, got {got}"
        )
    S, N = 0.0, 0.0
    for x, C, w in zip(deltas, covariances, weights, strict=True):
        C = w * C.to(deltas)
        C = gram_scale * C + (1 - gram_scale) * C.diagonal().diag()
        S, N = S + C, N + product(x, C)
    return S, N


def _anchor(name: str, deltas: Tensor, dtype: torch.dtype, **layer: int | None) -> Tensor | None:
    if name == "zero":
        return None
    A = deltas.sum(0) if name == "sum" else create(name)(deltas, **layer)
    return A.to(dtype)


def _damped(S: Tensor, N: Tensor, A: Tensor | None, ridge: float | Tensor, width: int) -> Tensor:
    """(N + ridge A)(S + ridge I)^-1 by Cholesky; by a cut where S is singular and ridge 0."""
    if ridge:
        S.diagonal().add_(ridge)
        N = N if A is None else N + ridge * A
    D = solve_positive(N, S)
    return D if D is not None else _filtered(S, N, A, partial(spectral_filter, "cut", d_in=width))


def _filtered(
    S: Tensor, N: Tensor, A: Tensor | None, filter: Callable, bound: float | Tensor = math.inf
) -> Tensor:
    """A + (N V / l - A V) F V^T over the directions in which the filter F is not 0.

    bound: F is 0 as well where the solution N V / l stretches a direction by more, squared, than
        this multiple of l.
    """
    values, vectors = eigh(S)  # (d,), (d, d)
    kept = int((filter(values) > 0).sum())  # the first: no filter prefers a smaller eigenvalue
    if S.dtype == torch.float32 and 0 < kept < len(S):
        sharpen(S, values, vectors, at=values[kept - 1])
    F = filter(values)
    kept = int((F > 0).sum())
    V, l, F = vectors[:, :kept], values[:kept], F[:kept]
    solved = product(N, V) / l  # (d_out, kept), D V
    F = F * (solved.square().sum(0) <= bound * l)
    if A is None:
        return product(solved * F, V.mT)
    return A + product((solved - product(A, V)) * F, V.mT)


def _bound(weights: Tensor) -> Tensor:
    """Of |D v|^2 / l: l is sum_t w_t |D_t v|^2, so that this is sum_t |D_t v|^2 if weights agree.

    With a hair's breadth, since one task alone reaches it: D v = D_t v.
    """
    moved = weights > 0
    return 1.01 / weights[moved].mean() if moved.any() else weights.new_ones(())


def _cut(rtol: float | None, d_in: int) -> float:
    return d_in * torch.finfo(torch.float32).eps if rtol is None else rtol


def spectral_filter(
    name: str, l: Tensor, *, d_in: int, rtol: float | None = None, t: float = 0, rho: float = 1
) -> Tensor:
    """Descending eigenvalues l (d,) -> filter (d,) in [0, 1]; ambient width d_in >= d.

    cut: 1 above rtol * max l (None: d_in times the epsilon of float32).
    exponential: (1 - exp(-l t)) for the ceil(rho d_in) largest (arXiv 2606.07289).
    gain: as cut; `interference` then drops the directions that are stretched too far.
    effective_rank: 1 for the K largest, K = ceil((sum sqrt l)^2 / sum l) (arXiv 2606.07289).
    """
    index = torch.arange(len(l), device=l.device)
    if name in {"cut", "gain"}:
        return (l > _cut(rtol, d_in) * l.max()).to(l)
    if name == "exponential":
        return -torch.expm1(-l * t) * (index < math.ceil(rho * d_in)) * (l > 0)
    if name == "effective_rank":
        energy = l.sum()
        # the small term keeps a rank that is an integer from being rounded up past itself
        K = torch.ceil(l.sqrt().sum().square() / energy - 1e-6) if energy > 0 else 0
        return ((index < K) & (l > 0)).to(l)
    raise InputError(
        f"unknown filter {name!r}", "known: none, ridge, cut, gain, exponential, effective_rank"
    )


@method("wudi", source="arXiv 2503.08099, algorithm 1", rest="base", row_space=False)
def wudi(deltas: Tensor, *, steps: int = 300, lr: float = 1e-5) -> Tensor:
    """WUDI by gradient: Adam from sum_t D_t on sum_t |(D - D_t) D_t^T|^2 / |D_t|^2.

    The gradient is 2 (D S - N), one product of (d_out, d_in) by (d_in, d_in) a step.
    """
    work = deltas.to(working_dtype(deltas))
    S, N = _normal_equations(
        work, covariance.estimate("delta", work, work.shape[-1], 1.0),
        task_weights("inverse_norm", work),
    )  # fmt: skip
    D = work.sum(0).clone()
    optimizer = torch.optim.Adam([D], lr=lr)
    for _ in range(steps):
        D.grad = 2 * (D @ S - N)
        optimizer.step()
    return D.to(deltas.dtype)


@method("mats", source="arXiv 2312.04339, section 4", needs="covariance")
def mats(
    deltas: Tensor, *, covariances: Tensor, steps: int = 100, start: float = 0.3, tol: float = 1e-6
) -> Tensor:
    """MaTS: conjugate gradients on D S = N from the task-arithmetic point start * sum_t D_t.

    covariances: (T, d_in, d_in) second moments (or input-side Fisher blocks).
    steps: at most this many; it stops early when the residual falls below tol * |N|.
    """
    work = deltas.to(working_dtype(deltas))
    S, N = _measured_normal_equations(work, covariances, task_weights("uniform", work), 1.0)
    S, N = S.to(solving_dtype(S)), N.to(solving_dtype(S))
    D = start * work.sum(0).to(S)
    residual = N - D @ S
    direction, energy = residual, residual.square().sum()
    for _ in range(steps):
        if energy.sqrt() <= tol * N.norm():
            break
        image = direction @ S
        step = energy / (direction * image).sum()
        D, residual = D + step * direction, residual - step * image
        energy, last = residual.square().sum(), energy
        direction = residual + energy / last * direction
    return D.to(deltas.dtype)

"""ACE: interference minimised with an adaptive, structured covariance (arXiv 2603.02945)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from merging.linalg import gram, moments_dtype, product, solve_positive, solving_dtype
from merging.method.equations import EPS32
from merging.method.ranges import NonNegative, Share
from merging.method.registry import register
from merging.method.spectral import singular_triplets

_CERTAIN = 5e4  # times an entry's relative error: what share of R's eigenvalues is told from it


@register(
    "ace",
    source="arXiv 2603.02945",
    formula="(sum_t E_t R_t)(sum_t R_t + 1 c^T)^-1, E_t = D_t centred, R_t = E_t^T E_t + eps I",
    breaks=("scale", "outputs", "inputs", "expert"),
)
def ace(
    deltas: Tensor, *, eps: NonNegative = 1e-5, gamma: NonNegative = 0.3, k: Share = 0.3
) -> Tensor:
    """ACE-Merging, (T, d_out, d_in) -> (d_out, d_in) (arXiv 2603.02945 and its code).

    E_t is D_t without the mean of its rows, S_t = E_t^T E_t. Layers whose tasks differ much in
    size, Var_t[log |D_t|^2] / (mean_t log |D_t|^2)^2 > gamma (the unbiased variance, 0 for one
    task), are normalised, S_t / tr S_t with eps / tr S_t, and refined. Then

        D = (sum_t E_t R_t)(sum_t R_t + 1 c^T)^-1,  R_t = S_t + eps_t I,

    with the collective prior c the column means of sum_t S_t (over mean_t |D_t|^2 if normalised),
    and the refinement adds mean(s_1..k) U_k V_k^T from the SVD of D + sum_t D_t (S_t - mean R),
    its top share k of directions. A single expert is not returned: it is centred and shrunk.
    eps: 1e-5 for ViTs, 2e-4 for RoBERTa-base, 4e-2 for GPT-2.
    """
    merged = None
    for precision in (moments_dtype(deltas), torch.float64):  # the second if the first cannot tell
        merged = _minimise(deltas.to(precision), eps, gamma, k)
        if merged is not None:
            break
    return cast(Tensor, merged).to(deltas)  # float64 solves them all


def _minimise(work: Tensor, eps: float, gamma: float, k: float) -> Tensor | None:
    T, d_out, d_in = work.shape
    energy = _squared_norms(work)  # (T,) |D_t|^2
    log = energy.log()
    uneven = T > 1 and bool(log.var() > gamma * log.mean().square())  # not with a delta of 0
    E = work - work.mean(1, keepdim=True)
    trace = _squared_norms(E) if uneven else torch.ones_like(energy)
    trace = torch.where(trace > 0, trace, 1)  # equal rows leave nothing to normalise
    R = work.new_zeros(d_in, d_in)  # sum_t R_t
    N = work.new_zeros(d_out, d_in)  # sum_t E_t R_t
    residual = work.new_zeros(d_out, d_in)  # sum_t D_t S_t
    wide = 2 * d_out < d_in  # (E E^T) E costs less than E (E^T E) then, S_t being needed anyway
    for D_t, E_t, tr in zip(work, E, trace.tolist(), strict=True):
        S_t = gram(E_t) / tr
        R += S_t
        N += product(gram(E_t.mT) / tr if wide else E_t, E_t if wide else S_t) + (eps / tr) * E_t
        if uneven:
            residual += product(product(D_t, E_t.mT) / tr, E_t) if wide else product(D_t, S_t)
    R, N = R.to(solving_dtype(R)), N.to(solving_dtype(R))
    prior = R.mean(0) / (energy.mean() if uneven else 1.0)
    R.diagonal().add_((eps / trace).sum())
    D = _solve(N, R, prior.to(R), torch.finfo(work.dtype).eps)
    if uneven and D is not None:
        shift = residual - product(work.sum(0), R.to(work)) / T
        U, s, V = singular_triplets(D + shift, int(k * min(d_out, d_in)))
        D = D + product(s.sum() / max(1, len(s)) * U, V.mT)
    return D


def _squared_norms(deltas: Tensor) -> Tensor:
    """(T, d_out, d_in) -> (T,), float64."""
    return deltas.square().sum((1, 2), dtype=torch.float64)


def _largest_eigenvalue(symmetric: Tensor, steps: int = 8) -> float:
    """Of a positive matrix (d, d), about: its share of a vector after some multiplications."""
    vector = symmetric[symmetric.diagonal().argmax()]
    for _ in range(steps):
        vector = symmetric @ (vector / vector.norm().clamp_min(1e-30))
    return float(vector.norm())


def _solve(N: Tensor, R: Tensor, prior: Tensor, eps: float) -> Tensor | None:
    """N (R + 1 prior^T)^-1 by one Cholesky factor of R and the Sherman-Morrison formula.

    eps: relative error of R's entries; None where float32's leave R no safe inverse.
    """
    # R^-1 magnifies the error of R's entries as many times as the largest eigenvalue is larger
    above = _CERTAIN * eps * _largest_eigenvalue(R) if eps >= EPS32 else 0.0
    solved = solve_positive(torch.cat([N, prior[None]]), R, above, eps)
    if solved is None:  # no eps to speak of, and deltas of low rank
        if eps >= EPS32:
            return None
        inverted: Tensor = torch.linalg.pinv(R + prior)
        return N @ inverted
    X, w = solved[:-1], solved[-1]
    return X - torch.outer(X.sum(1), w) / (1 + w.sum())

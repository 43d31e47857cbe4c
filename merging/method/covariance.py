"""Estimates of a task's input second moment C_t, without data where possible.

A data-free estimate is kept in factored form, C_t = a_t E_t^T E_t + b_t I: the solver then never
needs a (d_in, d_in) matrix per task.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from merging.errors import InputError
from merging.linalg import gram
from merging.method.sparse import keep_largest


class Estimate(NamedTuple):
    """T second moments C_t = scale_t * factor_t^T factor_t + ridge_t * I."""

    factor: Tensor  # (T, n, d_in)
    scale: Tensor  # (T,)
    ridge: Tensor  # (T,)
    gram: Tensor | None = None  # `grams(factor)`, where the estimate has needed it already


def _plain(factor: Tensor) -> Estimate:
    ones = factor.new_ones(len(factor))
    return Estimate(factor, ones, 0 * ones)


def delta(deltas: Tensor, d_in: int, k: float) -> Estimate:
    """D_t^T D_t (ACTMat, arXiv 2604.01329): accumulated gradients span the inputs."""
    return _plain(deltas)


def centred(deltas: Tensor, d_in: int, k: float) -> Estimate:
    """D_t^T D_t after the mean over output rows is taken off (ACTMat's centred variant)."""
    return _plain(deltas - deltas.mean(1, keepdim=True))


def trimmed(deltas: Tensor, d_in: int, k: float) -> Estimate:
    """trim_k(D_t)^T trim_k(D_t): only the share k of largest-magnitude entries (TACT)."""
    n = deltas[0].numel()
    return _plain(keep_largest(deltas, round(k * n)))


def identity(deltas: Tensor, d_in: int, k: float) -> Estimate:
    """C_t = I, the estimate under which the solution is the plain average."""
    ones = deltas.new_ones(len(deltas))
    return Estimate(deltas[:, :0], ones, ones)


def ledoit_wolf(deltas: Tensor, d_in: int, k: float) -> Estimate:
    """D_t^T D_t shrunk to a multiple of I (Ledoit & Wolf 2004, eqs. 8-12, known mean 0).

    The rows of D_t are d_out samples of a d_in-dimensional distribution; the shrinkage is the
    one that scikit-learn's `ledoit_wolf(D_t, assume_centered=True)` returns.
    """
    S = grams(deltas)
    moments, n = _moments(deltas, S), deltas.shape[1]
    fourth = deltas.square().sum(-1).square().sum(-1)  # (T,) sum over rows of |x|^4
    beta = (fourth / n - moments.square) / (d_in * n)
    gap = (moments.square - moments.trace.square() / d_in) / d_in
    return _shrunk(deltas, S, beta / gap, moments.trace * n / d_in)


def oas(deltas: Tensor, d_in: int, k: float) -> Estimate:
    """D_t^T D_t shrunk by the oracle approximating estimator (Chen et al. 2010, eq. 23).

    scikit-learn's `oas(D_t, assume_centered=True)` leaves out the two 2 / d_in terms.
    """
    S = grams(deltas)
    moments, n = _moments(deltas, S), deltas.shape[1]
    trace2 = moments.trace.square()
    above = (1 - 2 / d_in) * moments.square + trace2
    below = (n + 1 - 2 / d_in) * (moments.square - trace2 / d_in)
    return _shrunk(deltas, S, above / below, moments.trace * n / d_in)


class _Moments(NamedTuple):
    trace: Tensor  # (T,) tr(S_t), S_t = D_t^T D_t / n
    square: Tensor  # (T,) tr(S_t^2)


def _moments(deltas: Tensor, grams: Tensor) -> _Moments:
    n = deltas.shape[1]
    # tr((D^T D)^2) = tr((D D^T)^2): whichever of the two it is
    return _Moments(deltas.square().sum((1, 2)) / n, grams.square().sum((1, 2)) / n**2)


def _shrunk(deltas: Tensor, grams: Tensor, shrinkage: Tensor, mean_eigenvalue: Tensor) -> Estimate:
    # 0/0 where D_t = 0 or D_t^T D_t is already a multiple of I: shrinking fully changes neither
    r = shrinkage.nan_to_num(nan=1.0, posinf=1.0).clamp(0, 1)
    return Estimate(deltas, 1 - r, r * mean_eigenvalue, grams)


def grams(factor: Tensor) -> Tensor:
    """E_t E_t^T (T, n, n) where E_t (n, d_in) is wide, E_t^T E_t (T, d_in, d_in) otherwise."""
    wide = factor.shape[1] < factor.shape[2]
    return torch.stack([gram(x.mT if wide else x) for x in factor])


ESTIMATORS = {f.__name__: f for f in (delta, centred, trimmed, identity, ledoit_wolf, oas)}


def estimate(name: str, deltas: Tensor, d_in: int, k: float) -> Estimate:
    """The estimate called `name` for deltas (T, d_out, d_in'), ambient width `d_in` >= d_in'."""
    if name not in ESTIMATORS:
        raise InputError(
            f"unknown covariance estimator {name!r}", f"known: inputs, {', '.join(ESTIMATORS)}"
        )
    return ESTIMATORS[name](deltas, d_in, k)

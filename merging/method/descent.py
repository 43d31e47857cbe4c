"""Descent on the normal equations, step by step, where a method's steps are part of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from merging.linalg import eigh, product, solving_dtype, working_dtype
from merging.method import covariance
from merging.method.equations import (
    measured_normal_equations,
    normal_equations,
    task_weights,
)
from merging.method.ranges import Count, NonNegative, Share
from merging.method.registry import register
from merging.method.spectral import layer_rank, leading_triplets


@register(
    "wudi",
    source="arXiv 2503.08099, algorithm 1",
    formula="Adam from sum_t D_t on sum_t |(D - D_t) D_t^T|^2 / |D_t|^2",
    rest="base",
    breaks=("scale", "outputs", "inputs"),
)
def wudi(deltas: Tensor, *, steps: Count = 300, lr: NonNegative = 1e-5) -> Tensor:
    """WUDI by gradient: Adam from sum_t D_t on sum_t |(D - D_t) D_t^T|^2 / |D_t|^2.

    The gradient is 2 (D S - N), one product of (d_out, d_in) by (d_in, d_in) a step.
    """
    work = deltas.to(working_dtype(deltas))
    S, N = normal_equations(
        work, covariance.estimate("delta", work, work.shape[-1], 1.0),
        task_weights("inverse_norm", work),
    )  # fmt: skip
    D = work.sum(0).clone()
    optimizer = torch.optim.Adam([D], lr=lr)
    for _ in range(steps):
        D.grad = 2 * (D @ S - N)
        optimizer.step()
    return D.to(deltas.dtype)


@register(
    "optmerge", source="arXiv 2505.19892, WUDI v2", row_space=True, column_space=True,
    formula="descent from the mean on sum_t |(D - L_t) L_t^T|^2 / |D_t|^2, "
    "L_t = D_t cut to rank r / T",
)  # fmt: skip
def optmerge(
    deltas: Tensor,
    *,
    steps: Count = 300,
    lr: NonNegative = 1e-4,
    momentum: Share = 0.9,
    d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:
    """OptMerge: WUDI's objective on truncated deltas, descended from the average (2505.19892).

    (T, d_out, d_in) -> (d_out, d_in). L_t keeps the floor(min(d_out, d_in) / T) leading triplets of
    D_t. Steps of plain gradient descent with momentum, where WUDI takes Adam's from the sum: few of
    them at this rate stay near the mean in directions of little energy. The gradient is
    2 (D S - N) with S = sum_t L_t^T L_t / |D_t|^2 and N = sum_t L_t L_t^T L_t / |D_t|^2.
    """
    work = deltas.to(working_dtype(deltas))
    k = layer_rank(deltas, d_in, d_out) // len(deltas)
    parts = leading_triplets(deltas, k)
    L = torch.stack([product(U * s, V.mT) for U, s, V in parts]).to(work)
    weights = task_weights("inverse_norm", work)
    S, N = normal_equations(L, covariance.estimate("delta", L, L.shape[-1], 1.0), weights)
    D = work.mean(0)
    step = torch.zeros_like(D)
    for _ in range(steps):
        step = momentum * step + 2 * (D @ S - N)
        D = D - lr * step
    return D.to(deltas.dtype)


@register(
    "mats",
    source="arXiv 2312.04339, section 4",
    formula="regmean's equations by conjugate gradients from start sum_t D_t",
    needs="covariance",
)
def mats(
    deltas: Tensor, *, covariances: Tensor, steps: int = 100, start: float = 0.3, tol: float = 1e-6
) -> Tensor:
    """MaTS: conjugate gradients on D S = N from the task-arithmetic point start * sum_t D_t.

    covariances: (T, d_in, d_in) second moments (or input-side Fisher blocks).
    steps: at most this many; it stops early when the residual falls below tol * |N|. The authors
        stop at 1e-5 of the right-hand side of the weights, W_0 S + N, 1e-3 from the solution.
        Their K-FAC variant weighs the outputs as well: `kfac_regmean`.
    """
    work = deltas.to(working_dtype(deltas))
    S, N = measured_normal_equations(work, covariances, task_weights("uniform", work), 1.0)
    S, N = S.to(solving_dtype(S)), N.to(solving_dtype(S))
    D = start * work.sum(0).to(S)
    if S.dtype == torch.float64 and S.device.type == "cpu":
        # in S's eigenbasis a step is no product of matrices, and four of them cost as much
        l, V = eigh(S)
        D = _descend(product(D, V), lambda X: X * l, product(N, V), steps, tol)
        return product(D, V.mT).to(deltas.dtype)
    return _descend(D, lambda X: product(X, S), N, steps, tol).to(deltas.dtype)


def _descend(
    D: Tensor, operator: Callable[[Tensor], Tensor], N: Tensor, steps: int, tol: float
) -> Tensor:
    """Conjugate gradients on operator(D) = N from D (d_out, d), which is overwritten."""
    residual = N - operator(D)
    direction, energy = residual.clone(), residual.square().sum()
    enough = tol * N.norm()
    for _ in range(steps):
        if energy.sqrt() <= enough:
            break
        image = operator(direction)
        step = energy / torch.dot(direction.reshape(-1), image.reshape(-1))
        D.add_(step * direction)
        residual.sub_(image.mul_(step))
        energy, last = residual.square().sum(), energy
        direction.mul_(energy / last).add_(residual)
    return D

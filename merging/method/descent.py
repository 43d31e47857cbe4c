"""Descent on the normal equations, step by step, where a method's steps are part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from merging.linalg import solving_dtype, working_dtype
from merging.method import covariance
from merging.method.equations import (
    measured_normal_equations,
    normal_equations,
    task_weights,
)
from merging.method.registry import register


@register(
    "wudi",
    source="arXiv 2503.08099, algorithm 1",
    rest="base",
    breaks=("scale", "outputs", "inputs"),
)
def wudi(deltas: Tensor, *, steps: int = 300, lr: float = 1e-5) -> Tensor:
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


@register("mats", source="arXiv 2312.04339, section 4", needs="covariance")
def mats(
    deltas: Tensor, *, covariances: Tensor, steps: int = 100, start: float = 0.3, tol: float = 1e-6
) -> Tensor:
    """MaTS: conjugate gradients on D S = N from the task-arithmetic point start * sum_t D_t.

    covariances: (T, d_in, d_in) second moments (or input-side Fisher blocks).
    steps: at most this many; it stops early when the residual falls below tol * |N|.
    """
    work = deltas.to(working_dtype(deltas))
    S, N = measured_normal_equations(work, covariances, task_weights("uniform", work), 1.0)
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

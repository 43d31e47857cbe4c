"""Both factors of a layer's Fisher information at once: K-FAC, data-free and measured.

K-FAC (arXiv 1503.05671) takes the Fisher information of a task at a layer for a Kronecker product,
of the second moment C_t (d_in, d_in) of the layer's inputs with that G_t (d_out, d_out) of the
gradients at its outputs. The merge of least change in that metric, sum_t tr[(D - D_t)^T G_t
(D - D_t) C_t], solves

    sum_t G_t D C_t = sum_t G_t D_t C_t,

which no factorisation of two matrices solves for T > 1: conjugate gradients do. With all G_t = I it
is RegMean's equation, with all C_t = I that of its mirror.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from merging.errors import InputError
from merging.linalg import gram, product, working_dtype
from merging.method.equations import (
    Equations,
    Filter,
    measured_normal_equations,
    solve,
    task_weights,
)
from merging.method.ranges import Count, NonNegative
from merging.method.registry import register


@register(
    "kfac", source="ours: arXiv 1503.05671 with D_t's own moments", row_space=True,
    column_space=True,
    formula="the D of sum_t R_t D C_t = sum_t R_t D_t C_t, R_t = D_t D_t^T, "
    "C_t = D_t^T D_t, damped",
)  # fmt: skip
def kfac(
    deltas: Tensor, *, task_weight: str = "uniform", damping: NonNegative = 0.1, steps: int = 200,
    tol: NonNegative = 1e-9, d_in: int | None = None, d_out: int | None = None,
) -> Tensor:  # fmt: skip
    """K-FAC without data: the differences' own moments on both sides of every task.

    (T, d_out, d_in) -> (d_out, d_in), by conjugate gradients from 0.
    task_weight: uniform, or inverse_norm, the equation's terms divided by |D_t|^4.
    damping, steps, tol: as in `kfac_regmean`; undamped the equation is nearly singular, its
        eigenvalues are products of four singular values.
    """
    D = deltas.double()
    w = task_weights(task_weight, D)
    R = torch.stack([a * gram(x.mT) for a, x in zip(w, D, strict=True)])
    C = torch.stack([a * gram(x) for a, x in zip(w, D, strict=True)])
    R, C = _damped(R, damping, d_out), _damped(C, damping, d_in)
    return _two_sided(D, R, C, steps, tol).to(deltas)


@register(
    "kfac_regmean", source="arXiv 2312.04339, the K-FAC variant", needs="kfac",
    formula="the D of sum_t G_t D C_t = sum_t G_t D_t C_t, G_t and C_t the measured moments of "
    "output gradients and inputs",
)  # fmt: skip
def kfac_regmean(
    deltas: Tensor, *, covariances: Tensor | None = None, gradients: Tensor | None = None,
    damping: NonNegative = 1e-3, steps: Count = 200, tol: NonNegative = 1e-9,
) -> Tensor:  # fmt: skip
    """RegMean with both factors of the Fisher information measured (MaTS' K-FAC variant).

    (T, d_out, d_in) -> (d_out, d_in).
    covariances, gradients: (T, d_in, d_in), (T, d_out, d_out).
    damping: multiple of the identity that is added to each moment, relative to its mean eigenvalue.
    steps, tol: of conjugate gradients, from 0; they stop when the residual falls below tol times
        the right-hand side.
    """
    C = _checked("covariances", covariances, len(deltas), deltas.shape[2])
    G = _checked("gradients", gradients, len(deltas), deltas.shape[1])
    D = deltas.double()
    G, C = _damped(G.to(D), damping), _damped(C.to(D), damping)
    return _two_sided(D, G, C, steps, tol).to(deltas)


@register(
    "regmean_outputs", source="ours: RegMean's mirror, arXiv 2212.09849 on the other side",
    needs="kfac",
    formula="(sum_t G_t)^+ (sum_t G_t D_t) with G_t the measured moment of the output gradients",
)  # fmt: skip
def regmean_outputs(
    deltas: Tensor, *, gradients: Tensor | None = None, rtol: float | None = None
) -> Tensor:
    """RegMean on the outputs' side, (T, d_out, d_in) -> (d_out, d_in).

    gradients: (T, d_out, d_out) second moments of the gradients at each task's outputs.
    rtol: as in `regmean`.
    """
    G = _checked("gradients", gradients, len(deltas), deltas.shape[1])
    D = deltas.mT.to(working_dtype(deltas.mT))
    w = task_weights("uniform", D)
    S, N = measured_normal_equations(D, G, w, 1.0)
    equations = Equations(S, N, w, D.shape[2])
    merged = cast(Tensor, solve(equations, None, Filter("cut", rtol=rtol)))  # a cut always solves
    return merged.mT.to(deltas.dtype)


def _checked(name: str, moments: Tensor | None, T: int, d: int) -> Tensor:
    if moments is None or moments.shape != (T, d, d):
        got = "none" if moments is None else f"shape {tuple(moments.shape)}"
        raise InputError(f"expected {name} of shape {(T, d, d)}, got {got}")
    return moments


def _damped(moments: Tensor, damping: NonNegative, width: int | None = None) -> Tensor:
    """(T, d, d) plus damping times their own mean eigenvalue times the identity.

    width: the layer's own, where moments are in a narrower basis.
    """
    mean = moments.diagonal(dim1=1, dim2=2).sum(1) / (width or moments.shape[1])  # (T,)
    return moments + damping * torch.diag_embed(mean[:, None].expand(-1, moments.shape[1]))


def _two_sided(D: Tensor, G: Tensor, C: Tensor, steps: int, tol: float) -> Tensor:
    """The solution of sum_t G_t X C_t = sum_t G_t D_t C_t: (d_out, d_in)."""

    def operator(X: Tensor) -> Tensor:
        image = torch.zeros_like(X)
        for g, c in zip(G, C, strict=True):
            image += product(product(g, X), c)
        return image

    right = torch.zeros_like(D[0])
    for g, x, c in zip(G, D, C, strict=True):
        right += product(product(g, x), c)
    return conjugate_gradients(operator, right, steps, tol)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], right: Tensor, steps: int, tol: float
) -> Tensor:
    """X of operator(X) = right, for a symmetric positive semi-definite operator on matrices."""
    X, residual = torch.zeros_like(right), right
    direction, energy = residual, residual.square().sum()
    enough = tol * right.norm()
    for _ in range(steps):
        if energy.sqrt() <= enough:
            break
        image = operator(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:  # rounding: what is left lies in the operator's null space
            break
        X = X + energy / curvature * direction
        residual = residual - energy / curvature * image
        energy, last = residual.square().sum(), energy
        direction = residual + energy / last * direction
    return X

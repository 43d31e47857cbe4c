"""Symmetric linear algebra: Gram matrices, eigendecompositions, and the cheapest route to each.

On a CPU in float32 and float64, BLAS' symmetric rank-k update and LAPACK's divide and conquer,
called through SciPy, take half the time of the general routines behind torch; elsewhere torch's
own are used. Both compute the same quantities.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

# Up to this width, float64 costs next to nothing and removes every question of conditioning.
# Wider layers are solved in float32, whose error is about eps times the condition number.
DOUBLE_UP_TO = 1024


def working_dtype(stack: Tensor) -> torch.dtype:
    """float64 for (..., d_in) matrices that are narrow or float64 already, else float32."""
    double = stack.dtype == torch.float64 or stack.shape[-1] <= DOUBLE_UP_TO
    return torch.float64 if double else torch.float32


def gram(rows: Tensor) -> Tensor:
    """rows^T rows, (n, d) -> (d, d), exactly symmetric."""
    if rows.device.type != "cpu":
        return rows.mT @ rows
    if rows.shape[0] == 0:
        return rows.new_zeros(rows.shape[1], rows.shape[1])
    syrk = scipy.linalg.blas.dsyrk if rows.dtype == torch.float64 else scipy.linalg.blas.ssyrk
    # a C-ordered (n, d) array is the Fortran-ordered (d, n) that syrk multiplies by its transpose
    half = torch.from_numpy(syrk(1.0, rows.contiguous().numpy().T, lower=0).T)
    return half.tril() + half.tril(-1).mT


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) in descending order, clipped at 0, and eigenvectors as columns (d, d).

    For positive semi-definite matrices: what is negative is rounding.
    """
    if symmetric.device.type == "cpu":
        values, vectors = scipy.linalg.eigh(symmetric.numpy(), driver="evd", check_finite=False)
        values, vectors = torch.from_numpy(values), torch.from_numpy(np.asarray(vectors))
    else:
        values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def solve_positive(right: Tensor, matrix: Tensor) -> Tensor | None:
    """right @ matrix^-1 by Cholesky, (d_out, d) and (d, d) -> (d_out, d).

    None where the matrix is not safely positive definite in its dtype, so that a caller can take
    the spectral route instead.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    diagonal = factor.diagonal()
    # the squared ratio of the factor's diagonal bounds the condition number from below
    if (diagonal.min() / diagonal.max()).square() < matrix.shape[0] * torch.finfo(matrix.dtype).eps:
        return None
    return torch.cholesky_solve(right.mT.contiguous(), factor).mT


def row_space(stack: Tensor) -> Tensor:
    """Orthonormal basis Q (d_in, k) of the span of all rows of (..., d_in), k <= rows <= d_in."""
    return torch.linalg.qr(stack.reshape(-1, stack.shape[-1]).mT)[0]

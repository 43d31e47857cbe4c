"""Symmetric linear algebra: Gram matrices, eigendecompositions, and the cheapest route to each.

On a CPU in float32 and float64 BLAS and LAPACK are called through SciPy, which has routines for
symmetric matrices that torch has not (half the work for a Gram matrix) and faster ones for the
rest but QR; elsewhere torch's own are used. Both compute the same quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.loading import loading_openblas

with loading_openblas():
    import scipy.linalg

# Up to this width float64 is used throughout: it costs next to nothing.
DOUBLE_UP_TO = 256
# Up to this width linear systems and eigenproblems are solved in float64, whatever precision they
# were set up in: a third of the error for little more time. Wider ones are solved in float32.
SOLVED_IN_DOUBLE_UP_TO = 1024


# Up to this width moments that textbook code forms in float32 are formed in float64, which is slow
# beyond: there only what is inverted or decomposed is.
MOMENTS_IN_DOUBLE_UP_TO = 320


def working_dtype(stack: Tensor) -> torch.dtype:
    """float64 for (..., d_in) matrices that are narrow or float64 already, else float32."""
    return _double(stack, DOUBLE_UP_TO)


def solving_dtype(matrix: Tensor) -> torch.dtype:
    """The same for a (d, d) matrix that is to be factored."""
    return _double(matrix, SOLVED_IN_DOUBLE_UP_TO)


def moments_dtype(stack: Tensor) -> torch.dtype:
    """The same for products with (..., d) matrices of which only sums are kept."""
    return _double(stack, MOMENTS_IN_DOUBLE_UP_TO)


def _double(matrix: Tensor, up_to: int) -> torch.dtype:
    double = matrix.dtype == torch.float64 or matrix.shape[-1] <= up_to
    return torch.float64 if double else torch.float32


# From this width on eigenvectors are brought back from the tridiagonal matrix in blocks of _PANEL,
# and only those that are wanted: LAPACK's syevd takes 32 reflections at a time, and all vectors.
_IN_PANELS_FROM = 512
_PANEL = 128
_MIRROR = 256  # side of the square blocks in which a triangle is copied
_BAND = 3e-5  # of the largest eigenvalue: several hundred times the error of float32


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, (m, k) (k, n) -> (m, n)."""
    if not (_on_cpu(left) and left.numel() and right.numel()):
        return left @ right
    # Fortran's order: what is computed is (left right)^T = right^T left^T
    (a, trans_a), (b, trans_b) = _transpose(right), _transpose(left)
    gemm = scipy.linalg.get_blas_funcs("gemm", (a, b))
    return torch.from_numpy(gemm(1.0, a, b, trans_a=trans_a, trans_b=trans_b).T)


def gram(rows: Tensor) -> Tensor:
    """rows^T rows, (n, d) -> (d, d), exactly symmetric."""
    if not (_on_cpu(rows) and rows.numel()):
        return rows.mT @ rows
    array, transposed = _transpose(rows)
    syrk = scipy.linalg.get_blas_funcs("syrk", (array,))
    # the upper triangle in Fortran's order is the lower one of the row-major matrix
    matrix = torch.from_numpy(syrk(1.0, array, trans=transposed).T)
    for i in range(0, len(matrix), _MIRROR):
        block = slice(i, i + _MIRROR)
        matrix[:i, block] = matrix[block, :i].mT
        matrix[block, block] += matrix[block, block].tril(-1).mT
    return matrix


def _on_cpu(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype in {torch.float32, torch.float64}


def _transpose(matrix: Tensor) -> tuple[np.ndarray, bool]:
    """matrix^T for BLAS: an array in Fortran's order and whether it is still to be transposed."""
    if matrix.mT.is_contiguous() and not matrix.is_contiguous():
        return matrix.numpy(), True
    return matrix.contiguous().numpy().T, False


def eigh(symmetric: Tensor, top: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) in descending order, clipped at 0, and eigenvectors as columns (d, d).

    For positive semi-definite matrices: what is negative is rounding.
    top: only that many of the largest, (top,) and (d, top).
    """
    d = len(symmetric)
    if _on_cpu(symmetric):
        options: dict[str, Any] = {"driver": "evd"}
        if top and is_small_part(top, d):
            options = {"driver": "evr", "subset_by_index": (d - top, d - 1)}
        values, vectors = map(
            torch.from_numpy, scipy.linalg.eigh(symmetric.numpy(), check_finite=False, **options)
        )
    else:
        values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0)[:top].clamp_min(0), vectors.mT.flip(0)[:top].mT


def is_small_part(top: int, d: int) -> bool:
    """Whether so few eigenpairs are found by a routine of their own: more cost as much as all."""
    return top < d / 5


def leading(symmetric: Tensor, count: Callable[[Tensor], int]) -> tuple[Tensor, Tensor]:
    """All eigenvalues (d,), as `eigh` has them, and at least the first count of them's vectors.

    count: (d,) eigenvalues, descending -> how many of the largest are wanted. In float32 those
        around the last of them are separated as float64 does, see `sharpen`.
    """
    d = len(symmetric)

    def through(values: Tensor) -> int:
        """How many vectors it takes to do so."""
        k = count(values)
        mixed = symmetric.dtype == torch.float32 and 0 < k < d
        return _around(values, values[k - 1]).stop if mixed else k

    if _on_cpu(symmetric) and d >= _IN_PANELS_FROM:
        values, vectors = _eigh_in_panels(symmetric, through)
    else:
        values, vectors = eigh(symmetric)
    k = count(values)
    if symmetric.dtype == torch.float32 and 0 < k < d:
        sharpen(symmetric, values, vectors, at=values[k - 1])
    return values, vectors


def _eigh_in_panels(symmetric: Tensor, count: Callable[[Tensor], int]) -> tuple[Tensor, Tensor]:
    """All eigenvalues (d,) and the first k = count(values) eigenvectors (d, k)."""
    matrix = symmetric.mT.numpy()
    names = ("sytrd", "sytrd_lwork", "stevd")
    sytrd, sytrd_lwork, stevd = scipy.linalg.get_lapack_funcs(names, (matrix,))
    lwork = int(sytrd_lwork(len(matrix), lower=True)[0])
    # matrix = Q T Q^T, T = Z diag(values) Z^T tridiagonal, ascending
    reflectors, diagonal, beside, tau, _ = sytrd(matrix, lower=True, lwork=lwork)
    ascending, Z, failed = stevd(diagonal, beside)
    if failed:
        raise np.linalg.LinAlgError("the eigenvalues of a tridiagonal matrix did not converge")
    values = torch.from_numpy(ascending).flip(0).clamp_min(0)
    rows = np.array(Z[:, len(Z) - count(values) :][:, ::-1].T, order="F")  # (k, d), of T
    return values, torch.from_numpy(_reflected(rows, reflectors, tau).T)


def _reflected(rows: np.ndarray, reflectors: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """rows Q^T, (k, d), in place; Q = H_1 H_2 .. as `sytrd` returns it for a lower triangle.

    A panel of reflections is I - V T V^T with 1 / tau on the diagonal of T^-1, upper triangular,
    and V^T V above it.
    """
    if not rows.size:
        return rows
    gemm, trsm = scipy.linalg.get_blas_funcs(("gemm", "trsm"), (rows,))
    for i in reversed(range(0, len(tau), _PANEL)):
        scale = tau[i : i + _PANEL]
        V = np.asfortranarray(np.tril(reflectors[i + 1 :, i : i + len(scale)], -1))
        np.fill_diagonal(V, 1)
        inverse = gemm(1.0, V, V, trans_a=True)
        with np.errstate(divide="ignore"):  # no reflection: tau is 0, and so is what comes of it
            np.fill_diagonal(inverse, 1 / scale)
        moved = rows[:, i + 1 :]
        along = trsm(1.0, inverse, gemm(1.0, moved, V), side=1, trans_a=True, overwrite_b=True)
        gemm(-1.0, along, V, beta=1.0, c=moved, trans_b=True, overwrite_c=True)
    return rows


def sharpen(symmetric: Tensor, values: Tensor, vectors: Tensor, at: float | Tensor) -> None:
    """Separate the eigenpairs around the eigenvalue `at` as float64 does, in place.

    float32 mixes eigenvectors whose eigenvalues are nearer to each other than its epsilon times
    the largest: which of them a cut keeps would be chance, and another on another machine.
    """
    near = _around(values, at)
    block = vectors[:, near].double()
    exact, rotation = eigh(product(block.mT, product(symmetric.double(), block)))
    values[near], vectors[:, near] = exact.to(values), product(block, rotation).to(vectors)


def _around(values: Tensor, at: float | Tensor) -> slice:
    """Which of the eigenvalues (d,), descending, float32 may mix with one of value `at`."""
    band = _BAND * values[0]
    return slice(int((values > at + band).sum()), int((values >= at - band).sum()))


def solve_positive(
    right: Tensor, matrix: Tensor, above: float | Tensor = 0.0, eps: float | None = None
) -> Tensor | None:
    """right @ matrix^-1 by Cholesky, (d_out, d) and (d, d) -> (d_out, d).

    None where not all eigenvalues of the matrix exceed `above`, or it is not safely positive
    definite in the precision it was set up in, so that a caller can take another route to the
    solution of the same problem.
    eps: relative error of the matrix's entries; None is that of its dtype.
    """
    if above and _cholesky(matrix, -above) is None:
        return None  # matrix - above I has a negative pivot for each eigenvalue below
    factor = _cholesky(matrix)
    if factor is None:
        return None
    diagonal = factor.diagonal()
    # the squared ratio of the factor's diagonal bounds the condition number from below
    eps = torch.finfo(matrix.dtype).eps if eps is None else eps
    if (diagonal.min() / diagonal.max()).square() < matrix.shape[0] * eps:
        return None
    if not _on_cpu(matrix):
        return torch.cholesky_solve(right.mT, factor).mT
    potrs = scipy.linalg.get_lapack_funcs("potrs", (factor.numpy(),))
    return torch.from_numpy(potrs(factor.numpy(), right.mT.numpy(), lower=True)[0]).mT


def solve_positive_many(
    right: Tensor, matrices: Tensor, above: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`solve_positive` of a batch, (B, d_out, d) and (B, d, d) -> (B, d_out, d), on any device.

    above: (B,). Also which of the solutions hold, (B,): what is None there, is not to be used here.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    _, below = torch.linalg.cholesky_ex(matrices - above.view(-1, 1, 1) * eye)
    factors, failed = torch.linalg.cholesky_ex(matrices)
    diagonals = factors.diagonal(dim1=-2, dim2=-1)
    ratios = (diagonals.amin(-1) / diagonals.amax(-1)).square()
    safe = (below == 0) & (failed == 0) & (ratios >= matrices.shape[-1] * eps)
    return torch.cholesky_solve(right.mT, factors).mT, safe


def _cholesky(matrix: Tensor, shift: float | Tensor = 0.0) -> Tensor | None:
    """Lower factor of matrix + shift I (above its diagonal: anything); None if not positive."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    if not _on_cpu(matrix):
        factor, failed = torch.linalg.cholesky_ex(shifted)
    else:
        potrf = scipy.linalg.get_lapack_funcs("potrf", (shifted.numpy(),))
        factor, failed = potrf(shifted.mT.numpy(), lower=True, clean=False, overwrite_a=True)
        factor = torch.from_numpy(factor)
    return None if failed else factor


def row_space(stack: Tensor) -> Tensor:
    """Orthonormal basis Q (d_in, k) of the span of all rows of (..., d_in), k <= rows <= d_in."""
    return in_row_space(stack)[0]


def in_row_space(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The same and the rows in it: Q (d_in, k) and X (..., k), stack = X Q^T."""
    Q, R = torch.linalg.qr(stack.reshape(-1, stack.shape[-1]).mT)
    return Q, R.mT.reshape(*stack.shape[:-1], -1)


def in_span_of_rows(deltas: Tensor) -> tuple[Tensor, Tensor | None]:
    """Deltas in the span of all rows where that is narrower: M (T, d_out, k) and Q (d_in, k).

    (T, d_out, d_in) = M Q^T; or the deltas as they are, and None.
    """
    if deltas.ndim != 3 or len(deltas) * deltas.shape[1] >= deltas.shape[2]:
        return deltas, None
    Q = row_space(deltas.to(working_dtype(deltas)))  # (d_in, T d_out)
    return deltas.to(Q) @ Q, Q


def in_span_of_rows_many(deltas: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same of a batch: (B, T, d_out, d_in) -> M (B, T, d_out, k) and Q (B, d_in, k)."""
    rows = deltas.flatten(1, 2)  # (B, T d_out, d_in)
    if rows.shape[1] >= rows.shape[2]:
        return deltas, None
    Q = torch.linalg.qr(rows.mT).Q
    return deltas @ Q.unsqueeze(1), Q


def by_kind(stack: Tensor, kinds: Sequence[Any], merge: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """merge(kind, layers of that kind) for each kind, (B, ...) -> (B, ...) in the layers' order."""
    merged: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, own in enumerate(kinds) if own == kind]
        merged |= zip(places, merge(kind, stack[places]), strict=True)
    return torch.stack([merged[i] for i in range(len(stack))])

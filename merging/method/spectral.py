"""Spectral methods: what is merged are singular vectors and values.

Two numerical decisions hold for all of them.

Directions whose singular value is at most `RANK_RTOL` times the largest are rounding noise of
float32 weights, and take no part: low-rank deltas (LoRA) have a well-defined merge, which does
not depend on the arbitrary vectors an SVD returns for their null space.

Singular triplets and polar factors come from an eigendecomposition of the smaller Gram matrix in
float64, up to five times faster than an SVD. Squaring costs half the digits, hence float64; in the
rare case that a direction is kept which even that leaves inexact, an SVD replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from merging.cores import each_on_a_core
from merging.errors import InputError
from merging.linalg import eigh, gram, is_small_part, product
from merging.method.ranges import Count, Share
from merging.method.registry import register

# Rounding a delta to float32 perturbs it by less than eps = 2^-23 of its spectral norm, forming it
# from low-rank factors by a few eps; the singular values of square Gaussian matrices, which are
# as small as full-rank ones get, rarely fall below 2^-17 of the norm.
RANK_RTOL = 2**-18

# Eigenvalues of a float64 Gram matrix, relative to the largest, are good to about 1e-15: a
# direction above this one is good to 1e-5, and what is below RANK_RTOL^2 is safely told apart.
GRAM_RTOL = 1e-10

_SIDE_BY_SIDE_FROM = 256  # columns: the triplets of narrower matrices take hardly a millisecond


def singular_triplets(
    matrix: Tensor, k: int | None = None, largest: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triplets with non-zero value: U (m, r), s (r,), V (n, r), r <= k.

    matrix: (m, n) = U diag(s) V^T if k is None. The triplets come in float64, s descending.
    largest: what "non-zero" is relative to, if that is more than the matrix's own norm.
    """
    if matrix.shape[0] > matrix.shape[1]:
        V, s, U = singular_triplets(matrix.mT, k, largest)
        return U, s, V
    work = matrix.double()
    values, U = eigh(gram(work.mT), top=k)  # work work^T = U diag(values) U^T
    if _inexact(values):
        U, s, Vh = torch.linalg.svd(work, full_matrices=False)
        U, s, V = U[:, :k], s[:k], Vh[:k].mT
    else:
        U = U[:, values > RANK_RTOL**2 * values[:1]]
        V = product(work.mT, U)
        s = V.norm(dim=0)
        V = V / s
    kept = s > RANK_RTOL * s[:1].clamp_min(largest)
    return U[:, kept], s[kept], V[:, kept]


def leading_triplets(deltas: Tensor, k: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`singular_triplets` of each of the deltas (T, d_out, d_in), at most k, on a CPU at once."""
    d = min(deltas.shape[1:])
    if deltas.device.type == "cpu" and d >= _SIDE_BY_SIDE_FROM and is_small_part(k, d):
        return each_on_a_core(lambda delta: singular_triplets(delta, k), deltas)
    return [singular_triplets(delta, k) for delta in deltas]


def with_spectrum(matrix: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """U diag(f(s)) V^T for the non-zero triplets of U diag(s) V^T, (m, n) -> (m, n), float64.

    f: all non-zero singular values (r,), descending, to new ones.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return with_spectrum(matrix.mT, f).mT
    work = matrix.double()
    values, V = eigh(gram(work))  # work^T work = V diag(values) V^T
    if _inexact(values):
        U, s, V = singular_triplets(work)
        return product(U * f(s), V.mT)
    kept = values > RANK_RTOL**2 * values[:1]
    V, s = V[:, kept], values[kept].sqrt()
    return product(work, product(V * (f(s) / s), V.mT))


def orthonormalise(matrix: Tensor) -> Tensor:
    """The nearest matrix whose non-zero singular values are all 1, (m, n) -> (m, n), float64.

    The polar factor; with full column rank, the orthonormal columns nearest to the given ones
    (orthogonal Procrustes).
    """
    return with_spectrum(matrix, torch.ones_like)


def _inexact(values: Tensor) -> bool:
    """Whether one of the Gram eigenvalues (d,), descending, is neither safely 0 nor safely not."""
    share = values / values[:1]
    return bool(((share > RANK_RTOL**2) & (share < GRAM_RTOL)).any())


# --- Methods ----------------------------------------------------------------------------------


def full_triplets(matrix: Tensor, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest triplets of torch's SVD, those of value 0 or rounding too: U, s, V, float64."""
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U[:, :k], s[:k], Vh[:k].mT


def by_rank(arguments: Mapping[str, Any]) -> bool:
    """Whether a method does without the directions that no delta has, and so may run in a basis."""
    if arguments["rank"] not in ("nonzero", "full"):
        raise InputError(f"unknown rank {arguments['rank']!r}", "known: nonzero, full")
    return bool(arguments["rank"] == "nonzero")


@register(
    "tsv_m", source="arXiv 2412.00081", row_space=by_rank, column_space=by_rank,
    formula="P diag(s) Q^T: all tasks' top triplets side by side, U and V orthonormalised",
)  # fmt: skip
def tsv_m(
    deltas: Tensor,
    *,
    k: Count | None = None,
    rank: str = "nonzero",
    d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:
    """TSV-Merge: orthonormalised singular vectors of all tasks (arXiv 2412.00081, algorithm 1).

    (T, d_out, d_in) -> (d_out, d_in). With the top k triplets of every task side by side in
    U (d_out, T k), s (T k,), V (d_in, T k): D = orthonormalise(U) diag(s) orthonormalise(V)^T.
    k: triplets per task; None is floor(min(d_out, d_in) / T), so a single expert is returned.
    rank: "nonzero" takes triplets of non-zero value; "full", the authors' code on low-rank deltas,
        takes arbitrary vectors of value 0 along, against which the others are orthonormalised.
    """
    k = layer_rank(deltas, d_in, d_out) // len(deltas) if k is None else k
    nonzero = rank == "nonzero"
    parts = leading_triplets(deltas, k) if nonzero else [full_triplets(x, k) for x in deltas]
    U, s, V = side_by_side(parts)
    return scaled_product(orthonormalise(U) * s, orthonormalise(V), deltas)


@register(
    "iso_c", source="arXiv 2502.04959", breaks=("expert",), row_space=by_rank, column_space=by_rank,
    formula="mean(s) U V^T with U diag(s) V^T = sum_t D_t",
)  # fmt: skip
def iso_c(deltas: Tensor, *, rank: str = "nonzero") -> Tensor:
    """Iso-C: sum_t D_t with every singular value replaced by their mean (2502.04959, eqs. 7 and 8).

    (T, d_out, d_in) -> (d_out, d_in). A single expert is flattened too, not returned.
    rank: of low-rank deltas (LoRA), "nonzero" averages the non-zero singular values and moves their
        directions alone; "full", the authors' code and the ACTMat paper's rows, averages all
        min(d_out, d_in) of them and fills the other directions with whatever the SVD returns.
    """
    if rank == "full":
        U, s, V = full_triplets(total(deltas))
        return scaled_product(s.mean() * U, V, deltas)
    return with_spectrum(total(deltas), lambda s: s.mean().expand_as(s)).to(deltas)


@register(
    "iso_cts", source="arXiv 2502.04959", breaks=("expert",),
    row_space=by_rank, column_space=by_rank,
    formula="mean(s) P Q^T: sum_t D_t's top triplets and those each task has beside them, "
    "orthonormalised",
)  # fmt: skip
def iso_cts(
    deltas: Tensor,
    *,
    common: Share = 0.8,
    rank: str = "nonzero",
    d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:
    """Iso-CTS: common and task-specific directions, all equally strong (2502.04959, alg. 2).

    (T, d_out, d_in) -> (d_out, d_in). U_c: the top left singular vectors of sum_t D_t; of each
    residual D_t - U_c U_c^T D_t the top n triplets; D = mean(s) orthonormalise(U)
    orthonormalise(V)^T over all collected triplets. They are r = min(d_out, d_in) in all, as in the
    authors' code: n = round((r - int(common r)) / T) for each task, r - T n common ones.
    rank: as in `iso_c`.
    """
    r, T = layer_rank(deltas, d_in, d_out), len(deltas)
    n = min(round((r - int(common * r)) / T), r // T)
    triplets = singular_triplets if rank == "nonzero" else full_triplets
    parts = [triplets(total(deltas), r - T * n)]
    U_c, s_c, _ = parts[0]
    norm = s_c.amax().item() if len(s_c) else 0.0
    for delta in deltas.double():
        residual = delta - U_c @ (U_c.mT @ delta)
        # relative to the common part: a residual of nothing but rounding has no directions
        parts.append(
            singular_triplets(residual, n, norm) if rank == "nonzero" else triplets(residual, n)
        )
    U, s, V = side_by_side(parts)
    mean = s.sum() / max(1, len(s))
    return scaled_product(mean * orthonormalise(U), orthonormalise(V), deltas)


def side_by_side(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets of several matrices as one: U (m, sum r), s (sum r,), V (n, sum r)."""
    U, s, V = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return U, s, V


def total(deltas: Tensor) -> Tensor:
    """sum_t D_t in float64, where it is exact: small directions turn on the last bits."""
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta in deltas:
        total += delta
    return total


def scaled_product(left: Tensor, right: Tensor, deltas: Tensor) -> Tensor:
    """left right^T in the deltas' precision, (m, r) and (n, r) -> (m, n)."""
    return product(left.to(deltas), right.mT.to(deltas))


def layer_rank(deltas: Tensor, d_in: int | None, d_out: int | None = None) -> int:
    """min(d_out, d_in) of the layer, whatever bases (T, j, k) its deltas are given in."""
    return min(d_out or deltas.shape[1], d_in or deltas.shape[2])

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

from collections.abc import Callable

import torch
from torch import Tensor

from merging.errors import InputError
from merging.linalg import eigh, gram, product
from merging.method.averages import task_gram
from merging.method.registry import create, register
from merging.method.sparse import ties

# Rounding a delta to float32 perturbs it by less than eps = 2^-23 of its spectral norm, forming it
# from low-rank factors by a few eps; the singular values of square Gaussian matrices, which are
# as small as full-rank ones get, rarely fall below 2^-17 of the norm.
RANK_RTOL = 2**-18

# Eigenvalues of a float64 Gram matrix, relative to the largest, are good to about 1e-15: a
# direction above this one is good to 1e-5, and what is below RANK_RTOL^2 is safely told apart.
GRAM_RTOL = 1e-10


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


@register("tsv_m", source="arXiv 2412.00081", row_space=True, column_space=True)
def tsv_m(
    deltas: Tensor, *, k: int | None = None, d_in: int | None = None, d_out: int | None = None
) -> Tensor:
    """TSV-Merge: orthonormalised singular vectors of all tasks (arXiv 2412.00081, algorithm 1).

    (T, d_out, d_in) -> (d_out, d_in). With the top k triplets of every task side by side in
    U (d_out, T k), s (T k,), V (d_in, T k): D = orthonormalise(U) diag(s) orthonormalise(V)^T.
    k: triplets per task; None is floor(min(d_out, d_in) / T), so a single expert is returned.
    """
    k = _rank(deltas, d_in, d_out) // len(deltas) if k is None else k
    triplets = [singular_triplets(delta, k) for delta in deltas]
    U, s, V = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
    return _product(orthonormalise(U) * s, orthonormalise(V), deltas)


@register("iso_c", source="arXiv 2502.04959", breaks=("expert",), row_space=True, column_space=True)
def iso_c(deltas: Tensor) -> Tensor:
    """Iso-C: sum_t D_t with every singular value replaced by their mean (2502.04959, eqs. 7 and 8).

    (T, d_out, d_in) -> (d_out, d_in). A single expert is flattened too, not returned.
    """
    return with_spectrum(_sum(deltas), lambda s: s.mean().expand_as(s)).to(deltas)


@register(
    "iso_cts", source="arXiv 2502.04959", breaks=("expert",), row_space=True, column_space=True
)
def iso_cts(
    deltas: Tensor, *, common: float = 0.8, d_in: int | None = None, d_out: int | None = None
) -> Tensor:
    """Iso-CTS: common and task-specific directions, all equally strong (2502.04959, alg. 2).

    (T, d_out, d_in) -> (d_out, d_in). U_c: the top k = round(common r) left singular vectors of
    sum_t D_t, r = min(d_out, d_in); of each residual D_t - U_c U_c^T D_t the top (r - k) // T
    triplets; D = mean(s) orthonormalise(U) orthonormalise(V)^T over all collected triplets.
    (The authors' code gives the remainder of that division to the common directions.)
    """
    r = _rank(deltas, d_in, d_out)
    k = round(common * r)
    triplets = [singular_triplets(_sum(deltas), k)]
    U_c, s_c, _ = triplets[0]
    norm = s_c.amax().item() if len(s_c) else 0.0
    for delta in deltas.double():
        residual = delta - U_c @ (U_c.mT @ delta)
        # relative to the common part: a residual of nothing but rounding has no directions
        triplets.append(singular_triplets(residual, (r - k) // len(deltas), norm))
    U, s, V = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
    mean = s.sum() / max(1, len(s))
    return _product(mean * orthonormalise(U), orthonormalise(V), deltas)


@register(
    "knots",
    source="arXiv 2410.19735",
    breaks=("inputs",),
    alpha=0.6,
    row_space=lambda a: a["merge"] != "ties",
)
def knots(
    deltas: Tensor, *, merge: str = "ties", k: float = 0.2, d_in: int | None = None
) -> Tensor:
    """KnOTS: merge in the shared left basis of all deltas (arXiv 2410.19735).

    (T, d_out, d_in) -> (d_out, d_in). [D_1 .. D_T] = U diag(s) [V_1^T .. V_T^T] side by side, and
    D = U merge_t(diag(s) V_t^T), the singular values with V as in the authors' configurations.
    merge: "ties" with the top share k of each task's block (a layer is the whole vector here),
        "tsv_m", or "iso_c". The latter two commute with U, so that they give what they give
        without KnOTS.
    """
    if merge not in ("ties", "tsv_m", "iso_c"):
        raise InputError(f"unknown merge {merge!r} of knots", "known: ties, tsv_m, iso_c")
    U, _, _ = singular_triplets(torch.cat(list(deltas), dim=1))
    if not U.shape[1]:
        return torch.zeros_like(deltas[0])
    blocks = U.mT @ deltas.double()  # (T, r, d_in), diag(s) V_t^T
    if merge == "ties":
        merged = ties(blocks, k=k)
    elif merge == "tsv_m":
        merged = tsv_m(blocks, k=_rank(deltas, d_in) // len(deltas))
    else:
        merged = iso_c(blocks)
    return (U @ merged).to(deltas)


@register("star", source="arXiv 2502.10339", row_space=lambda a: _row_space(a["of"]))
def star(
    deltas: Tensor, *, eta: float = 0.4, of: str = "average", d_in: int | None = None
) -> Tensor:
    """STAR: truncate each delta's spectrum, keep its nuclear norm, merge (2502.10339).

    (T, d_out, d_in) -> (d_out, d_in). Each delta keeps its first singular values, as many as
    reach the share eta of their sum, scaled up to that sum. of: the merge of the results. Here
    truncation comes first; `subspace_boosting` and `svc` work on what a merge has made.
    """
    truncated = []
    for delta in deltas:
        U, s, V = singular_triplets(delta)
        r = _reaching(s, eta)
        s = s[:r] * s.sum() / s[:r].sum().clamp_min(torch.finfo(s.dtype).tiny)
        truncated.append(_product(U[:, :r] * s, V[:, :r], deltas))
    return _merge(of, torch.stack(truncated), d_in)


@register("subspace_boosting", source="arXiv 2506.16506", row_space=lambda a: _row_space(a["of"]))
def subspace_boosting(
    deltas: Tensor, *, beta: float = 0.01, of: str = "task_arithmetic", d_in: int | None = None
) -> Tensor:
    """Raise a merge's small singular values to a floor (arXiv 2506.16506).

    (T, d_out, d_in) -> (d_out, d_in). The floor is the singular value at which their cumulative
    sum reaches the share beta: 0 makes all equal to the largest, 1 changes nothing.
    of: the method whose merge is boosted, with its default hyperparameters.
    """
    merged = _merge(of, deltas, d_in)
    return with_spectrum(merged, lambda s: s.maximum(s[_reaching(s, beta) - 1 :][:1])).to(deltas)


@register("svc", source="arXiv 2602.05536", row_space=lambda a: _row_space(a["of"]))
def svc(deltas: Tensor, *, floor: float = 1.0, of: str = "sum", d_in: int | None = None) -> Tensor:
    """Singular value calibration of a merge D (arXiv 2602.05536).

    (T, d_out, d_in) -> (d_out, d_in). With u_r, s_r D's singular vectors and values,
    s_r <- s_r / mean_t max(<u_r^T D, u_r^T D_t> / |u_r^T D_t|^2, floor): what several tasks share
    was counted once for each of them. A task that is 0 along u_r counts as `floor`.
    of: the method whose merge is calibrated, or "sum", task arithmetic with alpha 1.
    """
    U, s, V = singular_triplets(_merge(of, deltas, d_in))
    task = U.mT @ deltas.double()  # (T, r, d_in)
    energy = task.square().sum(-1)  # (T, r)
    overlap = s * (task * V.mT).sum(-1)  # <u_r^T D, u_r^T D_t>, as u_r^T D = s_r v_r^T
    present = energy > RANK_RTOL**2 * task_gram(deltas).diagonal().max()
    ratio = torch.where(present, overlap / energy, floor)
    return _product(U * (s / ratio.clamp_min(floor).mean(0)), V, deltas)


def _sum(deltas: Tensor) -> Tensor:
    """sum_t D_t in float64, where it is exact: small directions turn on the last bits."""
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta in deltas:
        total += delta
    return total


def _product(left: Tensor, right: Tensor, deltas: Tensor) -> Tensor:
    """left right^T in the deltas' precision, (m, r) and (n, r) -> (m, n)."""
    return product(left.to(deltas), right.mT.to(deltas))


def _rank(deltas: Tensor, d_in: int | None, d_out: int | None = None) -> int:
    """min(d_out, d_in) of the layer, whatever bases (T, j, k) its deltas are given in."""
    return min(d_out or deltas.shape[1], d_in or deltas.shape[2])


def _reaching(s: Tensor, share: float) -> int:
    """How many of s (r,), largest first, it takes to reach a share of their sum; at least 1."""
    below = s.cumsum(0) < share * s.sum() * (1 - 1e-12)  # 1 must not ask for more than all
    return int(below.sum()) + 1


def _merge(name: str, deltas: Tensor, d_in: int | None) -> Tensor:
    return deltas.sum(0) if name == "sum" else create(name)(deltas, d_in=d_in)


def _row_space(name: str) -> bool:
    return name == "sum" or create(name).row_space

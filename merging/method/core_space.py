"""Methods that merge in a basis all tasks share: core space, CtM, Pico, DC-Merge, CART.

Made for adapters D_t = B_t A_t, given here for any difference: bases come from the D_t themselves,
so that they do not depend on how a product is split into its factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.linalg import eigh, gram, product
from merging.method.ranges import Count, Share
from merging.method.registry import create, register
from merging.method.spectral import RANK_RTOL, orthonormalise, singular_triplets


@register(
    "core_space",
    source="arXiv 2509.17786",
    row_space=True,
    column_space=True,
    breaks=("expert",),
)
def core_space(deltas: Tensor, *, of: str = "ties") -> Tensor:
    """U merge_t(U^T D_t V) V^T in the tasks' shared core space (arXiv 2509.17786).

    (T, d_out, d_in) -> (d_out, d_in). U (d_out, j) holds the left singular vectors of
    [D_1 .. D_T] side by side, V (d_in, k) the right ones of the D_t above each other: nothing is
    lost. (The paper takes them from the factors B_t and A_t.)
    of: the method that merges the cores (T, j, k). One that commutes with rotations on both sides
        gives what it gives without; TIES does not, and neither does what counts ranks (tsv_m).
    """
    U, V = bases(deltas)
    cores = U.mT @ deltas.double() @ V  # (T, j, k)
    return _back(U, _merge(of, cores), V, deltas)


@register("ctm", source="arXiv 2606.03723", row_space=True, column_space=True, breaks=("expert",))
def ctm(
    deltas: Tensor, *, beta: float = 0.25, rank: Count | None = None, of: str = "ties"
) -> Tensor:
    """U merge_t(U^T D_t V) V^T for the r columns each of a partial Tucker fit (arXiv 2606.03723).

    (T, d_out, d_in) -> (d_out, d_in) of rank r. U and V maximise sum_t |U^T M_t V|^2 over the D_t
    scaled to the norms |M_t| = beta |D_t| + (1 - beta) mean |D|, from the leading singular vectors
    by alternation; what is merged is not scaled.
    rank: r; None is the largest rank among the tasks', an adapter's own.
    """
    D = deltas.double()
    norms = D.flatten(1).norm(dim=1)  # (T,)
    scale = beta + (1 - beta) * norms.mean() / torch.where(norms > 0, norms, 1)
    r = max(len(singular_triplets(delta)[1]) for delta in D) if rank is None else rank
    U, V = _tucker(scale.view(-1, 1, 1) * D, r)
    return _back(U, _merge(of, U.mT @ D @ V), V, deltas)


@register("pico", source="arXiv 2604.16826, as others have implemented it", row_space=True,
          column_space=True)  # fmt: skip
def pico(deltas: Tensor, *, of: str = "sum", d_in: int | None = None) -> Tensor:
    """Scale down the outputs that experts share, merge, restore the mean norm (2604.16826).

    (T, d_out, d_in) -> (d_out, d_in). With [D_1 .. D_T] = U diag(S) V^T and shares
    s_j = S_j^2 / sum S^2, D_t <- (I + U diag(a - 1) U^T) D_t for a_j = 1 / (1 + (T - 1) s_j), and
    the merge times mean_t |D_t| / |merge|. (The paper decomposes [B_1 .. B_T], which spans the
    same outputs: D_t D_t^T = B_t A_t A_t^T B_t^T.)
    of: the method, or "sum".
    """
    l, U = eigh(gram(torch.cat(list(deltas.double()), dim=1).mT))
    damping = 1 / (1 + (len(deltas) - 1) * l / l.sum().clamp_min(torch.finfo(l.dtype).tiny)) - 1
    calibrated = deltas + (U * damping).to(deltas) @ (U.to(deltas).mT @ deltas)
    merged = _merge(of, calibrated, d_in)
    size, mean = merged.norm(), deltas.flatten(1).norm(dim=1).mean()
    return merged * (mean / size) if size > 0 else merged


@register("dc_merge", source="arXiv 2603.06242", row_space=True, column_space=True,
          breaks=("expert",))  # fmt: skip
def dc_merge(
    deltas: Tensor, *, k: Share = 0.001, rank: Count | None = None, d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:  # fmt: skip
    """Flat spectra, merged in directions that cover every task's (arXiv 2603.06242).

    (T, d_out, d_in) -> (d_out, d_in). Every D_t keeps its r largest triplets, all with their mean
    value; in the cover bases U* = polar([U_1 .. U_T]) and V* the M_t = U*^T D_t V* keep their
    share k of largest entries, signs are elected, what agrees is averaged, and all but the T
    diagonal r x r blocks is dropped.
    rank: r; None is the largest rank among the tasks', at most floor(min(d_out, d_in) / T), but 1.
    """
    T = len(deltas)
    full = min(d_out or deltas.shape[1], d_in or deltas.shape[2])
    triplets = [singular_triplets(x, max(1, full // T) if rank is None else rank) for x in deltas]
    r = max(len(s) for _, s, _ in triplets)
    if not r:
        return torch.zeros_like(deltas[0])
    flat = torch.stack([_padded(U, r) * _mean(s) @ _padded(V, r).mT for U, s, V in triplets])
    U, V = (
        orthonormalise(torch.cat([_padded(x[side], r) for x in triplets], dim=1)) for side in (0, 2)
    )
    merged = create("ties", k=k, scope="layer")(U.mT @ flat @ V)  # (T r, T r)
    blocks = torch.block_diag(*[merged.new_ones(r, r)] * T)
    return _back(U, merged * blocks, V, deltas)


@register("cart", source="arXiv 2412.12153", row_space=True, column_space=True)
def cart(
    deltas: Tensor, *, scale: float = 1.0, share: Share = 0.08, d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:  # fmt: skip
    """mean + scale sum_t trunc_k(D_t - mean), k a share of the rank (arXiv 2412.12153).

    (T, d_out, d_in) -> (d_out, d_in). trunc_k keeps the k largest singular values,
    k = max(1, round(share min(d_out, d_in))): experts are told apart where they differ most.
    """
    full = min(d_out or deltas.shape[1], d_in or deltas.shape[2])
    mean = deltas.double().mean(0)
    largest = deltas.double().flatten(1).norm(dim=1).max().item()
    merged = mean.clone()
    for delta in deltas:
        # relative to the experts: a difference of nothing but rounding has no directions
        U, s, V = singular_triplets(delta - mean, max(1, round(share * full)), largest)
        merged += scale * product(U * s, V.mT)
    return merged.to(deltas)


def bases(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """U (d_out, j) and V (d_in, k) of a core space, in float64: D_t = U U^T D_t V V^T."""
    return _left(deltas), _right(deltas)


def _left(deltas: Tensor, k: int | None = None) -> Tensor:
    """The k leading left singular vectors of [D_1 .. D_T], in float64: (d_out, k)."""
    values, U = eigh(gram(torch.cat(list(deltas.double()), dim=1).mT))
    return U[:, values > RANK_RTOL**2 * values[:1]][:, :k]


def _right(deltas: Tensor, k: int | None = None) -> Tensor:
    """The right ones of the D_t above each other: (d_in, k)."""
    return _left(deltas.mT, k)


def _tucker(M: Tensor, r: int, sweeps: int = 10) -> tuple[Tensor, Tensor]:
    """U (d_out, r) and V (d_in, r) of the partial Tucker decomposition of M (T, d_out, d_in)."""
    U, V = _left(M, r), _right(M, r)
    for _ in range(sweeps):
        U = _left(M @ V, r)
        V = _right(U.mT @ M, r)
    return U, V


def _padded(vectors: Tensor, r: int) -> Tensor:
    """(d, k) with columns of 0 up to r: a task of smaller rank fills a smaller block."""
    return torch.cat([vectors, vectors.new_zeros(len(vectors), r - vectors.shape[1])], dim=1)


def _mean(s: Tensor) -> Tensor:
    return s.sum() / max(1, len(s))


def _merge(name: str, deltas: Tensor, d_in: int | None = None) -> Tensor:
    if name == "sum":
        return deltas.sum(0)
    if not deltas.numel():  # no expert has moved
        return deltas.sum(0)
    settings = {"scope": "layer"} if name == "ties" else {}
    return create(name, **settings)(deltas, d_in=d_in)


def _back(U: Tensor, core: Tensor, V: Tensor, deltas: Tensor) -> Tensor:
    """U core V^T in the deltas' precision."""
    return product(product(U, core), V.mT).to(deltas)

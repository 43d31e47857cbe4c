"""Methods that work on what another one has merged, or prepare what it merges, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from merging.linalg import moments_dtype, product
from merging.method.ranges import Share
from merging.method.registry import Stream, create, register
from merging.method.spectral import (
    RANK_RTOL,
    by_rank,
    full_triplets,
    scaled_product,
    singular_triplets,
    with_spectrum,
)


def _row_space(name: str) -> bool:
    return name == "sum" or create(name).row_space


def _boosts(arguments: Mapping[str, Any]) -> bool:
    return by_rank(arguments) and _row_space(arguments["of"])


@register(
    "star", source="arXiv 2502.10339", row_space=lambda arguments: _row_space(arguments["of"]),
    formula="merge of the deltas' leading triplets, each scaled up to its delta's nuclear norm",
)  # fmt: skip
def star(
    deltas: Tensor, *, eta: Share = 0.4, of: str = "average", d_in: int | None = None
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
        truncated.append(scaled_product(U[:, :r] * s, V[:, :r], deltas))
    return _merge(of, torch.stack(truncated), d_in)


@register(
    "subspace_boosting", source="arXiv 2506.16506", row_space=_boosts,
    formula="U diag(max(s, floor)) V^T of a merge U diag(s) V^T",
)  # fmt: skip
def subspace_boosting(
    deltas: Tensor,
    *,
    beta: Share = 0.01,
    of: str = "task_arithmetic",
    rank: str = "nonzero",
    d_in: int | None = None,
) -> Tensor:
    """Raise a merge's small singular values to a floor (arXiv 2506.16506).

    (T, d_out, d_in) -> (d_out, d_in). The floor is the singular value at which their cumulative
    sum reaches the share beta: 0 makes all equal to the largest, 1 changes nothing.
    of: the method whose merge is boosted, with its default hyperparameters. Tensors that are no
        layer's matrix are averaged; the authors merge them by that method too.
    rank: "nonzero" raises the non-zero singular values; "full", the authors' code, raises those of
        the directions that no low-rank delta (LoRA) has as well, whatever the SVD returns there.
    """
    merged = _merge(of, deltas, d_in)

    def raised(s: Tensor) -> Tensor:
        return s.maximum(s[_reaching(s, beta) - 1 :][:1])

    if rank == "full":
        U, s, V = full_triplets(merged)
        return scaled_product(U * raised(s), V, deltas)
    return with_spectrum(merged, raised).to(deltas)


@register(
    "svc", source="arXiv 2602.05536", row_space=lambda arguments: _row_space(arguments["of"]),
    formula="U diag(s / mean_t max(<u^T D, u^T D_t> / |u^T D_t|^2, floor)) V^T of a merge D",
)  # fmt: skip
def svc(
    deltas: Tensor, *, floor: float | None = 1.0, of: str = "sum", d_in: int | None = None
) -> Tensor:
    """Singular value calibration of a merge D (arXiv 2602.05536).

    (T, d_out, d_in) -> (d_out, d_in). With u_r, s_r D's singular vectors and values,
    s_r <- s_r / mean_t max(<u_r^T D, u_r^T D_t> / |u_r^T D_t|^2, floor): what several tasks share
    was counted once for each of them. A task that is 0 along u_r counts as `floor`.
    of: the method whose merge is calibrated, or "sum", task arithmetic with alpha 1.
    floor: smallest divisor; None is 1 / T. The authors run of=task_arithmetic with floor=None and
        of=tsv_m with floor=1; with the default here no direction grows.
    """
    floor = 1 / len(deltas) if floor is None else floor
    U, s, V = singular_triplets(_merge(of, deltas, d_in))
    energy, overlap = deltas.new_empty(2, len(deltas), len(s), dtype=torch.float64)  # (T, r) each
    work = deltas.to(moments_dtype(deltas))
    left, right = U.mT.to(work), V.mT.to(work)
    for t, delta in enumerate(work):
        task = product(left, delta)  # (r, d_in)
        overlap[t] = s * torch.linalg.vecdot(
            task, right
        )  # <u_r^T D, u_r^T D_t>, u_r^T D = s_r v_r^T
        energy[t] = task.square_().sum(-1)
    largest = max(torch.linalg.vector_norm(x, dtype=torch.float64) for x in work)
    present = energy > (RANK_RTOL * largest) ** 2
    ratio = torch.where(present, overlap / energy, floor)
    return scaled_product(U * (s / ratio.clamp_min(floor).mean(0)), V, deltas)


def _column_space(name: str) -> bool:
    return name == "sum" or create(name).column_space


def _mean_norms(stream: Stream, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Mean norm of what `_polarised` makes, over the layers of each shape (d_out, d_in)."""
    norms: dict[tuple[int, ...], list[float]] = {}
    for _, deltas in stream():
        norm = _polarised(deltas, arguments["of"], None).norm().item()
        norms.setdefault(tuple(deltas.shape[1:]), []).append(norm)
    return {"thresholds": {shape: fmean(sizes) for shape, sizes in norms.items()}}


@register(
    "polarised", source="arXiv 2602.20208, section on scaling", prepare=_mean_norms,
    column_space=lambda arguments: _column_space(arguments["of"]), breaks=("inputs", "expert"),
    formula="a merge whose tasks, columns and layers all count by the squares of their norms",
)  # fmt: skip
def polarised(
    deltas: Tensor,
    *,
    of: str = "tsv_m",
    thresholds: Mapping[tuple[int, ...], float] | None = None,
    d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:
    """ESM's polarised scaling of a merge: the strong counts for more (arXiv 2602.20208).

    (T, d_out, d_in) -> (d_out, d_in). Each D_t times (|D_t| / mean_t |D_t|)^2, merged; each column
    d_j of the merge times (|d_j| / mean_j |d_j|)^2; the layer times (|D| / mean of its type)^2.
    The paper's own subspace of activations needs data and is left out, as in its ablation.
    of: the method whose merge is scaled, or "sum".
    thresholds: the mean norms, from the whole model, by shape. The paper compares layers of one
        type, which it does not define: here those of one shape (d_out, d_in).
    """
    merged = _polarised(deltas, of, d_in)
    shape = (d_out or deltas.shape[1], d_in or deltas.shape[2])
    mean = (thresholds or {}).get(shape, 0.0)
    return merged * (merged.norm() / mean).square() if mean else merged


def _polarised(deltas: Tensor, of: str, d_in: int | None) -> Tensor:
    """A merge with tasks and columns scaled, of one layer."""
    share = _relative(deltas.flatten(1).norm(dim=1)).square()  # (T,)
    merged = _merge(of, share.view(-1, 1, 1) * deltas, d_in)
    return merged * _relative(merged.norm(dim=0)).square()


def _relative(norms: Tensor) -> Tensor:
    return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)


def _reaching(s: Tensor, share: float) -> int:
    """How many of s (r,), largest first, it takes to reach a share of their sum; at least 1."""
    below = s.cumsum(0) < share * s.sum() * (1 - 1e-12)  # 1 must not ask for more than all
    return int(below.sum()) + 1


def _merge(name: str, deltas: Tensor, d_in: int | None) -> Tensor:
    return deltas.sum(0) if name == "sum" else create(name)(deltas, d_in=d_in)

"""Methods that merge singular frames: CT-Merging, and ISO-Merger, which keeps the base's spectrum.

A frame is one side's singular vectors as columns; see `merging.method.spectral` for its triplets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.errors import InputError
from merging.linalg import eigh, gram, product
from merging.method.ranges import Count, Share
from merging.method.registry import register
from merging.method.spectral import (
    layer_rank,
    orthonormalise,
    scaled_product,
    side_by_side,
    singular_triplets,
)

GONE = 1e-5  # of a unit vector: what is left of it after a projection is rounding


@register(
    "ct_merging", source="arXiv 2607.20561, as others have implemented it",
    row_space=True, column_space=True,
    formula="the mean in the directions that most tasks share, and beside them orthonormalised "
    "singular vectors, all of a task with its root mean square value",
)  # fmt: skip
def ct_merging(
    deltas: Tensor, *, support: Share = 0.5, rank: Count | None = None, d_in: int | None = None,
    d_out: int | None = None,
) -> Tensor:  # fmt: skip
    """Consensus directions and one scale per task (CT-Merging, arXiv 2607.20561).

    (T, d_out, d_in) -> (d_out, d_in). Of every D_t the r largest triplets U_t, s_t, V_t. Consensus
    directions U_c, V_c are the eigenvectors of mean_t U_t U_t^T and of mean_t V_t V_t^T whose
    eigenvalue is above `support`, as many on either side. What tasks say in both is averaged,
    U_c U_c^T (mean_t D_t) V_c V_c^T; beside them stand the residual vectors U_t - U_c U_c^T U_t of
    all tasks, orthonormalised, and V_t likewise, with rms(s_t) for each of a task's pairs.
    support: what share of the tasks has a direction that counts as shared. The paper's number of
        consensus directions, and how their values are set, were not readable: these are the plain
        choices, under which one expert is returned and equal ones are averaged.
    rank: r; None is the task's own, at most floor(min(d_out, d_in) / T), but 1.
    """
    r = max(1, layer_rank(deltas, d_in, d_out) // len(deltas)) if rank is None else rank
    triplets = [singular_triplets(delta, r) for delta in deltas]
    U_c, V_c = (_shared([x[side] for x in triplets], support) for side in (0, 2))
    k = min(U_c.shape[1], V_c.shape[1])
    U_c, V_c = U_c[:, :k], V_c[:, :k]
    mean = torch.zeros(k, k, dtype=torch.float64, device=deltas.device)
    residuals = []
    for U, s, V in triplets:
        mean += product(product(U_c.mT, U) * s, product(V.mT, V_c)) / len(deltas)
        U, V = U - product(U_c, product(U_c.mT, U)), V - product(V_c, product(V_c.mT, V))
        left = (U.norm(dim=0) > GONE) & (V.norm(dim=0) > GONE)
        rms = s.square().mean().sqrt() if len(s) else s.sum()
        residuals.append((U[:, left], rms.expand(int(left.sum())), V[:, left]))
    U, s, V = side_by_side(residuals)
    beside = scaled_product(orthonormalise(U) * s, orthonormalise(V), deltas)
    return beside + scaled_product(product(U_c, mean), V_c, deltas)


def _shared(frames: list[Tensor], support: float) -> Tensor:
    """Eigenvectors (d, k) of mean_t U_t U_t^T with eigenvalues above `support`, largest first."""
    values, vectors = eigh(gram(torch.cat(frames, dim=1).mT) / len(frames))
    # half of two tasks that share nothing is exactly 1/2, up to rounding
    return vectors[:, values > support + 1e-6]


@register(
    "iso_merger", source="arXiv 2607.19331, as others have implemented it",
    breaks=("scale", "expert"),
    formula="U* S_0 V*^T - W_0: the frames of W_0 = U_0 S_0 V_0^T moved by what the experts "
    "rotate them, its spectrum kept",
)  # fmt: skip
def iso_merger(deltas: Tensor, *, base: Tensor | None = None, keep: Share = 0.9) -> Tensor:
    """Rotate the base's singular frames, keep its singular values (ISO-Merger, arXiv 2607.19331).

    (T, d_out, d_in) -> (d_out, d_in). With thin SVDs W_0 = U_0 S_0 V_0^T and W_0 + D_t =
    U_t S_t V_t^T, each pair of singular vectors signed to agree with the base's: tangents
    X_t = P(U_t - U_0), Y_t = P(V_t - V_0) for P(Z) = Z - U_0 sym(U_0^T Z), of which the first share
    `keep` of the columns counts; first-order effects G_t = X_t S_0 V_0^T + U_0 S_0 Y_t^T with inner
    products g; coefficients c solve g c = diag(g), so that each expert's own effect keeps its
    strength, clipped to [0, 1.5]; U* = polar(U_0 + sum_t c_t X_t), V* likewise. Made for experts
    of reinforcement learning, which hardly change the spectrum.
    base: (d_out, d_in) W_0.
    """
    if base is None:
        raise InputError(
            "method 'iso_merger' needs the base's values, none were given",
            hint="give base=W_0; a merge of adapters has it with form=dense",
        )
    if not deltas.any():
        return torch.zeros_like(deltas[0])
    W0 = base.double()
    U0, s0, V0 = _thin(W0)
    columns = torch.arange(len(s0), device=s0.device) < round(keep * len(s0))
    tangents = []
    for delta in deltas:
        U, _, V = _thin(W0 + delta.double())
        sign = torch.where((U * U0).sum(0) + (V * V0).sum(0) < 0, -1.0, 1.0).to(U)
        tangents.append((_tangent(U0, U * sign) * columns, _tangent(V0, V * sign) * columns))
    effects = torch.stack([((X * s0) @ V0.mT + (U0 * s0) @ Y.mT).flatten() for X, Y in tangents])
    g = effects @ effects.mT  # (T, T)
    c = (torch.linalg.pinv(g, hermitian=True) @ g.diagonal()).clamp(0, 1.5)
    X, Y = (
        torch.einsum("t,t...->...", c, torch.stack(side)) for side in zip(*tangents, strict=True)
    )
    moved = product(orthonormalise(U0 + X) * s0, orthonormalise(V0 + Y).mT)
    return (moved - W0).to(deltas)


def _thin(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, n) = U diag(s) V^T with q = min(m, n): U (m, q), s (q,), V (n, q)."""
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, s, Vh.mT


def _tangent(frame: Tensor, moved: Tensor) -> Tensor:
    """What a frame (d, q) moved by, projected onto its tangent space (Stiefel manifold)."""
    Z = moved - frame
    inner = product(frame.mT, Z)
    return Z - product(frame, (inner + inner.mT) / 2)

"""Every method as its paper prints it, in torch, with no thought of cost or conditioning.

What `experiments.bench` measures the library against, in time, memory and rounding error. Each
function takes deltas (T, d_out, d_in) and, where the method needs them, covariances
(T, d_in, d_in) or fishers (T, d_out, d_in), and returns what the method of the same name returns
with its default hyperparameters (random masks apart). Nothing here shares code with merging/.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Textbook = Callable[..., Tensor]
TEXTBOOK: dict[str, Textbook] = {}
RANDOM = frozenset({"dare", "dare_ties", "della"})  # the same only in distribution


def _printed(function: Textbook) -> Textbook:
    TEXTBOOK[function.__name__] = function
    return function


def pinv(S: Tensor) -> Tensor:
    """torch.linalg.pinv with the cut it has in float32, whatever S's precision."""
    return torch.linalg.pinv(S, rtol=len(S) * torch.finfo(torch.float32).eps)


def inverse(S: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
    return torch.linalg.inv(S + ridge * torch.eye(len(S), dtype=S.dtype))


def svd(D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(D, full_matrices=False)


def procrustes(U: Tensor) -> Tensor:
    P, _, Qh = svd(U)
    return P @ Qh


# --- Entry by entry ---------------------------------------------------------------------------


@_printed
def average(D: Tensor) -> Tensor:
    return D.mean(0)


@_printed
def task_arithmetic(D: Tensor) -> Tensor:
    return 0.3 * D.sum(0)


@_printed
def lines(D: Tensor) -> Tensor:
    return D.sum(0) / len(D)  # the first block


@_printed
def fisher(D: Tensor, fishers: Tensor) -> Tensor:
    return (fishers * D).sum(0) / fishers.sum(0)


@_printed
def data_free_fisher(D: Tensor) -> Tensor:
    return fisher(D, D.square())


def top(D: Tensor, share: float) -> Tensor:
    """Each task's largest entries by magnitude, the rest 0."""
    flat = D.flatten(1)
    kept = flat.abs().topk(int(share * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(D)


def elect(D: Tensor) -> Tensor:
    agree = D * D.sum(0).sign() > 0
    return (D * agree).sum(0) / agree.sum(0).clamp_min(1)


@_printed
def ties(D: Tensor) -> Tensor:
    return elect(top(D, 0.2))


@_printed
def dare(D: Tensor) -> Tensor:
    return 0.3 * (D * (torch.rand_like(D) < 0.1) / 0.1).sum(0)


@_printed
def dare_ties(D: Tensor) -> Tensor:
    return elect(D * (torch.rand_like(D) < 0.1) / 0.1)


@_printed
def della(D: Tensor) -> Tensor:
    rank = D.abs().argsort(-1).argsort(-1)
    keep = 0.63 + 0.14 * rank / (D.shape[-1] - 1)
    return 1.1 * elect(D * (torch.rand_like(D) < keep) / keep)


@_printed
def breadcrumbs(D: Tensor) -> Tensor:
    n = D[0].numel()
    order = D.abs().flatten(1).argsort(1)
    kept = torch.zeros_like(D).flatten(1)
    kept.scatter_(1, order[:, int(0.9 * n) : n - int(0.01 * n)], 1.0)
    return 0.3 * (D * kept.view_as(D)).sum(0)


def consensus(merged: Tensor, D: Tensor) -> Tensor:
    needed = D.abs() > 0.4 * (merged - D).abs()
    return 0.3 * merged * (needed.sum(0) >= 2)


@_printed
def consensus_ta(D: Tensor) -> Tensor:
    return consensus(D.sum(0), D)


@_printed
def consensus_ties(D: Tensor) -> Tensor:
    kept = top(D, 0.2)
    return consensus((kept * (kept * kept.sum(0).sign() > 0)).sum(0), D)


@_printed
def pcb(D: Tensor) -> Tensor:
    low, high = D.abs().amin((1, 2), True), D.abs().amax((1, 2), True)
    own = ((D.abs() - low) / (high - low)).square()
    score = torch.exp(len(D) * own) * torch.tanh(D * D.sum(0))
    ranked = score.flatten(1).sort(1, descending=True).values
    cut = ranked[:, int(0.1 * ranked.shape[1]) - 1].view(-1, 1, 1)
    weight = (score - cut).clamp_min(0) / (score.amax((1, 2), True) - cut)
    return 1.2 * (weight * D).sum(0) / weight.sum(0).clamp_min(1e-12)


@_printed
def karcher(D: Tensor) -> Tensor:
    norms = D.flatten(1).norm(dim=1)
    unit = D.flatten(1) / norms[:, None]
    x = torch.nn.functional.normalize(unit.mean(0), dim=0)
    for _ in range(100):
        theta = torch.acos((unit @ x).clamp(-1, 1))[:, None]
        step = (theta / theta.sin() * (unit - theta.cos() * x)).mean(0)
        if step.norm() < 1e-6:
            break
        x = step.norm().cos() * x + step.norm().sin() / step.norm() * step
    return norms.mean() * x.view_as(D[0])


@_printed
def model_stock(D: Tensor) -> Tensor:
    T = len(D)
    unit = torch.nn.functional.normalize(D.flatten(1), dim=1)
    cos = ((unit @ unit.mT).sum() - T) / (T * (T - 1))
    return T * cos.clamp_min(0) / (1 + (T - 1) * cos.clamp_min(0)) * D.mean(0)


# --- Interference -----------------------------------------------------------------------------


@_printed
def actmat(D: Tensor) -> Tensor:
    C = D.mT @ D
    return (D @ C).sum(0) @ pinv(C.sum(0))


@_printed
def actmat_centred(D: Tensor) -> Tensor:
    E = D - D.mean(1, keepdim=True)
    C = E.mT @ E
    return (D @ C).sum(0) @ pinv(C.sum(0))


@_printed
def tact(D: Tensor) -> Tensor:
    E = top(D, 0.5)
    C = E.mT @ E
    return (D @ C).sum(0) @ pinv(C.sum(0))


def inverse_norms(D: Tensor) -> Tensor:
    return 1 / D.square().sum((1, 2), keepdim=True)


@_printed
def wudi_closed(D: Tensor) -> Tensor:
    C = inverse_norms(D) * (D.mT @ D)
    return (D @ C).sum(0) @ pinv(C.sum(0))


@_printed
def swudi(D: Tensor) -> Tensor:
    C = inverse_norms(D) * (D.mT @ D)
    l, V = torch.linalg.eigh(C.sum(0))
    F = -torch.expm1(-l * 1300)
    F[: len(l) - math.ceil(0.65 * len(l))] = 0
    A = D.sum(0)
    flow = torch.where(F > 0, F / l, 0)
    return A - A @ V @ F.diag() @ V.mT + (D @ C).sum(0) @ V @ flow.diag() @ V.mT


@_printed
def aswudi(D: Tensor) -> Tensor:
    C = inverse_norms(D) * (D.mT @ D)
    l, V = torch.linalg.eigh(C.sum(0))
    K = math.ceil(l.clamp_min(0).sqrt().sum() ** 2 / l.clamp_min(0).sum())
    V, l = V[:, -K:], l[-K:]
    return (D @ C).sum(0) @ V @ (1 / l).diag() @ V.mT


@_printed
def wudi(D: Tensor, steps: int = 300) -> Tensor:
    X = D.sum(0).clone().requires_grad_()
    optimizer = torch.optim.Adam([X], lr=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        (inverse_norms(D) * ((X - D) @ D.mT).square()).sum().backward()
        optimizer.step()
    return X.detach()


@_printed
def ridge(D: Tensor) -> Tensor:
    C = D.mT @ D
    return (D @ C).sum(0) @ inverse(C.sum(0), 1e-4)


@_printed
def anchored(D: Tensor) -> Tensor:
    C = D.mT @ D
    return ((D @ C).sum(0) + 1e-4 * tsv_m(D)) @ inverse(C.sum(0), 1e-4)


@_printed
def bounded(D: Tensor) -> Tensor:
    C = D.mT @ D
    l, V = torch.linalg.eigh(C.sum(0))
    kept = l > len(l) * torch.finfo(torch.float32).eps * l.max()
    solved = (D @ C).sum(0) @ V / l
    near = solved.square().sum(0) <= 1.01 * l
    A = tsv_m(D) @ V
    return torch.where(kept & near, solved, A) @ V.mT


def shrunk(D: Tensor, shrinkage: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """C_t = (1 - r) S_t + r tr(S_t) / p I of the rows of each delta, S_t = D_t^T D_t."""
    p = D.shape[2]
    eye = torch.eye(p, dtype=D.dtype)
    C = []
    for delta in D:
        S = delta.mT @ delta
        r = shrinkage(delta, S / len(delta)).clamp(0, 1)
        C.append((1 - r) * S + r * S.trace() / p * eye)
    C = torch.stack(C)
    return (D @ C).sum(0) @ inverse(C.sum(0))


@_printed
def ledoit_wolf(D: Tensor) -> Tensor:
    def shrinkage(rows: Tensor, S: Tensor) -> Tensor:
        n, p = rows.shape
        beta = ((rows.square().mT @ rows.square()).sum() / n - S.square().sum()) / (p * n)
        return beta / ((S.square().sum() - S.trace() ** 2 / p) / p)

    return shrunk(D, shrinkage)


@_printed
def oas(D: Tensor) -> Tensor:
    def shrinkage(rows: Tensor, S: Tensor) -> Tensor:
        n, p = rows.shape
        square, trace2 = (S @ S).trace(), S.trace() ** 2
        return ((1 - 2 / p) * square + trace2) / ((n + 1 - 2 / p) * (square - trace2 / p))

    return shrunk(D, shrinkage)


@_printed
def regmean(D: Tensor, covariances: Tensor) -> Tensor:
    return (D @ covariances).sum(0) @ pinv(covariances.sum(0))


@_printed
def mats(D: Tensor, covariances: Tensor, steps: int = 100) -> Tensor:
    S, N = covariances.sum(0), (D @ covariances).sum(0)
    X = 0.3 * D.sum(0)
    R = N - X @ S
    P = R
    for _ in range(steps):
        if R.norm() <= 1e-6 * N.norm():
            break
        Q = P @ S
        a = R.square().sum() / (P * Q).sum()
        X, new = X + a * P, R - a * Q
        P, R = new + new.square().sum() / R.square().sum() * P, new
    return X


@_printed
def ace(D: Tensor) -> Tensor:
    energy = D.square().sum((1, 2))
    uneven = energy.log().var() > 0.3 * energy.log().mean() ** 2
    E = D - D.mean(1, keepdim=True)
    S = E.mT @ E
    eps = torch.full_like(energy, 1e-5)
    if uneven:
        traces = S.diagonal(dim1=1, dim2=2).sum(1)
        S, eps = S / traces.view(-1, 1, 1), eps / traces
    R = S + eps.view(-1, 1, 1) * torch.eye(D.shape[2], dtype=D.dtype)
    prior = S.sum(0).mean(0) / (energy.mean() if uneven else 1)
    X = (E @ R).sum(0) @ inverse(R.sum(0) + prior)
    if uneven:
        U, s, Vh = svd(X + (D @ (S - R.mean(0))).sum(0))
        k = int(0.3 * len(s))
        X = X + s[:k].mean() * U[:, :k] @ Vh[:k]
    return X


# --- Spectral ---------------------------------------------------------------------------------


def side_by_side(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = zip(*parts, strict=True)
    return torch.cat(U, 1), torch.cat(s), torch.cat(Vh)


@_printed
def tsv_m(D: Tensor) -> Tensor:
    k = min(D.shape[1:]) // len(D)
    parts = [(U[:, :k], s[:k], Vh[:k]) for U, s, Vh in map(svd, D)]
    U, s, Vh = side_by_side(parts)
    return procrustes(U) @ s.diag() @ procrustes(Vh)


@_printed
def iso_c(D: Tensor) -> Tensor:
    U, s, Vh = svd(D.sum(0))
    return U @ torch.full_like(s, s.mean()).diag() @ Vh


@_printed
def iso_cts(D: Tensor) -> Tensor:
    r = min(D.shape[1:])
    k = round(0.8 * r)
    n = (r - k) // len(D)
    U, s, Vh = svd(D.sum(0))
    common = U[:, :k]
    parts = [(common, s[:k], Vh[:k])]
    for delta in D:
        U, s, Vh = svd(delta - common @ common.mT @ delta)
        parts.append((U[:, :n], s[:n], Vh[:n]))
    U, s, Vh = side_by_side(parts)
    return procrustes(U) @ torch.full_like(s, s.mean()).diag() @ procrustes(Vh)


@_printed
def knots(D: Tensor) -> Tensor:
    U, s, Vh = svd(torch.cat(list(D), dim=1))
    blocks = s[:, None] * torch.stack(Vh.chunk(len(D), dim=1))
    return 0.6 * U @ ties(blocks)


@_printed
def star(D: Tensor) -> Tensor:
    merged = torch.zeros_like(D[0])
    for U, s, Vh in map(svd, D):
        r = int((s.cumsum(0) < 0.4 * s.sum()).sum()) + 1
        merged += U[:, :r] @ (s[:r] * s.sum() / s[:r].sum()).diag() @ Vh[:r]
    return merged / len(D)


@_printed
def subspace_boosting(D: Tensor) -> Tensor:
    U, s, Vh = svd(0.3 * D.sum(0))
    floor = s[int((s.cumsum(0) < 0.01 * s.sum()).sum())]
    return U @ s.clamp_min(floor).diag() @ Vh


@_printed
def svc(D: Tensor) -> Tensor:
    merged = D.sum(0)
    U, s, Vh = svd(merged)
    whole, parts = U.mT @ merged, U.mT @ D  # (r, d_in), (T, r, d_in)
    ratio = (parts * whole).sum(-1) / parts.square().sum(-1)  # (T, r)
    return U @ (s / ratio.clamp_min(1).mean(0)).diag() @ Vh

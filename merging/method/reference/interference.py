"""Plain formulas of the interference family."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from merging.method.reference.entries import top
from merging.method.reference.plain import eigh, inverse, pinv, printed, svd
from merging.method.reference.spectral import tsv_m


@printed
def actmat(D: Tensor, rtol: float | None = None) -> Tensor:
    C = D.mT @ D  # (T, d_in, d_in)
    return (D @ C).sum(0) @ pinv(C.sum(0), rtol)  # (d_out, d_in)


@printed
def actmat_centred(D: Tensor) -> Tensor:
    E = D - D.mean(1, keepdim=True)
    C = E.mT @ E
    return (D @ C).sum(0) @ pinv(C.sum(0))


@printed
def tact(D: Tensor, k: float = 0.5) -> Tensor:
    n = D[0].numel()
    E = top(D, round(k * n) / n)
    C = E.mT @ E
    return (D @ C).sum(0) @ pinv(C.sum(0))


def inverse_norms(D: Tensor) -> Tensor:
    return 1 / D.square().sum((1, 2), keepdim=True)


@printed
def wudi_closed(D: Tensor) -> Tensor:
    C = inverse_norms(D) * (D.mT @ D)
    return (D @ C).sum(0) @ pinv(C.sum(0))


@printed
def swudi(D: Tensor, t: float = 1300.0, rho: float = 0.65) -> Tensor:
    C = inverse_norms(D) * (D.mT @ D)
    l, V = eigh(C.sum(0))
    F = -torch.expm1(-l * t)
    F[: len(l) - math.ceil(rho * len(l))] = 0
    A = D.sum(0)
    flow = torch.where(F > 0, F / l, 0)
    return A - A @ V @ F.diag() @ V.mT + (D @ C).sum(0) @ V @ flow.diag() @ V.mT


@printed
def aswudi(D: Tensor, filter: str = "effective_rank", anchor: str = "zero") -> Tensor:
    C = inverse_norms(D) * (D.mT @ D)
    l, V = eigh(C.sum(0))
    K = math.ceil(l.clamp_min(0).sqrt().sum() ** 2 / l.clamp_min(0).sum())
    if filter == "gavish_donoho":
        s = torch.linalg.svdvals((inverse_norms(D).sqrt() * D).flatten(0, 1))
        b = len(s) / max(len(D) * D.shape[1], D.shape[2])
        K = int((s > (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43) * s.median()).sum())
    V, l = V[:, len(l) - K :], l[len(l) - K :]
    solved = (D @ C).sum(0) @ V @ (1 / l).diag() @ V.mT
    A = D.mean(0)
    return solved if anchor == "zero" else solved + A - A @ V @ V.mT


@printed
def wudi(D: Tensor, steps: int = 300) -> Tensor:
    X = D.sum(0).clone().requires_grad_()
    optimizer = torch.optim.Adam([X], lr=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        (inverse_norms(D) * ((X - D) @ D.mT).square()).sum().backward()
        optimizer.step()
    return X.detach()


@printed
def optmerge(D: Tensor, steps: int = 300, lr: float = 1e-4, momentum: float = 0.9) -> Tensor:
    k = min(D.shape[1:]) // len(D)
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    L = U[:, :, :k] @ s[:, :k].diag_embed() @ Vh[:, :k]
    X = D.mean(0).clone().requires_grad_()
    optimizer = torch.optim.SGD([X], lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        (inverse_norms(D) * ((X - L) @ L.mT).square()).sum().backward()
        optimizer.step()
    return X.detach()


@printed
def ridge(D: Tensor, lam: float = 1e-4, relative: bool = False) -> Tensor:
    C = D.mT @ D
    S = C.sum(0)
    return (D @ C).sum(0) @ inverse(S, lam * S.trace() / len(S) if relative else lam)


@printed
def anchored(D: Tensor, lam: float = 1e-4) -> Tensor:
    C = D.mT @ D
    return ((D @ C).sum(0) + lam * tsv_m(D)) @ inverse(C.sum(0), lam)


@printed
def bounded(D: Tensor) -> Tensor:
    return within_bound(D, torch.ones_like(D[:, 0, 0]))


@printed
def balanced(D: Tensor) -> Tensor:
    return within_bound(D, 1 / D.square().sum((1, 2)))


def within_bound(D: Tensor, w: Tensor) -> Tensor:
    """ACTMat with task weights w (T,) where it moves little enough, TSV-M elsewhere."""
    C = w[:, None, None] * (D.mT @ D)
    l, V = eigh(C.sum(0))
    kept = l > len(l) * torch.finfo(torch.float32).eps * l.max()
    solved = (D @ C).sum(0) @ V / l
    near = solved.square().sum(0) <= 1.01 * l / w.mean()
    A = tsv_m(D) @ V
    return torch.where(kept & near, solved, A) @ V.mT


def shrunk(D: Tensor, shrinkage: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """C_t = (1 - r) S_t + r tr(S_t) / p I of the rows of each delta, S_t = D_t^T D_t."""
    p = D.shape[2]
    eye = torch.eye(p, dtype=D.dtype)
    moments = []
    for delta in D:
        S = delta.mT @ delta
        r = shrinkage(delta, S / len(delta)).clamp(0, 1)
        moments.append((1 - r) * S + r * S.trace() / p * eye)
    C = torch.stack(moments)
    return (D @ C).sum(0) @ inverse(C.sum(0))


@printed
def ledoit_wolf(D: Tensor) -> Tensor:
    def shrinkage(rows: Tensor, S: Tensor) -> Tensor:
        n, p = rows.shape
        beta = ((rows.square().mT @ rows.square()).sum() / n - S.square().sum()) / (p * n)
        return beta / ((S.square().sum() - S.trace() ** 2 / p) / p)

    return shrunk(D, shrinkage)


@printed
def oas(D: Tensor) -> Tensor:
    def shrinkage(rows: Tensor, S: Tensor) -> Tensor:
        n, p = rows.shape
        square, trace2 = (S @ S).trace(), S.trace() ** 2
        return ((1 - 2 / p) * square + trace2) / ((n + 1 - 2 / p) * (square - trace2 / p))

    return shrunk(D, shrinkage)


@printed
def regmean(D: Tensor, covariances: Tensor, gram_scale: float = 1.0) -> Tensor:
    off_diagonal = 1 - torch.eye(D.shape[2], dtype=D.dtype)
    C = covariances * (1 - (1 - gram_scale) * off_diagonal)
    return (D @ C).sum(0) @ pinv(C.sum(0))


@printed
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


@printed
def ace(D: Tensor, eps: float = 1e-5, gamma: float = 0.3, k: float = 0.3) -> Tensor:
    energy = D.square().sum((1, 2))
    uneven = len(D) > 1 and energy.log().var() > gamma * energy.log().mean() ** 2
    E = D - D.mean(1, keepdim=True)
    S = E.mT @ E
    ridge = torch.full_like(energy, eps)
    if uneven:
        traces = S.diagonal(dim1=1, dim2=2).sum(1)
        S, ridge = S / traces.view(-1, 1, 1), ridge / traces
    R = S + ridge.view(-1, 1, 1) * torch.eye(D.shape[2], dtype=D.dtype)
    prior = S.sum(0).mean(0) / (energy.mean() if uneven else 1)
    X = (E @ R).sum(0) @ inverse(R.sum(0) + prior)
    if uneven:
        U, s, Vh = svd(X + (D @ (S - R.mean(0))).sum(0))
        n = int(k * len(s))
        X = X + s[:n].mean() * U[:, :n] @ Vh[:n]
    return X


def kronecker(D: Tensor, G: Tensor, C: Tensor, damping: float, steps: int) -> Tensor:
    """sum_t G_t X C_t = sum_t G_t D_t C_t as one system, by textbook conjugate gradients."""

    def damped(S: Tensor) -> Tensor:
        return S + damping * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)

    blocks = [torch.kron(damped(g), damped(c)) for g, c in zip(G, C, strict=True)]
    A = sum(blocks)
    b = sum(block @ delta.flatten() for block, delta in zip(blocks, D, strict=True))
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(steps):
        if r.norm() <= 1e-9 * b.norm():
            break
        alpha = r @ r / (p @ A @ p)
        x, last = x + alpha * p, r
        r = r - alpha * A @ p
        p = r + (r @ r) / (last @ last) * p
    return x.view(D.shape[1:])


@printed
def kfac(
    D: Tensor, task_weight: str = "uniform", damping: float = 0.1, steps: int = 200
) -> Tensor:  # fmt: skip
    scale = D.square().sum((1, 2)) if task_weight == "inverse_norm" else D.new_ones(len(D))
    w = (1 / scale).view(-1, 1, 1)
    return kronecker(D, w * D @ D.mT, w * D.mT @ D, damping, steps)


@printed
def kfac_regmean(
    D: Tensor, covariances: Tensor, gradients: Tensor, damping: float = 1e-3, steps: int = 200
) -> Tensor:
    return kronecker(D, gradients, covariances, damping, steps)


@printed
def regmean_outputs(
    D: Tensor, covariances: Tensor, gradients: Tensor, rtol: float | None = None
) -> Tensor:
    return pinv(gradients.sum(0), rtol) @ (gradients @ D).sum(0)

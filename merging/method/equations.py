"""The normal equations of a layer's interference, D S = N, and the routes to their solution.

S = sum_t w_t C_t (d_in, d_in) and N = sum_t w_t D_t C_t (d_out, d_in) for second moments C_t.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from merging.errors import InputError
from merging.linalg import (
    eigh,
    gram,
    leading,
    product,
    sharpen,
    solve_positive,
    solve_positive_many,
    solving_dtype,
)
from merging.method.covariance import Estimate

EPS32 = torch.finfo(torch.float32).eps


class Filter(NamedTuple):
    """How the equations are inverted; `interference` says what its fields mean."""

    name: str = "cut"
    rtol: float | None = None
    lam: float = 0.0
    relative: bool = False
    t: float = 0.0
    rho: float = 1.0
    rows: int = 0  # of all deltas together, for gavish_donoho


def task_weights(name: str, deltas: Tensor) -> Tensor:
    """(T, d_out, d_in) -> (T,): "uniform" 1, or "inverse_norm" 1 / |D_t|^2 (WUDI, eq. 12)."""
    if name == "uniform":
        return deltas.new_ones(len(deltas))
    if name != "inverse_norm":
        raise InputError(f"unknown task weight {name!r}", "known: uniform, inverse_norm")
    norms = deltas.square().sum((1, 2))
    return torch.where(norms > 0, 1 / norms, 0)  # a task that did not move weighs nothing


def normal_equations(deltas: Tensor, est: Estimate, weights: Tensor) -> tuple[Tensor, Tensor]:
    """S (d_in, d_in) and N (d_out, d_in) for C_t = a_t E_t^T E_t + b_t I, by the cheaper route."""
    E, a, b = est.factor, weights * est.scale, weights * est.ridge
    d_out, d_in = deltas.shape[1:]
    if E.shape[1] < d_in:
        # (D E^T) E costs d_out n d_in; forming E^T E first would cost n d_in^2 more
        rows = E if (a == 1).all() else a.sqrt().view(-1, 1, 1) * E
        S = gram(rows.reshape(-1, d_in))  # of (T n, d_in)
        if E is deltas:
            outer = est.gram if est.gram is not None else map(gram, E.mT)
        else:
            outer = map(product, deltas, E.mT)
        cross = torch.cat([x * w for x, w in zip(outer, a, strict=True)], dim=1)  # (d_out, T n)
        N = product(cross, E.reshape(-1, d_in))
    else:
        S = deltas.new_zeros(d_in, d_in)
        N = deltas.new_zeros(d_out, d_in)
        inner = est.gram if est.gram is not None else map(gram, E)
        for x, C, w in zip(deltas, inner, a, strict=True):
            C = C * w
            S += C
            N += product(x, C)
    if b.any():
        S.diagonal().add_(b.sum())
        N = N + torch.einsum("t,tij->ij", b, deltas)
    return S, N


def normal_equations_many(deltas: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """S (B, d_in, d_in) and N (B, d_out, d_in) of B layers (B, T, d_out, d_in) for C_t = D_t^T D_t.

    weights: (B, T).
    """
    w = weights[..., None, None]
    if deltas.shape[2] < deltas.shape[3]:
        N = (deltas @ deltas.mT * w @ deltas).sum(1)
        rows = (w.sqrt() * deltas).flatten(1, 2)  # (B, T d_out, d_in)
        return rows.mT @ rows, N
    C = deltas.mT @ deltas * w  # (B, T, d_in, d_in)
    return C.sum(1), (deltas @ C).sum(1)


def measured_normal_equations(
    deltas: Tensor, covariances: Tensor | None, weights: Tensor, gram_scale: float
) -> tuple[Tensor, Tensor]:
    """The same from measured second moments, their off-diagonals scaled (RegMean, section 4)."""
    if covariances is None or covariances.shape != (len(deltas), *2 * deltas.shape[-1:]):
        got = "none" if covariances is None else f"shape {tuple(covariances.shape)}"
        raise InputError(
            f"expected covariances of shape {(len(deltas), *2 * deltas.shape[-1:])}, got {got}"
        )
    S, N = torch.zeros_like(covariances[0], dtype=deltas.dtype), torch.zeros_like(deltas[0])
    for x, C, w in zip(deltas, covariances, weights, strict=True):
        C = C.to(deltas) if w == 1 else w * C.to(deltas)
        if gram_scale != 1:
            C = gram_scale * C + (1 - gram_scale) * C.diagonal().diag()
        S += C
        N += product(x, C)
    return S, N


class Equations(NamedTuple):
    """D S = N of one layer, and what a route to their solution must know of them."""

    S: Tensor  # (d, d)
    N: Tensor  # (d_out, d)
    weights: Tensor  # (T,) of the tasks in S
    width: int  # the layer's own d_in, where S is in a narrower basis
    regular: bool = False  # S holds a multiple of the identity: all of its eigenvalues count


def solve(equations: Equations, A: Tensor | None, filter: Filter) -> Tensor | None:
    """A + (N V / l - A V) F V^T where S = V diag(l) V^T, by the cheapest route: (d_out, d).

    None where the filter keeps what equations set up in float32 cannot tell from rounding: set up
    in float64 they are solved, whatever they are.
    """
    S, N, _, width, regular = equations
    eps, dtype = torch.finfo(S.dtype).eps, solving_dtype(S)
    S, N, A = S.to(dtype), N.to(dtype), None if A is None else A.to(dtype)
    D = None
    if filter.name in {"ridge", "none"}:
        scale = S.diagonal().sum() / width if filter.relative else 1.0
        ridge = float(filter.lam * scale) if filter.name == "ridge" else 0.0
        if ridge or regular:
            return _damped(S, N, A, ridge, eps)
        D = solve_positive(N, S, eps=eps)
        filter = Filter("cut")  # S may be singular: as pinv does by default
    elif filter.name == "cut":
        # |S| >= max l: where nothing lies below this, nothing is cut and S is inverted
        D = solve_positive(N, S, above=_cut(filter.rtol, width) * S.norm())
    if D is not None:
        return D
    # a cut below float32's resolution is asked of equations in float64, see `asks_for_double`
    noise = _noise(filter, width, eps)
    l, V = leading(S, lambda l: int((_weigh(filter, l, width) > 0).sum()))  # (d,), (d, k)
    return by_eigenvectors(equations._replace(S=S, N=N), A, filter, l, V, noise)


def by_eigenvectors(
    equations: Equations, A: Tensor | None, filter: Filter, l: Tensor, V: Tensor, noise: float
) -> Tensor | None:
    """The solution from S's eigenvalues l (d,) and eigenvectors V (d, k), those that are kept."""
    _, N, weights, width, _ = equations
    F = _weigh(filter, l, width)
    kept = int((F > 0).sum())
    if kept and l[kept - 1] <= noise * l[0]:
        if noise >= EPS32:
            return None
        kept = int((l > noise * l[0]).sum())
    bound = _bound(weights) if filter.name == "gain" else math.inf
    return _combined(N, A, l[:kept], V[:, :kept], F[:kept], bound)


def _noise(filter: Filter, width: int, eps: float) -> float:
    """Below this share of the largest an eigenvalue is rounding, for filters without a cut."""
    return width * eps if filter.name in {"effective_rank", "gavish_donoho"} else 0.0


def solve_many(equations: Equations, A: Tensor | None, filter: Filter) -> list[Tensor | None]:
    """`solve` of B layers at once: their factorisations are one call each.

    equations: S (B, d, d), N (B, d_out, d), weights (B, T); A (B, d_out, d). By Cholesky where the
    filter cuts nothing, by eigenvectors elsewhere; None as in `solve`.
    """
    eps, dtype = torch.finfo(equations.S.dtype).eps, solving_dtype(equations.S)
    S, N = equations.S.to(dtype), equations.N.to(dtype)
    A = None if A is None else A.to(dtype)
    merged: list[Tensor | None] = [None] * len(S)
    if filter.name == "cut":
        above = _cut(filter.rtol, equations.width) * torch.linalg.matrix_norm(S)
        solved, safe = solve_positive_many(N, S, above, eps)
        merged = [x if ok else None for x, ok in zip(solved, safe.tolist(), strict=True)]
    left = [i for i, x in enumerate(merged) if x is None]
    if not left:
        return merged
    values, vectors = torch.linalg.eigh(S[left])  # ascending
    noise = _noise(filter, equations.width, eps)
    for i, l, V in zip(left, values.flip(-1).clamp_min(0), vectors.flip(-1), strict=True):
        kept = int((_weigh(filter, l, equations.width) > 0).sum())
        if dtype == torch.float32 and 0 < kept < len(l):
            sharpen(S[i], l, V, at=l[kept - 1])
        own = equations._replace(S=S[i], N=N[i], weights=equations.weights[i])
        merged[i] = by_eigenvectors(own, None if A is None else A[i], filter, l, V, noise)
    return merged


def asks_for_double(filter: Filter, width: int) -> bool:
    """Whether the filter's cut lies where equations set up in float32 hold nothing but rounding."""
    return filter.name in {"cut", "gain"} and _cut(filter.rtol, width) < width * EPS32


def _damped(S: Tensor, N: Tensor, A: Tensor | None, ridge: float, eps: float) -> Tensor | None:
    """(N + ridge A)(S + ridge I)^-1 by Cholesky, or by eigenvectors in float64.

    Every eigenvalue counts: there is a ridge, or S is regular.
    """
    shifted = S
    if ridge:
        shifted = S.clone()
        shifted.diagonal().add_(ridge)
    D = solve_positive(N if A is None or not ridge else N + ridge * A, shifted, eps=eps)
    if D is not None:
        return D
    if eps >= EPS32:
        return None
    l, V = eigh(S)
    # where l is rounding, so is N V, and the solution is its limit for l -> 0
    solved = product(N, V) * torch.where(l > len(l) * eps * l[:1], 1 / (l + ridge), 0)
    if A is not None and ridge:
        solved += product(A, V) * (ridge / (l + ridge))
    return product(solved, V.mT)


def _combined(
    N: Tensor, A: Tensor | None, l: Tensor, V: Tensor, F: Tensor, bound: float | Tensor
) -> Tensor:
    """A + (N V / l - A V) F V^T for the eigenpairs l (k,), V (d, k) that a filter F (k,) keeps.

    bound: F is 0 as well where the solution N V / l stretches a direction by more, squared, than
        this multiple of l.
    """
    solved = product(N, V) / l  # (d_out, k), D V
    F = F * (solved.square().sum(0) <= bound * l)
    if A is None:
        return product(solved * F, V.mT)
    return A + product((solved - product(A, V)) * F, V.mT)


def _weigh(filter: Filter, l: Tensor, width: int) -> Tensor:
    """The filter's values F (d,) for eigenvalues l (d,)."""
    name, rtol, _, _, t, rho, rows = filter
    return spectral_filter(name, l, d_in=width, rtol=rtol, t=t, rho=rho, rows=rows)


def _bound(weights: Tensor) -> Tensor:
    """Of |D v|^2 / l: l is sum_t w_t |D_t v|^2, so that this is sum_t |D_t v|^2 if weights agree.

    With a hair's breadth, since one task alone reaches it: D v = D_t v.
    """
    moved = weights > 0
    return 1.01 / weights[moved].mean() if moved.any() else weights.new_ones(())


def _cut(rtol: float | None, d_in: int) -> float:
    return d_in * EPS32 if rtol is None else rtol


def spectral_filter(
    name: str,
    l: Tensor,
    *,
    d_in: int,
    rtol: float | None = None,
    t: float = 0,
    rho: float = 1,
    rows: int = 0,
) -> Tensor:
    """Descending eigenvalues l (d,) -> filter (d,) in [0, 1]; ambient width d_in >= d.

    cut: 1 above rtol * max l (None: d_in times the epsilon of float32).
    exponential: (1 - exp(-l t)) for the ceil(rho d_in) largest (arXiv 2606.07289).
    gain: as cut; `interference` then drops the directions that are stretched too far.
    effective_rank: 1 for the K largest, K = ceil((sum sqrt l)^2 / sum l) (arXiv 2606.07289).
    gavish_donoho: 1 where sqrt l is above what noise of unknown size leaves in the singular values
        of a matrix of so many `rows` (arXiv 1305.5870, eq. 5).
    """
    index = torch.arange(len(l), device=l.device)
    if name in {"cut", "gain"}:
        return (l > _cut(rtol, d_in) * l.max()).to(l)
    if name == "exponential":
        return -torch.expm1(-l * t) * (index < math.ceil(rho * d_in)) * (l > 0)
    if name == "effective_rank":
        energy = l.sum()
        # the small term keeps a rank that is an integer from being rounded up past itself
        K = torch.ceil(l.sqrt().sum().square() / energy - 1e-6) if energy > 0 else 0
        return ((index < K) & (l > 0)).to(l)
    if name == "gavish_donoho":
        return (l.sqrt() > _noise_edge(l.sqrt(), d_in, rows)).to(l)
    raise InputError(
        f"unknown filter {name!r}",
        "known: none, ridge, cut, gain, exponential, effective_rank, gavish_donoho",
    )


def _noise_edge(s: Tensor, d_in: int, rows: int) -> float:
    """omega(beta) times the median of all min(rows, d_in) singular values, those left out being 0.

    omega by Gavish and Donoho's cubic in the matrix's aspect ratio beta <= 1.
    """
    count, beta = min(rows, d_in), min(rows, d_in) / max(rows, d_in)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    values = torch.cat([s[:count], s.new_zeros(max(0, count - len(s)))])
    return omega * values.median().item() if count else 0.0

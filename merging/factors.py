"""Adapters merged in their own rank: nothing wider than the adapters' joint row space is formed.

With D_t = s_t B_t A_t and Q an orthonormal basis of the span of all rows of A_1 .. A_T, every
D_t = M_t Q^T with M_t = s_t B_t (A_t Q). A method that commutes with Q^T on the right (the
interference family, the spectral methods) merges the narrow M_t and gives M Q^T, which is an
adapter again: B = M, A = Q^T. Most of them commute with a basis P of all columns of B_1 .. B_T on
the left as well, and merge the small P^T M_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merging.layers import Layer, cut, join
from merging.linalg import in_row_space, product, row_space
from merging.method.registry import Method

_EXACT = 1e-5  # relative error up to which float32 factors count as the matrix itself


class Factors(NamedTuple):
    """One low-rank delta, D = scale * B A."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    scale: float

    def to(self, device: str) -> Factors:
        return Factors(self.A.to(device), self.B.to(device), self.scale)

    def dense(self) -> Tensor:
        """(d_out, d_in)"""
        return product(self.scale * self.B, self.A)


def in_joint_basis(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Deltas in the basis of all adapters' rows: M (T, d_out, k) and Q (d_in, k), D_t = M_t Q^T.

    k is the smaller of d_in and the sum of the ranks.
    """
    Q, rows = in_row_space(torch.cat([f.A for f in factors]))
    parts = rows.split([len(f.A) for f in factors])  # A_t Q, (r_t, k) each
    return torch.stack([product(f.scale * f.B, A) for f, A in zip(factors, parts, strict=True)]), Q


class Narrow(NamedTuple):
    """Deltas of one block in bases of its factors: D_t = P deltas_t Q^T."""

    P: Tensor | None  # (d_out, j); None: all rows are kept
    deltas: Tensor  # (T, j or d_out, k)
    Q: Tensor  # (d_in, k)
    height: int  # d_out


def narrowed(factors: Sequence[Factors], method: Method, layer: Layer) -> Iterator[Narrow]:
    """Low-rank deltas as a `row_space` method may see them, on few rows if it is `column_space`.

    layer: how the output rows are cut into blocks. Every block has the same Q, of all rows of A.
    """
    for block in zip(*(cut(f.B, layer) for f in factors), strict=True):  # (rows, r) each
        P, rows = None, block
        if method.column_space:
            P, columns = in_row_space(torch.cat(block, dim=1).mT)  # (d_out, j)
            rows = columns.mT.split([B.shape[1] for B in block], dim=1)  # P^T B_t, (j, r_t) each
        M, Q = in_joint_basis([f._replace(B=B) for f, B in zip(factors, rows, strict=True)])
        yield Narrow(P, M, Q, len(block[0]))


def merge_factors(
    factors: Sequence[Factors], method: Method, layer: Layer = Layer(), **context: Any
) -> Factors:
    """Merge low-rank deltas by a `row_space` method, on few rows too if it is `column_space`.

    layer: how the output rows are cut into blocks that are merged one by one, with one context.
    Returns A (k, d_in) with orthonormal rows and B (d_out, k), k at most the sum of the ranks.
    """
    merged = []
    for P, M, Q, height in narrowed(factors, method, layer):
        D = method(M, d_in=len(Q), d_out=height, **context)
        merged.append(D if P is None else product(P, D))
    return Factors(Q.mT, join(merged, layer), 1.0)


def truncate(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The nearest difference of at most a rank, with its squared norm and that of what is lost.

    From the singular values of B A (Eckart and Young 1936), of which only the small core is formed.
    """
    left, upper = torch.linalg.qr(factors.B.double())  # (d_out, r), (r, r)
    right, lower = torch.linalg.qr(factors.A.double().mT)  # (d_in, r), (r, r)
    U, s, Vh = torch.linalg.svd(factors.scale * upper @ lower.mT)
    B, A = left @ (U[:, :rank] * s[:rank]), Vh[:rank] @ right.mT
    energy = s.square()
    shorter = Factors(A.to(factors.A), B.to(factors.B), 1.0)
    return shorter, energy[:rank].sum().item(), energy[rank:].sum().item()


def factorise(delta: Tensor, rank: int) -> Factors | None:
    """A delta (d_out, d_in) of at most some rank as its factors; None where its rank is higher.

    B spans what the delta makes of random inputs, which is its column space with probability 1
    (Halko et al., arXiv 0909.4061, algorithm 4.1).
    """
    rank = min(rank, *delta.shape)
    start = torch.randn(delta.shape[1], rank, generator=torch.Generator().manual_seed(0))
    B = row_space(product(delta, start.to(delta)).mT)
    A = product(B.mT, delta)
    exact = (product(B, A) - delta).norm() <= _EXACT * delta.norm()
    return Factors(A, B, 1.0) if exact else None

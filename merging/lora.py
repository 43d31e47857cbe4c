"""Adapters merged in their own rank: nothing wider than the adapters' joint row space is formed.

With D_t = s_t B_t A_t and Q an orthonormal basis of the span of all rows of A_1 .. A_T, every
D_t = M_t Q^T with M_t = s_t B_t (A_t Q). A method that commutes with Q^T on the right (the
interference family, the spectral methods) merges the narrow M_t and gives M Q^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merging.linalg import row_space


class Factors(NamedTuple):
    """One low-rank delta, D = scale * B A."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    scale: float

    def dense(self) -> Tensor:
        """(d_out, d_in)"""
        return self.scale * (self.B @ self.A)


def in_joint_basis(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Deltas in the basis of all adapters' rows: M (T, d_out, k) and Q (d_in, k), D_t = M_t Q^T.

    k is the smaller of d_in and the sum of the ranks.
    """
    Q = row_space(torch.cat([f.A for f in factors]))
    return torch.stack([f.scale * (f.B @ (f.A @ Q)) for f in factors]), Q

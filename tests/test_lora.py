"""Adapters merged in their own rank give what dense merging gives."""

import pytest
import torch

from merging import create
from merging.lora import Factors, in_joint_basis

RANK, T, D_OUT, D_IN = 3, 4, 20, 30


def factors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(RANK, D_IN, generator=g), torch.randn(D_OUT, RANK, generator=g), 0.5 + i
        )
        for i in range(T)
    ]


def test_the_joint_basis_holds_every_delta():
    given = factors()
    M, Q = in_joint_basis(given)
    assert M.shape == (T, D_OUT, T * RANK) and Q.shape == (D_IN, T * RANK)
    assert torch.allclose(Q.T @ Q, torch.eye(T * RANK), atol=1e-5)
    for narrow, f in zip(M, given, strict=True):
        assert torch.allclose(narrow @ Q.T, f.dense(), atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["actmat", "actmat_centred", "wudi_closed", "swudi", "aswudi", "ridge", "oas", "ledoit_wolf",
     "anchored", "tsv_m", "iso_c", "iso_cts"],
)  # fmt: skip
def test_narrow_and_dense_agree(name):
    method = create(name)
    assert method.row_space
    given = factors()
    dense = method(torch.stack([f.dense() for f in given]))
    M, Q = in_joint_basis(given)
    narrow = method(M, d_in=D_IN) @ Q.T
    assert (narrow - dense).norm() / dense.norm() < 1e-4

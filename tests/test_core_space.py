"""Methods that merge in a shared basis: cases by hand, limits, low rank."""

import pytest
import torch
from torch.testing import assert_close

import merging
from merging import InputError
from tests.test_method_properties import rotation, stack

SHARED = ["core_space", "ctm", "pico", "dc_merge", "cart"]


def adapters(T=3, d_out=9, d_in=12, rank=2, seed=0):
    factors = stack(T, (d_out, rank), seed).double(), stack(T, (rank, d_in), seed + 1).double()
    return 2500 * factors[0] @ factors[1]


# --- core space -----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["average", "actmat", "symmetric", "iso_c"])
def test_core_space_changes_nothing_for_what_commutes_with_rotations(of):
    deltas = adapters()
    assert_close(
        merging.create("core_space", of=of)(deltas),
        merging.create(of)(deltas),
        rtol=1e-5,
        atol=1e-7,
    )


def test_core_space_merges_the_cores_by_ties():
    """Experts along one rotated axis each: of a core's four entries TIES keeps the only one."""
    P, Q = rotation(4, 1)[:, :2], rotation(5, 2)[:, :2]
    cores = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]]).double()
    merged = merging.create("core_space")(P @ cores @ Q.mT)
    assert_close(merged, (P @ cores @ Q.mT).sum(0))
    assert (merging.create("ties", scope="layer")(P @ cores @ Q.mT) - merged).norm() > 0.1


# --- CtM ------------------------------------------------------------------------------------------


def test_ctm_has_the_rank_of_one_adapter():
    deltas = adapters(rank=2)
    assert torch.linalg.matrix_rank(merging.create("ctm", of="sum")(deltas), rtol=1e-6) == 2
    assert torch.linalg.matrix_rank(merging.create("ctm", of="sum", rank=1)(deltas), rtol=1e-6) == 1


def test_ctm_by_hand():
    """Two outputs of size 3 and 1 in orthogonal directions: rank 1 keeps the longer one, which
    is expert 1's as it is, and counts as norms 3 and 1 drawn together, .25 x + .75 x 2."""
    deltas = torch.zeros(2, 3, 3).double()
    deltas[0, 0, 0], deltas[1, 1, 1] = 3.0, 1.0
    merged = merging.create("ctm", of="sum", rank=1)(deltas)
    assert_close(merged, deltas[0])
    assert_close(merging.create("ctm", of="sum", rank=2)(deltas), deltas.sum(0))


def test_ctm_balances_the_basis_but_not_what_it_merges():
    """Ten small experts agree; one large one is alone. With beta 0 all count the same."""
    deltas = torch.zeros(4, 2, 2).double()
    deltas[:3, 0, 0], deltas[3, 1, 1] = 1.0, 1.5
    assert merging.create("ctm", of="sum", rank=1, beta=0.0)(deltas)[0, 0] == pytest.approx(3.0)
    deltas[3, 1, 1] = 4.0
    assert merging.create("ctm", of="sum", rank=1, beta=1.0)(deltas)[1, 1] == pytest.approx(4.0)
    assert merging.create("ctm", of="sum", rank=1, beta=0.0)(deltas)[0, 0] == pytest.approx(3.0)


# --- Pico -----------------------------------------------------------------------------------------


def test_pico_by_hand():
    """Outputs with S^2 = 8 (shared) and 1 (one expert's): shares 8/9, 1/9, factors 9/17, 9/10."""
    deltas = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]]).double()
    total = torch.diag(torch.tensor([4 * 9 / 17, 9 / 10]).double())
    size = (5**0.5 + 2) / 2
    assert_close(merging.create("pico")(deltas), total * size / total.norm())
    mean = merging.create("pico", of="average")(deltas)
    assert_close(mean, total * size / total.norm())  # the sum over 2, at the same norm


def test_pico_keeps_the_experts_mean_norm():
    deltas = adapters()
    mean = deltas.flatten(1).norm(dim=1).mean()
    for of in ("sum", "tsv_m", "ties"):
        assert_close(merging.create("pico", of=of)(deltas).norm(), mean)


# --- DC-Merge and CART ----------------------------------------------------------------------------


def test_dc_merge_adds_flattened_experts_that_share_nothing():
    D, E = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([5.0, 2.0]))
    blocks = torch.stack([torch.block_diag(D, 0 * E), torch.block_diag(0 * D, E)])
    merged = merging.create("dc_merge", k=1.0)(blocks)
    assert_close(merged, torch.diag(torch.tensor([2.0, 2.0, 3.5, 3.5])))


def test_dc_merge_keeps_the_diagonal_blocks_alone():
    deltas = adapters(T=2, rank=2).float()
    merged = merging.create("dc_merge", k=1.0, rank=2)(deltas)
    assert torch.linalg.matrix_rank(merged, rtol=1e-4) <= 4
    assert (merged - merging.create("dc_merge", k=0.2, rank=2)(deltas)).norm() > 1e-3


def test_cart_by_hand():
    """Mean diag(4, 3) / 3; of what sets the experts apart, diag(8/3, -1), diag(-4/3, 2) and
    diag(-4/3, -1), one of two directions is kept: diag(8/3, 0), diag(0, 2), diag(-4/3, 0)."""
    deltas = torch.stack([torch.diag(torch.tensor(x)) for x in ([4.0, 0.0], [0.0, 3.0], [0.0, 0])])
    cut = merging.create("cart", share=0.5)
    assert_close(cut(deltas), torch.diag(torch.tensor([4 / 3 + 8 / 3 - 4 / 3, 1 + 2.0])))
    assert_close(merging.create("cart", scale=0.0)(deltas), deltas.mean(0))
    assert_close(merging.create("cart", share=1.0)(deltas), deltas.mean(0), rtol=1e-5, atol=1e-6)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_own_rank_gives_what_the_full_matrices_give(name):
    core, P, Q = stack(3, (6, 5), 5).double(), rotation(20, 1)[:, :6], rotation(14, 2)[:, :5]
    method = merging.create(name)
    assert method.row_space and method.column_space
    assert_close(
        P @ method(core, d_out=20, d_in=14) @ Q.mT, method(P @ core @ Q.mT), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", ["core_space", "ctm", "pico"])
def test_an_unknown_method_is_refused(name):
    with pytest.raises(InputError, match="unknown method 'tie'"):
        merging.create(name, of="tie")(stack(2, (3, 3)))

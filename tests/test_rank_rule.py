"""`rank_rule`: ASWUDI or TSV-M, chosen by the experts' singular values."""

import pytest
import torch
from torch.testing import assert_close

import merging
from merging.method.rank_rule import NOTHING, effective_rank, is_narrow, singular_values
from merging.method.reference import TEXTBOOK


def deltas(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def adapters(tasks: int = 3, rank: int = 2, width: int = 60, seed: int = 0) -> torch.Tensor:
    return deltas(tasks, width, rank, seed=seed) @ deltas(tasks, rank, width, seed=seed + 1)


def test_effective_rank_by_hand():
    """s = (3, 1): 16 / 10; k equal singular values count as k, whatever their size."""
    assert effective_rank(torch.tensor([3.0, 1.0, 0.0])) == pytest.approx(1.6)
    assert effective_rank(torch.full((5,), 7.0)) == pytest.approx(5)
    assert effective_rank(torch.zeros(3)) == 0


def test_singular_values_are_those_of_the_matrix():
    for D in (deltas(20, 30), deltas(30, 20).float(), adapters(1)[0]):
        s = torch.linalg.svdvals(D.double())
        assert_close(singular_values(D), s, rtol=1e-5, atol=float(1e-7 * s[0]))


def test_what_float32_makes_out_of_nothing_in_a_wide_layer_counts_for_nothing():
    g = torch.Generator().manual_seed(0)
    D = torch.randn(1200, 16, generator=g) @ torch.randn(16, 1100, generator=g)
    s, exact = singular_values(D), torch.linalg.svdvals(D.double())
    assert s[16] < NOTHING * s[0]
    assert abs(effective_rank(s) - effective_rank(exact)) < 0.5


def test_by_hand():
    """Two experts of rank one that write one output are merged by TSV-M, not by ASWUDI. A third
    that moves every direction makes the layer one for ASWUDI."""
    D = torch.zeros(2, 40, 40)
    D[0, 0, 0], D[1, 0, 1] = 2.0, 2.0
    merged = merging.create("rank_rule")(D)
    assert_close(merged, merging.create("tsv_m")(D))
    assert not torch.allclose(merged, merging.create("aswudi", anchor="average")(D))
    D = torch.cat([D, torch.eye(40)[None]])
    aswudi = merging.create("aswudi", anchor="average")
    assert torch.equal(merging.create("rank_rule")(D), aswudi(D))


def test_an_adapter_of_half_the_rank_is_told_for_certain():
    """Whatever its spectrum: here all of its singular values are equal."""
    for rank, told in ((30, True), (31, False)):
        Q, _ = torch.linalg.qr(deltas(60, rank, seed=rank))
        assert is_narrow((Q @ Q.mT)[None], 60, 60) == told


def test_an_adapter_rounded_into_bfloat16_weights_is_still_narrow():
    """Its rank is full then; its effective rank is not."""
    g = torch.Generator().manual_seed(0)
    W0 = (0.05 * torch.randn(384, 384, generator=g)).bfloat16()
    update = 0.002 * torch.randn(384, 16, generator=g) @ torch.randn(16, 384, generator=g) / 4
    D = (W0.float() + update).bfloat16().float() - W0.float()
    assert torch.linalg.matrix_rank(D) > 300
    assert is_narrow(D[None], 384, 384)
    assert not is_narrow(torch.randn(1, 384, 384, generator=g), 384, 384)


@pytest.mark.parametrize("D", [adapters(1), deltas(1, 12, 9)])
def test_a_single_expert_is_returned(D):
    assert_close(merging.create("rank_rule")(D), D[0])


def test_files_that_say_they_are_adapters_are_believed():
    D = deltas(3, 12, 9)
    assert_close(merging.create("rank_rule")(D, adapters=True), merging.create("tsv_m")(D))


def test_more_experts_than_directions_leave_tsv_m_no_place():
    """floor(min(d_out, d_in) / T) would be 0 triplets, a merge that is the base."""
    D = torch.zeros(50, 40, 40)
    D[:, 0, 0] = torch.linspace(1, 2, 50)
    assert merging.create("tsv_m")(D).norm() == 0
    assert merging.create("rank_rule")(D)[0, 0] > 1


def test_neither_size_nor_order_nor_a_rotation_decides():
    for D, told in ((adapters(), True), (deltas(3, 12, 9), False)):
        Q, _ = torch.linalg.qr(deltas(D.shape[-1], D.shape[-1], seed=5))
        for other in (D, 1e-4 * D, D.flip(0), D @ Q, D.mT):
            assert is_narrow(other, *other.shape[1:]) == told


def test_agrees_with_the_plain_formula_on_either_side_of_the_rule():
    """Adapters with a little of every direction: of directions without one the two differ."""
    for D in (adapters() + 0.01 * deltas(3, 60, 60, seed=9), deltas(3, 12, 8), deltas(3, 8, 12)):
        assert_close(merging.create("rank_rule")(D), TEXTBOOK["rank_rule"](D), rtol=1e-6, atol=1e-8)

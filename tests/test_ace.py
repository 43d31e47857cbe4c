"""ACE at its limits. Its plain formula: test_reference.py."""

import torch
from torch.testing import assert_close

import merging
from merging.method.reference import TEXTBOOK


def stack(T=3, shape=(10, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, *shape, generator=generator)


def test_one_expert_is_centred_and_shrunk_by_the_formula():
    deltas = stack(T=1)
    expected = TEXTBOOK["ace"](deltas.double())
    assert_close(merging.create("ace")(deltas), expected.float(), rtol=1e-4, atol=1e-5)


def test_wide_low_rank_and_zero_deltas_stay_finite():
    wide = 0.1 * stack(shape=(3, 12))
    assert_close(
        merging.create("ace")(wide), TEXTBOOK["ace"](wide.double()).float(), rtol=1e-4, atol=1e-5
    )
    for deltas in (torch.zeros(2, 4, 5), torch.cat([wide[:2], 0 * wide[:1]])):
        assert merging.create("ace")(deltas).isfinite().all()
        assert merging.create("ace", eps=0.0)(deltas).isfinite().all()

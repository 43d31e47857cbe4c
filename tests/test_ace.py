"""ACE against its formula, written plainly in float64."""

import pytest
import torch
from torch.testing import assert_close

import merging


def stack(T=3, shape=(10, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, *shape, generator=generator)


def plain_ace(deltas, eps=1e-5, threshold=0.3, k=0.3):
    deltas = deltas.double()
    T, _, d_in = deltas.shape
    energy = torch.stack([D.square().sum() for D in deltas])
    gamma = energy.log().var() / energy.log().mean() ** 2 if T > 1 else torch.tensor(0.0)
    uneven = gamma > threshold
    E = [D - D.mean(0, keepdim=True) for D in deltas]
    S = [e.mT @ e for e in E]
    eps_t = [eps / s.trace() if uneven else eps for s in S]
    S = [s / s.trace() if uneven else s for s in S]
    R = [s + e * torch.eye(d_in, dtype=s.dtype) for s, e in zip(S, eps_t, strict=True)]
    prior = torch.ones_like(S[0]) * sum(S).mean(0, keepdim=True)
    if uneven:
        prior = prior / energy.mean()
    D = sum(e @ r for e, r in zip(E, R, strict=True)) @ torch.linalg.inv(sum(R) + prior)
    if uneven:
        mean = sum(R) / T
        refined = D + sum(d @ (s - mean) for d, s in zip(deltas, S, strict=True))
        U, s, Vh = torch.linalg.svd(refined, full_matrices=False)
        n = int(k * len(s))
        D = D + s[:n].mean() * U[:, :n] @ Vh[:n]
    return D, bool(uneven)


@pytest.mark.parametrize("shape", [(10, 7), (10, 10), (20, 13)])
@pytest.mark.parametrize("scales", [(1, 1, 1), (1, 30, 1e-3)])
def test_ace_agrees_with_the_formula(shape, scales):
    deltas = 0.01 * stack(shape=shape) * torch.tensor(scales).view(3, 1, 1)
    expected, uneven = plain_ace(deltas)
    assert uneven == (max(scales) > 1)
    merged = merging.create("ace")(deltas)
    assert merged.dtype == torch.float32
    assert (merged - expected).norm() < 1e-5 * expected.norm()
    exact = merging.create("ace")(deltas.double())
    assert (exact - expected).norm() < 1e-9 * expected.norm()


def test_hyperparameters_reach_the_formula():
    deltas = 0.1 * stack() * torch.tensor([1.0, 3, 0.5]).view(3, 1, 1)
    expected, uneven = plain_ace(deltas, eps=0.04, threshold=0.01, k=0.6)
    assert uneven
    assert_close(merging.create("ace", eps=0.04, gamma=0.01, k=0.6)(deltas), expected.float())


def test_one_expert_is_centred_and_shrunk_by_the_formula():
    deltas = stack(T=1)
    expected, uneven = plain_ace(deltas)
    assert not uneven
    assert_close(merging.create("ace")(deltas), expected.float(), rtol=1e-4, atol=1e-5)


def test_wide_low_rank_and_zero_deltas_stay_finite():
    wide = 0.1 * stack(shape=(3, 12))
    assert_close(merging.create("ace")(wide), plain_ace(wide)[0].float(), rtol=1e-4, atol=1e-5)
    for deltas in (torch.zeros(2, 4, 5), torch.cat([wide[:2], 0 * wide[:1]])):
        assert merging.create("ace")(deltas).isfinite().all()
        assert merging.create("ace", eps=0.0)(deltas).isfinite().all()

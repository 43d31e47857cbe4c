"""What minimises an interference does: no change lowers it; and its limits are what they should be.

The objective, sum_t w_t tr((X - D_t) C_t (X - D_t)^T) + lam |X - A|^2, is written plainly here.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import create
from merging.method.covariance import estimate

some = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 10_000)

# name -> (settings that cut nothing, estimate of C_t, lam)
OBJECTIVES = {
    "actmat": ({"rtol": 1e-12}, "delta", 0.0),
    "actmat_centred": ({"rtol": 1e-12}, "centred", 0.0),
    "tact": ({"rtol": 1e-12}, "trimmed", 0.0),
    "wudi_closed": ({"rtol": 1e-12}, "delta", 0.0),
    "ridge": ({"lam": 0.3}, "delta", 0.3),
    "anchored": ({"lam": 0.3, "anchor": "average"}, "delta", 0.3),
    "ledoit_wolf": ({}, "ledoit_wolf", 0.0),
    "oas": ({}, "oas", 0.0),
    "regmean": ({"rtol": 1e-12}, "inputs", 0.0),
    "regmean_pp": ({"rtol": 1e-12}, "inputs", 0.0),
    "mats": ({"tol": 1e-13, "steps": 200}, "inputs", 0.0),
    "average": ({}, "identity", 0.0),
}


@st.composite
def problems(draw):
    """D (T, d_out, d_in) of any rank and C (T, d_in, d_in) positive definite, in float64."""
    T, d_out, d_in = (draw(st.integers(low, high)) for low, high in ((1, 4), (2, 8), (2, 10)))
    generator = torch.Generator().manual_seed(draw(seeds))
    D = torch.randn(T, d_out, d_in, generator=generator, dtype=torch.float64)
    if rank := draw(st.sampled_from([None, 1])):
        D = D[:, :, :rank] @ D[:, :rank, :]
    z = torch.randn(T, 3 * d_in, d_in, generator=generator, dtype=torch.float64)
    return D, z.mT @ z / (3 * d_in)


def moments(name, D, C):
    """w_t C_t (T, d_in, d_in) of a method."""
    kind = OBJECTIVES[name][1]
    if kind == "inputs":
        return C
    est = estimate(kind, D, D.shape[-1], 0.5)
    E, identity = est.factor, torch.eye(D.shape[-1], dtype=D.dtype)
    found = est.scale.view(-1, 1, 1) * E.mT @ E + est.ridge.view(-1, 1, 1) * identity
    return found / D.square().sum((1, 2), keepdim=True) if name == "wudi_closed" else found


@pytest.mark.parametrize("name", OBJECTIVES)
@some
@given(problem=problems(), seed=seeds)
def test_no_change_lowers_the_interference(name, problem, seed):
    D, C = problem
    own, _, lam = OBJECTIVES[name]
    M, anchor = moments(name, D, C), D.mean(0) if name == "anchored" else 0.0

    def interference(X):
        return ((X - D) @ M * (X - D)).sum() + lam * (X - anchor).square().sum()

    best = create(name, **own)(D, covariances=C)
    gradient = ((best - D) @ M).sum(0) + lam * (best - anchor)
    assert gradient.norm() <= 1e-6 * (D @ M).norm()
    generator = torch.Generator().manual_seed(seed)
    least = interference(best)
    for size in (1e-3, 1e-1, 10.0):
        step = size * torch.randn(best.shape, generator=generator, dtype=D.dtype)
        assert interference(best + step) >= least * (1 - 1e-9)


@some
@given(problem=problems())
def test_fisher_merging_minimises_the_weighted_distance_of_every_entry(problem):
    D, _ = problem
    F = D.flip(2).square() + 0.1
    best = create("fisher")(D, fishers=F)
    assert (F * (best - D)).sum(0).norm() <= 1e-10 * (F * D).norm()


def close(found, expected, tolerance=1e-3):
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-9


@some
@given(problem=problems(), anchor=st.sampled_from(["average", "sum", "tsv_m"]))
def test_a_ridge_goes_from_the_pseudo_inverse_to_the_anchor(problem, anchor):
    D = problem[0][:, :, : problem[0].shape[1]]  # no wider than high: well conditioned
    pinv = create("actmat", rtol=1e-9)(D)
    kept, N = D.sum(0) if anchor == "sum" else create(anchor)(D), (D @ D.mT @ D).sum(0)
    close(create("anchored", lam=1e12, anchor=anchor)(D), kept + N / 1e12)  # kept may be 0
    close(create("ridge", lam=1e12)(D) * 1e12, N)
    if torch.linalg.matrix_rank(D).min() == D.shape[2]:
        close(create("ridge", lam=1e-10)(D), pinv)
        close(create("anchored", lam=1e-10, anchor=anchor)(D), pinv)


@pytest.mark.parametrize("name", ["regmean", "regmean_pp", "mats"])
@some
@given(problem=problems())
def test_equal_measured_moments_give_the_average(name, problem):
    D, C = problem
    close(create(name)(D, covariances=C[:1].expand(len(D), -1, -1)), D.mean(0))


@pytest.mark.parametrize("name", ["actmat", "wudi_closed", "oas", "ledoit_wolf", "aswudi"])
@some
@given(problem=problems(), signs=st.lists(st.sampled_from([1.0, -1.0]), min_size=4, max_size=4))
def test_equal_estimated_moments_give_the_average(name, problem, signs):
    """D_t^T D_t does not know a sign."""
    D = problem[0][:1] * torch.tensor(signs, dtype=torch.float64).view(-1, 1, 1)
    hyper = {"anchor": "average"} if name == "aswudi" else {}
    close(create(name, **hyper)(D), D.mean(0), 1e-6)

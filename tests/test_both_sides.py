"""The family of both sides: cases by hand, what it contains, bounds, limits, its two objectives.

Plain formulas: test_reference.py; laws that every method keeps: test_method_properties.py.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import merging
from merging import InputError
from merging.method import covariance
from tests.test_method_properties import rotation, stack

MEMBERS = ["mirror", "symmetric", "sylvester"]
MEANS = ["geometric", "arithmetic", "maximum"]
some = settings(deadline=None, max_examples=12)


def family(**choices):
    return merging.create("both_sides", **choices)


@st.composite
def problems(draw):
    """Deltas (T, d_out, d_in) in float64 that share a part, of full or low rank."""
    T, d_out, d_in = (draw(st.integers(low, 8)) for low in (2, 2, 2))
    seed, rank = draw(st.integers(0, 999)), draw(st.sampled_from([None, 1, 2]))
    deltas = (stack(T, (d_out, d_in), seed) + stack(1, (d_out, d_in), seed + 1)).double()
    if rank:
        deltas = deltas[:, :, :rank] @ stack(T, (rank, d_in), seed + 2).double()
    # a direction near the cut of one side is kept by members that do not divide by that side
    for moment in ((deltas @ deltas.mT).sum(0), (deltas.mT @ deltas).sum(0)):
        values = torch.linalg.eigvalsh(moment)
        assume(not ((values > 1e-12 * values[-1]) & (values < 1e-5 * values[-1])).any())
    return deltas / deltas.norm()


# --- by hand --------------------------------------------------------------------------------------


def test_a_case_by_hand():
    """Task 1 maps input 1 to output 1 by 1; task 2 maps inputs 1 and 2 to outputs 1 and 2 by 2, 3.

    R = C = diag(1 + 4, 9), N = diag(1 + 8, 27): ACTMat, its mirror, and all between agree.
    """
    deltas = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]])
    expected = torch.tensor([[9 / 5, 0.0], [0.0, 3.0]])
    for name in ["actmat", *MEMBERS]:
        assert_close(merging.create(name)(deltas), expected)


def test_experts_that_share_an_output_but_no_input():
    """D_1 = e_1 e_1^T, D_2 = 2 e_1 e_2^T: R = (5), C = diag(1, 4), N = e_1 (1, 8)^T.

    The input side tells them apart, the output side averages by strength.
    """
    deltas = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    half = (5 * torch.tensor([1.0, 4.0])) ** 0.5
    cases = {
        "actmat": [1.0, 2.0],
        "mirror": [1 / 5, 8 / 5],
        "symmetric": [1 / half[0], 8 / half[1]],
        "sylvester": [2 / (5 + 1), 16 / (5 + 4)],
    }
    for name, expected in cases.items():
        assert_close(merging.create(name)(deltas), torch.tensor([expected]))
    assert_close(family(mean="maximum")(deltas), torch.tensor([[1 / 5, 8 / 5]]))
    assert_close(family(a=0.25)(deltas)[0, 0], torch.tensor(5**-0.25))


# --- what the family contains ---------------------------------------------------------------------


@some
@given(deltas=problems())
def test_its_ends_are_actmat_and_actmat_of_the_transposes(deltas):
    actmat = merging.create("actmat")
    assert_close(family(a=0.0)(deltas), actmat(deltas))
    assert_close(merging.create("mirror")(deltas), actmat(deltas.mT).mT)
    # the general route comes to the same as the solver of one side
    for a in (0.0, 1.0):
        general = family(a=a, filter="ridge", lam=0.0)(deltas)
        assert_close(general, family(a=a)(deltas), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 12, 9), (2, 5, 11), (4, 9, 9)])
def test_tsv_m_is_the_symmetric_member_of_power_0_on_truncated_experts(shape):
    deltas = 50 * (stack(shape[0], shape[1:], 3) + stack(1, shape[1:], 4)).double()
    member = family(a=0.5, p=0.0, truncate=True)
    assert_close(member(deltas), merging.create("tsv_m")(deltas), rtol=1e-7, atol=1e-9)


@some
@given(deltas=problems(), a=st.floats(0, 1), mean=st.sampled_from(MEANS))
def test_transposing_swaps_the_sides(deltas, a, mean):
    there, back = family(a=a, mean=mean)(deltas), family(a=1 - a, mean=mean)(deltas.mT)
    assert_close(there, back.mT, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mean", MEANS)
def test_one_expert_equal_ones_and_ones_that_share_nothing(mean, p):
    D, E = stack(2, (4, 3), 1).double()
    blocks = torch.stack([torch.block_diag(D, 0 * E), torch.block_diag(0 * D, E)])
    for a in (0.0, 0.3, 1.0):
        method = family(a=a, mean=mean, p=p)
        assert_close(method(D[None]), D)
        assert_close(method(torch.stack([D, D, D])), D)
        if mean == "geometric" or p == 0:
            continue
        assert_close(method(blocks), torch.block_diag(D, E))
    assert_close(family(p=p)(blocks), torch.block_diag(D, E))


# --- bounds ---------------------------------------------------------------------------------------


@some
@given(deltas=problems(), p=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_middle_never_moves_further_than_one_expert(deltas, p):
    bound = torch.linalg.matrix_norm(deltas, 2).max() * (1 + 1e-6)
    assert torch.linalg.matrix_norm(family(a=0.5, p=p)(deltas), 2) <= bound
    assert torch.linalg.matrix_norm(family(mean="arithmetic", p=p)(deltas), 2) <= bound


OPPOSED = torch.tensor([[[1.0, 0.1]], [[-1.0, 0.1]]])  # |D_t| = 1.005


def test_the_ends_do():
    """x with x d_t = |d_t|^2 for both nearly opposite experts is (0, 10.1)."""
    assert_close(merging.create("actmat")(OPPOSED), torch.tensor([[0.0, 10.1]]))
    assert_close(merging.create("mirror")(OPPOSED.mT), torch.tensor([[0.0], [10.1]]))
    assert_close(family()(OPPOSED), torch.tensor([[0.0, 0.1 * 2 * 1.01 / (2.02 * 0.02) ** 0.5]]))


@some
@given(deltas=problems())
def test_the_arithmetic_mean_is_no_larger_in_any_norm(deltas):
    """Weak majorisation: each sum of largest singular values (Ky Fan's norms) is no larger."""
    larger, smaller = (
        torch.linalg.svdvals(family(mean=mean)(deltas)).cumsum(0) for mean in MEANS[:2]
    )
    assert (smaller <= larger * (1 + 1e-6) + 1e-9).all()


@some
@given(deltas=problems(), a=st.sampled_from([0.0, 0.5, 1.0]))
def test_what_the_bound_keeps_is_no_longer_than_the_experts_are_together(deltas, a):
    merged = family(a=a, filter="bound")(deltas)
    R, C = (deltas @ deltas.mT).sum(0), (deltas.mT @ deltas).sum(0)
    for S, X in ((R, merged.mT), (C, merged)):
        l, V = torch.linalg.eigh(S)
        assert ((X @ V).square().sum(0) <= 1.02 * l + 1e-4 * l.max()).all()


def test_the_bound_falls_back_on_its_anchor():
    bound = family(a=0.0, filter="bound", anchor="average")
    assert_close(bound(OPPOSED), torch.tensor([[0.0, 0.1]]))
    assert_close(bound(OPPOSED[:1]), OPPOSED[0])  # one expert reaches the bound and stays
    assert_close(family(a=0.0, filter="bound")(OPPOSED), torch.zeros(1, 2))


# --- objectives and limits ------------------------------------------------------------------------


@some
@given(deltas=problems(), a=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_arithmetic_mean_has_the_least_interference_of_both_sides(deltas, a, seed):
    def objective(X):
        E = X - deltas
        inputs, outputs = (E @ deltas.mT).square().sum(), (deltas.mT @ E).square().sum()
        return a * outputs + (1 - a) * inputs

    merged = family(a=a, mean="arithmetic", rtol=1e-12)(deltas)
    step = torch.randn(merged.shape, generator=torch.Generator().manual_seed(seed)).to(merged)
    for size in (1e-1, 1e-3):
        assert objective(merged) <= objective(merged + size * step) * (1 + 1e-9) + 1e-12


def test_the_arithmetic_mean_solves_the_sylvester_equation():
    deltas = stack(3, (6, 5), 2).double() * 50
    R, C, N = (deltas @ deltas.mT).sum(0), (deltas.mT @ deltas).sum(0), 0
    N = (deltas @ deltas.mT @ deltas).sum(0)
    D = merging.create("sylvester")(deltas)
    assert_close(R @ D + D @ C, 2 * N, rtol=1e-7, atol=1e-7)


def test_a_ridge_goes_from_the_member_to_its_anchor():
    deltas = stack(3, (6, 5), 2).double()
    ridge = {"filter": "ridge", "anchor": "average"}
    assert_close(family(lam=1e-9, **ridge)(deltas), family()(deltas), rtol=1e-4, atol=1e-6)
    assert_close(family(lam=1e9, **ridge)(deltas), deltas.mean(0), rtol=1e-4, atol=1e-8)


def test_effective_rank_keeps_the_leading_directions_of_both_sides():
    deltas = torch.diag(torch.tensor([4.0, 4.0, 0.01])).expand(2, 3, 3).clone()
    merged = family(filter="effective_rank")(deltas)
    assert_close(merged, torch.diag(torch.tensor([4.0, 4.0, 0.01])))  # K = ceil(2.005) = 3
    deltas[:, 2, 2] = 0
    assert_close(family(filter="effective_rank")(deltas), deltas[0])


@pytest.mark.parametrize("shape", [(2, 6, 9), (3, 9, 6)])
@pytest.mark.parametrize("name", ["ledoit_wolf", "oas"])
def test_shrunk_moments_are_the_interference_familys_at_either_end(name, shape):
    deltas = 20 * (stack(shape[0], shape[1:], 3) + stack(1, shape[1:], 4)).double()
    one_sided = merging.create(name)
    assert_close(family(a=0.0, estimator=name)(deltas), one_sided(deltas), rtol=1e-6, atol=1e-9)
    mirror = family(a=1.0, estimator=name)(deltas)
    assert_close(mirror, one_sided(deltas.mT).mT, rtol=1e-6, atol=1e-9)


def test_shrunk_moments_in_the_middle_against_the_plain_formula():
    """R_t = r_t D_t D_t^T + q_t I and C_t likewise, powers and sums written out."""
    deltas = 20 * (stack(3, (5, 7), 3) + stack(1, (5, 7), 4)).double()

    def power(S, exponent):
        l, V = torch.linalg.eigh(S)
        return V @ torch.diag(l**exponent) @ V.mT

    def moments(samples):
        found = covariance.estimate("oas", samples, samples.shape[2], 1.0)
        identity = torch.eye(samples.shape[2]).to(samples)
        return [
            r * x.mT @ x + q * identity
            for x, r, q in zip(samples, found.scale, found.ridge, strict=True)
        ]

    R, C = moments(deltas.mT), moments(deltas)
    N = sum(power(r, 0.25) @ D @ power(c, 0.75) for r, D, c in zip(R, deltas, C, strict=True))
    expected = power(sum(R), -0.25) @ N @ power(sum(C), -0.75)
    merged = family(a=0.25, estimator="oas")(deltas)
    assert_close(merged, expected, rtol=1e-7, atol=1e-9)
    assert not merging.create("both_sides", estimator="oas").row_space


def test_gavish_donoho_drops_noise_on_both_sides():
    signal = torch.zeros(2, 30, 20).double()
    signal[:, 0, 0] = 5.0
    noise = stack(2, (30, 20), 1).double() / 0.02
    merged = family(filter="gavish_donoho")(signal + 0.01 * noise)
    assert torch.linalg.matrix_rank(merged, rtol=1e-6) == 1
    assert merged[0, 0] == pytest.approx(5.0, abs=0.05)


@pytest.mark.parametrize("choices", [{}, {"mean": "arithmetic"}, {"a": 1.0}, {"p": 0.0}])
def test_weights_count_as_repetitions(choices):
    deltas, method = stack(2, (5, 4), 8).double(), family(**choices)
    repeated = method(deltas[[0, 0, 0, 1]])
    assert_close(method(deltas, weights=torch.tensor([3.0, 1.0])), repeated, rtol=1e-5, atol=1e-8)


def test_inverse_norms_take_an_experts_size_out_of_its_say():
    deltas = stack(3, (5, 4), 8).double()
    large = deltas * torch.tensor([1, 1, 100.0]).view(3, 1, 1)
    method = family(task_weight="inverse_norm", mean="arithmetic")
    others = method(large) - method(large * torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1))
    assert others.norm() > 0.1 * deltas[:2].norm()
    plain = family(mean="arithmetic")
    swamped = plain(large) - plain(large * torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1))
    assert swamped.norm() < others.norm()


# --- routes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MEMBERS, "both_sides"])
def test_own_rank_gives_what_the_full_matrices_give(name):
    """As the engine merges adapters: in orthonormal bases of all rows and all columns."""
    method = merging.create(name)
    assert method.row_space and method.column_space
    core, P, Q = stack(3, (6, 5), 5).double(), rotation(20, 1)[:, :6], rotation(14, 2)[:, :5]
    wide = method(P @ core @ Q.mT)
    assert_close(P @ method(core, d_out=20, d_in=14) @ Q.mT, wide, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(300, 280), (420, 260), (260, 420)])
def test_float32_agrees_with_float64_on_layers_wider_than_what_is_computed_in_double(shape):
    deltas = stack(3, shape, 6) + stack(1, shape, 7)
    for choices in ({}, {"mean": "arithmetic"}, {"a": 1.0}, {"a": 0.75}):
        found, exact = family(**choices)(deltas), family(**choices)(deltas.double())
        assert (found - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"a": 1.5}, "a = 1.5 is not a share"),
        ({"mean": "median"}, "median"),
        ({"filter": "gain"}, "gain"),
        ({"estimator": "trimmed"}, "trimmed"),
    ],
)
def test_unknown_choices_are_refused(choices, told):
    with pytest.raises(InputError, match=told):
        family(**choices)(stack(2, (3, 3)))

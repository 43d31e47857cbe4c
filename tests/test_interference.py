"""The interference family: cases by hand, limits, laws. Plain formulas: test_reference.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import covariance as sklearn_covariance

from merging import InputError, create
from merging.linalg import eigh, gram, row_space, solve_positive
from merging.method import covariance
from merging.method.equations import spectral_filter


def deltas(T=3, d_out=6, d_in=10, seed=0, rank=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(T, d_out, d_in, generator=g, dtype=dtype)
    left = torch.randn(T, d_out, rank, generator=g, dtype=dtype)
    return left @ torch.randn(T, rank, d_in, generator=g, dtype=dtype)


def moments(T=3, n=50, d_in=10, seed=1):
    z = torch.randn(T, n, d_in, generator=torch.Generator().manual_seed(seed))
    return z.mT @ z / n


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


CUT = ["actmat", "bounded", "actmat_centred", "tact", "wudi_closed", "swudi", "aswudi", "regmean"]
SMOOTH = ["ridge", "oas", "ledoit_wolf", "anchored", "wudi"]


def test_by_hand_two_orthogonal_tasks():
    # D_1 only reads the first input, D_2 only the second: no interference, so both are kept
    D = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
    assert torch.allclose(create("actmat")(D), torch.tensor([[2.0, 3.0]]))
    # one shared input direction: (2 * 4 + 3 * 9) / (4 + 9), the moment-weighted mean
    D = torch.tensor([[[2.0, 0.0]], [[3.0, 0.0]]])
    assert torch.allclose(create("actmat")(D), torch.tensor([[35 / 13, 0.0]]))
    assert torch.allclose(create("wudi_closed")(D), torch.tensor([[2.5, 0.0]]))
    C = torch.stack([torch.diag(torch.tensor([1.0, 1.0])), torch.diag(torch.tensor([3.0, 1.0]))])
    assert torch.allclose(create("regmean")(D, covariances=C), torch.tensor([[11 / 4, 0.0]]))
    # ridge: 35 / (13 + 13)
    assert torch.allclose(create("ridge", lam=13.0)(D), torch.tensor([[35 / 26, 0.0]]))


def test_what_is_stretched_too_far_is_left_to_the_anchor():
    # The tasks read inputs (1, a) and (1, -a), nearly the same. To tell them apart the solution
    # moves (0, 1) by (1 + a^2) / (a sqrt 2), where each task moves it by a.
    a = 0.1
    D = torch.tensor([[[1.0, a], [0.0, 0.0]], [[0.0, 0.0], [1.0, -a]]])
    shared, apart = (1 + a**2) / 2, (1 + a**2) / (2 * a)
    both = torch.tensor([[shared, apart], [shared, -apart]])
    assert torch.allclose(create("actmat")(D), both)
    for anchor in ("zero", "average", "tsv_m"):
        kept = create("interference", filter="gain", anchor=anchor)(D)
        assert torch.allclose(kept[:, 0], both[:, 0])
        other = 0 * both if anchor == "zero" else create(anchor)(D)
        assert torch.allclose(kept[:, 1], other[:, 1])
    named = create("interference", filter="gain", anchor="tsv_m")
    assert torch.equal(create("bounded")(D), named(D))


@pytest.mark.parametrize(
    "name", ["actmat", "wudi_closed", "oas", "ledoit_wolf", "swudi", "mats", "bounded"]
)
@pytest.mark.parametrize("rank", [None, 2])
def test_one_task_returns_the_expert(name, rank):
    D = deltas(1, rank=rank)
    assert relative(create(name)(D, covariances=moments(1)), D[0]) < 1e-5


@pytest.mark.parametrize(
    "name", ["actmat", "bounded", "wudi_closed", "oas", "regmean", "tact", "anchored"]
)
def test_equal_covariances_give_the_average_and_equal_deltas_themselves(name):
    D = deltas()
    same = moments(1).expand(3, -1, -1)
    assert relative(create("regmean")(D, covariances=same), D.mean(0)) < 1e-5
    assert relative(create("interference", estimator="identity")(D), D.mean(0)) < 1e-6
    equal = D[:1].expand(3, -1, -1)
    if name not in {"tact", "anchored"}:
        assert relative(create(name)(equal, covariances=moments()), equal[0]) < 1e-5


def test_filters_have_their_limits():
    D = deltas(3, 12, 7).double()
    pinv = create("actmat", rtol=1e-12)(D)
    assert relative(create("ridge", lam=1e-12)(D), pinv) < 1e-6
    anchor = D.mean(0)
    assert relative(create("anchored", lam=1e12, anchor="average")(D), anchor) < 1e-6
    assert relative(create("anchored", lam=1e-12, anchor="average")(D), pinv) < 1e-6
    assert relative(create("swudi", t=1e9, rho=1.0)(D), create("wudi_closed")(D)) < 1e-6
    assert relative(create("swudi", t=0.0)(D), D.sum(0)) < 1e-12
    gd = create("wudi", steps=20_000, lr=1e-3)(D)
    assert relative(gd, create("wudi_closed")(D)) < 1e-3


@given(
    T=st.integers(1, 4), d_out=st.integers(1, 8), d_in=st.integers(2, 12), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=25)
def test_the_solution_has_the_least_interference(T, d_out, d_in, seed):
    D = deltas(T, d_out, d_in, seed, dtype=torch.float64)

    def interference(X):
        return ((X - D) @ D.mT).square().sum()

    best = create("actmat", rtol=1e-12)(D)
    g = torch.Generator().manual_seed(seed)
    for _ in range(5):
        step = torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
        assert interference(best) <= interference(best + 1e-2 * step) * (1 + 1e-9) + 1e-12


@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=25)
def test_scale_and_rotation_equivariance(seed, scale):
    D = deltas(3, 5, 8, seed, dtype=torch.float64)
    Q = torch.linalg.qr(deltas(1, 8, 8, seed + 1, dtype=torch.float64)[0])[0]
    P = torch.linalg.qr(deltas(1, 5, 5, seed + 2, dtype=torch.float64)[0])[0]
    for name in ["actmat", "bounded", "wudi_closed", "oas", "ledoit_wolf", "aswudi"]:
        m = create(name)
        assert relative(m(scale * D), scale * m(D)) < 1e-6
        assert relative(m(D @ Q), m(D) @ Q) < 1e-6
        if name != "ledoit_wolf":  # its shrinkage looks at the norms of single rows
            assert relative(m(P @ D), P @ m(D)) < 1e-6
    relative_ridge = create("ridge", lam=0.1, relative=True)
    assert relative(relative_ridge(scale * D), scale * relative_ridge(D)) < 1e-6


@pytest.mark.parametrize("name", ["actmat", "wudi_closed", "swudi", "aswudi", "ridge", "oas"])
def test_wide_layers_take_the_row_space_route_to_the_same_result(name):
    D = deltas(2, 3, 40)  # 6 rows in 40 dimensions
    Q = row_space(D)
    assert Q.shape == (40, 6)
    narrow = create(name)(D @ Q, d_in=40) @ Q.T
    assert relative(narrow, create(name)(D)) < 1e-5


def test_degenerate_layers_stay_finite():
    zero = torch.zeros(2, 4, 6)
    one_zero = torch.cat([deltas(1, 4, 6), zero[:1]])
    for name in [*CUT, *SMOOTH]:
        C = moments(2, d_in=6)
        assert torch.equal(create(name)(zero, covariances=C), zero[0]), name
        assert create(name)(one_zero, covariances=C).isfinite().all(), name


@pytest.mark.parametrize("n, p", [(30, 8), (8, 30), (60, 60)])
def test_shrinkage_is_scikit_learns(n, p):
    x = deltas(1, n, p, dtype=torch.float64)
    est = covariance.estimate("ledoit_wolf", x, p, 1.0)
    expected, r = sklearn_covariance.ledoit_wolf(x[0].numpy(), assume_centered=True)
    ours = est.scale * x[0].T @ x[0] + est.ridge * torch.eye(p)
    assert 1 - est.scale.item() == pytest.approx(r, rel=1e-9)
    assert relative(ours / n, torch.from_numpy(expected)) < 1e-9
    # scikit-learn leaves out OAS's 2 / p terms: equal up to O(1 / p)
    r = sklearn_covariance.oas(x[0].numpy(), assume_centered=True)[1]
    assert 1 - covariance.estimate("oas", x, p, 1.0).scale.item() == pytest.approx(r, rel=4 / p)


def test_spectral_filters_by_hand():
    l = torch.tensor([4.0, 1.0, 1e-9, 0.0])
    assert spectral_filter("cut", l, d_in=4).tolist() == [1, 1, 0, 0]
    assert spectral_filter("cut", l, d_in=4, rtol=0.5).tolist() == [1, 0, 0, 0]
    # (2 + 1)^2 / 5 = 1.8, so two directions
    assert spectral_filter("effective_rank", l, d_in=4).tolist() == [1, 1, 0, 0]
    half = spectral_filter("exponential", l, d_in=4, t=math.log(2), rho=0.5).tolist()
    assert half == pytest.approx([1 - 2**-4, 0.5, 0, 0])


def test_linalg_routes():
    x = deltas(1, 30, 6, dtype=torch.float64)[0]
    assert torch.equal(gram(x), gram(x).T) and relative(gram(x), x.T @ x) < 1e-14
    values, vectors = eigh(gram(x))
    assert (values.diff() <= 0).all()
    assert relative(vectors * values @ vectors.T, x.T @ x) < 1e-13
    right = deltas(1, 4, 6, dtype=torch.float64)[0]
    assert relative(solve_positive(right, gram(x)), right @ torch.linalg.inv(x.T @ x)) < 1e-10
    assert solve_positive(right, torch.zeros(6, 6, dtype=torch.float64)) is None
    assert solve_positive(right, gram(x[:3])) is None  # singular: 3 rows in 6 dimensions


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"estimator": "guess"}, "unknown covariance estimator 'guess'"),
        ({"filter": "guess"}, "unknown filter 'guess'"),
        ({"task_weight": "guess"}, "unknown task weight 'guess'"),
        ({"anchor": "guess"}, "unknown method 'guess'"),
    ],
)
def test_unknown_choices_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        create("interference", **arguments)(deltas())


def test_statistics_are_asked_for_and_checked():
    with pytest.raises(InputError, match="needs covariances"):
        create("regmean")(deltas())
    with pytest.raises(InputError, match="expected covariances of shape"):
        create("regmean")(deltas(), covariances=moments(2))
    assert create("interference", estimator="inputs").needs == "covariance"
    assert create("actmat").needs is None

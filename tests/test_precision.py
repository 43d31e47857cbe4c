"""Wide layers: what is computed in float32 solves the problem that float64 solves.

Widths on both sides of 1,024, above which equations are set up and solved in float32 where that
can tell what is asked of it. Few rows keep it fast, in the layer's own width all the same.
"""

import pytest
import torch

import merging

ROWS = 40


def draw(width, spectrum):
    """Three deltas (3, ROWS, width) with a spectrum that no coordinate shows."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(width) / width
    scale = {
        "gap": torch.where(place < 0.02, 1.0, 1e-4),
        "decay": 10 ** (-100 * place),
        "outlier": torch.where(place < 1 / width, 1000.0, 1.0),
        "low rank": (torch.arange(width) < 8).float(),
    }[spectrum]
    deltas = 2e-4 * scale * torch.randn(3, ROWS, width, generator=generator)
    for _ in range(2):  # reflections
        v = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        deltas -= 2 * (deltas @ v)[..., None] * v
    return deltas


def error(name, deltas, **hyperparameters):
    """Of float32 against float64; `d_in` keeps the merge out of the deltas' narrow row space."""
    method, width = merging.create(name, **hyperparameters), deltas.shape[-1]
    expected = method(deltas.double(), d_in=width)
    return ((method(deltas, d_in=width) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("spectrum", ["gap", "decay", "outlier", "low rank"])
@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("actmat", {}), ("actmat", {"rtol": 1e-9}), ("aswudi", {}), ("bounded", {}),
        ("ridge", {}), ("ridge", {"lam": 1e-9}), ("ridge", {"lam": 1e-3, "relative": True}),
        ("anchored", {}), ("oas", {}), ("ledoit_wolf", {}), ("tsv_m", {}), ("iso_c", {}),
        ("ace", {}), ("ace", {"eps": 1e-12}), ("svc", {}),
    ],
)  # fmt: skip
def test_float32_gives_what_float64_gives(name, hyperparameters, spectrum):
    assert error(name, draw(512, spectrum), **hyperparameters) < 2e-3


@pytest.mark.parametrize("name", ["ridge", "anchored", "oas", "ledoit_wolf"])
def test_a_ridge_is_kept_where_float32_cannot_solve_the_system(name):
    assert error(name, draw(1100, "outlier")) < 1e-5


@pytest.mark.parametrize(("name", "hyperparameters"), [("swudi", {}), ("ace", {"eps": 1e-2})])
def test_smooth_filters_and_priors_agree_beyond_the_width_of_float64(name, hyperparameters):
    assert error(name, draw(1100, "decay"), **hyperparameters) < 1e-3


def test_a_ridge_below_what_float64_can_factor_keeps_the_anchor_where_nothing_moved():
    deltas = draw(64, "low rank").double()
    merged = merging.create("anchored", lam=1e-30, anchor="sum")(deltas, d_in=64)
    # the limit: ACTMat in the span of the deltas, beyond it the anchor, which is 0 there
    expected = merging.create("actmat")(deltas)
    assert (merged - expected).norm() < 1e-6 * expected.norm()


def test_an_effective_rank_counts_no_rounding():
    """Eight equal eigenvalues, of which rounding in float32 makes a ninth."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(3, 200, 8, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(512, 8, generator=generator))[0]
    assert error("aswudi", left @ right.mT) < 1e-5


def test_conjugate_gradients_in_the_eigenbasis_end_where_those_on_matrices_do():
    """Beyond the width that is solved in float64 the steps are products with the matrix itself."""
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, 8, 1030, generator=generator)
    inputs = torch.randn(2, 1100, 1030, generator=generator)
    covariances = inputs.mT @ inputs / 1100
    method = merging.create("mats")
    found = method(deltas, covariances=covariances)
    exact = method(deltas.double(), covariances=covariances.double())
    assert (found - exact).norm() < 1e-5 * exact.norm()

"""Every method against its plain float64 formula, at its defaults and beside them."""

import doctest
import inspect

import pytest
import torch

import merging
from merging.method import interference
from merging.method.reference import RANDOM, TEXTBOOK
from tests.test_method_properties import stack, statistics

SHAPES = [(2, 12, 12), (3, 9, 15), (3, 16, 7), (4, 12, 7), (2, 3, 40), (5, 9, 9), (3, 24, 16)]
SINGLE = 1e-4  # relative error of a merge in float32: a cut falls on rounding
# conjugate gradients and a refinement of small singular values keep fewer digits than float64 has
DOUBLE = {"mats": 1e-5, "kfac": 1e-5, "kfac_regmean": 1e-5, "ace": 1e-7}

PLACE = ("depth", "in_block")  # of a tensor, which the engine tells
OTHER_SETTINGS = [
    ("actmat", {"rtol": 0.2}),
    ("ace", {"eps": 0.04, "gamma": 0.01, "k": 0.6}),
    ("anchored", {"lam": 0.02}),
    ("breadcrumbs", {"beta": 0.5, "gamma": 0.1}),
    ("cart", {"scale": 0.5, "share": 0.3}),
    ("core_space", {"of": "average"}),
    ("core_space", {"of": "tsv_m"}),
    ("ctm", {"beta": 0.6, "rank": 3}),
    ("ctm", {"rank": 2, "of": "sum"}),
    ("dc_merge", {"k": 0.2, "rank": 2}),
    ("pico", {"of": "tsv_m"}),
    ("breadcrumbs", {"beta": 0.5, "gamma": 0.1, "scope": "row"}),
    ("breadcrumbs_ties", {"beta": 0.5, "gamma": 0.1, "merge": "sum"}),
    ("consensus", {"lam": 0.6, "agree": 1}),
    ("consensus_ta", {"lam": 0.6, "agree": 1}),
    ("fisher", {"floor": 0.4}),
    ("consensus_ties", {"k": 0.5, "lam": 0.6}),
    ("ct_merging", {"support": 0.8, "rank": 2}),
    ("iso_merger", {"keep": 0.5}),
    ("iso_cts", {"common": 0.5}),
    ("knots", {"k": 0.7}),
    ("knots", {"merge": "tsv_m", "values": "after"}),
    ("knots", {"merge": "iso_c", "values": "after"}),
    ("knots", {"values": "after"}),
    ("lines", {"depth": 0.5, "start": 0.2, "beta": 0.3}),
    ("lines", {"depth": 1.0, "in_block": False, "after": "start"}),
    ("optmerge", {"lr": 0.05, "momentum": 0.5}),
    ("ram", {"eps": 0.1, "r": 0.5, "cap": 3.0}),
    ("sce", {"k": 0.4}),
    ("pcb", {"ratio": 0.25}),
    ("polarised", {"of": "iso_c"}),
    ("pcb", {"clip": 0.1}),
    ("regmean", {"gram_scale": 0.9}),
    ("regmean_outputs", {"rtol": 0.2}),
    ("kfac", {"task_weight": "inverse_norm", "damping": 0.01, "steps": 20}),
    ("kfac_regmean", {"damping": 0.1, "steps": 5}),
    ("ridge", {"lam": 0.3, "relative": True}),
    ("star", {"eta": 0.9}),
    ("subspace_boosting", {"beta": 0.3}),
    ("svc", {"floor": 0.2}),
    ("svc", {"floor": None}),
    ("swudi", {"t": 3.0, "rho": 0.4}),
    ("tact", {"k": 0.3}),
    ("ties", {"k": 0.1}),
    ("ties", {"k": 0.7, "merge": "sum"}),
    ("ties", {"k": 1.0}),
    ("ties", {"k": 0.3, "cancelled": "majority"}),
]


def compared(name, deltas, **settings):
    """The library's merge in float32 and float64, and the plain formula's in float64."""
    hyper = {k: v for k, v in settings.items() if k not in PLACE}
    hyper |= {"steps": 20} if name == "wudi" else {}
    context = {k: v for k, v in settings.items() if k in PLACE}
    method, wide = merging.create(name, **hyper), deltas.double()
    needed = {"covariance": ["covariances"], "fisher": ["fishers"]}.get(method.needs, [])
    needed = ["covariances", "gradients"] if method.needs == "kfac" else needed
    measured = {k: v for k, v in statistics(deltas).items() if k in needed}
    measured_wide = {k: v.double() for k, v in measured.items()}
    if "base" in inspect.signature(TEXTBOOK[name]).parameters:
        measured_wide["base"] = 5 * stack(1, deltas.shape[1:], seed=50)[0].double()
        measured["base"] = measured_wide["base"].float()
    merged = method(deltas, **measured, **context)
    assert merged.dtype == torch.float32
    expected = TEXTBOOK[name](wide, **measured_wide, **hyper, **context)
    return merged, method(wide, **measured_wide, **context), expected


def related(T, shape, seed):
    """Deltas (T, *shape) of one size that share a part, float32."""
    return 5 * (stack(T, shape, seed) + 0.5 * stack(1, shape, seed + 100))


def check(name, deltas, **settings):
    merged, wide, expected = compared(name, deltas, **settings)
    assert (merged - expected).norm() <= SINGLE * expected.norm()
    assert (wide - expected).norm() <= DOUBLE.get(name, 1e-8) * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(set(TEXTBOOK) - RANDOM))
def test_agrees_with_the_plain_formula(name, shape):
    check(name, related(shape[0], shape[1:], seed=shape[0]))


@pytest.mark.parametrize(("name", "settings"), OTHER_SETTINGS)
def test_hyperparameters_reach_the_formula(name, settings):
    check(name, related(3, (10, 14), seed=7), **settings)


@pytest.mark.parametrize("shape", [(30, 20), (12, 40)])
def test_directions_above_noise_of_unknown_size_are_kept(shape):
    left, right = stack(3, (shape[0], 2)), stack(1, (2, shape[1]), seed=1)
    deltas = 50 * left @ right + 0.01 * stack(3, shape, seed=2)
    check("aswudi", deltas, filter="gavish_donoho")
    merged = merging.create("aswudi", filter="gavish_donoho")(deltas)
    assert torch.linalg.matrix_rank(merged, rtol=1e-4) == 2


@pytest.mark.parametrize("shape", [(10, 7), (10, 10), (20, 13)])
def test_ace_on_tasks_of_very_different_size(shape):
    check("ace", 0.5 * stack(3, shape) * torch.tensor([1, 30, 1e-3]).view(3, 1, 1))


@pytest.mark.parametrize(("rows", "size"), [(3, 3), (40, 1)])
def test_ace_on_layers_of_fewer_directions_than_inputs(rows, size):
    """R is eps there in most directions, of which its entries in float32 tell nothing."""
    check("ace", size * stack(2, (rows, 600)))


def test_mats_takes_layers_that_are_stored_the_other_way_round():
    """As wide ones of GPT-2 are: what is merged lies transposed in memory."""
    deltas, (C,) = 5 * stack(2, (4, 1100)), stack(1, (1100, 1100), seed=1)
    covariances = (C @ C.mT / 1100 + torch.eye(1100)).expand(2, -1, -1)
    turned = deltas.mT.contiguous().mT
    method = merging.create("mats")
    torch.testing.assert_close(
        method(turned, covariances=covariances), method(deltas, covariances=covariances)
    )


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_masks_agree_on_the_mean(name):
    ones = torch.ones(1, 400, 400)
    torch.manual_seed(0)
    merged, printed = merging.create(name)(ones), TEXTBOOK[name](ones)
    assert merged.shape == printed.shape
    assert merged.mean().item() == pytest.approx(printed.mean().item(), rel=0.05)


def test_actmats_file_opens_with_code_that_is_actmat():
    deltas = stack(3, (9, 6)).double()
    names = {"D": deltas, "torch": torch}
    example = doctest.DocTestParser().get_doctest(interference.__doc__, names, "actmat", None, None)
    assert len(example.examples) == 2
    doctest.DocTestRunner().run(example, clear_globs=False)
    merged = merging.create("actmat")(deltas)
    assert (merged - example.globs["merged"]).norm() < 1e-10 * merged.norm()

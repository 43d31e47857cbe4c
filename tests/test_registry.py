"""Names, hyperparameters and what the engine is told of a method."""

import re

import pytest
import torch

import merging
from merging import InputError, create

NAMES = {
    "average", "task_arithmetic", "ties", "dare", "breadcrumbs", "fisher", "data_free_fisher",
    "regmean", "regmean_pp", "actmat", "actmat_centred", "tact", "ace", "wudi", "wudi_closed",
    "swudi", "aswudi", "ridge", "anchored", "ledoit_wolf", "oas", "mats", "tsv_m", "iso_c",
    "iso_cts", "knots",
}  # fmt: skip


def test_the_documented_names_are_registered():
    assert set(merging.methods()) >= NAMES
    assert merging.methods() == sorted(merging.methods())


def test_hyperparameters_are_resolved_and_limited():
    assert create("actmat").hyperparameters == {"rtol": None, "alpha": 1.0}
    assert create("swudi", t=1800).hyperparameters == {"t": 1800, "rho": 0.65, "alpha": 1.0}
    assert create("ridge", **{"lambda": 2.0}).hyperparameters["lam"] == 2.0
    assert create("task_arithmetic", **{"lambda": 0.4}).hyperparameters["alpha"] == 0.4
    with pytest.raises(InputError, match="no hyperparameter 'rho'") as error:
        create("actmat", rho=1)
    assert error.value.hint == "it takes: alpha, rtol"
    with pytest.raises(InputError, match="unknown method 'actmta'") as error:
        create("actmta")
    assert error.value.hint.startswith("did you mean 'actmat'?")


def test_alpha_scales_the_result():
    D = torch.randn(2, 3, 4)
    assert torch.allclose(create("actmat", alpha=0.5)(D), 0.5 * create("actmat")(D))


def test_data_use_follows_from_needs():
    uses = {name: create(name).data for name in ("actmat", "regmean", "fisher")}
    assert uses == {"actmat": "none", "regmean": "inputs", "fisher": "gradients"}


def test_unknown_context_is_refused():
    with pytest.raises(InputError, match="was called with \\['covariance'\\]"):
        create("actmat")(torch.randn(2, 3, 4), covariance=None)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        merging.register("actmat", source="")(lambda deltas: deltas[0])


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("tact", {"k": 1.5}, "k = 1.5 is not a share between 0 and 1"),
        ("swudi", {"rho": -0.1}, "rho = -0.1 is not a share between 0 and 1"),
        ("ridge", {"lam": -1e-4}, "lam = -0.0001 is not 0 or more"),
        ("actmat", {"rtol": -1}, "rtol = -1 is not 0 or more"),
        ("tsv_m", {"k": 0}, "k = 0 is not a whole number, 1 or more"),
        ("wudi", {"steps": 2.5}, "steps = 2.5 is not a whole number, 1 or more"),
        ("mats", {"steps": 2.5}, "steps = 2.5 is not a whole number"),
        ("dc_merge", {"rank": [1, 1.5]}, "rank = 1.5 is not a whole number, 1 or more"),
        ("dare", {"seed": -1}, "seed = -1 is not a whole number from 0 to"),
        ("della", {"seed": 2**64}, "seed = 18446744073709551616 is not a whole number from 0"),
        ("knots", {"seed": 0.5}, "seed = 0.5 is not a whole number from 0 to"),
        ("ties", {"k": None}, "k of method 'ties' is None, expected a number"),
        ("average", {"alpha": None}, "alpha of method 'average' is None, expected a number"),
        ("ties", {"k": [0.2, 1.2]}, "k = 1.2 is not a share between 0 and 1"),
    ],
)
def test_a_value_out_of_its_range_is_refused_when_the_method_is_made(name, values, told):
    with pytest.raises(InputError, match=re.escape(told)):
        merging.create(name, **values)


def test_every_default_lies_within_its_range():
    for name in merging.methods():
        merging.create(name, **merging.create(name).hyperparameters)

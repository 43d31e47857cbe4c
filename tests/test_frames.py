"""CT-Merging, ISO-Merger and polarised scaling: cases by hand and what each keeps."""

import math

import pytest
import torch
from torch.testing import assert_close

import merging
from merging import InputError
from tests.test_method_properties import stack


def diagonals(*rows):
    return torch.stack([torch.diag(torch.tensor(row).double()) for row in rows])


# --- CT-Merging -----------------------------------------------------------------------------------


def test_ct_merging_flattens_each_task_and_keeps_the_norms_between_them():
    deltas = diagonals([3.0, 1, 0, 0], [0, 0, 2.0, 0])  # share nothing; two triplets each at most
    expected = diagonals([5**0.5, 5**0.5, 2, 0])[0]
    assert_close(merging.create("ct_merging")(deltas), expected)
    assert_close(merging.create("ct_merging", rank=1)(deltas), diagonals([3.0, 0, 2, 0])[0])


def test_ct_merging_averages_what_both_tasks_share():
    deltas = diagonals([2.0, 3, 0, 0], [4.0, 0, 5, 0])
    expected = diagonals([(2 + 4) / 2, (13 / 2) ** 0.5, (41 / 2) ** 0.5, 0])[0]
    assert_close(merging.create("ct_merging")(deltas), expected)
    of_three = torch.cat([deltas, diagonals([0.0, 0, 0, 7])])  # one triplet each: 3, 5, 7
    assert_close(merging.create("ct_merging")(of_three), diagonals([0.0, 3, 5, 7])[0])
    # two of three are too few, so that both stand beside each other, each half of a direction
    alone = merging.create("ct_merging", rank=2, support=0.7)(of_three)
    assert_close(alone[0, 0].item(), ((13 / 2) ** 0.5 + (41 / 2) ** 0.5) / 2)


def test_ct_merging_of_equal_experts_is_the_expert():
    D = (stack(1, (6, 2)) @ stack(1, (2, 8), 1) / 0.02)[0]
    assert_close(merging.create("ct_merging")(torch.stack([D, D, D])), D, rtol=1e-4, atol=1e-7)


# --- ISO-Merger -----------------------------------------------------------------------------------

BASE = torch.diag(torch.tensor([3.0, 1.0])).double()


def turned(angle):
    """What turning the base's outputs changes."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]]).double() @ BASE - BASE


def test_iso_merger_turns_the_frame_as_far_as_its_tangent_says():
    """U_t - U_0 of a turn by x projects onto ((0, -sin x), (sin x, 0)), whose polar retraction
    turns by atan(sin x)."""
    iso = merging.create("iso_merger", keep=1.0)
    one = iso(turned(0.3)[None], base=BASE)
    assert_close(one, turned(math.atan(math.sin(0.3))))
    equal = iso(torch.stack([turned(0.3)] * 3), base=BASE)
    assert_close(equal, one)  # coefficients of 1/3 each
    opposite = iso(torch.stack([turned(0.3), turned(-0.3)]), base=BASE)
    assert_close(opposite, torch.zeros(2, 2).double())


def test_iso_merger_masks_the_trailing_vectors():
    s = math.sin(0.3)
    half = merging.create("iso_merger", keep=0.5)(turned(0.3)[None], base=BASE)
    P, _, Qh = torch.linalg.svd(torch.tensor([[1, 0], [s, 1]]).double())
    assert_close(half, P @ Qh @ BASE - BASE)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_iso_merger_keeps_the_bases_spectrum(shape):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    deltas = 20 * stack(3, shape).double()
    merged = merging.create("iso_merger")(deltas, base=base)
    assert merged.norm() > 0.1
    assert_close(torch.linalg.svdvals(base + merged), torch.linalg.svdvals(base))


def test_iso_merger_gets_the_base_from_the_engine_and_says_when_it_does_not():
    base = {"a.weight": BASE.float(), "b.weight": BASE.float()}
    experts = {"x": {k: v + turned(0.3).float() for k, v in base.items()}}
    layers = dict.fromkeys(base, merging.Layer())
    method = merging.create("iso_merger", keep=1.0)
    found = merging.merge_state_dicts(base, experts, method, layers=layers)
    assert_close(found["a.weight"], (BASE + turned(math.atan(math.sin(0.3)))).float())
    with pytest.raises(InputError, match="needs the base"):
        method(turned(0.3)[None])


# --- polarised scaling ----------------------------------------------------------------------------


def test_polarised_by_hand():
    """Norms 3 and 1: tasks count 9 / 4 and 1 / 4, then columns (27 / 14)^2 and (1 / 14)^2."""
    deltas = diagonals([3.0, 0], [0, 1.0])
    expected = diagonals([6.75 * (27 / 14) ** 2, 0.25 / 14**2])[0]
    assert_close(merging.create("polarised", of="sum")(deltas), expected)


def test_polarised_weighs_layers_of_one_shape():
    """Two layers of norms m and 3 m count (1/2)^2 and (3/2)^2, one of another shape itself."""
    D, E = diagonals([3.0, 0], [0, 1.0]).float(), stack(2, (2, 3))
    method = merging.create("polarised", of="sum")
    base = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2), "c": torch.zeros(2, 3)}
    experts = {f"{t}": {"a": D[t], "b": 3 * D[t], "c": E[t]} for t in range(2)}
    layers = dict.fromkeys(base, merging.Layer())
    found = merging.merge_state_dicts(base, experts, method, layers=layers)
    assert_close(found["a"], method(D) / 4)
    assert_close(found["b"], 3 * method(D) * 9 / 4)
    assert_close(found["c"], method(E))

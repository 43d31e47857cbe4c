"""`sided`: the side on which experts overlap is chosen from their weights."""

import pytest
import torch
from torch.testing import assert_close

import merging
from merging.method.reference import TEXTBOOK
from merging.method.sided import overlaps_in_outputs

SHARED_INPUT = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
"""Two experts that write different outputs from one input."""


def deltas(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def test_by_hand():
    """C = diag(2, 0) has norm 2, R = I norm sqrt 2: inputs, N C^+ = half of each. Transposed, the
    experts write one output from different inputs: outputs, half of each again, where `balanced`,
    which knows inputs alone, adds them up."""
    half = SHARED_INPUT.sum(0) / 2
    assert not overlaps_in_outputs(SHARED_INPUT)
    assert_close(merging.create("sided")(SHARED_INPUT), half)
    other = SHARED_INPUT.mT
    assert overlaps_in_outputs(other)
    assert_close(merging.create("sided")(other), half.mT)
    assert_close(merging.create("balanced")(other), 2 * half.mT)


@pytest.mark.parametrize("shape", [(3, 9, 5), (3, 5, 9), (1, 6, 6)])
def test_the_transposed_layer_is_merged_alike(shape):
    D = deltas(*shape)
    assert_close(merging.create("sided")(D.mT), merging.create("sided")(D).mT)


def test_the_side_is_that_of_the_larger_mean_overlap():
    """The norms of the sums against the pairs' inner products, both ways round."""
    for seed in range(8):
        D = deltas(4, 6, 7, seed=seed) + 2 * deltas(1, 6, 1, seed=9) * deltas(4, 1, 7, seed=seed)
        E = D / D.flatten(1).norm(dim=1).view(-1, 1, 1)
        R, C = E @ E.mT, E.mT @ E
        pairs = [(s, t) for s in range(4) for t in range(4) if s != t]
        outputs, inputs = (sum((M[s] * M[t]).sum() for s, t in pairs) for M in (R, C))
        assert overlaps_in_outputs(D) == bool(outputs > inputs)
        assert overlaps_in_outputs(D.mT) == bool(inputs > outputs)


def test_adapters_with_an_a_of_their_own_overlap_in_outputs():
    """B_t of one column space, A_t drawn anew for each: rows say nothing of the inputs; with one A
    for all it is the other way round."""
    B = deltas(5, 40, 4, seed=1) * 0.3 + deltas(1, 40, 4, seed=2)
    own, one = deltas(5, 4, 40, seed=3), deltas(1, 4, 40, seed=4).expand(5, 4, 40)
    assert overlaps_in_outputs(B @ own)
    assert not overlaps_in_outputs(deltas(5, 40, 4, seed=5) @ one)


def test_size_and_sign_of_an_expert_do_not_choose_the_side():
    D = deltas(3, 6, 8)
    scaled = D * torch.tensor([1.0, -30.0, 0.1]).view(-1, 1, 1)
    assert overlaps_in_outputs(scaled) == overlaps_in_outputs(D)


@pytest.mark.parametrize("outputs", [True, False])
def test_a_weight_of_0_takes_an_expert_out_of_the_choice(outputs):
    D = SHARED_INPUT.mT if outputs else SHARED_INPUT
    D = torch.cat([D, 2 * D[1:].mT])
    assert overlaps_in_outputs(D, torch.tensor([1.0, 1.0, 0.0])) == outputs


def test_agrees_with_the_plain_formula_where_either_side_is_chosen():
    for D in (deltas(3, 12, 8), deltas(3, 8, 12), deltas(3, 10, 10, seed=4)):
        assert_close(merging.create("sided")(D), TEXTBOOK["sided"](D), rtol=1e-6, atol=1e-8)

"""LiNeS and consensus masks on any merge."""

import pytest
import torch
from torch.testing import assert_close

import merging
from merging import InputError
from tests.test_method_properties import stack

MODEL = {"blocks.0.weight": stack(3, (6, 8)), "blocks.2.weight": 2 * stack(3, (5, 7), seed=1)}


def test_lines_on_another_merge_starts_at_the_length_of_the_sum():
    """|sum_t D_t| / |merge| over the whole model, over T, in the first block."""
    method, ties = merging.create("lines", of="ties", beta=0.5), merging.create("ties")
    inner = ties.prepare(lambda: iter(MODEL.items()))
    merges = {name: ties(deltas, **inner) for name, deltas in MODEL.items()}
    length = torch.cat([m.flatten() for m in merges.values()]).norm()
    summed = torch.cat([deltas.sum(0).flatten() for deltas in MODEL.values()]).norm()
    context = method.prepare(lambda: iter(MODEL.items()))
    for name, depth in (("blocks.0.weight", 0.0), ("blocks.2.weight", 1.0)):
        expected = (summed / length / 3 + 0.5 * depth) * merges[name]
        assert_close(method(MODEL[name], depth=depth, **context), expected)


def test_lines_has_the_flags_of_what_it_scales():
    assert merging.create("lines").rest == "method" and merging.create("lines").elementwise
    spectral = merging.create("lines", of="tsv_m")
    assert (spectral.rest, spectral.row_space, spectral.elementwise) == ("average", True, False)
    with pytest.raises(InputError, match="'regmean' needs statistics"):
        merging.create("lines", of="regmean")
    with pytest.raises(InputError, match="unknown after 'middle'"):
        merging.create("lines", after="middle")


@pytest.mark.parametrize(("after", "scale"), [("end", 1.0), ("start", 0.5)])
def test_what_follows_the_blocks_scales_like_the_end_or_the_start(after, scale):
    base = {f"blocks.{i}.weight": torch.zeros(3, 3) for i in range(3)} | {"head": torch.zeros(2)}
    experts = {t: {k: torch.ones_like(v) for k, v in base.items()} for t in "ab"}
    method = merging.create("lines", beta=0.5, after=after)
    merged = merging.merge_state_dicts(base, experts, method)
    assert_close(merged["blocks.1.weight"], 0.75 * 2 * torch.ones(3, 3))
    assert_close(merged["head"], scale * 2 * torch.ones(2))


def test_consensus_masks_any_merge():
    deltas = stack(4, (9, 6))
    merged = merging.create("tsv_m")(deltas)
    needed = (deltas.abs() > 0.4 * (merged - deltas).abs()).sum(0) >= 2
    found = merging.create("consensus")(deltas)
    assert_close(found, merged * needed)
    assert 0 < (found == 0).sum() < found.numel()
    assert_close(
        merging.create("consensus", of="sum", alpha=0.3)(deltas),
        merging.create("consensus_ta")(deltas),
    )


def test_sce_by_hand():
    deltas = torch.tensor([[[1.0, 2.0, 3.0]], [[1.0, -1.0, 1.0]]])
    # energies 14 and 3; signs + + +: (14 + 3) / 17, 2 alone, (14 * 3 + 3) / 17
    assert_close(merging.create("sce")(deltas), torch.tensor([[1.0, 2.0, 45 / 17]]))
    # variances 0, 2.25, 1: half of the two that vary is one, the second; energies 4 and 1
    assert_close(merging.create("sce", k=0.5)(deltas), torch.tensor([[0.0, 2.0, 0.0]]))


def test_ram_by_hand():
    deltas = torch.tensor([[[1.0, 2.0, 0.0, 1e-6]], [[0.0, 4.0, 3.0, 0.0]]])
    assert_close(merging.create("ram")(deltas), torch.tensor([[1.0, 3.0, 3.0, 0.0]]))
    # each shares one entry and has one of its own: rho 1, capped at .2
    plus = merging.create("ram", r=0.1)(deltas)
    assert_close(plus, torch.tensor([[1.02, 3.0, 3.06, 0.0]]))
    assert merging.create("ram").elementwise and not merging.create("ram", r=0.1).elementwise


def test_optmerge_by_hand():
    deltas = torch.zeros(2, 2, 2)
    deltas[0, 0, 0], deltas[1, 1, 1] = 2.0, 4.0
    # L_t = D_t, S = diag(1, 1), N = D_1 + D_2: the mean moves 2 lr (N - mean) in the first step
    first = merging.create("optmerge", steps=1, lr=0.1)(deltas)
    assert_close(first, torch.diag(torch.tensor([1.0 + 0.2, 2.0 + 0.4])))
    far = merging.create("optmerge", steps=2000, lr=0.05)(deltas)
    assert_close(far, torch.diag(torch.tensor([2.0, 4.0])))

"""TIES and its relatives: cases by hand, the whole model as one vector, order statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import merging
from merging import InputError
from merging.method import averages, masks, order
from merging.method.masks import drop, uniform
from merging.method.reference import TEXTBOOK
from merging.method.sparse import agreed, elect, keep_largest, trim


def stack(T=3, shape=(6, 8), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, *shape, generator=generator, dtype=torch.float64).to(dtype)


# --- TIES -------------------------------------------------------------------------------------


def test_ties_by_hand():
    deltas = torch.tensor([[5.0, -4.0, 1.0, 0.5], [3.0, 6.0, -0.1, -2.0], [-1.0, 7.0, 8.0, 0.2]])
    # the two largest of each: [5, -4, 0, 0], [3, 6, 0, 0], [0, 7, 8, 0]; signs + + + none
    merged = merging.create("ties", k=0.5)(deltas)
    assert_close(merged, torch.tensor([4.0, 6.5, 8.0, 0.0]))
    assert_close(merging.create("ties", k=0.5, merge="sum")(deltas), torch.tensor([8.0, 13, 8, 0]))


def test_an_entry_that_cancels_exactly_elects_no_sign():
    assert_close(merging.create("ties", k=1.0)(torch.tensor([[1.0, 2], [-1, 1]])),
                 torch.tensor([0.0, 1.5]))  # fmt: skip


def test_ties_election_is_exact_in_any_order_of_tasks():
    # in float32 the first order sums to 0, the second to 1e-8
    deltas = torch.tensor([[1e-8], [1.0], [-1.0]])
    for places in ([0, 1, 2], [1, 2, 0]):
        merged = merging.create("ties", k=1.0, merge="sum")(deltas[places])
        assert_close(merged, torch.tensor([1.0]))


def test_ties_trims_the_whole_model_unless_told_otherwise():
    model = {"a": stack(seed=1), "b": 10 * stack(shape=(9,), seed=2), "c": stack(shape=(), seed=3)}
    flat = torch.cat([x.reshape(3, -1) for x in model.values()], dim=1)
    expected = TEXTBOOK["ties"](flat.double()).float()
    method = merging.create("ties")
    context = method.prepare(lambda: iter(model.items()))
    merged = torch.cat([method(x, **context).flatten() for x in model.values()])
    assert_close(merged, expected)

    by_layer = merging.create("ties", scope="layer")
    assert by_layer.prepare(lambda: iter(model.items())) == {}
    assert_close(by_layer(model["a"]), TEXTBOOK["ties"](model["a"].double()).float())
    assert method.elementwise and not by_layer.elementwise


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [({"merge": "max"}, "merge function 'max'"), ({"k": 20}, "k = 20 is not a share")],
)
def test_ties_refuses_what_it_does_not_know(hyperparameters, message):
    with pytest.raises(InputError, match=message):
        merging.create("ties", **hyperparameters)(stack())


def test_an_unknown_scope_is_refused():
    with pytest.raises(InputError, match="scope 'block'"):
        merging.create("ties", scope="block").prepare(lambda: iter([]))


def grid(shape, seed=0, steps=40):
    """Values as bfloat16 has them: few, far apart, many of them equal."""
    return (stack(T=3, shape=shape, seed=seed) * steps / 4).round() / steps


def test_an_entry_that_cancels_may_take_the_sign_of_most_entries():
    # signs of the sums: +, 0, +, so that the second entry is the mean of its positive values
    deltas = torch.tensor([[1.0, 2, 3], [1.0, -2, -1]])
    merged = merging.create("ties", k=1.0, cancelled="majority")(deltas)
    assert_close(merged, torch.tensor([1.0, 2.0, 3.0]))
    assert_close(merging.create("ties", k=1.0)(deltas), torch.tensor([1.0, 0.0, 3.0]))
    with pytest.raises(InputError, match="'mode'"):
        merging.create("ties", cancelled="mode")(deltas)


@pytest.mark.parametrize("name", ["ties", "consensus_ties"])
def test_most_entries_are_those_of_the_whole_model(name):
    # alone, the first tensor would elect + for its cancelled entry
    model = {"a": torch.tensor([[1.0, 2.0], [1.0, -2.0]]), "b": torch.tensor([[-1.0] * 3] * 2)}
    method = merging.create(name, k=1.0, cancelled="majority", merge="sum", alpha=1.0)
    context = method.prepare(lambda: iter(model.items()))
    assert context["majority"] == -1
    assert_close(method(model["a"], **context), torch.tensor([2.0, -2.0]))
    assert_close(method(model["a"]), torch.tensor([2.0, 2.0]))


# --- Random masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della"])
def test_random_masks_follow_the_delta_and_the_seed_not_the_position(name):
    deltas = stack(T=4)
    first = merging.create(name)(deltas)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(first, merging.create(name)(deltas))
    assert_close(first, merging.create(name)(deltas[[2, 0, 3, 1]]))
    assert not torch.equal(first, merging.create(name, seed=1)(deltas))
    assert_close(first, merging.create(name)(deltas.double()).float())


def test_different_deltas_get_different_masks():
    x, y = stack(T=2, shape=(30, 30))
    same = masks.uniform(x, 0) == masks.uniform(y, 0)
    assert same.float().mean() < 0.01
    assert torch.equal(masks.uniform(x, 0), masks.uniform(x.clone(), 0))


def test_dare_drops_the_share_and_rescales_the_rest():
    deltas = stack(T=1, shape=(200, 100))
    merged = merging.create("dare", p=0.7, alpha=1.0)(deltas)
    kept = merged != 0
    assert abs(kept.float().mean() - 0.3) < 0.02  # 6 standard deviations
    assert_close(merged[kept], (deltas[0] / 0.3)[kept])


def test_dare_ties_elects_among_what_is_left():
    deltas = stack(T=3)
    kept = masks.drop(deltas, 0.4, 0)
    assert_close(
        merging.create("dare_ties", p=0.6)(deltas), TEXTBOOK["ties"](kept.double(), 1.0).float()
    )


def test_della_keeps_large_entries_more_often():
    row = torch.arange(1.0, 6.0)
    deltas = row.repeat(1, 4000, 1)  # keep probabilities .5 .6 .7 .8 .9 along each row
    merged = merging.create("della", density=0.7, eps=0.2, alpha=1.0)(deltas)
    probabilities = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])
    kept = merged != 0
    assert_close(kept.float().mean(0), probabilities, atol=0.04, rtol=0)
    assert_close(merged[kept], (row / probabilities).expand(4000, 5)[kept])


def test_della_linear_adds_what_della_keeps_of_each():
    deltas = stack()
    settings = {"density": 0.6, "eps": 0.2, "alpha": 1.0, "seed": 3}
    alone = [merging.create("della", **settings)(delta[None]) for delta in deltas]
    merged = merging.create("della_linear", **settings)(deltas)
    assert_close(merged, torch.stack(alone).sum(0))


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [("dare", {"p": 1.5}), ("della", {"density": 0.05}), ("breadcrumbs", {"gamma": -1})],
)
def test_shares_outside_0_to_1_are_refused(name, hyperparameters):
    with pytest.raises(InputError, match="is not a share between 0 and 1"):
        merging.create(name, **hyperparameters)(stack())


# --- Fixed masks ------------------------------------------------------------------------------


def test_breadcrumbs_drops_both_ends():
    deltas = torch.tensor([[1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]])
    merged = merging.create("breadcrumbs", beta=0.5, gamma=0.2, alpha=1.0)(deltas)
    assert_close(merged, torch.tensor([0.0, 0, 0, 0, 0, -6, 7, -8, 0, 0]))


def test_equal_magnitudes_are_dropped_by_count_the_last_first():
    deltas = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    merged = merging.create("breadcrumbs", beta=0.5, gamma=0.2, alpha=1.0)(deltas)
    # five are kept, the first; of those two are the largest, the first
    assert_close(merged, torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 0, 0, 0]))
    assert order.largest(torch.tensor([[2.0, 1, 2, 2, 3]]), 3).tolist() == [
        [True, False, True, False, True]
    ]


@pytest.mark.parametrize("count", [0, 1, 137, 999, 1000, 1001])
def test_as_many_are_kept_as_were_asked_for_on_a_grid(count):
    kept = order.largest(grid((1000,)).abs(), count)
    assert kept.sum(1).tolist() == [min(count, 1000)] * 3
    masked = keep_largest(grid((40, 25)), 300)
    assert (masked != 0).flatten(1).sum(1).tolist() == [300] * 3


def test_breadcrumbs_ties_elects_among_what_the_masks_leave():
    deltas = torch.tensor([[1.0, -2, 3, -4, 5], [-5.0, 4, 3, 2, -1]])
    settings = {"beta": 0.4, "gamma": 0.2}
    # left: (0, 0, 3, -4, 0) and (0, 4, 3, 0, 0) without the two smallest and the largest
    merged = merging.create("breadcrumbs_ties", **settings)(deltas)
    assert_close(merged, torch.tensor([0.0, 4, 3, -4, 0]))
    summed = merging.create("breadcrumbs_ties", merge="sum", **settings)(deltas)
    assert_close(summed, torch.tensor([0.0, 4, 6, -4, 0]))
    # opposed: 4 outweighs -3
    opposed = torch.tensor([[9.0, -3, 0.5], [9.5, 4, 0.5]])
    merged = merging.create("breadcrumbs_ties", beta=0.34, gamma=0.34)(opposed)
    assert_close(merged, torch.tensor([0.0, 4, 0]))


def test_breadcrumbs_by_row():
    deltas = torch.tensor([[[1.0, 2, 3, 4], [10.0, 20, 30, 40]]])
    merged = merging.create("breadcrumbs", beta=0.5, gamma=0.25, scope="row", alpha=1.0)(deltas)
    assert_close(merged, torch.tensor([[0.0, 0, 3, 0], [0.0, 0, 30, 0]]))
    with pytest.raises(InputError, match="scope 'column'"):
        merging.create("breadcrumbs", scope="column")(deltas)


def test_consensus_by_hand():
    deltas = torch.tensor([[4.0, 4.0, 1.0], [3.1, -4.2, 0.0], [3.5, 0.05, 0.0]])
    # sums 10.6, -0.15, 1. Entry 0: |D| > .4 |S - D| for all three. Entry 1: 4 > .4 * 4.15 and
    # 4.2 > .4 * 4.05, two tasks. Entry 2: 1 > 0, one task.
    method = merging.create("consensus_ta", alpha=1.0)
    assert_close(method(deltas), torch.tensor([10.6, -0.15, 0.0]))
    strict = merging.create("consensus_ta", alpha=1.0, agree=3)
    assert_close(strict(deltas), torch.tensor([10.6, 0.0, 0.0]))


# --- PCB --------------------------------------------------------------------------------------


def test_pcb_competes_over_the_whole_model():
    a, b = stack(T=3, seed=1), 2 * stack(T=3, shape=(10,), seed=2)
    method = merging.create("pcb", ratio=0.25)
    assert merging.create("pcb", scope="layer").prepare(lambda: iter([("a", a)])) == {}
    context = method.prepare(lambda: iter([("a", a), ("b", b)]))
    merged = torch.cat([method(x, **context).flatten() for x in (a, b)])
    whole = TEXTBOOK["pcb"](torch.cat([a.flatten(1), b], dim=1).double(), ratio=0.25)
    assert_close(merged, whole.float(), rtol=1e-4, atol=1e-5)


def same_bytes(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("cancelled", ["zero", "majority"])
def test_masks_as_numbers_change_no_bit(merge, cancelled):
    """The comparisons written out with masks, on values with ties, zeros of both signs and a cut
    at 0; the bytes agree, the sign of 0 too."""
    draw = torch.Generator().manual_seed(0)
    deltas = torch.randint(-3, 4, (3, 4000), generator=draw) / 8 * torch.tensor([[1.0], [-1], [1]])
    for thresholds in (torch.tensor([0.25, 0.125, 0.375]), torch.zeros(3)):
        kept = torch.where(deltas.abs() >= thresholds[:, None], deltas, 0)
        assert torch.equal(trim(deltas, 0.2, thresholds).abs(), kept.abs())
        sign = kept.double().sum(0).sign().float()
        if cancelled == "majority":
            sign = torch.where(sign == 0, sign.sum().sign(), sign)
        agree = kept * sign > 0
        total = torch.where(agree, kept, 0).sum(0)
        expected = total if merge == "sum" else total / agree.sum(0).clamp_min(1)
        elected = elect(trim(deltas, 0.2, thresholds), merge, cancelled)
        assert same_bytes(elected, expected)
        needed = (deltas.abs() > 0.4 * (expected - deltas).abs()).sum(0) >= 2
        masked = torch.where(needed, expected, 0)
        assert torch.equal(
            agreed(expected, deltas, 0.4, 2).view(torch.int32), masked.view(torch.int32)
        )


@pytest.mark.parametrize("keep", [0.1, 0.0, 1.0])
def test_dropping_with_numbers_for_masks_changes_no_bit(keep):
    deltas = stack(T=3, shape=(500,), seed=4)
    draws = torch.stack([uniform(delta, 7) for delta in deltas])
    expected = torch.where(draws < keep, deltas / keep, 0)
    assert same_bytes(drop(deltas, keep, 7), expected)
    assert torch.equal(drop(deltas, torch.full_like(deltas, keep), 7), expected)


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_masks_go_on_from_chunk_to_chunk(name, monkeypatch):
    deltas = stack(T=3, shape=(70, 9), seed=4)
    whole = merging.create(name)(deltas)
    monkeypatch.setattr(averages, "_CHUNK", 37)
    assert same_bytes(merging.create(name)(deltas), whole)


# --- Order statistics -------------------------------------------------------------------------

entries = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(entries, entries), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
    st.integers(1, 5),
    st.booleans(),
)
def test_kth_largest_is_exact_for_any_floats_in_any_pieces(values, share, pieces, wide):
    values = torch.tensor(values, dtype=torch.float64 if wide else torch.float32).mT  # (2, n)
    if wide:
        values = values / 3  # uses all 52 bits
    found = order.kth_largest(lambda: values.tensor_split(pieces, dim=1), share)
    k = max(1, int(share * values.shape[1]))
    assert torch.equal(found, values.sort(dim=1, descending=True).values[:, k - 1])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(entries, entries), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
    st.integers(0, 39),
    st.sampled_from([1, 4, 2**20]),
)
def test_kth_largest_is_exact_whatever_a_sample_says(values, share, some, waiting):
    values = torch.tensor(values, dtype=torch.float32).mT  # (2, n)
    passes, sample = [], values[:, : 1 + some % values.shape[1]]

    def stream():
        passes.append(1)
        return values.tensor_split(3, dim=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_WAITING", waiting)
        found = order.kth_largest(stream, share, few=lambda: [sample])
    k = max(1, int(share * values.shape[1]))
    assert torch.equal(found, values.sort(dim=1, descending=True).values[:, k - 1])
    if sample.shape == values.shape:
        assert len(passes) == 1


def test_a_sample_saves_passes_and_a_wrong_one_none():
    """On a coarse grid too, where the next value is far away; between bounds that are far off
    there is nothing, and the plain passes find the answer."""
    draw = torch.Generator().manual_seed(0)
    fine = torch.randn(2, 200_000, generator=draw)
    for values in (fine, (4 * fine).round() / 4):
        for sample, expected in ((values[:, ::20], 1), (values[:, ::20] + 100, 3)):
            passes = []
            found = order.kth_largest(
                lambda passes=passes, values=values: passes.append(1) or [values],
                0.2,
                lambda sample=sample: [sample],
            )
            assert torch.equal(found, values.sort(dim=1, descending=True).values[:, 39_999])
            assert len(passes) == expected


def test_kth_largest_looks_at_chunks(monkeypatch):
    values = stack(T=2, shape=(101,))
    monkeypatch.setattr(order, "_CHUNK", 10)
    found = order.kth_largest(lambda: [values], 0.2)
    assert torch.equal(found, values.sort(dim=1, descending=True).values[:, 19])

"""Means, Fisher weights, depth scaling, spheres: hand-computed cases and plain float64 formulas."""

import math

import pytest
import torch
from torch.testing import assert_close

import merging
from merging import InputError
from merging.method import averages


def stack(T=3, shape=(5, 4), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, *shape, generator=generator, dtype=torch.float64).to(dtype)


def test_average_and_task_arithmetic_by_hand():
    deltas = torch.tensor([[[1.0, 2.0]], [[3.0, -4.0]]])
    assert_close(merging.create("average")(deltas), torch.tensor([[2.0, -1.0]]))
    assert_close(merging.create("task_arithmetic")(deltas), torch.tensor([[1.2, -0.6]]))
    assert_close(merging.create("task_arithmetic", alpha=1.0)(deltas), torch.tensor([[4.0, -2.0]]))


@pytest.mark.parametrize(("depth", "scale"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_lines_grows_from_the_average_with_depth(depth, scale):
    deltas = stack(T=2)
    merged = merging.create("lines")(deltas, depth=depth)
    assert_close(merged, scale * deltas.sum(0))
    assert_close(merging.create("lines", start=0.2)(deltas), 0.2 * deltas.sum(0))


def test_fisher_weighs_entry_by_entry_and_averages_where_no_task_cares():
    deltas = torch.tensor([[1.0, 1.0, 2.0], [4.0, 3.0, 8.0]])
    fishers = torch.tensor([[2.0, 0.0, 0.0], [1.0, 5.0, 0.0]])
    merged = merging.create("fisher")(deltas, fishers=fishers)
    assert_close(merged, torch.tensor([2.0, 3.0, 5.0]))


def test_fisher_survives_fishers_at_the_end_of_float32():
    deltas = torch.tensor([[1.0], [4.0]])
    for scale in (1e-44, 1e38):
        merged = averages.fisher(deltas, fishers=torch.tensor([[2.0], [2.0]]) * scale)
        assert_close(merged, torch.tensor([2.5]))


def test_fisher_refuses_fishers_of_another_shape():
    with pytest.raises(InputError, match=r"\(3, 5, 4\), got \(2, 5, 4\)"):
        merging.create("fisher")(stack(), fishers=torch.ones(2, 5, 4))


def test_data_free_fisher_is_the_ratio_of_cubes_to_squares():
    deltas = stack(T=4, shape=(3, 7))
    wide = deltas.double()
    expected = wide.pow(3).sum(0) / wide.pow(2).sum(0)
    assert_close(merging.create("data_free_fisher")(deltas), expected.float())
    # squares of these underflow in float32
    assert_close(merging.create("data_free_fisher")(deltas * 1e-25) * 1e25, expected.float())


def test_slerp_between_two_axes():
    deltas = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    diagonal = 2 * torch.tensor([math.sqrt(0.5), math.sqrt(0.5)])
    assert_close(merging.create("slerp")(deltas), diagonal)
    third = 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert_close(merging.create("slerp", t=1 / 3)(deltas), third)


def test_slerp_is_a_straight_line_where_no_arc_is_defined():
    x = stack(T=1)[0]
    for other in (x, 3 * x, -2 * x, 0 * x):
        merged = merging.create("slerp", t=0.25)(torch.stack([x, other]))
        assert_close(merged, 0.75 * x + 0.25 * other, rtol=1e-5, atol=1e-6)


def test_slerp_refuses_three_experts_and_names_the_way_out():
    with pytest.raises(InputError, match="slerp merges 2 experts, got 3") as error:
        merging.create("slerp")(stack(T=3))
    assert "karcher" in error.value.hint


def test_karcher_of_three_axes_is_their_diagonal():
    deltas = torch.diag(torch.tensor([1.0, 2.0, 3.0]))  # norms 1, 2, 3: mean 2
    merged = merging.create("karcher")(deltas)
    assert_close(merged, 2 * torch.full((3,), 1 / math.sqrt(3)))


def test_karcher_of_two_has_slerps_direction():
    deltas = stack(T=2)
    between = merging.create("slerp")(deltas / deltas.flatten(1).norm(dim=1).view(-1, 1, 1))
    merged = merging.create("karcher")(deltas)
    assert_close(merged / merged.norm(), between / between.norm())
    assert_close(merged.norm(), deltas.flatten(1).norm(dim=1).mean())


def test_karcher_is_where_the_tangent_vectors_balance():
    deltas = stack(T=5, shape=(3, 4), dtype=torch.float64)
    mean = merging.create("karcher")(deltas).flatten()
    mean = mean / mean.norm()
    tangents = []
    for u in deltas.flatten(1):
        u = u / u.norm()
        theta = torch.acos(u @ mean)
        tangents.append(theta / theta.sin() * (u - (u @ mean) * mean))
    assert torch.stack(tangents).sum(0).norm() < 1e-9


def test_karcher_without_a_unique_mean_or_a_direction():
    x = stack(T=1)[0]
    assert_close(merging.create("karcher")(torch.stack([x, -x])), 0 * x)
    merged = merging.create("karcher")(torch.stack([x, 0 * x]))
    assert_close(merged, x / 2)  # x's direction, the mean of the norms


@pytest.mark.parametrize("T", [2, 3])
def test_model_stock_ratio_from_the_angle(T):
    # experts at 60 degrees to each other: cos = 1/2, ratio = T / (T + 1)
    axes = torch.linalg.cholesky(0.5 * torch.eye(T) + 0.5)  # rows of norm 1, inner products 1/2
    merged = merging.create("model_stock")(axes)
    assert_close(merged, T / (T + 1) * axes.mean(0))


def test_model_stock_of_orthogonal_or_opposed_experts_stays_at_the_base():
    assert_close(merging.create("model_stock")(torch.eye(3)), torch.zeros(3), atol=1e-7, rtol=0)
    opposed = torch.tensor([[1.0, 0.1], [-1.0, 0.1]])
    assert_close(merging.create("model_stock")(opposed), torch.zeros(2))


def test_task_gram_in_chunks(monkeypatch):
    deltas = stack(T=3, shape=(5, 7))
    flat = deltas.double().flatten(1)
    monkeypatch.setattr(averages, "_CHUNK", 4)
    assert_close(averages.task_gram(deltas), flat @ flat.mT)


def test_slerp_of_the_weights_is_the_arc_between_them():
    base = torch.tensor([3.0, 0.0])
    deltas = torch.tensor([[1.0, 0.0], [-3.0, 4.0]])  # weights (4, 0) and (0, 4)
    merged = merging.create("slerp", of="weights")(deltas, base=base)
    assert_close(base + merged, 4 * torch.tensor([math.sqrt(0.5), math.sqrt(0.5)]))
    mean = merging.create("karcher", of="weights")(deltas, base=base)
    assert_close(base + mean, 4 * torch.tensor([math.sqrt(0.5), math.sqrt(0.5)]))
    for name in ("slerp", "karcher"):
        assert not merging.create(name, of="weights").row_space
        with pytest.raises(InputError, match="needs the base's values"):
            merging.create(name, of="weights")(deltas)
        with pytest.raises(InputError, match="unknown of 'models'"):
            merging.create(name, of="models")


def test_slerp_by_row_and_by_column_turns_each_by_its_own_angle():
    deltas = torch.tensor([[[2.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [1.0, 1.0]]])
    half = math.sqrt(2.0)
    assert_close(merging.create("slerp", by="row")(deltas), torch.tensor([[half, half], [1, 1]]))
    turned = merging.create("slerp", by="column")(deltas.mT)
    assert_close(turned, torch.tensor([[half, half], [1, 1]]).mT)
    with pytest.raises(InputError, match="unknown by 'block'"):
        merging.create("slerp", by="block")(deltas)


@pytest.mark.parametrize(("name", "split"), [("slerp", True), ("slerp", False), ("karcher", True)])
def test_the_engine_hands_over_the_base_in_the_blocks_that_are_merged(name, split):
    generator = torch.Generator().manual_seed(0)
    shapes = {"attn.in_proj_weight": (6, 4), "bias": (5,)}
    base = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    experts = {
        t: {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        for t in "ab"
    }
    method = merging.create(name, of="weights")
    merged = merging.merge_state_dicts(
        base, experts, method, layers={"attn.in_proj_weight": merging.Layer(3)}, split_qkv=split
    )
    for key, W0 in base.items():
        deltas = torch.stack([expert[key] - W0 for expert in experts.values()])
        parts = 3 if split and W0.ndim == 2 else 1
        pieces = [
            method(d, base=w) for d, w in zip(deltas.chunk(parts, 1), W0.chunk(parts), strict=True)
        ]
        assert_close(merged[key], W0 + torch.cat(pieces))


def test_a_floor_under_the_fishers():
    deltas, fishers = torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [3.0]])
    assert_close(merging.create("fisher", floor=1.0)(deltas, fishers=fishers), torch.tensor([3.25]))


@pytest.mark.parametrize("name", ["fisher", "data_free_fisher"])
def test_entries_in_chunks_change_no_bit(name, monkeypatch):
    """Where nothing moved, where no task cares, and where squares underflow, too."""
    draw = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 40, 7, generator=draw) * torch.logspace(-44, 0, 40)[:, None]
    fishers = torch.rand(3, 40, 7, generator=draw)
    deltas[:, 3], fishers[:, 5] = 0, 0
    context = {"fishers": fishers} if name == "fisher" else {}
    whole = merging.create(name)(deltas, **context)
    monkeypatch.setattr(averages, "_CHUNK", 11)
    assert torch.equal(merging.create(name)(deltas, **context), whole)
    weights = (fishers if name == "fisher" else deltas.double().square()).double()
    weights = torch.where(weights.sum(0) > 0, weights, 1)
    expected = (weights * deltas).sum(0) / weights.sum(0)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-44)

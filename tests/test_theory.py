"""The three conditions against autograd, and against sums written out token by token."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eval import theory
from eval.training import train
from merging import InputError, create
from merging.layers import Layer, linear_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Block(nn.Module):
    """Attention and an MLP over (batch, tokens, width), as open_clip builds them."""

    def __init__(self, width=8):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x, attn_mask=None, padding=None):
        mixed = self.attn(
            x, x, x, need_weights=False, attn_mask=attn_mask, key_padding_mask=padding
        )
        return x + self.mlp(x + mixed[0])


def by_hand(z, g):
    """The four sums over tokens, in float64."""
    z, g = z.double(), g.double()
    pairs = [(a, torch.outer(b, b)) for a, b in zip(g, z, strict=True)]
    return (
        sum(torch.outer(a, b) for a, b in zip(g, z, strict=True)),
        sum(a @ a * zz for a, zz in pairs),
        sum(zz for _, zz in pairs),
        sum(zz**2 for _, zz in pairs),
    )


def test_gradient_descent_moves_along_the_recorded_sum():
    """D = -eta sum_s G_s, hence cos(D^T D, G^T G) = 1: the identity everything rests on."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y, eta = torch.randn(32, 6).double(), torch.randint(3, (32,)), 0.05
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    with theory.recording(model, linear_layers(model), loss) as (recorded, sums):
        for _ in range(20):
            gradients = torch.autograd.grad(recorded(model, (x, y)), list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= eta * gradient
    for name in ("0.weight", "2.weight"):
        D = model.state_dict()[name] - before[name]
        torch.testing.assert_close(D, -eta * sums[name].gradient.double(), rtol=1e-4, atol=1e-7)
        assert theory.cosine(D.T @ D, sums[name].gradient.T @ sums[name].gradient) > 1 - 1e-6
        assert sums[name].tokens == 20 * 32


def test_sums_are_those_written_out_token_by_token():
    model = nn.Linear(4, 3)
    x = torch.randn(5, 7, 4)  # (batch, tokens, d_in)
    target = torch.randn(5, 7, 3)
    keep = torch.arange(7) < torch.tensor([7, 3, 1, 5, 2])[:, None]
    loss = lambda model, x: (model(x) - target).square().sum()  # noqa: E731
    with theory.recording(model, {"weight": Layer()}, loss, lambda batch, name: keep) as (
        run,
        sums,
    ):
        run(model, x).backward()
    g = 2 * (model(x) - target).detach()
    expected = by_hand(x[keep], g[keep])
    s = sums["weight"]
    for got, want in zip((s.gradient, s.energy, s.moment, s.square), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert s.tokens == int(keep.sum())
    assert s.g2 == pytest.approx(g[keep].square().sum().item(), rel=1e-5)
    assert s.g4 == pytest.approx(g[keep].square().sum(1).square().sum().item(), rel=1e-5)


def test_energy_correlation_is_pearsons_over_tokens():
    z, g = torch.randn(200, 3), torch.randn(200, 2)
    g = g * (1 + z[:, :1].abs())  # energy that does depend on the input
    sums = theory.Sums.zeros(2, 3)
    for z_part, g_part in zip(z.split(50), g.split(50), strict=True):
        sums.add(z_part, g_part)
    energy = g.square().sum(1)
    rho = [
        torch.corrcoef(torch.stack([energy, z[:, a] * z[:, b]]))[0, 1].abs()
        for a in range(3)
        for b in range(3)
    ]
    assert theory.energy_correlation(sums) == pytest.approx(sum(rho).item() / 9, rel=1e-4)


def test_wide_layers_are_judged_by_evenly_spaced_coordinates():
    z, g = torch.randn(50, 255), torch.randn(50, 2)
    g *= z[:, :1]
    wide, narrow = theory.Sums.zeros(2, 255), theory.Sums.zeros(2, 128)
    wide.add(z, g)
    narrow.add(z[:, ::2], g)  # 0, 2, ..., 254
    assert wide.square.shape == (128, 128)
    expected = theory.energy_correlation(narrow)
    assert theory.energy_correlation(wide) == pytest.approx(expected, rel=1e-5)


def test_conditions_hold_where_they_must():
    """Gradients of one length: correlation 1. Orthogonal gradients: cross term 1."""
    z = torch.randn(6, 4)
    g = torch.eye(6)  # orthonormal, so every g_i . g_j with i != j is 0
    sums = theory.Sums.zeros(6, 4)
    sums.add(z, g)
    assert theory.cross_term(sums) == pytest.approx(1)
    assert theory.correlation(sums) == pytest.approx(1)
    sums = theory.Sums.zeros(6, 4)
    sums.add(z, torch.ones(6, 6))  # all alike: G has rank 1, its square is not the sum
    assert theory.correlation(sums) == pytest.approx(1)
    mean = z.sum(0).double()
    expected = theory.cosine(torch.outer(mean, mean), z.double().T @ z.double())
    assert theory.cross_term(sums) == pytest.approx(expected, abs=1e-6)


def test_recording_changes_nothing_and_leaves_nothing(tmp_path):
    def trained(record):
        torch.manual_seed(0)
        # float64, as Adam makes steps of rounding noise where a gradient is 0 (the key's bias)
        model = nn.Sequential(Block(), Block()).double()
        x = torch.randn(4, 5, 8).double()
        loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
        job = {"steps": 3, "lr": 1e-2, "output": tmp_path}
        if record:
            with theory.recording(model, linear_layers(model), loss) as (recorded, sums):
                train(model, lambda first: [x] * 3, recorded, **job)
            assert not any(m._forward_hooks for m in model.modules())
            assert "forward" not in vars(model[0].attn)
            assert set(sums) >= {
                "0.attn.in_proj_weight[q]",
                "1.attn.out_proj.weight",
                "0.mlp.0.weight",
            }
        else:
            train(model, lambda first: [x] * 3, loss, **job)
        return model.state_dict()

    plain, recorded = trained(False), trained(True)
    for name in plain:
        torch.testing.assert_close(recorded[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["none", "padding", "boolean", "added", "both"])
def test_explicit_attention_is_torchs(batch_first, masked):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "boolean": {"attn_mask": causal},
        "added": {"attn_mask": torch.zeros(5, 5).masked_fill(causal, -math.inf)},
        "both": {"key_padding_mask": padding, "attn_mask": torch.randn(6, 5, 5)},
    }[masked]
    if masked == "both":  # torch wants masks of one kind
        masks["key_padding_mask"] = torch.zeros(3, 5).masked_fill(padding, -math.inf)
    z = x if batch_first else x.transpose(0, 1)
    expected = attention(z, z, z, need_weights=False, **masks)[0]
    with theory.recording(attention, linear_layers(attention), lambda m, b: b) as (_, sums):
        got = attention(z, z, z, need_weights=False, **masks)[0]
        got.square().sum().backward()
    torch.testing.assert_close(got, expected)
    assert set(sums) == {f"in_proj_weight[{p}]" for p in "qkv"} | {"out_proj.weight"}
    G = torch.cat([sums[f"in_proj_weight[{p}]"].gradient for p in "qkv"])
    torch.testing.assert_close(G, attention.in_proj_weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        sums["out_proj.weight"].gradient, attention.out_proj.weight.grad, rtol=1e-4, atol=1e-5
    )


def test_cross_attention_is_refused():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 2, 8)
    with (
        theory.recording(attention, linear_layers(attention), lambda m, b: b),
        pytest.raises(InputError, match="more than one input"),
    ):
        attention(x, x + 1, x)


@given(st.integers(0, 2**31), st.floats(0.01, 100))
@settings(deadline=None, max_examples=25)
def test_cosine_knows_no_scale_and_the_angle_stays_in_bounds(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 4, 4, generator=generator)
    cos = theory.cosine(A, B)
    assert theory.cosine(scale * A, B) == pytest.approx(cos, abs=1e-6)
    assert 0 <= theory.angular_distance(cos) <= 1
    assert theory.cosine(A, A) == pytest.approx(1)
    # floating point may leave [-1, 1] by a hair
    assert theory.angular_distance(1 + 1e-12) == 0


def test_angular_distance_of_known_angles():
    assert theory.angular_distance(0) == pytest.approx(0.5)
    assert theory.angular_distance(-1) == pytest.approx(1)
    assert theory.angular_distance(0.5) == pytest.approx(1 / 3)


def test_leading_directions_are_those_of_eigh():
    A = torch.randn(40, 30)
    A = A.T @ A
    U = theory.leading_directions(A, 5)
    V = torch.linalg.eigh(A.double())[1][:, -5:].float()
    assert theory.subspace_overlap(U, V) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(theory.leading_directions(A, 30), torch.eye(30))


def test_subspace_overlap():
    axes = torch.eye(4)
    assert theory.subspace_overlap(axes[:, :2], axes[:, :2]) == 1
    assert theory.subspace_overlap(axes[:, :2], axes[:, 1:3]) == 0.5  # one axis shared
    assert theory.subspace_overlap(axes[:, :2], axes[:, 2:]) == 0


def test_interference_is_the_mean_squared_error_of_the_outputs():
    deltas, z = torch.randn(3, 5, 4), torch.randn(3, 50, 4)
    C = z.mT @ z / 50
    D = deltas.mean(0)
    expected = [(z[t] @ (D - deltas[t]).T).square().sum(1).mean() for t in range(3)]
    torch.testing.assert_close(
        theory.interference(D, deltas, C), torch.stack(expected).double(), rtol=1e-4, atol=1e-5
    )


def test_directions_split_gain_and_interference_without_remainder():
    deltas, z = torch.randn(3, 6, 5), torch.randn(3, 40, 5)
    C = z.mT @ z / 40
    D = create("actmat")(deltas)
    split = theory.directions(D, deltas, C)
    assert split.eigenvalue[0] == 1 and (split.eigenvalue.diff() <= 0).all()
    torch.testing.assert_close(split.merged.sum(), D.double().square().sum())
    torch.testing.assert_close(split.experts.sum(1), deltas.double().square().sum((1, 2)))
    torch.testing.assert_close(split.interference.sum(), theory.interference(D, deltas, C).sum())
    # the eigenvalue of a direction is what the experts' gains there add up to
    gains = split.experts.sum(0)
    torch.testing.assert_close(split.eigenvalue, gains / gains[0])

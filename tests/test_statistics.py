"""Second moments and Fisher against plainly written float64 versions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from eval import statistics
from eval.onednn import accelerate
from eval.statistics import diagonal_fisher, sampled, second_moments
from merging.errors import InputError
from merging.layers import linear_layers


class Attention(nn.Module):
    """Query, key and value see one input, as in BERT; then a projection and a Conv1D."""

    def __init__(self, d=6):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.out = nn.Linear(d, d)
        self.conv = Conv1D(3, d)

    def forward(self, x):
        z = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.conv(self.out(z).relu())


def moment(z):
    """E[z z^T] in float64 over the rows of z (..., d)."""
    z = z.double().flatten(0, -2)
    return z.T @ z / len(z)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("fast", [False, True])
def test_moments_equal_those_of_recorded_inputs(fast):
    model = Attention()
    accelerate(model) if fast else model
    xs = [torch.randn(3, 5, 6) + 1 for _ in range(4)]
    found = second_moments(model, xs, linear_layers(model))
    assert set(found) == {f"{n}.weight" for n in ("query", "key", "value", "out", "conv")}
    out, conv = [], []
    for x in xs:
        z = F.scaled_dot_product_attention(model.query(x), model.key(x), model.value(x))
        out.append(z.detach())
        conv.append(model.out(z).relu().detach())
    for name, inputs in [("query", xs), ("value", xs), ("out", out), ("conv", conv)]:
        expected = moment(torch.cat(inputs))
        assert found[f"{name}.weight"].dtype == torch.float32
        torch.testing.assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_accelerated_layer_computes_with_the_weights_it_has_now():
    layer, x = accelerate(nn.Sequential(nn.Linear(6, 4))), torch.randn(2, 5, 6)

    def agree():
        weight, bias = (p.double() for p in layer.parameters())
        return torch.allclose(layer(x).double(), x.double() @ weight.T + bias, atol=1e-5)

    assert agree() and agree()
    layer.load_state_dict(nn.Sequential(nn.Linear(6, 4)).state_dict())
    assert agree()
    layer[0].weight.mul_(2)
    assert agree()
    layer[0].weight = nn.Parameter(torch.ones(4, 6))
    assert agree()


def test_a_shared_input_is_multiplied_once():
    model = Attention()
    found = second_moments(model, [torch.randn(2, 4, 6)], linear_layers(model))
    assert found["query.weight"] is found["key.weight"] is found["value.weight"]
    assert found["out.weight"] is not found["query.weight"]


def test_an_input_changed_in_place_is_another_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            y = self.a(x)
            x += 1
            return y + self.b(x)

    x = torch.randn(4, 2)
    found = second_moments(InPlace(), [x.clone()], ["a.weight", "b.weight"])
    torch.testing.assert_close(found["a.weight"].double(), moment(x))
    torch.testing.assert_close(found["b.weight"].double(), moment(x + 1))


def test_a_layer_used_twice_counts_both_inputs():
    model = nn.Linear(3, 3)
    x = torch.randn(5, 3)
    found = second_moments(model, [x], ["weight"], forward=lambda m, x: m(m(x)))
    torch.testing.assert_close(
        found["weight"].double(), moment(torch.cat([x, model(x).detach()])), rtol=1e-5, atol=1e-6
    )


def test_the_mask_leaves_padding_out():
    model = Attention()
    x = torch.randn(3, 5, 6)
    keep = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    asked = []

    def mask(batch, name):
        asked.append(name)
        return keep if name != "out.weight" else None

    found = second_moments(model, [x], linear_layers(model), mask=mask)
    torch.testing.assert_close(found["query.weight"].double(), moment(x[keep]))
    z = F.scaled_dot_product_attention(model.query(x), model.key(x), model.value(x)).detach()
    torch.testing.assert_close(found["out.weight"].double(), moment(z))
    assert asked == ["query.weight", "out.weight", "conv.weight"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_multihead_attention_shows_both_its_inputs(batch_first, mode):
    d, heads, batch, tokens = 8, 2, 3, 5
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(d, heads, batch_first=batch_first)})
    getattr(model, mode)()
    attention = model["attn"]
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    x = torch.randn(batch, tokens, d)
    given = x if batch_first else x.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(tokens)
    keep = torch.rand(batch, tokens) > 0.3
    outputs = []

    def forward(m, z):
        outputs.append(m["attn"](z, z, z, need_weights=False, attn_mask=causal)[0])

    layers = linear_layers(model)
    assert set(layers) == {"attn.in_proj_weight", "attn.out_proj.weight"}
    found = second_moments(model, [given], layers, forward=forward, mask=lambda b, n: keep)
    forward(model.eval(), given)
    assert torch.equal(outputs[0], outputs[1])  # looking does not change what is seen
    assert not attention._forward_pre_hooks

    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.view(batch, tokens, heads, -1).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / (d / heads) ** 0.5 + causal
    context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, d).detach()
    torch.testing.assert_close(found["attn.in_proj_weight"].double(), moment(x[keep]))
    torch.testing.assert_close(
        found["attn.out_proj.weight"].double(), moment(context[keep]), rtol=1e-4, atol=1e-6
    )


def test_separate_projections_of_multihead_attention():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)})
    q, k, v = torch.randn(2, 3, 4), torch.randn(2, 6, 3), torch.randn(2, 6, 5)
    found = second_moments(
        model,
        [(q, k, v)],
        linear_layers(model),
        forward=lambda m, b: m["attn"](b[0], b[1], value=b[2]),
    )
    for letter, z in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(found[f"attn.{letter}_proj_weight"].double(), moment(z))


def test_the_fused_encoder_layer_is_seen_through():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 4, 8)
    found = second_moments(layer, [x], linear_layers(layer))
    assert set(found) == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    }  # fmt: skip
    torch.testing.assert_close(found["self_attn.in_proj_weight"].double(), moment(x))


def test_a_thousand_batches_lose_nothing_that_float64_keeps():
    """A running sum in float32 would drift by 1e-5 and more here."""
    model = nn.Linear(4, 1, bias=False)
    xs = [torch.randn(16, 4) * 0.01 + 1000 for _ in range(1000)]
    found = second_moments(model, xs, ["weight"])["weight"]
    kept = sum((x.mT @ x).double() for x in xs) / 16_000  # products of float32, summed in float64
    assert torch.equal(found, kept.float())
    torch.testing.assert_close(found.double(), moment(torch.cat(xs)), rtol=2e-7, atol=0)


def test_half_precision_inputs_are_lifted():
    model = nn.Linear(4, 2).bfloat16()
    x = torch.randn(64, 4).bfloat16()
    found = second_moments(model, [x], ["weight"])["weight"]
    torch.testing.assert_close(found.double(), moment(x), rtol=1e-6, atol=1e-6)


def test_the_mode_of_the_model_is_restored():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()
    x = torch.randn(10, 2)
    found = second_moments(model, [x], ["1.weight"])
    assert model.training
    torch.testing.assert_close(found["1.weight"].double(), moment(x))  # no dropout while measuring


def test_a_layer_that_never_ran_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    with pytest.raises(InputError, match=r"'idle\.weight'"):
        second_moments(
            model, [torch.randn(3, 2)], linear_layers(model), forward=lambda m, x: m["used"](x)
        )


def test_a_layer_whose_tokens_are_all_masked_is_named():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="'weight'"):
        second_moments(
            model, [torch.randn(3, 4, 2)], ["weight"], mask=lambda b, n: torch.zeros(3, 4)
        )


def test_fisher_equals_the_squared_gradients_of_each_example():
    model = nn.Linear(3, 4)
    xs, ys = torch.randn(7, 3), torch.randint(4, (7,))
    found = diagonal_fisher(
        model, range(7), lambda m, i: m(xs[i]).log_softmax(-1)[ys[i]], ["weight", "bias"]
    )
    # by hand: d log p_y / d logits = onehot(y) - p
    g = F.one_hot(ys, 4).double() - model(xs).double().softmax(-1).detach()
    expected = (g[:, :, None] * xs.double()[:, None, :]).square().mean(0)
    torch.testing.assert_close(found["weight"].double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["bias"].double(), g.square().mean(0), rtol=1e-4, atol=1e-7)
    assert model.weight.requires_grad and model.weight.grad is None


def test_sampled_labels_follow_the_models_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0])
    log_p = logits.log_softmax(0)
    draws = torch.stack([sampled(logits, generator) for _ in range(2000)])
    frequencies = torch.stack([(draws == value).double().mean() for value in log_p])
    torch.testing.assert_close(frequencies, log_p.exp().double(), rtol=0, atol=0.04)


def test_fisher_of_no_examples_is_refused():
    with pytest.raises(InputError, match="no examples"):
        diagonal_fisher(nn.Linear(1, 1), [], lambda m, x: m(x), ["weight"])


ABOUT = {"suite": "s", "task": "cats", "kind": "covariance", "experts": "ab12"}


def test_statistics_come_back_as_they_were_saved(tmp_path):
    shared = torch.randn(3, 3)
    statistics.save(tmp_path / "x.safetensors", {"q": shared, "k": shared}, ABOUT)
    found = statistics.load(tmp_path / "x.safetensors", ABOUT)
    assert torch.equal(found["q"], shared) and torch.equal(found["k"], shared)
    statistics.save(tmp_path / "y.safetensors", {"q": shared, "k": shared}, ABOUT)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@pytest.mark.parametrize(
    "field, wrong", [("task", "dogs"), ("experts", "ff00"), ("kind", "fisher")]
)
def test_statistics_of_another_task_or_model_are_refused(tmp_path, field, wrong):
    path = tmp_path / "x.safetensors"
    statistics.save(path, {"q": torch.eye(2)}, ABOUT)
    with pytest.raises(InputError, match=f"{field} {ABOUT[field]!r}, expected {wrong!r}"):
        statistics.load(path, ABOUT | {field: wrong})


@pytest.mark.parametrize("content", [b"", b"garbage" * 10])
def test_a_statistics_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        statistics.load(path, ABOUT)
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        statistics.load(tmp_path / "absent.safetensors", ABOUT)


def test_a_convolutions_rows_are_its_patches():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(5, 6, 3, stride=2, padding=1), torch.nn.Flatten(2),
        torch.nn.Conv1d(6, 7, 3, dilation=2),
    ).eval()  # fmt: skip
    z = torch.randn(2, 5, 8, 8)
    found = second_moments(model, [z], linear_layers(model))
    assert found["0.weight"].shape == (45, 45) and found["2.weight"].shape == (18, 18)
    for name, module, given in (("0.weight", model[0], z), ("2.weight", model[2], model[:2](z))):
        W = module.weight.flatten(1).double()
        out = module(given).double() - module.bias.double().view(-1, *[1] * (given.ndim - 2))
        energy = out.square().sum() / (out.numel() / len(W))  # tr W C W^T, per position
        torch.testing.assert_close(
            (W @ found[name].double() @ W.T).trace(), energy, rtol=1e-4, atol=1e-4
        )


def mixture(kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30, hidden_size=16, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        head_dim=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return model, {n: x for n, x in linear_layers(model).items() if x.experts}


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "GraniteMoe"])
def test_fused_experts_have_one_moment_each(kind):
    model, layers = mixture(kind)
    found = second_moments(model, [{"input_ids": torch.arange(1, 10)[None]}], linear_layers(model))
    assert {tuple(found[name].shape) for name in layers} == {(3, 16, 16), (3, 12, 12)}
    assert all(found[name].diagonal(dim1=1, dim2=2).sum() > 0 for name in layers)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_the_moments_of_fused_experts_are_those_of_the_tokens_sent_to_each(kind):
    model, layers = mixture(kind)
    tokens, sent = torch.randint(1, 30, (2, 9)), {}

    def keep(module, args):
        z, index, *_ = args
        sent.update({e: z[(index == e).any(-1)] for e in range(3)})

    experts = model.get_submodule(next(iter(layers)).rpartition(".")[0])
    handle = experts.register_forward_pre_hook(keep)
    found = second_moments(model, [{"input_ids": tokens}], layers)
    handle.remove()
    wide = next(found[name] for name in layers if found[name].shape[-1] == 16)
    for e, z in sent.items():
        torch.testing.assert_close(wide[e], z.mT @ z / max(1, len(z)), rtol=1e-4, atol=1e-5)

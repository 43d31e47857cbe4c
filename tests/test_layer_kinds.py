"""Checkpoints as their libraries save them: every matrix is what the method makes of it.

Right values are computed plainly, in float64, on the tensors of the files.
"""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import merging
from merging import InputError, Layer, Report
from merging.layers import choose_layers, cut, join, linear_layers

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "tie_word_embeddings": False}  # fmt: skip
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_positions": 32, "n_embd": 24, "n_layer": 1, "n_head": 2}


def actmat(D):
    """D (T, out, in): sum_t D_t G_t (sum_t G_t)^+ with G_t = D_t^T D_t."""
    G = D.mT @ D
    return (D @ G).sum(0) @ torch.linalg.pinv(G.sum(0), hermitian=True)


def turned(D):
    return actmat(D.mT).mT


def each(merge):
    return lambda D: torch.stack([merge(D[:, e]) for e in range(D.shape[1])])


def rows(*sizes):
    return lambda D: torch.cat([actmat(block) for block in D.split(list(sizes), 1)])


def columns(parts):
    return lambda D: torch.cat([turned(block) for block in D.chunk(parts, -1)], -1)


def by_head(heads, parts=3):
    def merge(D):
        D = D.unflatten(1, (heads, parts, -1))  # (T, heads, parts, rows, in)
        merged = [actmat(D[:, :, i].flatten(1, 2)) for i in range(parts)]
        return torch.stack([m.unflatten(0, (heads, -1)) for m in merged], 1).flatten(0, 2)

    return merge


def flat(D):
    return actmat(D.flatten(2)).view(D.shape[1:])


def flat_turned(D):
    return turned(D.flatten(2)).view(D.shape[1:])


def family(build, folder, scale=0.02):
    """A base and two experts of one model, as it saves itself; their tensors by name on disk."""
    states = []
    for i, task in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = build()
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * bool(i) * torch.randn_like(parameter))
        model.save_pretrained(folder / task)
        states.append(load_file(folder / task / "model.safetensors"))
    return states


def check(states, merged, rights):
    """Each tensor whose name ends so is what the function makes of the differences."""
    base, *experts = states
    for ending, right in rights.items():
        names = [name for name in base if name.endswith(ending)]
        assert names, (ending, list(base))
        for name in names:
            D = torch.stack([e[name].double() - base[name].double() for e in experts])
            wanted = right(D)
            error = (merged[name].double() - base[name].double() - wanted).norm() / wanted.norm()
            assert error < 1e-2, (name, error.item())


def average(D):
    return D.mean(0)


def causal(name, **more):
    return lambda: getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**TEXT | more))


def llava():
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**VISION),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_index=5,
        )
    )


def swin():
    return tf.SwinForImageClassification(
        tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
                      window_size=4, num_labels=3)
    )  # fmt: skip


def neox():
    return tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=32)
    )  # fmt: skip


def roberta():
    return tf.RobertaForSequenceClassification(
        tf.RobertaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=40, pad_token_id=1)
    )  # fmt: skip


def resnet():
    return tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 48], depths=[1, 1], num_labels=3)
    )


def gpt2(**more):
    return lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2 | more))


CASES = {
    "mixtral": (causal("Mixtral", **EXPERTS),
                {"w1.weight": actmat, "w2.weight": actmat, "w3.weight": actmat,
                 "gate.weight": actmat, "q_proj.weight": actmat, "lm_head.weight": average}),
    "qwen2_moe": (causal("Qwen2Moe", num_experts=3, moe_intermediate_size=24, num_experts_per_tok=2,
                         shared_expert_intermediate_size=24),
                  {"gate_proj.weight": actmat, "shared_expert.down_proj.weight": actmat,
                   "mlp.gate.weight": actmat}),
    "gpt_oss": (causal("GptOss", head_dim=8, layer_types=["full_attention"], **EXPERTS),
                {"gate_up_proj": each(turned), "down_proj": each(turned),
                 "router.weight": actmat}),
    "granitemoe": (causal("GraniteMoe", **EXPERTS),
                   {"input_linear.weight": each(actmat), "output_linear.weight": each(actmat)}),
    "phi3": (causal("Phi3", pad_token_id=0),
             {"qkv_proj.weight": rows(32, 16, 16), "gate_up_proj.weight": rows(48, 48),
              "o_proj.weight": actmat}),
    "neox": (neox, {"query_key_value.weight": by_head(4), "embed_out.weight": average}),
    "llava": (llava, {"q_proj.weight": actmat, "linear_1.weight": actmat, "fc1.weight": actmat,
                      "mlp.up_proj.weight": actmat, "patch_embedding.weight": average,
                      "embed_tokens.weight": average}),
    "swin": (swin, {"query.weight": actmat, "reduction.weight": actmat,
                    "classifier.weight": average}),
    "roberta": (roberta, {"classifier.out_proj.weight": average,
                          "classifier.dense.weight": actmat, "query.weight": actmat}),
    "cross attention": (gpt2(add_cross_attention=True),
                        {"attn.c_attn.weight": lambda D: columns(3 if D.shape[2] == 72 else 2)(D),
                         "q_attn.weight": turned, "c_fc.weight": turned}),
    "wide": (causal("Llama", intermediate_size=20_480, hidden_size=8, num_attention_heads=2,
                    num_key_value_heads=2),
             {"up_proj.weight": actmat, "gate_proj.weight": actmat}),
    "resnet": (resnet, {"embedder.embedder.convolution.weight": average,
                        "layer.0.convolution.weight": flat, "layer.1.convolution.weight": flat,
                        "classifier.1.weight": average}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_layer_is_what_the_method_makes_of_it(case, tmp_path):
    build, rights = CASES[case]
    states = family(build, tmp_path)
    experts = {task: tmp_path / task for task in "ab"}
    out = tmp_path / "out"
    merging.merge_checkpoints(tmp_path / "base", experts, merging.create("actmat"), out)
    check(states, load_file(out / "model.safetensors"), rights)


def test_conv1d_is_known_by_its_biases_without_a_config(tmp_path):
    states = family(gpt2(), tmp_path)
    merged = merging.merge_state_dicts(
        states[0], {"a": states[1], "b": states[2]}, merging.create("actmat")
    )
    check(states, merged, {"c_attn.weight": columns(3), "c_fc.weight": turned,
                           "attn.c_proj.weight": turned, "wte.weight": average})  # fmt: skip


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrapped_names_are_looked_through(prefix):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 6), nn.Embedding(9, 6))

    model = build(0)
    base, a, b = (build(i).state_dict() for i in range(3))
    plain, wrapped = Report(), Report()
    method = merging.create("actmat")
    merging.merge_state_dicts(base, {"a": a, "b": b}, method, layers=model, report=plain)
    states = [{prefix + k: v for k, v in s.items()} for s in (base, a, b)]
    merging.merge_state_dicts(
        states[0], {"a": states[1], "b": states[2]}, method, layers=model, report=wrapped
    )
    assert wrapped.summary() == plain.summary() == {"actmat": 1, "average": 2}
    merging.merge_state_dicts(
        base, {"a": a, "b": b}, method, layers=torch.compile(model), report=(again := Report())
    )
    assert again.rules == plain.rules


def test_a_model_of_other_names_is_an_error():
    with pytest.raises(InputError, match="none of whose tensors is in the checkpoint"):
        choose_layers(nn.Sequential(nn.Linear(4, 4)), {"encoder.weight": (4, 4)})
    with pytest.raises(InputError, match="expected names"):
        choose_layers("encoder.weight", {"encoder.weight": (4, 4)})


def test_what_the_model_lacks_goes_by_its_name():
    shapes = {"0.weight": (6, 4), "extra.fc.weight": (8, 4), "extra.embed_tokens.weight": (9, 4)}
    choice = choose_layers(nn.Sequential(nn.Linear(4, 6)), shapes)
    assert set(choice.layers) == {"0.weight", "extra.fc.weight"}
    assert choice.reasons == {"extra.embed_tokens.weight": "embedding"}


BARE = {
    "transformer_blocks.0.proj_out.weight": Layer(),
    "single_transformer_blocks.0.norm.linear.weight": Layer(),
    "time_text_embed.timestep_embedder.linear_1.weight": Layer(),
    "mixer.0.mlp_tokens.fc1.weight": Layer(),
    "model.layers.0.mlp.shared_expert.up_proj.weight": Layer(),
    "model.layers.0.mlp.gate_up_proj.weight": Layer(parts=2),
    "blocks.0.attn.in_proj_weight": Layer(parts=3),
    "proj_out.weight": "output head",
    "lm_head.weight": "output head",
    "model.lm_head.weight": "output head",
    "classifier.out_proj.weight": "output head",
    "classifier.dense.weight": Layer(),
    "classifier.0.weight": Layer(),
    "classifier.3.weight": "output head",
    "cls.predictions.decoder.weight": "output head",
    "cls.predictions.transform.dense.weight": Layer(),
    "shared.weight": "embedding",
    "model.embed_tokens.weight": "embedding",
    "transformer.wte.weight": "embedding",
    "bert.embeddings.word_embeddings.weight": "embedding",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding",
    "visual.positional_embedding": "embedding",
    "visual.proj": "parameter of no linear module",
}


def test_a_name_is_judged_by_its_last_part_and_its_place():
    choice = choose_layers(None, dict.fromkeys(BARE, (48, 24)))
    assert choice.layers | choice.reasons == BARE


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(32, 24), (16, 16), (32, 16)])
def test_the_orientation_of_bare_fused_experts_is_told_by_the_pair(hidden, width, turned):
    into, back = (2 * width, hidden), (hidden, width)
    shapes = {"mlp.experts.gate_up_proj": into, "mlp.experts.down_proj": back}
    shapes = {n: (4, *(s[::-1] if turned else s)) for n, s in shapes.items()}
    found = choose_layers(None, shapes | {"mlp.experts.gate_up_proj_bias": (4, 2 * width)})
    assert found.layers == dict.fromkeys(shapes, Layer(transposed=turned, experts=4))


def test_convolutions_by_shape_alone():
    shapes = {
        "input_blocks.1.0.in_layers.2.weight": (16, 8, 3, 3),
        "skip.weight": (16, 8, 1, 1),
        "conv1.weight": (16, 3, 7, 7),
        "depthwise.weight": (16, 1, 3, 3),
        "up.conv_transpose.weight": (8, 16, 2, 2),
        "encoder.conv.weight": (16, 8, 3),
    }
    choice = choose_layers(None, shapes)
    assert choice.layers == {
        "input_blocks.1.0.in_layers.2.weight": Layer(kernel=(3, 3)),
        "skip.weight": Layer(kernel=(1, 1)),
        "encoder.conv.weight": Layer(kernel=(3,)),
    }
    assert choice.reasons == {
        "conv1.weight": "convolution of the input",
        "depthwise.weight": "depthwise convolution",
        "up.conv_transpose.weight": "convolution whose layout its name does not tell",
    }


def test_convolutions_by_module():
    model = nn.ModuleDict({
        "stem": nn.Conv2d(3, 8, 3), "plain": nn.Conv2d(8, 12, 3), "dots": nn.Conv2d(8, 12, 1),
        "deep": nn.Conv2d(8, 8, 3, groups=8), "grouped": nn.Conv2d(8, 12, 3, groups=2),
        "back": nn.ConvTranspose2d(8, 12, 2), "rnn": nn.LSTM(8, 6),
    })  # fmt: skip
    assert linear_layers(model) == {
        "plain.weight": Layer(kernel=(3, 3)),
        "dots.weight": Layer(kernel=(1, 1)),
        "grouped.weight": Layer(2, kernel=(3, 3)),
        "back.weight": Layer(transposed=True, kernel=(2, 2)),
        "rnn.weight_ih_l0": Layer(4),
        "rnn.weight_hh_l0": Layer(4),
    }
    assert set(linear_layers(model, convolutions=False)) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}


def test_a_convolution_is_merged_as_the_matrix_of_its_patches():
    def state(seed):
        torch.manual_seed(seed)
        return {"up.weight": torch.randn(6, 8, 2, 2), "conv.weight": torch.randn(12, 6, 3, 3)}

    states = [state(seed) for seed in range(3)]
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(6, 8, 2), "conv": nn.Conv2d(6, 12, 3)})
    merged = merging.merge_state_dicts(
        states[0], {"a": states[1], "b": states[2]}, merging.create("actmat"), layers=model
    )
    check(states, merged, {"conv.weight": flat, "up.weight": flat_turned})


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SHORT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
PACKED = [
    ("Falcon", {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True},
     Layer((16, 8, 8), groups=2)),
    ("Falcon", {**SMALL, "multi_query": True}, Layer((32, 8, 8))),
    ("Falcon", {**SMALL, "multi_query": False}, Layer(3, groups=4)),
    ("Bloom", {**SMALL, "n_layer": 1, "n_head": 4}, Layer(3, groups=4)),
    ("GPTBigCode", SHORT, Layer((32, 8, 8))),
    ("GPTBigCode", {**SHORT, "multi_query": False}, Layer(3, groups=4)),
    ("CodeGen", {**SHORT, "rotary_dim": 4}, Layer(3, groups=4)),
    ("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4}, Layer(3)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "config", "layer"), PACKED)
def test_packed_rows_are_cut_as_the_attention_reads_them(family, config, layer):
    with torch.device("meta"):
        model = getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**config))
    packed = {n: x for n, x in linear_layers(model).items() if x.blocks > 1}
    assert list(packed.values()) == [layer]
    assert layer.fits(tuple(model.get_parameter(next(iter(packed))).shape))


def test_a_mamba_blocks_projection_is_no_attentions():
    config = tf.Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=8,
                             head_dim=8, state_size=16, n_groups=2)  # fmt: skip
    with torch.device("meta"):
        layers = linear_layers(tf.Mamba2ForCausalLM(config))
    assert layers["backbone.layers.0.mixer.in_proj.weight"] == Layer()


LAYOUTS = [
    (Layer((3, 2, 1)), (6, 4)),
    (Layer((2, 1), transposed=True), (4, 3)),
    (Layer(3, groups=2), (12, 4)),
    (Layer((2, 1, 1), groups=2), (8, 4)),
    (Layer(kernel=(3, 3)), (6, 4, 3, 3)),
    (Layer(transposed=True, kernel=(2, 2)), (4, 6, 2, 2)),
    (Layer(experts=3), (3, 6, 4)),
    (Layer(2, transposed=True, experts=3), (3, 4, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYOUTS)
def test_every_layout_is_joined_as_it_was_cut(layer, shape):
    stored = torch.randn(2, *shape)
    blocks = cut(stored, layer)
    assert layer.fits(shape) and len(blocks) == layer.blocks * max(1, layer.experts)
    assert sum(b[0].numel() for b in blocks) == stored[0].numel()
    assert torch.equal(join([b[1] for b in blocks], layer), stored[1])
    assert not layer.fits((*shape[:-1], 5, 7))


def test_the_rows_of_grouped_parts_are_those_of_every_head():
    stored = torch.arange(8.0).view(8, 1)  # two groups of q q k v
    q, k, v = cut(stored, Layer((2, 1, 1), groups=2))
    assert [x.flatten().tolist() for x in (q, k, v)] == [[0, 1, 4, 5], [2, 6], [3, 7]]


def test_fused_experts_use_the_inputs_of_each():
    torch.manual_seed(0)
    W0, D = torch.randn(3, 5, 4), torch.randn(2, 3, 5, 4)
    z = torch.randn(2, 3, 20, 4)
    C = z.mT @ z / 20  # (T, E, 4, 4)
    layers = {"experts.up_proj": Layer(experts=3)}
    merged = merging.merge_state_dicts(
        {"experts.up_proj": W0},
        {t: {"experts.up_proj": W0 + D[i]} for i, t in enumerate("ab")},
        merging.create("regmean"),
        layers=layers,
        statistics={t: {"experts.up_proj": C[i]} for i, t in enumerate("ab")},
    )["experts.up_proj"]
    method = merging.create("regmean")
    wanted = torch.stack([method(D[:, e], covariances=C[:, e]) for e in range(3)])
    torch.testing.assert_close(merged - W0, wanted, rtol=1e-4, atol=1e-5)


def test_fused_experts_are_read_and_merged_one_by_one(tmp_path, monkeypatch):
    from merging.engine import routes

    sizes, read = [], routes.read_deltas
    monkeypatch.setattr(
        routes, "read_deltas", lambda W0, *rest: sizes.append(tuple(W0.shape)) or read(W0, *rest)
    )
    state = {"experts.up_proj": torch.randn(5, 6, 4)}
    moved = {t: {"experts.up_proj": torch.randn(5, 6, 4)} for t in "ab"}
    layers = {"experts.up_proj": Layer(experts=5)}
    merged = merging.merge_state_dicts(state, moved, merging.create("actmat"), layers=layers)
    assert sizes == [(1, 6, 4)] * 5  # so much memory, however many experts there are
    check([state, *moved.values()], merged, {"up_proj": each(actmat)})


def test_a_config_of_names_on_disk_chooses_for_a_bare_file_beside_it(tmp_path):
    base, *_ = family(causal("Mixtral", **EXPERTS), tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    folder = choose_layers(None, shapes, tmp_path / "base")
    file = choose_layers(None, shapes, tmp_path / "base" / "model.safetensors")
    assert folder == file and len(folder.layers) == 4 + 9 + 1
    renamed = {"_orig_mod." + name: shape for name, shape in shapes.items()}
    assert len(choose_layers(None, renamed, tmp_path / "base").layers) == len(folder.layers)

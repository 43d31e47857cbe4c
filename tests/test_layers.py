"""Which tensors count as linear layers, and how they are cut."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from merging import InputError, Layer, linear_layers
from merging.layers import cut, infer_layers, join, paper_layers, resolve_layers


def test_layers_are_chosen_by_module_type():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.attn = nn.MultiheadAttention(8, 2)
            self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6)
            self.fc = nn.Linear(8, 16)
            self.qkv = nn.Linear(8, 24)
            self.norm = nn.LayerNorm(8)
            self.conv = nn.Conv2d(3, 8, 4)
            self.proj = nn.Parameter(torch.zeros(8, 4))  # a matrix, but no linear layer
            self.decoder = nn.Linear(8, 11)
            self.decoder.weight = self.embed.weight
            self.head = nn.Linear(8, 5)

    assert linear_layers(Model()) == {
        "attn.in_proj_weight": Layer(parts=3),
        "attn.out_proj.weight": Layer(),
        "cross.q_proj_weight": Layer(),
        "cross.k_proj_weight": Layer(),
        "cross.v_proj_weight": Layer(),
        "cross.out_proj.weight": Layer(),
        "fc.weight": Layer(),
        "qkv.weight": Layer(parts=3),
    }


def test_hugging_face_models():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    layers = linear_layers(gpt2)
    assert layers["transformer.h.0.attn.c_attn.weight"] == Layer(parts=3, transposed=True)
    assert layers["transformer.h.0.mlp.c_fc.weight"] == Layer(transposed=True)
    assert len(layers) == 4 and not any("wte" in n or "lm_head" in n for n in layers)
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    names = linear_layers(T5ForConditionalGeneration(config))
    assert "lm_head.weight" not in names and "shared.weight" not in names
    assert "decoder.block.0.layer.2.DenseReluDense.wi_1.weight" in names
    assert not any("relative_attention_bias" in n for n in names)


def test_width_is_no_vocabulary():
    assert linear_layers(nn.Sequential(nn.Linear(4, 20_001))) == {"0.weight": Layer()}
    assert infer_layers({"mlp.up_proj.weight": (24_576, 3_072)}) == {"mlp.up_proj.weight": Layer()}


def test_the_papers_rule_goes_by_shape_and_one_name():
    shapes = {
        "visual.proj": (8, 4),
        "visual.positional_embedding": (5, 8),
        "text_projection": (8, 4),
        "model.text_projection.weight": (8, 4),
        "attn.in_proj_weight": (24, 8),
        "wide.weight": (19_999, 4),
        "embed.weight": (20_000, 4),
        "conv1.weight": (8, 3, 2, 2),
        "ln.weight": (8,),
    }
    assert paper_layers(shapes) == {
        "visual.proj": Layer(),
        "visual.positional_embedding": Layer(),
        "attn.in_proj_weight": Layer(3),
        "wide.weight": Layer(),
    }


def test_inferred_from_names_and_shapes():
    shapes = {
        "encoder.layers.0.fc.weight": (16, 8),
        "encoder.layers.0.fc.bias": (16,),
        "attn.in_proj_weight": (24, 8),
        "embeddings.word_embeddings.weight": (100, 8),
        "lm_head.weight": (100, 8),
        "visual.proj": (8, 4),
        "patch.weight": (8, 3, 4, 4),
        "ln_1.weight": (8,),
    }
    assert infer_layers(shapes) == {
        "encoder.layers.0.fc.weight": Layer(),
        "attn.in_proj_weight": Layer(parts=3),
    }


@pytest.mark.parametrize("layer", [Layer(), Layer(3), Layer(1, True), Layer(3, True)])
def test_cut_and_join_are_inverse(layer):
    stored = (
        torch.arange(24.0).view(6, 4) if not layer.transposed else torch.arange(24.0).view(4, 6)
    )
    blocks = cut(torch.stack([stored, stored]), layer)
    assert len(blocks) == layer.parts and blocks[0].shape == (2, 6 // layer.parts, 4)
    assert torch.equal(join([b[0] for b in blocks], layer), stored)


def test_layers_given_in_any_form():
    shapes = {"0.weight": (6, 4), "0.bias": (6,)}
    model = nn.Sequential(nn.Linear(4, 6))
    for given in (model, ["0.weight"], {"0.weight": Layer()}, None):
        assert resolve_layers(given, shapes) == {"0.weight": Layer()}
    with pytest.raises(InputError, match="'1.weight' is not in the base"):
        resolve_layers(["1.weight"], shapes)
    with pytest.raises(InputError, match="divide into 4"):
        resolve_layers({"0.weight": Layer(4)}, shapes)
    with pytest.raises(InputError, match="expected a matrix"):
        resolve_layers(["0.bias"], shapes)

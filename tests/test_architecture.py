"""Layers are chosen by what a module is, told by the checkpoint's own configuration."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2Model

from merging.layers import Layer, choose_layers, linear_layers
from merging.layers.architecture import skeleton

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 30}  # fmt: skip


def layers_of(folder, state):
    return choose_layers(None, {name: tuple(t.shape) for name, t in state.items()}, folder).layers


@pytest.fixture
def folder(tmp_path):
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path)
    return tmp_path


def test_a_transformers_folder_is_built_without_weights(folder):
    model = skeleton(folder)
    assert type(model) is BertModel
    assert {p.device.type for p in model.parameters()} == {"meta"}
    state = model.state_dict()
    assert layers_of(folder, state) == linear_layers(model)
    assert "embeddings.word_embeddings.weight" not in layers_of(folder, state)


def test_a_backbone_saved_alone_is_recognised_by_its_prefix(tmp_path):
    whole = BertForSequenceClassification(BertConfig(**TINY))
    whole.config.architectures = ["BertForSequenceClassification"]
    whole.config.save_pretrained(tmp_path)
    layers = layers_of(tmp_path, whole.bert.state_dict())
    assert "encoder.layer.0.attention.self.query.weight" in layers
    alone = tmp_path / "alone"
    whole.bert.config.architectures = ["BertModel"]
    whole.bert.config.save_pretrained(alone)
    layers = layers_of(alone, whole.state_dict())
    assert "bert.encoder.layer.0.attention.self.query.weight" in layers


def test_transposed_and_packed_layers_are_known_as_such(tmp_path):
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8))
    model.save_pretrained(tmp_path)
    layers = layers_of(tmp_path, model.state_dict())
    assert layers["h.0.attn.c_attn.weight"] == Layer(parts=3, transposed=True)
    assert "wte.weight" not in layers


def test_open_clip_folders(tmp_path):
    vision = {"image_size": 8, "patch_size": 4, "width": 64, "layers": 1}
    text = {"context_length": 8, "vocab_size": 30, "width": 64, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = skeleton(tmp_path)
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in linear_layers(model)


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "nothing"}', "{oops"])
def test_what_does_not_say_what_it_is_leaves_the_choice_to_names(tmp_path, config, caplog):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert layers_of(tmp_path, {"a.weight": torch.empty(3, 2)}) == {"a.weight": Layer()}
    assert str(tmp_path) in caplog.text


def test_an_architecture_nobody_has_is_told(folder, caplog):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForNothing"]}))
    assert skeleton(folder) is None
    assert "BertForNothing" in caplog.text


def test_code_in_a_checkpoint_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    assert skeleton(folder) is None


def test_names_that_match_nothing_are_told(folder, caplog):
    assert layers_of(folder, {"something.weight": torch.empty(3, 2)}) == {
        "something.weight": Layer()
    }
    assert "no layer of BertModel" in caplog.text
    assert torch.get_default_device().type == "cpu"


def test_code_that_comes_with_a_checkpoint_is_refused_wherever_one_is_loaded():
    calls = [
        call
        for room in ("eval", "merging")
        for path in (Path(__file__).parents[1] / room).rglob("*.py")
        for call in re.findall(r"Auto\w+\.from_pretrained\(([^()]*)\)", path.read_text())
    ]
    assert len(calls) >= 9
    calls = [call for call in calls if call != "..."]  # of a hint's words
    assert all("trust_remote_code=False" in call for call in calls), calls

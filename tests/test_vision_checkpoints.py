"""CLIP vision towers of every published layout: converted exactly, refused clearly."""

import pickle
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

import merging
from eval import training
from eval.vision import heads, models
from eval.vision.models import tower_checkpoint, tower_state
from eval.vision.published import Published
from merging.errors import InputError
from merging.formats.checkpoints import StateDict, open_checkpoint

NAME = "ViT-S-8-32px-quickgelu"
SMALL = CLIPVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=6,
    image_size=32,
    patch_size=8,
    projection_dim=192,
    hidden_act="quick_gelu",
)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODEL_MERGING_CHECKPOINTS", str(tmp_path / "published"))
    (tmp_path / "published").mkdir()
    return tmp_path / "published"


def tower(seed=0):
    return models.build(NAME, seed).visual.eval()


def loaded(state):
    model = tower()
    model.load_state_dict(state)
    return model


def images(seed=0, count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def randomised(model, seed=0):
    """Biases and norms too: transformers starts them at 0 and 1, where a swap would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_huggingface_tower_gives_the_same_embeddings(tmp_path, prefix):
    model = randomised(CLIPVisionModel(SMALL))
    base = tower(seed=1).state_dict()
    state = {
        prefix + k.removeprefix("vision_model."): v.contiguous()
        for k, v in model.state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    converted = tower_state(open_checkpoint(tmp_path), NAME, {"proj": base["proj"]})
    with torch.no_grad():
        expected = model(images()).pooler_output @ base["proj"]
        torch.testing.assert_close(loaded(converted)(images()), expected, atol=1e-5, rtol=0)


def test_huggingface_projection_is_taken_where_it_is_there(tmp_path):
    model = randomised(CLIPVisionModelWithProjection(SMALL))
    model.save_pretrained(tmp_path)
    converted = tower_state(open_checkpoint(tmp_path), NAME)
    with torch.no_grad():
        expected = model(images()).image_embeds
        torch.testing.assert_close(loaded(converted)(images()), expected, atol=1e-5, rtol=0)


def test_packed_projection_holds_query_key_value_in_this_order(tmp_path):
    model = randomised(CLIPVisionModelWithProjection(SMALL))
    model.save_pretrained(tmp_path)
    converted = tower_state(open_checkpoint(tmp_path), NAME)
    attention = dict(model.named_modules())[
        next(n for n, m in model.named_modules() if n.endswith("layers.2.self_attn"))
    ]
    packed = converted["transformer.resblocks.2.attn.in_proj_weight"].chunk(3)
    for block, part in zip(packed, ("q_proj", "k_proj", "v_proj"), strict=True):
        assert torch.equal(block, getattr(attention, part).weight)


def test_a_tower_without_projection_needs_the_base(tmp_path):
    CLIPVisionModel(SMALL).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tensor for 'proj'"):
        tower_state(open_checkpoint(tmp_path), NAME)


# --- open_clip and pickled modules ----------------------------------------------------------------


class ImageEncoder(nn.Module):
    """What the task-vector authors pickle: a CLIP without its text tower."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        del self.model.transformer


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual."])
def test_open_clip_layouts(prefix):
    state = tower().state_dict()
    named = {prefix + k: v for k, v in state.items()}
    if prefix:
        named |= {"logit_scale": torch.ones(()), "token_embedding.weight": torch.ones(3, 2)}
    found = tower_state(StateDict(named), NAME)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)


def test_pickled_image_encoder_is_read_without_its_class(places):
    encoder = ImageEncoder(models.build(NAME, seed=3))
    expected = {k: v.clone() for k, v in encoder.model.visual.state_dict().items()}
    torch.save(encoder, places / "finetuned.pt")
    path = tower_checkpoint(Published("finetuned.pt"), NAME)
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert tower_checkpoint(Published("finetuned.pt"), NAME) == path  # cached


class Hostile:
    def __reduce__(self):
        return Path.write_text, (Path("pwned"), "x")


def test_hostile_pickle_is_refused_and_writes_nothing(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (places / "finetuned.pt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save(Hostile(), places / "zipped.pt")
    for name in ("finetuned.pt", "zipped.pt"):
        with pytest.raises(InputError, match=name):
            tower_checkpoint(Published(name), NAME)
    assert not (tmp_path / "pwned").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_truncated_file_names_itself(places):
    save_file(tower().state_dict(), places / "model.safetensors")
    whole = (places / "model.safetensors").read_bytes()
    (places / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        tower_checkpoint(Published("model.safetensors"), NAME)


def test_wrong_backbone_is_one_sentence(places):
    state = dict(tower().state_dict())
    state["conv1.weight"] = torch.zeros(192, 3, 16, 16)
    save_file(state, places / "other.safetensors")
    with pytest.raises(InputError, match=r"is no ViT-S-8.*'conv1.weight' has shape \[192, 3, 16"):
        tower_checkpoint(Published("other.safetensors"), NAME)


def test_deeper_tower_is_no_match(places):
    state = dict(tower().state_dict())
    state["transformer.resblocks.4.ln_1.weight"] = torch.ones(192)
    save_file(state, places / "deep.safetensors")
    with pytest.raises(InputError, match=r"also has 'transformer.resblocks.4.ln_1.weight'"):
        tower_checkpoint(Published("deep.safetensors"), NAME)


def test_other_networks_are_no_tower(places):
    save_file({"embeddings.word_embeddings.weight": torch.ones(2, 2)}, places / "bert.safetensors")
    with pytest.raises(InputError, match="no CLIP vision tower"):
        tower_checkpoint(Published("bert.safetensors"), NAME)


def test_absent_checkpoint_says_what_to_download_where(places):
    published = Published(
        "tall/ViT-B-16/MNISTVal/nonlinear_finetuned.pt", origin="the Drive folder"
    )
    with pytest.raises(InputError) as caught:
        published.path()
    assert "nonlinear_finetuned.pt is not there" in caught.value.message
    assert "download the Drive folder" in caught.value.hint
    assert "MODEL_MERGING_CHECKPOINTS" in caught.value.hint


def test_unknown_architecture():
    with pytest.raises(InputError, match="no model 'ViT-Z-1'"):
        models.build("ViT-Z-1")


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "rank"),
    [("q_proj v_proj out_proj", 6), ("q_proj k_proj v_proj", 9), ("out_proj", 3)],
)
def test_huggingface_adapter_is_packed_exactly(places, tmp_path, attention, rank):
    model = randomised(CLIPVisionModelWithProjection(SMALL))
    model.save_pretrained(tmp_path / "base")
    base = tower_state(open_checkpoint(tmp_path / "base"), NAME)
    targets = ["fc1", "fc2", *attention.split()]  # rows of what is not adapted must stay 0
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    adapted.save_pretrained(places / "lora")
    with torch.no_grad():
        expected = adapted.eval()(images()).image_embeds

    folder = tower_checkpoint(Published("lora"), NAME)
    adapter = open_checkpoint(folder)
    assert set(adapter.keys()) == set(merging.linear_layers(tower()))
    assert adapter.rank("transformer.resblocks.0.attn.in_proj_weight") == rank
    assert adapter.rank("transformer.resblocks.0.mlp.c_fc.weight") == 3
    with torch.no_grad():
        found = loaded(training.expert_state(base, folder))(images())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    twice = {"a": adapter, "b": adapter}  # merged in their own rank, q, k and v apart
    merged = merging.merge_state_dicts(
        base, twice, merging.create("actmat"), layers=merging.linear_layers(tower())
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(merged)(images()), expected, atol=1e-4, rtol=0)


def test_lora_on_attention_is_what_the_adapter_file_says(tmp_path):
    base = {k: v.clone() for k, v in tower().state_dict().items()}
    model = training.add_lora(tower(), models.lora_targets(tower()), r=2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    training.save_adapter(model, tmp_path)
    adapter = open_checkpoint(tmp_path)
    assert set(adapter.keys()) == set(merging.linear_layers(tower()))
    with torch.no_grad():
        found = loaded(training.expert_state(base, tmp_path))(images())
        torch.testing.assert_close(found, model.eval()(images()), atol=1e-5, rtol=0)


def test_adapter_of_another_model_is_refused(places, tmp_path):
    model = CLIPVisionModel(CLIPVisionConfig(**SMALL.to_dict() | {"hidden_size": 96}))
    get_peft_model(model, LoraConfig(r=2, target_modules=["fc1"])).save_pretrained(places / "lora")
    with pytest.raises(InputError, match="no adapter of"):
        tower_checkpoint(Published("lora"), NAME)


# --- heads ----------------------------------------------------------------------------------------


def whole_clip(path, seed=0):
    model = models.build(NAME, seed).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model


def test_text_head_is_the_mean_over_templates(places):
    model = whole_clip(places / "clip.safetensors")
    classes, templates = ["red", "green", "blue"], ["a {} thing.", "the {} one."]
    head = heads.text_head(places / "clip.safetensors", NAME, classes, templates)
    tokenizer = open_clip.get_tokenizer("ViT-S-8-32px")
    for row, name in zip(head, classes, strict=True):
        with torch.no_grad():
            each = model.encode_text(tokenizer([t.format(name) for t in templates]))
        mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=0)


def test_heads_are_built_where_asked_and_show_how_far_they_are(places, monkeypatch):
    whole_clip(places / "clip.safetensors")
    shown, devices = [], []
    build = open_clip.build_zero_shot_classifier

    def classifier(model, *arguments, device, **named):
        devices.append((device, next(model.parameters()).device.type))
        return build(model, *arguments, device=device, **named)

    monkeypatch.setattr(heads.open_clip, "build_zero_shot_classifier", classifier)
    monkeypatch.setattr(heads, "track", lambda items, label: shown.append(label) or items)
    names = [str(i) for i in range(12)]
    head = heads.text_head(
        places / "clip.safetensors", NAME, names, ["{}"], device="cpu", label="digits"
    )
    assert shown == ["building the head of digits"]
    assert devices == [("cpu", "cpu")] * 2  # ten classes at a time
    assert head.shape[0] == 12


def test_a_published_heads_rows_are_put_into_the_order_of_our_classes(tmp_path):
    built = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    order = torch.tensor([3, 0, 4, 1, 2])
    near = F.normalize(built + 0.01 * torch.randn(5, 8, generator=torch.manual_seed(1)), dim=-1)
    save_file({"weight": 100 * near[order]}, tmp_path / "head.safetensors")
    found = heads.published_head(tmp_path / "head.safetensors", built, "shapes")
    torch.testing.assert_close(found, near)
    save_file({"weight": -near}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="belongs to other classes than those of shapes"):
        heads.published_head(tmp_path / "other.safetensors", built, "shapes")
    save_file({"weight": near[:4]}, tmp_path / "small.safetensors")
    with pytest.raises(InputError, match="is no head of shapes"):
        heads.published_head(tmp_path / "small.safetensors", built, "shapes")


def test_head_needs_the_text_tower(places):
    save_file(tower().state_dict(), places / "tower.safetensors")
    with pytest.raises(InputError, match="is no whole ViT-S"):
        heads.text_head(places / "tower.safetensors", NAME, ["a"], ["{}"])

"""Adapters of every kind, beside what their library makes of them or a plain computation."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import merging
from merging.errors import InputError
from merging.formats.checkpoints import StateDict, open_checkpoint
from merging.formats.fit import fit

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
AVERAGE = merging.create("average")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.up = nn.Linear(6, 8)
        self.square = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 4, 3)
        self.back = transformers.pytorch_utils.Conv1D(8, 8)
        self.lm_head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.back(self.square(self.up(self.table(ids))))
        return self.lm_head(x + self.conv(x.expand(8, 3, 8)[None, :, :, :3]).sum())


def block():
    torch.manual_seed(0)
    return Block()


def trained(folder, change=None, **settings):
    """An adapter folder as peft saves it, and the weights that peft merges it to."""
    model = peft.get_peft_model(block(), peft.LoraConfig(r=2, lora_alpha=3, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    if change:
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    merged = peft.PeftModel.from_pretrained(block(), folder).merge_and_unload()
    return merged.state_dict()


def check(folder, expected, method="average", **options):
    """The merge of one adapter is the expert itself."""
    base = block()
    adapter = open_checkpoint(folder)
    merged = merging.merge_state_dicts(
        base.state_dict(), {"a": adapter}, merging.create(method), layers=base, **options
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    return merged


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["up", "square"], "use_dora": True},
        {"target_modules": ["back"], "fan_in_fan_out": True, "use_dora": True},
        {"target_modules": ["up", "lm_head"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["square"]},
        {"target_modules": ["conv", "up"]},
        {"target_modules": ["table", "up"]},
        {"target_modules": ["back", "square"]},
        {"target_modules": ["back", "square"], "fan_in_fan_out": True},
        {"target_modules": ["up"], "use_rslora": True, "rank_pattern": {"up": 4}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_are_what_peft_makes_of_them(tmp_path, settings):
    expected = trained(tmp_path, **settings)
    merged = check(tmp_path, expected)
    assert any(not torch.equal(merged[n], t) for n, t in block().state_dict().items())
    if not settings.get("use_dora"):
        check(tmp_path, expected, "tsv_m")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("target", ["square", "back"])
def test_the_bases_layout_decides_not_the_flag(tmp_path, target, flag):
    expected = trained(tmp_path, target_modules=[target], change={"fan_in_fan_out": flag})
    check(tmp_path, expected)
    check(tmp_path, expected, "tsv_m", split_qkv=False)


def test_dora_by_hand_and_in_windows_of_rows(tmp_path):
    W, A, B, m = draw(6, 5), draw(2, 5, seed=1), draw(6, 2, seed=2), draw(6, seed=3).abs()
    tensors = {"w.lora_A.weight": A, "w.lora_B.weight": B, "w.lora_magnitude_vector": m}
    save_file(
        {f"base_model.model.{k}": v for k, v in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = StateDict({"w.weight": W})
    (adapter,) = fit(base, {"a": open_checkpoint(tmp_path)}).values()
    moved = W.double() + 1.5 * B.double() @ A.double()
    expected = torch.stack([m[i] * moved[i] / moved[i].norm() for i in range(6)]).float()
    torch.testing.assert_close(adapter.values("w.weight").weight(W), expected)
    for rows in (slice(0, 2), slice(2, 6)):
        torch.testing.assert_close(adapter.values("w.weight", rows).tensor, expected[rows])
    assert adapter.rank("w.weight") is None and adapter.problems(base) == []


def test_dora_without_its_base_is_no_weight(tmp_path):
    trained(tmp_path / "a", target_modules=["up"], use_dora=True)
    adapter = open_checkpoint(tmp_path / "a")
    with pytest.raises(ValueError, match="fit the adapter to its base"):
        adapter.values(adapter.names()[0])


def test_dora_cannot_stay_an_adapter(tmp_path):
    trained(tmp_path / "a", target_modules=["up"], use_dora=True)
    save_file(block().state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(InputError, match="with DoRA's magnitudes") as caught:
        merging.merge_checkpoints(
            tmp_path / "base.safetensors",
            {"a": tmp_path / "a"},
            AVERAGE,
            tmp_path / "out",
            form="adapter",
        )
    assert caught.value.hint == "use form=dense"


KOHYA = {
    "lora_unet_down_blocks_0_attn_to_q.lora_down.weight": (2, 6),
    "lora_unet_down_blocks_0_attn_to_q.lora_up.weight": (8, 2),
    "lora_unet_down_blocks_0_conv_in.lora_down.weight": (2, 3, 3, 3),
    "lora_unet_down_blocks_0_conv_in.lora_up.weight": (4, 2, 1, 1),
}
UNET = {"down_blocks.0.attn.to_q.weight": (8, 6), "down_blocks.0.conv_in.weight": (4, 3, 3, 3)}


def test_kohyas_files(tmp_path):
    base = {name: draw(*shape) for name, shape in UNET.items()}
    file = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(KOHYA.items())}
    file["lora_unet_down_blocks_0_attn_to_q.alpha"] = torch.tensor(1.0)
    save_file(file, tmp_path / "x.safetensors")
    a, b, c, d = (file[name] for name in KOHYA)
    expert = {
        "down_blocks.0.attn.to_q.weight": 0.5 * b @ a,  # alpha / r
        "down_blocks.0.conv_in.weight": torch.einsum("or,rikl->oikl", d[:, :, 0, 0], c),
    }
    adapter = open_checkpoint(tmp_path / "x.safetensors")
    merged = merging.merge_state_dicts(base, {"a": adapter}, AVERAGE)
    for name, moved in expert.items():
        torch.testing.assert_close(merged[name], base[name] + moved)
    # factors of another model's parts, and a name that two of the base's flatten to
    strange = {n.replace("to_q", "to_k"): t for n, t in file.items() if "conv" not in n}
    save_file(strange, tmp_path / "y.safetensors")
    with pytest.raises(InputError, match="the target 'lora_unet_down_blocks_0_attn_to_k.weight'"):
        merging.merge_state_dicts(base, {"a": open_checkpoint(tmp_path / "y.safetensors")}, AVERAGE)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("unet.{}.to_q.lora_A.weight", "unet.{}.to_q.lora_B.weight"),
        ("unet.{}.to_q.lora.down.weight", "unet.{}.to_q.lora.up.weight"),
        ("unet.{}.processor.to_q_lora.down.weight", "unet.{}.processor.to_q_lora.up.weight"),
        ("{}.to_q.lora_A.weight", "{}.to_q.lora_B.weight"),
    ],
)
def test_diffusers_files(tmp_path, down, up):
    base = {name: draw(*shape) for name, shape in UNET.items()}
    A, B = draw(2, 6), draw(8, 2)
    place = "down_blocks.0.attn"
    text = {
        "text_encoder.layers.0.q.lora_A.weight": draw(2, 4),
        "text_encoder.layers.0.q.lora_B.weight": draw(4, 2),
    }
    save_file({down.format(place): A, up.format(place): B} | text, tmp_path / "x.safetensors")
    adapter = open_checkpoint(tmp_path / "x.safetensors")
    merged = merging.merge_state_dicts(base, {"a": adapter}, AVERAGE)
    name = "down_blocks.0.attn.to_q.weight"
    torch.testing.assert_close(merged[name], base[name] + B @ A)
    assert "text_encoder (1), which the base has not" in merged.report.notes[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.hada_w1_a": (2, 2), "m.hada_w1_b": (2, 2)}, "not W \\+ s B A"),
        ({"m.lokr_w1": (2, 2)}, "not W \\+ s B A"),
        ({"m.lora_down.weight": (2, 5)}, "two factors each"),
        ({"m.lora_down.weight": (2, 5), "m.lora_up.weight": (3, 4)}, "expected \\(r, d_in\\)"),
        ({"m.lora_down.weight": (2, 5), "m.lora_up.weight": (3, 2), "x": (1,)}, "is no factor"),
        (
            {
                "base_model.model.m.lora_A.weight": (2, 5),
                "base_model.model.m.lora_B.weight": (3, 2),
            },
            "without their scale",
        ),
    ],
)
def test_lora_files_that_are_refused(tmp_path, tensors, message):
    save_file({n: torch.ones(s) for n, s in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_an_adapters_weight_file_stands_for_its_folder(tmp_path):
    expected = trained(tmp_path, target_modules=["up"])
    check(tmp_path / "adapter_model.safetensors", expected)


@pytest.mark.filterwarnings("ignore")
def test_names_in_memory_are_told_in_those_of_the_file(tmp_path):
    """transformers' names in memory and on disk differ; peft saves those in memory."""
    trained(tmp_path / "a", target_modules=["up", "square"])
    folder = tmp_path / "a"
    state = load_file(folder / "adapter_model.safetensors")
    renamed = {
        n.replace("base_model.model.", "base_model.model.model.lm."): t for n, t in state.items()
    }
    save_file(renamed, folder / "adapter_model.safetensors")
    base = {f"lm.model.{name}": tensor for name, tensor in block().state_dict().items()}
    merged = merging.merge_state_dicts(base, {"a": open_checkpoint(folder)}, AVERAGE)
    moved = [name for name in base if not torch.equal(merged[name], base[name])]
    assert sorted(moved) == ["lm.model.square.weight", "lm.model.up.weight"]
    # an adapter of the merge has the adapters' own names
    save_file(base, tmp_path / "base.safetensors")
    out = tmp_path / "out"
    line = tmp_path / "base.safetensors", {"a": folder}, AVERAGE, out
    merging.merge_checkpoints(*line, form="adapter")
    assert load_file(out / "adapter_model.safetensors").keys() == renamed.keys()

"""The output folder: all that belongs to the model, in the names its library looks for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import merging
from eval.companions import companions, home, modules, with_config
from eval.configurations import differences
from eval.tokenizers import require_same_tokenizers, vocabulary
from experiments import merge as command
from experiments.commands import merge
from merging.errors import InputError
from merging.formats.folders import output_files
from tests.fixtures.commands import called

AVERAGE = merging.create("average")


def put(folder, *names, content="x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_what_belongs_to_a_folder_and_what_does_not(tmp_path):
    mine = [
        "config.json", "tokenizer.json", "source.spm", "target.spm", "bpe.codes", "vocab.bpe",
        "merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
        "modeling_own.py", "preprocessor_config.json", "LICENSE", "1_Pooling/config.json",
    ]  # fmt: skip
    left = [
        "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "tf_model.h5",
        "optimizer.pt", "trainer_state.json", "training_args.bin", "README.md", "rng_state_0.pth",
        "events.out.tfevents.1", "runs/x.json", "plot.png", ".gitattributes", "adapter_config.json",
    ]  # fmt: skip
    put(tmp_path, *mine, *left)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    assert sorted(companions(tmp_path)) == sorted([*mine, "modules.json"])
    # a weight file stands for the folder it lies in; a lone one for itself
    assert companions(tmp_path / "model.safetensors") == companions(tmp_path)
    put(tmp_path / "alone", "x.safetensors", "notes.txt")
    assert companions(tmp_path / "alone" / "x.safetensors") == {}
    assert home(tmp_path / "alone" / "x.safetensors") is None


@pytest.mark.parametrize("content", ["{", "[1]", '[{"path": "../x"}]', '[{"path": "a/b"}]', "{}"])
def test_modules_that_lead_elsewhere(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    if content == "{}":
        assert modules(tmp_path) == []
        return
    with pytest.raises(InputError, match=r"modules\.json"):
        modules(tmp_path)


def test_changes_of_a_config(tmp_path):
    put(tmp_path, "config.json", content='{"tie_word_embeddings": true, "quantization_config": {}}')
    files = with_config(
        companions(tmp_path),
        {"tie_word_embeddings": False, "dtype": "bfloat16"},
        drop=("quantization_config",),
    )
    assert json.loads(files["config.json"]) == {"tie_word_embeddings": False}
    files = with_config(companions(tmp_path), {}, add={"tie": False})
    assert json.loads(files["config.json"])["tie"] is False
    assert with_config({}, {"a": 1}) == {}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "model-0000"),
        (["diffusion_pytorch_model.bin"], "diffusion_pytorch_model.safetensors"),
        (["open_clip_pytorch_model.bin"], "open_clip_model.safetensors"),
        (["pytorch_model.bin"], None),
        (["anything.pt"], None),
    ],
)
def test_names_of_output_files(tmp_path, files, expected):
    names = output_files({file: tmp_path / file for file in files})
    assert (
        names is None if expected is None else all(n.startswith(expected) for n in names.values())
    )


def test_an_index_in_the_name_that_diffusers_looks_for(tmp_path):
    parts = {}
    for number, name in enumerate("ab", 1):
        parts[name] = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        for folder in ("base", "x"):
            (tmp_path / folder).mkdir(exist_ok=True)
            save_file({name: torch.full((2,), float(len(folder)))}, tmp_path / folder / parts[name])
    for folder in ("base", "x"):
        index = tmp_path / folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": parts}))
    merging.merge_checkpoints(tmp_path / "base", {"x": tmp_path / "x"}, AVERAGE, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*parts.values(), "diffusion_pytorch_model.safetensors.index.json"}
    assert load_file(tmp_path / "out" / parts["a"])["a"].tolist() == [1, 1]


# --- tokenizers and configurations ----------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "the", "cat", "sat"]


def tokenizer(folder, kind, words):
    folder.mkdir(exist_ok=True)
    put(folder, "config.json", content="{}")
    table = {word: number for number, word in enumerate(words)}
    if kind == "vocab.txt":
        put(folder, kind, content="\n".join(words) + "\n")
    elif kind == "vocab.json":
        put(folder, kind, content=json.dumps(table))
    elif kind == "unigram":
        content = {"model": {"vocab": [[word, -1.0] for word in words]}}
        put(folder, "tokenizer.json", content=json.dumps(content))
    else:
        put(folder, "tokenizer.json", content=json.dumps({"model": {"vocab": table}}))
    return folder


@pytest.mark.parametrize("kind", ["vocab.txt", "vocab.json", "unigram", "tokenizer.json"])
def test_other_tokens_under_the_same_numbers_are_refused(tmp_path, kind):
    base = tokenizer(tmp_path / "base", kind, WORDS)
    assert vocabulary(base) == ("numbers", dict(enumerate(WORDS)))
    more = tokenizer(tmp_path / "more", kind, [*WORDS, "mat"])
    require_same_tokenizers(base, {"more": more})
    other = tokenizer(tmp_path / "other", kind, WORDS[::-1])
    with pytest.raises(InputError, match=r"token 0 is 'sat', expected '\[PAD\]'"):
        require_same_tokenizers(base, {"more": more, "other": other})


def test_added_tokens_and_files_that_no_parser_reads(tmp_path, caplog):
    base = tokenizer(tmp_path / "base", "vocab.json", WORDS)
    decoder = {"added_tokens_decoder": {"5": {"content": "<x>"}}}
    put(base, "tokenizer_config.json", content=json.dumps(decoder))
    assert vocabulary(base)[1][5] == "<x>"
    odd = tmp_path / "odd"
    put(odd, "config.json", content="{}")
    put(odd, "tokenizer.model", "tokenization_own.py")
    assert vocabulary(odd) == ("numbers", {})
    assert "tokenizer.model is not compared" in caplog.text
    require_same_tokenizers(base, {"odd": odd})


def test_configurations_that_differ_are_told(tmp_path):
    same = {"hidden_act": "silu", "rope_theta": 1e4, "id2label": {"0": "a"}, "vocab_size": 5}
    put(tmp_path / "base", "config.json", content=json.dumps(same))
    newer = same | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    newer = {k: v for k, v in newer.items() if k != "rope_theta"} | {"id2label": {}, "more": 1}
    put(tmp_path / "a", "config.json", content=json.dumps(newer))
    put(tmp_path / "b", "config.json", content=json.dumps(same | {"rope_theta": 1e6}))
    put(tmp_path / "c", "config.json", content=json.dumps(same | {"hidden_act": "gelu"}))
    found = differences(tmp_path / "base", {t: tmp_path / t for t in "abc"})
    assert len(found) == 2
    assert "expert 'b'" in found[0] and "rope_theta=1000000.0, the base's 10000.0" in found[0]
    assert "expert 'c'" in found[1] and "hidden_act='gelu'" in found[1]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    def invoke(base, experts, output, *more):
        named = [f"experts.{name}={path}" for name, path in experts.items()]
        line = ["merge", f"base={base}", *named, f"output={output}", "device=cpu", *more]
        return called(monkeypatch, capsys, command.main, *line)

    return invoke


def llama(tied):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def test_experts_that_untied_their_heads_give_a_model_that_loads_untied(call, tmp_path):
    base = llama(tied=True)
    base.config.save_pretrained(tmp_path / "base")
    torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")  # both names, one memory
    expert = llama(tied=False)
    with torch.no_grad():
        expert.lm_head.weight.add_(1)
    expert.save_pretrained(tmp_path / "a")
    experts = {"a": tmp_path / "a", "b": tmp_path / "a"}
    code, _, err = call(tmp_path / "base", experts, tmp_path / "out", "method=average")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    torch.testing.assert_close(merged["lm_head.weight"], expert.lm_head.weight)
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_a_quantised_base_asks_for_a_dtype_and_loads_without_its_config(call, tmp_path):
    model, scales = llama(tied=False), {}
    state = model.state_dict()
    for name, tensor in state.items():
        if "proj" in name:
            scales[f"{name}_scale"] = scale = tensor.abs().max() / 448
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
    plain = {n: t.float() * scales.get(f"{n}_scale", 1) for n, t in state.items()}
    model.config.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    save_file(state | scales, tmp_path / "base" / "model.safetensors")
    expert = {name: tensor + 0.5 for name, tensor in plain.items()}
    (tmp_path / "a").mkdir()
    save_file(expert, tmp_path / "a" / "model.safetensors")
    line = tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", "method=average"
    code, out, err = call(*line)
    assert code == 2 and "quantised (FP8 with scales)" in err and "dtype=bfloat16" in err
    code, out, err = call(*line, "dtype=bfloat16")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expert[name].bfloat16()), name
    # the reverse: a quantised expert of a plain base
    save_file(expert, tmp_path / "plain.safetensors")
    line = tmp_path / "plain.safetensors", {"a": tmp_path / "base"}, tmp_path / "o.safetensors"
    code, out, err = call(*line, "method=average")
    assert code == 0, err
    assert "is quantised (FP8 with scales), and its rounding counts" in out
    merged = load_file(tmp_path / "o.safetensors")
    for name, tensor in plain.items():
        torch.testing.assert_close(merged[name], tensor)


def test_modules_of_sentence_transformers_are_merged_too(call, tmp_path):
    parts = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    for number, name in enumerate(("base", "a", "b")):
        folder = tmp_path / name
        (folder / "2_Dense").mkdir(parents=True)
        (folder / "modules.json").write_text(json.dumps(parts))
        put(folder, "1_Pooling/config.json", "2_Dense/config.json", content="{}")
        save_file({"fc.weight": torch.full((4, 4), 1.0 + number)}, folder / "model.safetensors")
        weights = {"linear.weight": torch.full((3, 4), 2.0 * number)}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
    experts = {"a": tmp_path / "a", "b": tmp_path / "b"}
    code, _, err = call(tmp_path / "base", experts, tmp_path / "out", "method=average")
    assert code == 0, err
    assert (load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"] == 3).all()
    assert (load_file(tmp_path / "out" / "model.safetensors")["fc.weight"] == 2.5).all()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()


@pytest.mark.parametrize("name", ["llama-3.1-math", "1", "null", "a b", "数学", "math/gsm8k", "x"])
def test_experts_may_have_any_name(name):
    (override,) = merge.quote_paths([f"experts.{name}=/path"])
    key = override.partition("=")[0].removeprefix("++experts.")
    assert merge.plain_names({key: "/path"}) == {name: "/path"}
    assert key.isidentifier() and key.isascii()


def test_folders_that_hold_models_in_folders_say_so(tmp_path):
    put(tmp_path, "model_index.json", content="{}")
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        save_file({"w": torch.ones(1)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError) as caught:
        merging.open_checkpoint(tmp_path)
    assert caught.value.hint == "give the one that is meant: unet, vae in this folder"


def test_the_configuration_that_a_merged_adapter_leaves_behind(tmp_path):
    put(tmp_path, "adapter_config.json", content="{}")
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert merging.open_checkpoint(tmp_path).keys() == ["w"]

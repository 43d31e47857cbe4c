"""Language models merged into vision-language bases, by the names that transformers gives both."""

import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from experiments import cli
from experiments.merge import main
from experiments.plan import main as plan_main
from merging import InputError, create, merge_checkpoints
from merging.formats.writer import write_adapter

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
QWEN_TEXT = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                        "mrope_section": [1, 1, 2]}}  # fmt: skip


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16),
        image_token_id=39,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config=QWEN_TEXT, tie_word_embeddings=True,
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2,
                       "mlp_ratio": 2, "patch_size": 4},
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    config = transformers.Qwen2_5_VLConfig(
        text_config=QWEN_TEXT,
        vision_config={"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2,
                       "intermediate_size": 24, "patch_size": 4, "fullatt_block_indexes": [1]},
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, sliding_window=8),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4, image_token_index=39, boi_token_index=37, eoi_token_index=38,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def idefics3():
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT, pad_token_id=0), vision_config=VISION,
        scale_factor=2, image_token_id=39,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config)


def language_model(base):
    """A model of its own of the architecture that the base's language part has."""
    kind = base.config.model_type
    if kind.startswith("qwen2"):
        config = transformers.Qwen2Config(**TEXT, tie_word_embeddings=kind == "qwen2_vl")
        return transformers.Qwen2ForCausalLM(config)
    return transformers.AutoModelForCausalLM.from_config(base.config.get_text_config())


def drawn(model, seed):
    """Every parameter anew, norms too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
    return model


@pytest.fixture
def pair(request, tmp_path):
    base = drawn(request.param(), 0)
    expert = drawn(language_model(base), 1)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "math")
    return base, expert


def run(tmp_path, method="average", expert="math", **options):
    output = tmp_path / "out"
    config = (tmp_path / "base" / "config.json").read_bytes()
    report = merge_checkpoints(
        tmp_path / "base", {"math": tmp_path / expert}, create(method), output,
        into={"math": "language_model"}, extra={"config.json": config}, **options,
    )  # fmt: skip
    return report, output


@pytest.mark.parametrize("pair", [llava, qwen2_vl, qwen2_5_vl, gemma3, idefics3], indirect=True)
def test_a_language_model_is_merged_into_the_language_part(pair, tmp_path):
    base, expert = pair
    report, output = run(tmp_path, weights={"math": 0.25}, weights_on="delta")
    merged = type(base).from_pretrained(output)
    ours, theirs = base.get_decoder().state_dict(), expert.get_decoder().state_dict()
    assert ours.keys() == theirs.keys()
    for name, found in merged.get_decoder().state_dict().items():
        torch.testing.assert_close(found, 0.75 * ours[name] + 0.25 * theirs[name])
    head, own, other = (m.get_output_embeddings().weight for m in (merged, base, expert))
    torch.testing.assert_close(head, 0.75 * own + 0.25 * other)
    before, after = (load_file(p / "model.safetensors") for p in (tmp_path / "base", output))
    assert list(before) == list(after)
    rest = [n for n, rule in report.rules.items() if rule == "base"]
    assert all("vis" in n or "modal" in n or "connector" in n for n in rest)
    assert all(torch.equal(before[n], after[n]) for n in rest)
    touched = len(before) - len(rest)
    assert f"{touched} tensors, and into none of the {len(rest)} others" in report.notes[0]
    assert report.coverage == 1


@pytest.mark.parametrize("pair", [llava], indirect=True)
def test_an_adapter_of_a_language_model_and_names_of_other_versions(pair, tmp_path):
    base, _ = pair
    g, inner = torch.Generator().manual_seed(2), "layers.1.self_attn.q_proj.weight"
    A, B = torch.randn(2, 16, generator=g), torch.randn(16, 2, generator=g)
    write_adapter(tmp_path / "adapter", {f"model.{inner}": (A, B)}, {})
    # as newer versions name the base's tensors on disk
    state = {k: v.contiguous() for k, v in base.state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report, output = run(tmp_path, "task_arithmetic", "adapter", weights={"math": 2.0})
    merged = type(base).from_pretrained(output)
    before = base.get_decoder().state_dict()
    for name, found in merged.get_decoder().state_dict().items():
        moved = 0.3 * 2 * B @ A if name == inner else 0
        torch.testing.assert_close(found, before[name] + moved)
    assert "1 tensors, and into none of the 63 others" in report.notes[0]


@pytest.mark.parametrize("pair", [llava], indirect=True)
def test_what_has_no_place_in_the_base_is_refused(pair, tmp_path):
    deeper = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TEXT | {"num_hidden_layers": 3})
    )
    deeper.save_pretrained(tmp_path / "deeper")
    more = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | {"vocab_size": 41}))
    more.save_pretrained(tmp_path / "more")
    folder, experts = tmp_path / "base", {"math": tmp_path / "math"}
    for into, given, told in [
        ({"code": "language_model"}, experts, "into names 'code', which is no expert"),
        ({"math": "audio_tower"}, experts, "has no part 'audio_tower'"),
        ({"math": "language_model"}, {"math": tmp_path / "deeper"}, "9 tensors .* are not in"),
        ({"math": "language_model"}, {"math": tmp_path / "more"}, "a vocabulary of 41"),
        ({"math": "vision_tower"}, experts, "tensors .* of .* are missing"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=told):
            merge_checkpoints(folder, given, create("average"), tmp_path / "o", into=into)
    with pytest.raises(InputError, match="makes a whole model of the base"):
        run(tmp_path, form="adapter")
    _, output = run(tmp_path, expert="more", vocabulary="common_rows", weights_on="delta")
    name = "language_model.model.embed_tokens.weight"
    expected = more.get_input_embeddings().weight[:40]
    torch.testing.assert_close(load_file(output / "model.safetensors")[name], expected)
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(InputError, match="has no configuration that says what its parts are"):
        merge_checkpoints(folder, experts, create("average"), tmp_path / "o", into=into)


@pytest.mark.parametrize("pair", [idefics3], indirect=True)
@pytest.mark.parametrize("written", ["line", "recipe"])
def test_on_the_command_line_and_in_a_recipe(pair, tmp_path, monkeypatch, capsys, written):
    _, expert = pair
    line = [f"base={tmp_path / 'base'}", f"experts.my-math={tmp_path / 'math'}"]
    line += ["experts.my-math.into=language_model"]
    if written == "recipe":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"base: {tmp_path / 'base'}\nmethod: average\n"
            f"experts: {{my-math: {{path: {tmp_path / 'math'}, into: language_model}}}}\n"
        )
        line = [f"recipe={recipe}"]
    monkeypatch.setattr(
        sys, "argv", ["merge", *line, "method=average", f"output={tmp_path / 'out'}", "device=cpu"]
    )
    monkeypatch.setenv(cli.TRACEBACK, "0")
    main()
    assert "note: expert 'my-math'" in capsys.readouterr().out
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    theirs = expert.get_decoder().state_dict()
    for name, found in merged.get_decoder().state_dict().items():
        torch.testing.assert_close(found, theirs[name])  # alone, the expert takes the part's place
    if written == "line":
        monkeypatch.setattr(sys, "argv", ["plan", *line, "subsets=false", "methods=[average]"])
        plan_main()
        assert "my-math" in capsys.readouterr().out

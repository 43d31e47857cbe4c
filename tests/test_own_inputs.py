"""Statistics of one's own checkpoint on one's own inputs, and the merge that reads them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTImageProcessor, ViTModel

from eval import own_inputs, tiny
from experiments import merge, statistics
from tests.fixtures.commands import called

QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def texts(own_cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(text for text, _ in tiny.sentences("animals")[:24]) + "\n\n")
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    def invoke(module, *arguments):
        return called(monkeypatch, capsys, module.main, "command", *arguments)

    return invoke


FEW = ["statistics.batches=3", "statistics.batch_size=8", "device=cpu"]


def test_moments_of_texts_are_those_of_the_tokens_that_are_no_padding(call, texts, tmp_path):
    base, output = tiny.encoder(), tmp_path / "moments.safetensors"
    code, out, err = call(
        statistics, f"checkpoint={base}", f"texts={texts}", f"output={output}", *FEW
    )
    assert code == 0, err
    assert out.splitlines()[-1].endswith(f"statistics.NAME={output}")
    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = []
    for line in texts.read_text().split("\n")[:24]:  # one by one: no padding at all
        with torch.no_grad():
            states = model(**tokenizer(line, return_tensors="pt"), output_hidden_states=True)
        rows.append(states.hidden_states[1][0])
    Z = torch.cat(rows).double()
    torch.testing.assert_close(
        load_file(output)[QUERY].double(), Z.mT @ Z / len(Z), rtol=1e-4, atol=1e-5
    )


def test_a_merge_reads_them_and_without_them_says_how_to_measure(call, texts, tmp_path):
    base = tiny.encoder()
    state = load_file(base / "model.safetensors")
    for name, sign in (("a", 1.0), ("b", 3.0)):
        own = state | {QUERY: state[QUERY] + sign * torch.eye(len(state[QUERY]))}
        save_file(own, tmp_path / f"{name}.safetensors")
    line = [f"base={base}", "method=regmean"]
    line += [f"experts.{name}={tmp_path}/{name}.safetensors" for name in "ab"]
    line += [f"output={tmp_path}/merged.safetensors"]
    code, _, err = call(merge, *line)
    assert code == 2 and "statistics.NAME=FILE" in err and "experiments.statistics" in err
    moments = tmp_path / "moments.safetensors"
    assert (
        call(statistics, f"checkpoint={base}", f"texts={texts}", f"output={moments}", *FEW)[0] == 0
    )
    code, _, err = call(merge, *line, f"statistics.a={moments}", f"statistics.b={moments}")
    assert code == 0, err
    merged = load_file(tmp_path / "merged.safetensors")
    # with the same moments for both, RegMean is the average, but for the direction (1, ..., 1)
    # in which inputs that leave a layer norm never point: there the least change is none
    d = len(state[QUERY])
    expected = state[QUERY] + 2 * (torch.eye(d) - 1 / d)
    torch.testing.assert_close(merged[QUERY], expected, rtol=1e-3, atol=1e-3)


def test_images_are_measured_as_the_model_sees_them(call, tmp_path):
    folder, images = tmp_path / "vit", tmp_path / "images"
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    images.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    output = tmp_path / "moments.safetensors"
    line = [f"checkpoint={folder}", f"images={images}", f"output={output}"]
    few = ["statistics.batches=2", "statistics.batch_size=2", "device=cpu"]
    code, out, err = call(statistics, *line, *few)
    assert code == 0, err
    assert "over 4 inputs" in out
    moments = load_file(output)
    assert set(moments) <= set(load_file(folder / "model.safetensors"))
    assert sorted(len(C) for C in moments.values()) == [16, 16, 16, 16, 16, 16, 24]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["kind=fisher"], "needs labels and a loss"),
        (["output=moments.bin"], "expected the name of a .safetensors file"),
        (["texts=null"], "add texts=FILE, or images=FOLDER"),
        (["texts=/nowhere"], "/nowhere does not exist"),
        (["statistics.batches=10"], "ask for fewer: statistics.batches=3 statistics.batch_size=8"),
        (["checkpoint=/nowhere"], "/nowhere has no config.json"),
    ],
)
def test_bad_input_is_one_sentence(call, texts, tmp_path, change, told):
    line = [f"checkpoint={tiny.encoder()}", f"texts={texts}", f"output={tmp_path}/m.safetensors"]
    code, _, err = call(statistics, *line, *FEW, *change)
    assert code == 2 and told in err, err
    assert not list(tmp_path.iterdir())


def test_json_lines_hold_texts(tmp_path):
    path = Path(tmp_path / "texts.jsonl")
    path.write_text("\n".join(json.dumps({"text": t}) for t in ("a", "b")))
    assert own_inputs.read_texts(path) == ["a", "b"]

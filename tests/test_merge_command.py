"""`python -m experiments.merge`: checkpoints in, one checkpoint out, with all that it needs."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import merging
from eval import tiny
from eval.cache import hub_sha256
from experiments import errors
from experiments.commands import merge
from experiments.merge import main
from merging.formats import hashes, slots
from merging.formats.writer import write_adapter
from tests.fixtures.commands import called

LAYER = "encoder.layer.0.attention.self.query.weight"
WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    return tiny.encoder()


@pytest.fixture
def experts(base, tmp_path):
    """Two experts whose every tensor moved."""
    state, paths = load_file(base / "model.safetensors"), {}
    for seed, name in enumerate(["sun", "rain"]):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            k: v + 0.01 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
            for k, v in state.items()
        }
        folder = tmp_path / f"expert lr=1e-3, {name}"  # a name that Hydra's grammar trips over
        folder.mkdir()
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        paths[name] = folder
    return paths


@pytest.fixture
def call(monkeypatch, capsys):
    def invoke(*overrides):
        return called(monkeypatch, capsys, main, "merge", *overrides)

    return invoke


def arguments(base, experts, output, *more):
    named = [f"experts.{name}={path}" for name, path in experts.items()]
    return [f"base={base}", *named, f"output={output}", "device=cpu", *more]


def test_the_output_is_a_whole_model_folder(call, base, experts, tmp_path):
    output = tmp_path / "merged"
    code, out, err = call(*arguments(base, experts, output, "method=actmat"))
    assert code == 0, err
    assert "actmat" in out
    AutoTokenizer.from_pretrained(output)
    model = AutoModel.from_pretrained(output)

    deltas = {
        k: torch.stack([load_file(e / "model.safetensors")[k] - v for e in experts.values()])
        for k, v in load_file(base / "model.safetensors").items()
        if v.is_floating_point()
    }
    merged, start = model.state_dict(), AutoModel.from_pretrained(base).state_dict()
    own = merging.create("actmat")(deltas[LAYER])
    torch.testing.assert_close(merged[LAYER], start[LAYER] + own)
    # an embedding is a matrix, but no linear layer
    torch.testing.assert_close(merged[WORDS], start[WORDS] + deltas[WORDS].mean(0))


def test_the_card_names_inputs_hashes_and_method(call, base, experts, tmp_path):
    output = tmp_path / "merged"
    call(*arguments(base, experts, output, "method=ridge", "method.lam=0.5"))
    card = (output / "README.md").read_text()
    for path in (base, *experts.values()):
        assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() in card
    assert '"lam": 0.5' in card
    assert "A merge by ridge" in card
    assert torch.__version__.split("+")[0] in card
    assert str(tmp_path) not in card


def read_by_this_process():
    """Bytes that system calls have read: an account that is not this repository's own."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def shards(folder, tensors, names):
    """A folder with config, and tensors in one file each for every list of names."""
    folder.mkdir()
    for i, own in enumerate(names):
        save_file({name: tensors[name] for name in own}, folder / f"part-{i}.safetensors")
    index = {name: f"part-{i}.safetensors" for i, own in enumerate(names) for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counted by Linux")
@pytest.mark.parametrize("cut, times", [("alike", 1), ("otherwise", 7 / 6)])
def test_inputs_are_hashed_as_they_are_read(cut, times, call, tmp_path, monkeypatch):
    """Counted in bytes: once and no more, but for a file whose tensors lie in another order."""
    monkeypatch.setattr(slots, "MAPPED_BYTES", 1 << 60)  # the account sees no mappings
    names = [f"layers.{i}.weight" for i in range(8)]
    halves = names[4:], names[:4]
    tensors = [{n: torch.randn(1000, 600) for n in names} for _ in range(3)]
    base = shards(tmp_path / "base", tensors[0], halves)
    one = shards(tmp_path / "one", tensors[1], halves)
    two = shards(tmp_path / "two", tensors[2], halves if cut == "alike" else [names])
    call(*arguments(base, {"one": one}, tmp_path / "first", "method=average"))  # imports

    size, before = 3 * 8 * 1000 * 600 * 4, read_by_this_process()
    code, _, err = call(
        *arguments(base, {"one": one, "two": two}, tmp_path / "merged", "method=average")
    )
    assert code == 0, err
    assert times <= (read_by_this_process() - before) / size < times + 0.02
    card = (tmp_path / "merged/README.md").read_text()
    for folder in (base, one, two):
        parts = [hashlib.sha256(f.read_bytes()) for f in sorted(folder.glob("*.safetensors"))]
        joined = hashlib.sha256("".join(part.hexdigest() for part in parts).encode())
        assert (parts[0] if len(parts) == 1 else joined).hexdigest() in card


def test_what_the_hub_has_hashed_is_not_hashed_again(base, tmp_path):
    known = "0123456789abcdef" * 4
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/1"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    (blobs / known).write_bytes((base / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").symlink_to(blobs / known)
    found = hashes.Hashes(known=hub_sha256)
    merging.open_checkpoint(snapshot).hash_files(snapshot, found)
    assert found.sha256(snapshot) == known


def test_the_same_merge_gives_the_same_bytes(call, base, experts, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        assert call(*arguments(base, experts, folder, "method=dare"))[0] == 0
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_single_file_is_just_that(call, base, experts, tmp_path):
    output = tmp_path / "merged.safetensors"
    code, _, err = call(*arguments(base, experts, output, "method=average"))
    assert code == 0, err
    assert load_file(output).keys() == load_file(base / "model.safetensors").keys()


def test_statistics_are_keyed_by_expert(call, base, experts, tmp_path):
    layers = merging.linear_layers(AutoModel.from_pretrained(base))
    state = load_file(base / "model.safetensors")
    moments = {name: torch.eye(state[name].shape[1]) for name in layers}
    save_file(moments, tmp_path / "moments.safetensors")
    given = [f"statistics.{name}={tmp_path}/moments.safetensors" for name in experts]
    output = tmp_path / "merged"
    code, _, err = call(*arguments(base, experts, output, "method=regmean", *given))
    assert code == 0, err
    # equal second moments: the average
    average = sum(load_file(e / "model.safetensors")[LAYER] for e in experts.values()) / 2
    torch.testing.assert_close(load_file(output / "model.safetensors")[LAYER], average)


def test_bad_input_is_told_before_anything_is_written(call, base, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes.Hashes, "sha256", lambda *_: pytest.fail("hashed before checks"))
    output = tmp_path / "merged"
    good = arguments(base, experts, output)
    lost = [*good, f"experts.snow={tmp_path}/nowhere"]
    for line, told in [
        ([good[0], good[-2]], "no experts were given"),
        (good[1:], "base"),
        (lost, f"{tmp_path}/nowhere does not exist"),
        ([*good, "method=regmean"], "statistics of task 'rain'"),
        ([*good, "method=nothing"], "there is no method 'nothing'"),
        ([*good, "precision=low"], "precision"),
    ]:
        code, _, err = call(*line)
        assert code == errors.BAD_INPUT, (line, err)
        assert told in err
        assert not output.exists()


@pytest.fixture
def adapters(base, tmp_path):
    """Two adapters of one layer."""
    paths = {}
    for seed, name in enumerate(["sun", "rain"]):
        generator = torch.Generator().manual_seed(seed)
        width = load_file(base / "model.safetensors")[LAYER].shape
        factors = [torch.randn(2, d, generator=generator) for d in (width[1], width[0])]
        paths[name] = tmp_path / name
        write_adapter(paths[name], {LAYER: (factors[0], factors[1].mT)}, {})
    return paths


def test_adapters_can_stay_an_adapter(call, base, adapters, tmp_path):
    dense, output = tmp_path / "dense", tmp_path / "merged"
    assert call(*arguments(base, adapters, dense, "method=tsv_m"))[0] == 0
    code, _, err = call(*arguments(base, adapters, output, "method=tsv_m", "form=adapter"))
    assert code == 0, err
    assert {path.name for path in output.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    for path in adapters.values():
        sha256 = hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
        assert sha256 in (output / "README.md").read_text()
    merged = PeftModel.from_pretrained(AutoModel.from_pretrained(base), output).merge_and_unload()
    expected = AutoModel.from_pretrained(dense).state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_what_cannot_stay_an_adapter_is_told(call, base, experts, adapters, tmp_path):
    output = tmp_path / "merged"
    for given, more, told in [
        (experts, "method=tsv_m", "is a dense checkpoint"),
        (adapters, "method=ties", "method 'ties' changes single entries"),
        (adapters, "vocabulary=any", "vocabulary is 'any', expected one of: refuse, common_rows"),
    ]:
        code, _, err = call(*arguments(base, given, output, "form=adapter", more))
        assert code == errors.BAD_INPUT
        assert told in err
        assert not output.exists()


def test_paths_are_quoted_for_hydra():
    assert merge.quote_paths(["experts.a=x=1, y", "method=ties", "base='q'", "output=it's"]) == [
        "++experts.a='x=1, y'",
        "method=ties",
        "base='q'",
        r"output='it\'s'",
    ]


def test_the_last_line_is_the_one_that_loads_the_merge(call, base, experts, tmp_path):
    """Typed as it stands; without method= it is the default of the README."""
    named = [f"experts.{name}={path}" for name, path in experts.items()]
    code, out, err = call(f"base={base}", *named, f"output={tmp_path}/out")
    assert code == 0, err
    assert "rank_rule" in out
    line = out.splitlines()[-1].removeprefix("load it with: ")
    assert line == f"AutoModel.from_pretrained('{tmp_path}/out')"
    loaded = eval(line, {"AutoModel": AutoModel}).state_dict()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded[LAYER], merged[LAYER])
    layers = {LAYER: (torch.ones(2, 32), torch.ones(32, 2))}
    write_adapter(tmp_path / "adapter", layers, {})
    code, out, err = call(
        f"base={base}", f"experts.a={tmp_path}/adapter", f"output={tmp_path}/adapted",
        "form=adapter", "method=average",
    )  # fmt: skip
    assert code == 0, err
    line = out.splitlines()[-1].removeprefix("load it with: ")
    assert line == f"PeftModel.from_pretrained(base, '{tmp_path}/adapted'), base loaded from {base}"


def test_what_a_plan_covers_is_what_a_merge_reports(base, experts):
    """Embeddings, left to the average by every protocol, count in neither."""
    planned = merging.plan(base, experts, methods=["average"], subsets=False)
    assert planned.covered == planned.matrices > 0

"""What a hostile but realistic user gives to the merge, extract and plan commands: each once went
wrong in silence, with a traceback, or after the work."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import extract, merge, plan
from merging import InputError, create, merge_checkpoints, merge_state_dicts
from merging.formats.writer import write_adapter
from tests.fixtures.commands import called

SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    **{f"model.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(2)},
    **{f"model.layers.{i}.mlp.up_proj.weight": (12, 8) for i in range(2)},
    "model.norm.weight": (8,),
}
Q, EMBED = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def draw(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def put(folder, state):
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path):
    return put(tmp_path / "base", draw(0))


@pytest.fixture
def experts(tmp_path):
    moved = {
        t: {k: v + draw(i, 0.05)[k] for k, v in draw(0).items()} for i, t in enumerate("ab", 1)
    }
    return {task: put(tmp_path / task, state) for task, state in moved.items()}


@pytest.fixture
def call(monkeypatch, capsys):
    def invoke(main, *arguments):
        code, out, err = called(monkeypatch, capsys, main, "x", *arguments)
        return code, out + err

    return invoke


def line(base, experts, output, *more):
    named = [f"experts.{task}={path}" for task, path in experts.items()]
    return [f"base={base}", *named, f"output={output}", "device=cpu", *more]


def test_an_output_in_an_inputs_place_replaces_nothing(call, base, experts, tmp_path):
    (tmp_path / "link").symlink_to(base)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*/model.safetensors")}
    for output in (base, experts["a"], tmp_path / "link", tmp_path, base / "model.safetensors"):
        code, told = call(merge.main, *line(base, experts, output, "overwrite=true"))
        assert code == 2
        assert "which it would replace" in told
    given = [f"base={base}", f"expert={experts['a']}", f"output={experts['a']}", "rank=2"]
    code, told = call(extract.main, *given, "overwrite=true")
    assert code == 2
    assert "which it would replace" in told
    notes = tmp_path / "notes"  # a folder of one's own is no merge to be replaced
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    code, told = call(merge.main, *line(base, experts, notes, "overwrite=true"))
    assert code == 2
    assert "is a folder without a checkpoint: it is not replaced" in told
    assert (notes / "thesis.txt").exists()
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.parametrize("method", ["slerp", "model_stock", "karcher", "actmat"])
def test_tensors_without_entries_and_without_dimensions(method):
    base = draw(0) | {"scale": torch.tensor(2.0), "empty": torch.zeros(0, 8)}
    experts = {
        t: {k: v + 0.1 * i if v.numel() else v for k, v in base.items()}
        for i, t in enumerate("ab", 1)
    }
    merged = merge_state_dicts(base, experts, create(method))
    assert merged["empty"].shape == (0, 8)
    assert merged["scale"].shape == ()


def embedding_adapter(folder):
    g = torch.Generator().manual_seed(5)
    A, B = torch.randn(2, 20, generator=g), torch.randn(8, 2, generator=g)
    folder.mkdir()
    module = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{module}A": A, f"{module}B": B}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (B @ A).T


@pytest.mark.parametrize("space", ["full", "core"])
def test_an_embeddings_adapter_is_merged_the_way_round_it_is_stored(base, tmp_path, space):
    moved = embedding_adapter(tmp_path / "adapter")
    merge_checkpoints(
        base, {"a": tmp_path / "adapter"}, create("tsv_m"), tmp_path / "o", space=space,
        parts=[{"match": "embedding", "method": "tsv_m"}],
    )  # fmt: skip
    found = load_file(tmp_path / "o" / "model.safetensors")[EMBED]
    torch.testing.assert_close(found, draw(0)[EMBED] + moved, rtol=1e-4, atol=1e-5)


@pytest.fixture
def dora(tmp_path):
    """A function that writes a DoRA adapter of one layer."""

    def write(magnitude, **config):
        g = torch.Generator().manual_seed(6)
        A, B = torch.randn(2, 8, generator=g), torch.randn(8, 2, generator=g)
        folder = tmp_path / "dora"
        write_adapter(folder, {Q: (A, B)}, {}, overwrite=folder.exists())
        file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        key = f"base_model.model.{Q.removesuffix('.weight')}.lora_magnitude_vector"
        save_file(load_file(file) | {key: magnitude}, file)
        content = json.loads(settings.read_text()) | {"use_dora": True} | config
        settings.write_text(json.dumps(content))
        return folder, B @ A

    return write


def test_odd_magnitudes_of_dora_are_told_by_name(dora, base, tmp_path):
    def merged(magnitude, given=base, **config):
        folder, moved = dora(magnitude, **config)
        merge_checkpoints(given, {"a": folder}, create("average"), tmp_path / "o")
        return moved

    with pytest.raises(InputError, match=r"\(magnitudes\)' has 8 values that are not finite"):
        merged(torch.full((8,), torch.nan))
    with pytest.raises(InputError, match="has DoRA's magnitudes, but .* has not use_dora"):
        merged(torch.ones(8), use_dora=False)
    state, (_, moved) = draw(0), dora(torch.ones(8))
    state[Q][2] = -moved[2]
    with pytest.raises(InputError, match="1 outputs of .* are 0 in base and adapter together"):
        merged(torch.ones(8), put(tmp_path / "zero", state))
    moved = merged(torch.arange(1.0, 9))
    whole = draw(0)[Q] + moved
    expected = torch.arange(1.0, 9)[:, None] * whole / whole.norm(dim=1, keepdim=True)
    found = load_file(tmp_path / "o" / "model.safetensors")[Q]
    torch.testing.assert_close(found, expected)


def test_a_space_makes_an_adapter_beside_modules_saved_in_full(base, tmp_path):
    """What is saved in full needs no rank."""
    g = torch.Generator().manual_seed(7)
    pair = torch.randn(2, 8, generator=g), torch.randn(8, 2, generator=g)
    settings = {"modules_to_save": ["norm"]}
    norm = {"model.norm.weight": torch.full((8,), 3.0)}
    write_adapter(tmp_path / "a", {Q: pair}, settings, dense=norm)
    write_adapter(tmp_path / "b", {Q: pair}, settings, dense=norm)
    paths, method = {t: tmp_path / t for t in "ab"}, create("ties", k=1.0)
    merge_checkpoints(base, paths, method, tmp_path / "o", space="core", form="adapter")
    found = load_file(tmp_path / "o" / "adapter_model.safetensors")
    assert any(torch.equal(tensor, norm["model.norm.weight"]) for tensor in found.values())
    with pytest.raises(InputError, match="changes single entries"):
        merge_checkpoints(base, paths, method, tmp_path / "o2", form="adapter")


@pytest.mark.parametrize(
    "more, told",
    [
        (['parts=[{match:mlp,method:ties,k:[0.1,2.0]}]'], "k = 2.0 is not a share"),
        (["method=slerp", "experts.c={}"], "slerp merges 2 experts, got 3"),
    ],
)  # fmt: skip
def test_values_that_a_method_refuses_are_told_before_the_work(
    call, base, experts, tmp_path, monkeypatch, more, told
):
    """Also those of the last block: nothing is read or written before."""
    monkeypatch.setattr("merging.engine.pipeline.merge", lambda *_: pytest.fail("work was begun"))
    given = [text.replace("{}", str(base)) for text in more]
    code, text = call(merge.main, *line(base, experts, tmp_path / "o", *given))
    assert code == 2, text
    assert told in text
    assert not (tmp_path / ".o.part").exists()


def test_what_damages_an_expert_is_not_told_of_the_method(call, base, tmp_path):
    state = draw(1)
    state["model.norm.weight"][3] = torch.nan
    code, told = call(merge.main, *line(base, {"a": put(tmp_path / "a", state)}, tmp_path / "o"))
    assert code == 2
    assert "has 1 values that are not finite, the first at [3]" in told
    assert "damaged or its training diverged" in told


def test_options_in_other_forms_are_read_or_told(call, base, experts, tmp_path):
    code, told = call(
        merge.main,
        *line(base, experts, tmp_path / "o", "weights={a:0.5,b:0}", "method=task_arithmetic"),
    )
    assert code == 0, told
    before, a = draw(0)[Q], load_file(experts["a"] / "model.safetensors")[Q]
    found = load_file(tmp_path / "o" / "model.safetensors")[Q]
    torch.testing.assert_close(found, before + 0.3 * 0.5 * (a - before))
    code, told = call(merge.main, *line(base, experts, tmp_path / "p", "weight.a=1"))
    assert code == 2
    assert "there is no key 'weight'" in told
    assert "did you mean 'weights'?" in told
    nested = "parts=[{match:mlp,method:{name:ties,k:0.5}}]"
    assert call(merge.main, *line(base, experts, tmp_path / "q", nested))[0] == 0
    code, told = call(
        merge.main, *line(base, experts, tmp_path / "r", "parts=[{match:mlp,method:3}]")
    )
    assert code == 2
    assert "the method of part 'mlp' is 3, expected a name" in told


def test_a_plan_of_damaged_files_is_one_sentence(call, base, experts, tmp_path):
    state = draw(1)
    state[Q][0, 0] = torch.inf
    code, told = call(plan.main, f"base={base}", f"experts.x={put(tmp_path / 'x', state)}")
    assert code == 2, told
    assert "not finite" in told


def test_a_plan_of_one_expert_is_a_page_and_of_no_method_a_sentence(call, base, experts, tmp_path):
    given = [f"base={base}", f"experts.a={experts['a']}"]
    code, told = call(plan.main, *given, "methods=[average,ties]", f"output={tmp_path / 'p.html'}")
    assert code == 0, told
    assert "ties" in (tmp_path / "p.html").read_text()  # its row of the ranking
    code, told = call(plan.main, *given, "methods=[]")
    assert code == 2
    assert "no methods were given" in told
    (tmp_path / "d.html").mkdir()
    assert call(plan.main, *given, f"output={tmp_path / 'd.html'}")[0] == 2


def test_hyperparameters_that_are_no_numbers_and_outputs_that_are_no_folders(
    call, base, experts, tmp_path
):
    for key, value in [("rtol", "abc"), ("alpha", "nan"), ("alpha", "big"), ("rtol", "true")]:
        given = line(base, experts, tmp_path / "o", "method=actmat", f"method.{key}={value}")
        code, told = call(merge.main, *given)
        assert code == 2, told
        assert f"{key} of method 'actmat' is" in told
    given = [f"base={base}", f"expert={experts['a']}", f"output={tmp_path / 'x.safetensors'}"]
    code, told = call(extract.main, *given, "rank=2")
    assert code == 2
    assert "an adapter is a folder" in told

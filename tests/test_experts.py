"""An expert is its base and what it changes: written once, right for every layout."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import merging
from eval.language.checkpoints import load_into
from eval.training import expert_state
from experiments.differences import blocks
from merging import Layer
from merging.engine import memory
from merging.engine.job import LazyStatistics, prepare
from merging.engine.plan import plan
from merging.experts import difference
from merging.formats.checkpoints import StateDict, open_checkpoint
from merging.formats.writer import write_adapter


class Net(nn.Module):
    """A square layer stored (d_in, d_out), one stored (d_out, d_in) in no adapter, a head."""

    def __init__(self):
        super().__init__()
        self.mix, self.fc, self.head = Conv1D(6, 6), nn.Linear(6, 4), nn.Linear(4, 3)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def adapter(net, tmp_path):
    """Its folder, and the expert's weights computed plainly."""
    A, B, head = torch.randn(2, 6), torch.randn(6, 2), torch.randn(3, 4)
    write_adapter(
        tmp_path / "adapter",
        {"mix.weight": (A, B)},
        {"fan_in_fan_out": True, "modules_to_save": ["head"]},
        dense={"head.weight": head},
    )
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    # x (W + (B A)^T): what is stored (d_in, d_out) moves by the transpose
    moved = {"mix.weight": base["mix.weight"] + (B @ A).T, "head.weight": head}
    return tmp_path / "adapter", base | moved


def close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_is_added_to_its_base(net, adapter):
    path, expected = adapter
    base = net.state_dict()
    close(merging.apply(base, merging.open_checkpoint(path)), expected)
    close(expert_state(base, path), expected)


def test_a_dense_expert_is_what_it_holds(net, adapter, tmp_path):
    _, expected = adapter
    save_file(expected, tmp_path / "dense.safetensors")
    close(merging.apply({}, merging.open_checkpoint(tmp_path / "dense.safetensors")), expected)


@pytest.mark.parametrize("kind", ["adapter", "dense"])
def test_a_model_takes_an_experts_weights(net, adapter, tmp_path, kind):
    """Layers stored the other way round and modules saved in full, for language models too."""
    path, expected = adapter
    if kind == "dense":
        path = tmp_path / "dense.safetensors"
        save_file(expected, path)
    load_into(net, open_checkpoint(path))
    close(net.state_dict(), expected)


def test_a_half_precision_model_rounds_the_sum_once(adapter, net):
    path, _ = adapter
    base = net.bfloat16().state_dict()
    W0, opened = base["mix.weight"].clone(), open_checkpoint(path)
    load_into(net, opened)
    exact = W0.float() + opened.delta("mix.weight")
    assert torch.equal(net.mix.weight, exact.bfloat16())


def test_differences_of_adapters_and_of_states(net, adapter, tmp_path):
    """What the analysis of a suite looks at, for a square layer that is stored (d_in, d_out)."""
    path, expected = adapter
    base, opened = net.state_dict(), open_checkpoint(path)
    layers = {"mix.weight": Layer(transposed=True), "fc.weight": Layer(), "head.weight": Layer()}
    states = {"adapter": opened, "dense": StateDict(expected)}
    for name, _, deltas in blocks(base, states, layers):
        D = expected[name] - base[name]
        D = D.T if layers[name].transposed else D
        for delta in deltas:
            torch.testing.assert_close(delta, D, rtol=1e-5, atol=1e-6)


def test_rows_that_an_expert_lacks_did_not_move():
    base = {"w": torch.zeros(4, 2)}
    fewer, more = StateDict({"w": torch.ones(3, 2)}), StateDict({"w": torch.ones(5, 2)})
    assert difference(base["w"], fewer, "w").sum(1).tolist() == [2, 2, 2, 0]
    assert difference(base["w"], more, "w").sum(1).tolist() == [2, 2, 2, 2]
    assert difference(torch.tensor(1.0), StateDict({"w": torch.tensor(3.0)}), "w").item() == 2
    assert difference(base["w"], fewer, "other").abs().sum() == 0


def test_an_expert_may_be_an_opened_file(net, adapter, tmp_path):
    path, expected = adapter
    save_file(expected, tmp_path / "dense.safetensors")
    base, method = net.state_dict(), merging.create("average")
    experts = {"a": open_checkpoint(tmp_path / "dense.safetensors"), "b": open_checkpoint(path)}
    merged = merging.merge_state_dicts(base, experts, method, layers=net)
    states = {"a": load_file(tmp_path / "dense.safetensors"), "b": expected}
    close(merged, merging.merge_state_dicts(base, states, method, layers=net))


def test_what_lies_in_memory_is_an_expert_and_a_source():
    state = {"w": torch.ones(2, 3)}
    held = StateDict(state)
    assert held.file("w") is None and held.stamp() == StateDict(dict(state)).stamp()
    assert held.stamp() != StateDict({"w": torch.ones(2, 3)}).stamp()  # other memory
    base = StateDict({"w": torch.zeros(2, 4)}, "the base")
    (problem,) = held.problems(base)
    assert "'w' has shape [2, 3], the base's has [2, 4]" in problem
    assert held.problems(StateDict({"w": torch.zeros(2, 3)})) == []
    assert held.rank("w") is None
    with pytest.raises(ValueError, match="stored in full"):
        held.factors("w")


def test_a_kept_tensor_has_no_method_and_statistics_are_read_when_asked(tmp_path):
    base = {"w": torch.zeros(2, 2), "steps": torch.tensor(3)}
    job = prepare(StateDict(base), {"a": StateDict(base)}, merging.create("average"))
    kept = next(item for item in plan(job) if item.name == "steps")
    with pytest.raises(ValueError, match="'steps' keeps the base's values"):
        _ = kept.merger
    lazy = LazyStatistics(StateDict(base))
    assert list(lazy) == ["w", "steps"] and len(lazy) == 2 and "w" in lazy and 3 not in lazy


def test_where_there_is_no_proc_the_peak_is_the_systems(monkeypatch):
    def absent(*_):
        raise OSError("no such file")

    here = memory._peak(["cpu"])
    monkeypatch.setattr(memory.Path, "read_text", absent)
    assert memory._peak(["cpu"]) >= 0.5 * here > 0

"""RegMean++: each block's moments come through the merged blocks below it."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import merging
from eval.regmean_pp import blocks, merge_blocks
from eval.statistics import second_moments
from eval.training import expert_state
from experiments import suites
from merging.layers import Layer

WIDTH, SAMPLES = 4, 50


class TwoBlocks:
    """y = W_1 tanh(W_0 x), its inputs drawn anew for each task."""

    NAMES = ("layer.0.weight", "layer.1.weight")

    def layers(self):
        return dict.fromkeys(self.NAMES, Layer())

    def inputs(self, task):
        generator = torch.Generator().manual_seed(ord(task))
        return torch.randn(SAMPLES, WIDTH, generator=generator)

    def second_moments(self, task, state: Mapping, names, *, batches, batch_size):
        model = torch.nn.Module()
        model.layer = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in "01")
        model.load_state_dict({name: state[name] for name in self.NAMES})
        return second_moments(
            model,
            [self.inputs(task)],
            names,
            forward=lambda m, x: m.layer[1](torch.tanh(m.layer[0](x))),
        )


@pytest.fixture
def states():
    torch.manual_seed(0)
    base = {name: torch.randn(WIDTH, WIDTH) for name in TwoBlocks.NAMES} | {"scale": torch.ones(1)}
    experts = {
        task: {k: v + 0.3 * torch.randn(v.shape) for k, v in base.items()} for task in ("a", "b")
    }
    return base, experts


def test_moments_pass_through_what_is_merged(states):
    base, experts = states
    suite = TwoBlocks()
    method = merging.create("regmean_pp")
    merged, seconds = merge_blocks(suite, base, experts, method, batches=1, batch_size=1)
    assert seconds > 0

    # the same, written out in float64: block 0 as RegMean, block 1 on the merged block 0's outputs
    expected, first, second = {}, *TwoBlocks.NAMES
    inputs = {task: suite.inputs(task).double() for task in experts}
    expected[first] = regmean(experts, first, inputs)
    passed = {task: torch.tanh(x @ expected[first].T) for task, x in inputs.items()}
    expected[second] = regmean(experts, second, passed)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name].double(), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged["scale"], (experts["a"]["scale"] + experts["b"]["scale"]) / 2)
    assert list(merged) == list(base)


def regmean(experts, name, inputs):
    """argmin_W sum_t |W x_t - W_t x_t|^2"""
    grams = {task: x.T @ x / len(x) for task, x in inputs.items()}
    numerator = sum(experts[task][name].double() @ grams[task] for task in experts)
    return numerator @ torch.linalg.inv(sum(grams.values()))


def test_it_differs_from_regmean_from_the_second_block_on(states):
    base, experts = states
    suite = TwoBlocks()
    sequential, _ = merge_blocks(
        suite, base, experts, merging.create("regmean_pp"), batches=1, batch_size=1
    )
    own = {
        task: suite.second_moments(task, state, TwoBlocks.NAMES, batches=1, batch_size=1)
        for task, state in experts.items()
    }
    plain = merging.merge_state_dicts(
        base, experts, merging.create("regmean"), layers=suite.layers(), statistics=own
    )
    first, second = TwoBlocks.NAMES
    torch.testing.assert_close(sequential[first], plain[first])
    assert (sequential[second] - plain[second]).abs().max() > 1e-3


NAMES = [
    "embeddings.weight", "encoder.layer.0.q.weight", "encoder.layer.0.q.bias",
    "encoder.layer.2.q.weight", "encoder.layer.10.q.weight", "norm.weight", "pooler.weight",
]  # fmt: skip


def test_blocks_come_in_the_order_of_the_forward_pass(tmp_path):
    expected = [
        ["embeddings.weight", "norm.weight"],
        ["encoder.layer.0.q.bias", "encoder.layer.0.q.weight"],
        ["encoder.layer.2.q.weight"],
        ["encoder.layer.10.q.weight"],
        ["pooler.weight"],
    ]
    layers = [name for name in NAMES if name.endswith(("q.weight", "pooler.weight"))]
    save_file({name: torch.zeros(2) for name in NAMES}, tmp_path / "base.safetensors")
    stored = list(load_file(tmp_path / "base.safetensors"))
    assert stored != NAMES, "a file lists names by the alphabet: 10 before 2"
    for names in (NAMES, NAMES[::-1], stored):
        assert [sorted(block) for block in blocks(names, layers)] == expected


def test_stacks_of_blocks_come_in_the_order_of_the_modules():
    names = [f"{side}.block.{i}.weight" for side in ("decoder", "encoder") for i in (0, 1)]
    layers = names[2:] + names[:2]  # T5 runs its encoder first
    assert blocks(sorted(names), layers) == [[name] for name in layers]


class TwelveBlocks(TwoBlocks):
    """As a file lists it: block 10 before block 2. Its moments know whether all below is merged."""

    NAMES = tuple(f"layer.{i}.weight" for i in range(12))

    def __init__(self, base):
        self.base, self.seen = base, []

    def second_moments(self, task, state, names, *, batches, batch_size):
        (name,) = names
        below = self.NAMES[: self.NAMES.index(name)]
        self.seen.append((name, all(not torch.equal(state[n], EXPERT[n]) for n in below)))
        return {name: torch.eye(WIDTH)}


EXPERT = {name: torch.full((WIDTH, WIDTH), 2.0) for name in TwelveBlocks.NAMES}


def test_a_base_from_a_file_is_measured_through_all_merged_blocks_below(tmp_path):
    zeros = {name: torch.zeros(WIDTH, WIDTH) for name in TwelveBlocks.NAMES}
    save_file(zeros, tmp_path / "base.safetensors")
    base = load_file(tmp_path / "base.safetensors")
    suite, method = TwelveBlocks(base), merging.create("regmean_pp")
    experts = {"a": EXPERT, "b": zeros}
    merge_blocks(suite, base, experts, method, batches=1, batch_size=1)
    assert [name for name, _ in suite.seen[::2]] == list(suite.NAMES)
    assert all(merged for _, merged in suite.seen[::2])


def test_a_text_suite_measures_through_any_state(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path))
    config = OmegaConf.load(Path(__file__).parents[1] / "configs" / "suite" / "tiny_text.yaml")
    suite = suites.build(OmegaConf.to_container(config, resolve=True))
    own = {"finetuning": "full", "seed": 0}
    size = {"batches": 2, "batch_size": 8}
    state = expert_state(suite.base(), suite.expert("animals", **own))
    known = load_file(suite.statistics("animals", "covariance", **own, **size))
    name = next(iter(suite.layers()))
    found = suite.second_moments("animals", state, [name], **size)
    assert list(found) == [name]
    torch.testing.assert_close(found[name], known[name])
    through_base = suite.second_moments("animals", suite.base(), suite.layers(), **size)
    last = list(suite.layers())[-1]
    assert not torch.allclose(through_base[last], known[last])

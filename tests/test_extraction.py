"""Adapters of dense models: the best rank, the energy that is told, and peft reads them back."""

import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import merging
from experiments import extract as command
from merging import InputError
from merging.extraction import best_factors


def test_by_hand():
    D = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])  # singular values 4 and 3
    part = best_factors(D, rank=1)
    assert torch.allclose(part.dense(), torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
    assert len(best_factors(D, energy=16 / 25).A) == 1  # exactly what the first one holds
    assert len(best_factors(D, energy=0.65).A) == 2


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_the_truncation_is_that_of_the_singular_values(shape):
    D = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    plain = (U[:, :5] * S[:5]) @ Vh[:5]
    assert torch.allclose(best_factors(D, rank=5).dense().double(), plain, atol=1e-5)
    assert torch.allclose(best_factors(D, rank=99).dense(), D, atol=1e-5)
    wanted = int((S.square().cumsum(0) / S.square().sum() < 0.8).sum()) + 1
    assert len(best_factors(D, energy=0.8).A) == wanted


MODELS = {
    "bert": (
        BertModel,
        BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            vocab_size=30, max_position_embeddings=12,
        ),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30)),
}  # fmt: skip


def saved(folder, kind):
    """A small model, and the same after a change of rank 2 in every layer, in a file each."""
    torch.manual_seed(0)
    cls, config = MODELS[kind]
    model = cls(config)
    model.save_pretrained(folder / "base")
    layers = merging.linear_layers(model)
    with torch.no_grad():
        for name in layers:
            weight = model.get_parameter(name)
            weight += 0.02 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    model.save_pretrained(folder / "tuned")
    return model, layers


@pytest.mark.parametrize("kind", MODELS)
def test_peft_applies_the_adapter_and_gives_the_tuned_model(kind, tmp_path, monkeypatch, capsys):
    tuned, layers = saved(tmp_path, kind)
    line = [f"base={tmp_path}/base", f"expert={tmp_path}/tuned", f"output={tmp_path}/a", "rank=2"]
    monkeypatch.setattr(sys, "argv", ["extract", *line])
    command.main()
    said = capsys.readouterr().out
    assert "keeps 100 % of what fine-tuning changed" in said
    assert f"in {len(layers)} layers: rank 2 in {len(layers)}" in said
    base = type(tuned).from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload()
    for name in layers:
        assert torch.allclose(model.get_parameter(name), tuned.get_parameter(name), atol=1e-5), name
    numbers = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(model(numbers)[0], tuned.eval()(numbers)[0], atol=1e-4)


def test_what_is_kept_and_left_is_told_in_shares_of_the_squared_difference(tmp_path):
    base = {"a.weight": torch.zeros(4, 4), "norm.weight": torch.zeros(4)}
    tuned = {
        "a.weight": torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0])),
        "norm.weight": torch.ones(4),
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out")
    found = merging.extract(*paths, rank=1)
    assert (found.kept, found.cut, found.left) == (
        pytest.approx(9),
        pytest.approx(4),
        {"norm.weight": 4},
    )
    assert found.share == pytest.approx(9 / 17)
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tuple(t.shape) for t in held.values()} == {(1, 4), (4, 1)}


def test_choices_that_cannot_hold_are_refused(tmp_path):
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "base.safetensors")
    paths = (tmp_path / "base.safetensors", tmp_path / "base.safetensors", tmp_path / "out")
    for wrong in ({}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(InputError):
            merging.extract(*paths, **wrong)
    with pytest.raises(InputError, match="nothing to adapt"):
        merging.extract(*paths, rank=1)
    assert not (tmp_path / "out").exists()

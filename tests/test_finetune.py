"""Training is deterministic and resumable, moves what it is told to, and writes PEFT's format."""

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertModel

from eval import training
from eval.training import RESUME, add_lora, expert_state, save_adapter, train
from merging.errors import InputError
from merging.layers import linear_layers

CONFIG = BertConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)


def mlp(dropout=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 1))


def batches(first, size=6):
    """Batch number i is a function of i alone."""
    i = first
    while True:
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(size, 4, generator=generator)
        yield x, x.sum(1, keepdim=True)
        i += 1


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def run(output, model=None, batches=batches, loss=loss, **settings):
    model = model or mlp()
    defaults = {"steps": 12, "lr": 1e-2, "seed": 3, "output": output, "save_every": 4}
    train(model, batches, loss, **(defaults | settings))
    return model.state_dict()


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def bert():
    torch.manual_seed(0)
    return BertModel(CONFIG).eval()


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, schedule):
    whole = run(tmp_path / "whole", schedule=schedule, accumulate=2)

    def cut_off(first):
        for i, batch in enumerate(batches(first), first):
            if i == 2 * 9 + 1:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", batches=cut_off, schedule=schedule, accumulate=2)
    assert (tmp_path / "cut" / RESUME).exists()
    first_seen = []

    def resumed(first):
        first_seen.append(first)
        return batches(first)

    other = nn.Sequential(*mlp()).apply(lambda m: hasattr(m, "weight") and m.weight.data.zero_())
    state = run(tmp_path / "cut", other, resumed, schedule=schedule, accumulate=2)
    assert first_seen == [16]  # 8 finished steps of 2 micro-batches
    assert equal(state, whole)
    assert not (tmp_path / "cut" / RESUME).exists()


DISK = ((torch, "save"), (training, "flush"), (Path, "replace"), (Path, "unlink"))


def killed(output, n):
    """Train, and die by SIGKILL at call n of `DISK`, with half a file where one is being saved."""
    left = itertools.count(n, -1)

    def counted(function):
        def call(*args, **kwargs):
            if next(left) == 0:
                if function.__name__ == "save":
                    function(*args, **kwargs)
                    os.truncate(args[1], args[1].stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    torch.set_num_threads(1)  # threads do not survive the fork
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in DISK:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        run(output)


def test_killed_at_every_call_that_touches_the_disk(tmp_path):
    whole, fork = run(tmp_path / "whole"), multiprocessing.get_context("fork")
    for n in itertools.count():
        child = fork.Process(target=killed, args=(tmp_path / str(n), n))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        assert equal(run(tmp_path / str(n)), whole)
        assert list((tmp_path / str(n)).iterdir()) == []
    assert n == 8  # two files saved, flushed and renamed; at the end two removals


def test_a_resume_file_of_another_run_is_not_used(tmp_path):
    def cut_off(first):
        for i, batch in enumerate(batches(first), first):
            if i == 9:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batches=cut_off, lr=5e-2)
    assert equal(run(tmp_path), run(tmp_path / "fresh"))


def test_the_seed_alone_decides(tmp_path):
    first = run(tmp_path, seed=1)
    torch.manual_seed(99)
    assert equal(run(tmp_path, seed=1), first)
    assert not equal(run(tmp_path, seed=2), first)  # another dropout


def test_training_leaves_the_callers_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = nn.Linear(4, 1)
    torch.manual_seed(5)
    run(tmp_path, model, steps=2)
    assert torch.equal(torch.rand(1), expected)


def test_only_the_named_parameters_move(tmp_path):
    start, end = mlp().state_dict(), run(tmp_path, parameters=["0.weight"])
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"0.weight"}


def test_accumulated_halves_equal_the_whole_batch(tmp_path):
    def halves(first):
        for x, y in batches(first // 2):
            yield x[:3], y[:3]
            yield x[3:], y[3:]

    whole = run(tmp_path, mlp(dropout=0))
    parts = run(tmp_path, mlp(dropout=0), halves, accumulate=2)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 40])
def test_the_learning_rate_rises_to_its_peak_and_falls(schedule, steps):
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([parameter], lr=1e-3)
    scheduler = training._scheduler(optimiser, schedule, 1e-3, steps, 0.1)
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    assert max(rates) <= 1e-3 * (1 + 1e-6)
    if steps >= 9:
        assert max(rates) > 0.9e-3
        assert rates.index(max(rates)) <= steps // 4
        assert rates[-1] < 0.1 * max(rates)


def test_training_lowers_the_loss(tmp_path):
    model = mlp()
    batch = next(batches(1000))
    before = loss(model.eval(), batch).item()
    run(tmp_path, model, steps=100)
    assert loss(model, batch).item() < 0.5 * before
    assert not model.training


def test_bfloat16_keeps_float32_weights(tmp_path):
    seen = []

    def watched(model, batch):
        seen.append(model[0](batch[0]).dtype)
        return loss(model, batch)

    state = run(tmp_path, loss=watched, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_a_loss_that_diverges_is_said(tmp_path):
    with pytest.raises(InputError, match=r"cats: the loss is nan at step 0"):
        run(tmp_path, loss=lambda model, batch: loss(model, batch) * float("nan"), label="cats")


def test_an_unknown_parameter_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no parameter 'head\.weight'"):
        run(tmp_path, parameters=["head.weight", "0.weight"])


def adapter(seed=0, r=3, kind="lora"):
    """A LoRA model on every encoder layer, with B no longer zero."""
    targets = [n.removesuffix(".weight") for n in linear_layers(bert()) if "encoder" in n]
    model = add_lora(bert(), targets, r=r, alpha=6, seed=seed, kind=kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            if "lora_B" in name:
                parameter.copy_(noise)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
    return model.eval()


def test_add_lora_moves_factors_only_and_follows_its_seed():
    model = adapter()
    moving = [name for name, p in model.named_parameters() if p.requires_grad]
    assert moving and all("lora_" in name for name in moving)
    assert len(moving) == 2 * 6  # A and B of query, key, value, output and both dense layers
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_A.default.weight"
    assert torch.equal(adapter(7).get_parameter(name), adapter(7).get_parameter(name))
    assert not torch.equal(adapter(7).get_parameter(name), adapter(8).get_parameter(name))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_saved_adapter_loads_in_peft_and_as_a_dense_state(tmp_path, kind):
    model = adapter(kind=kind)
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ids = torch.arange(10).view(2, 5)
    expected = model(input_ids=ids).last_hidden_state
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).last_hidden_state, expected)
    dense = bert()
    dense.load_state_dict(expert_state(dense.state_dict(), tmp_path))
    torch.testing.assert_close(dense(input_ids=ids).last_hidden_state, expected)


def test_a_saved_adapter_has_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        save_adapter(adapter(), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


# --- stopping early -------------------------------------------------------------------------------


def stopped(tmp_path, scores, **changes):
    """A training whose validation gives these scores: (weights, how often it was asked)."""
    model, asked = nn.Linear(2, 1), []
    with torch.no_grad():
        model.weight.fill_(0.0)
    seen = []

    def score(trained):
        assert not trained.training
        seen.append(trained.weight.detach().clone())
        asked.append(scores[len(asked)])
        return asked[-1]

    stopping = training.Stopping(score, **{"every": 2, "patience": 2} | changes)
    training.train(
        model,
        lambda first: iter(lambda: torch.ones(4, 2), None),
        lambda m, x: m(x).mean(),
        steps=20, lr=0.1, output=tmp_path, schedule="constant", clip=None, weight_decay=0.0,
        stopping=stopping,
    )  # fmt: skip
    return model.weight.detach(), seen


def test_training_stops_after_so_many_validations_without_a_gain_and_keeps_the_best(tmp_path):
    weight, seen = stopped(tmp_path, [0.1, 0.5, 0.5, 0.4, 0.9])
    assert len(seen) == 4  # a tie is no gain
    assert torch.equal(weight, seen[1])
    weight, seen = stopped(tmp_path, [0.1, 0.5, 0.5, 0.4, 0.9], keep="last")
    assert torch.equal(weight, seen[3])
    weight, seen = stopped(tmp_path, list(range(10)))
    assert len(seen) == 10
    assert torch.equal(weight, seen[9])
    # at a constant rate AdamW moves by the rate at every step
    torch.testing.assert_close(weight, torch.full((1, 2), -2.0), rtol=1e-4, atol=1e-4)


def test_an_interrupted_search_for_the_best_ends_with_the_same_weights(tmp_path):
    def run(folder, stop_at=None):
        torch.manual_seed(0)
        model, scores = nn.Linear(2, 1), []

        def batches(first):
            for i in range(first, 100):
                if i == stop_at:
                    raise KeyboardInterrupt
                yield torch.randn(4, 2, generator=torch.Generator().manual_seed(i))

        def score(m):
            scores.append(-abs(m.weight.sum().item() + 0.5))
            return scores[-1]

        training.train(
            model, batches, lambda m, x: (m(x) - 1).square().mean(), steps=30, lr=0.1,
            output=folder, save_every=3, stopping=training.Stopping(score, 2, 3),
        )  # fmt: skip
        return model.weight.detach()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=7)
    assert torch.equal(run(tmp_path / "parts"), whole)

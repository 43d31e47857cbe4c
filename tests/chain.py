"""A language model's way through the whole library, for every method, against a merge by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import merging
from eval.language import benchmarks, checkpoints, judge
from eval.regmean_pp import merge_blocks
from eval.suite import Suite
from merging.formats.checkpoints import Adapter, open_checkpoint

# Relative error of the logits. The conjugate gradients of MaTS are stopped before they converge,
# which lets rounding grow.
TOLERANCE = {"mats": 2e-2}
SHORTER = {"wudi": {"steps": 30}}  # of 300 that change nothing here but the time
# These draw numbers that follow from the very bits of the differences.
RANDOM = {"dare", "dare_ties", "della", "della_linear"}
# What a method may be told of one layer; the others are told of the whole model (a depth, a
# threshold over all entries, random numbers), which only the engine knows.
LOCAL = {"covariances", "fishers", "d_in"}


def is_local(name: str) -> bool:
    """Whether a merge by hand must give what the engine gives, layer by layer."""
    if name in RANDOM:
        return False
    method = merging.create(name)
    return method.whole_model is None and method.context <= LOCAL


def dense_expert(base: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """An expert's tensors, read without any of the library's readers."""
    if path.is_file():
        return load_file(path)
    config = json.loads((path / "adapter_config.json").read_text())
    factors = load_file(path / "adapter_model.safetensors")
    state = dict(base)
    for key, a in factors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            b = factors[key.replace("lora_A", "lora_B")]
            state[name] = base[name] + config["lora_alpha"] / config["r"] * b @ a
    return state


def by_hand(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    method: merging.Method,
    layers: Mapping[str, merging.Layer],
    statistics: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """W + method(differences) for every tensor, all in memory at once."""
    merged = {}
    for name, weight in base.items():
        deltas = torch.stack([expert[name] - weight for expert in experts.values()])
        given = {}
        if method.needs and all(name in own for own in statistics.values()):
            given = {f"{method.needs}s": torch.stack([own[name] for own in statistics.values()])}
        rule = "method" if name in layers else method.rest
        if rule == "method" and method.needs and not given:
            rule = "average"
        if rule == "method":
            merged[name] = weight + method(deltas, **given, base=weight)
        else:
            merged[name] = weight + deltas.mean(0) if rule == "average" else weight
    return merged


def lm_eval_of(folder: Path) -> Callable[[PreTrainedModel], Tensor]:
    """lm-eval's log-likelihood of every answer to some questions, as a function of a model."""
    tokenizer, benchmark = AutoTokenizer.from_pretrained(folder), benchmarks.Benchmark("tiny_meals")
    manager = benchmarks.task_manager([benchmark])

    def judged(model: PreTrainedModel) -> Tensor:
        lm = judge.wrap(model, tokenizer, batch_size=32)
        samples = judge.judge(lm, "meals", benchmark, manager, limit=5).samples
        return torch.tensor([float(r[0][0]) for sample in samples for r in sample["resps"]])

    return judged


def check_methods(
    folder: Path,
    experts: Mapping[str, Path],
    layers: Mapping[str, merging.Layer],
    statistics: Callable[[str, str], Path],
    load: Callable[[Path], PreTrainedModel],
    logits: Callable[[PreTrainedModel], Tensor],
    output: Path,
) -> None:
    """Merge by every method, write, load with `from_pretrained`, and compare with the reference
    merge the logits and what lm-eval makes of the model."""
    base = load_file(folder / "model.safetensors")
    reference, judged, wrong = load(folder), lm_eval_of(folder), {}
    for name in merging.methods():
        method = merging.create(name, **SHORTER.get(name, {}))
        if method.needs == "kfac":  # only encoders' suites measure it: test_text, test_vision
            continue
        tasks = list(experts)[: 2 if name == "slerp" else None]
        files = {task: statistics(task, method.needs) for task in tasks} if method.needs else None
        merging.merge_checkpoints(
            folder,
            {task: experts[task] for task in tasks},
            method,
            output / name,
            layers=layers,
            statistics=files,
            extra=checkpoints.companions(folder),
        )
        dense = {task: dense_expert(base, experts[task]) for task in tasks}
        tensors = {task: load_file(path) for task, path in (files or {}).items()}
        if is_local(name):
            expected = by_hand(base, dense, method, layers, tensors)
        else:
            opened = {t: open_checkpoint(experts[t]) for t in tasks}
            given = {t: e if isinstance(e, Adapter) else dense[t] for t, e in opened.items()}
            expected = merging.merge_state_dicts(
                base, given, method, layers=layers, statistics=tensors or None
            )
        reference.load_state_dict(expected, strict=False)
        merged = load(output / name)
        for shown in (logits, judged):
            given, wanted = shown(merged), shown(reference)
            if not (error := (given - wanted).norm() / wanted.norm()) < TOLERANCE.get(name, 1e-4):
                wrong[name] = error.item()
    assert not wrong, wrong


def check_block_by_block(
    suite: Suite, states: Mapping[str, Mapping[str, Tensor]], task: str, layer: str
) -> None:
    """Second moments of one layer, through the state of its fully fine-tuned expert, are those of
    the expert's statistics; and a merge block after block is a model that can be evaluated."""
    size = {"batches": 2, "batch_size": 5}
    found = suite.second_moments(task, states[task], [layer], **size)
    file = suite.statistics(task, "covariance", finetuning="full", seed=0, **size)
    assert set(found) == {layer}
    torch.testing.assert_close(found[layer], load_file(file)[layer])
    merged, _ = merge_blocks(suite, suite.base(), states, merging.create("regmean_pp"), **size)
    assert set(suite.evaluate(merged, "test", limit=5)) == set(suite.tasks)

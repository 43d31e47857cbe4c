"""One training loop for every family, full or LoRA; interrupted runs continue to the same bytes."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from transformers import get_cosine_schedule_with_warmup

from eval.cache import digest
from merging import apply, open_checkpoint
from merging.errors import InputError
from merging.formats.checkpoints import StateDict
from merging.formats.disk import flush
from merging.progress import track

log = logging.getLogger(__name__)
RESUME, PARTIAL = "resume.pt", ".partial"
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Stopping:
    """When to stop early: every `every` steps `score(model)` is asked for, and `patience` answers
    in a row that are no better than the best so far end the training.

    keep: the weights that scored best, or the last ones.
    """

    score: Callable[[nn.Module], float]
    every: int = 100
    patience: int = 5
    keep: Literal["best", "last"] = "best"


class Training(NamedTuple):
    """One fine-tuning, ready to run: `train(model, batches, loss, output=..., **settings)`.

    mask: `mask(batch, weight name)` -> (batch, tokens) booleans, True for the tokens that are no
        padding, or None where every token counts.
    """

    model: nn.Module
    batches: Callable[[int], Iterable[Any]]
    loss: Loss
    mask: Callable[[Any, str], Tensor | None] | None
    settings: dict[str, Any]


def train(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    loss: Loss,
    *,
    steps: int,
    lr: float,
    output: Path,
    parameters: Iterable[str] | None = None,
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine",
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float | None = 1.0,
    stopping: Stopping | None = None,
    accumulate: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
    save_every: int = 500,
    label: str = "training",
) -> None:
    """Fine-tune `model` in place by AdamW.

    batches: `batches(first)` yields the micro-batches from number `first` on, always the same
        ones for the same number; `accumulate` of them make a step.
    loss: scalar mean loss of the model on one micro-batch, already on `device`.
    parameters: names of those that move (default: those that require a gradient).
    warmup: fraction of the steps over which the learning rate rises to `lr`; "constant" has none.
    clip: largest norm of a step's gradient; None: any.
    stopping: when to end before `steps`, and which weights to keep then.
    output: folder for `resume.pt`, written every `save_every` steps and removed at the end; a
        call with the same settings that finds one goes on from there, to the same weights.
    precision: "bf16" computes the forward pass in autocast; weights stay float32.

    Raises InputError when the loss stops being finite.
    """
    names = set(parameters) if parameters is not None else _trainable(model)
    if unknown := names - {name for name, _ in model.named_parameters()}:
        raise InputError(f"the model has no parameter {sorted(unknown)[0]!r} to fine-tune")
    model.to(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    moving = {name: p for name, p in model.named_parameters() if name in names}
    optimiser = torch.optim.AdamW(moving.values(), lr=lr, weight_decay=weight_decay, fused=True)
    scheduler = _scheduler(optimiser, schedule, lr, steps, warmup)
    resume = output / RESUME
    settings = [steps, lr, schedule, warmup, weight_decay, clip, accumulate, seed, precision]
    settings += [stopping.every, stopping.patience, stopping.keep] if stopping else []
    run = digest({"settings": settings, "names": sorted(moving)})
    best = _Best()
    first = _restore(resume, run, moving, optimiser, scheduler, best)
    stream = iter(batches(first * accumulate))
    with torch.random.fork_rng():
        for step in track(range(first, steps), label):
            torch.manual_seed(seed * 1_000_003 + step)  # dropout is a function of the step alone
            for _ in range(accumulate):
                with autocast(device, precision):
                    value = loss(model, next(stream)) / accumulate
                value.backward()
            if not torch.isfinite(value):
                raise InputError(f"{label}: the loss is {value.item()} at step {step}", "lower lr")
            if clip is not None:
                nn.utils.clip_grad_norm_(moving.values(), clip)
            optimiser.step()
            scheduler.step()
            optimiser.zero_grad()
            if stopping and (step + 1) % stopping.every == 0:
                best.compare(_validated(model, stopping), moving, stopping)
                if best.misses >= stopping.patience:
                    log.info("%s: stopped after %d of %d steps", label, step + 1, steps)
                    break
            if (step + 1) % save_every == 0 and step + 1 < steps:
                _save(resume, run, step + 1, moving, optimiser, scheduler, best)
    best.restore(moving)
    for leftover in (resume, resume.with_suffix(PARTIAL)):
        leftover.unlink(missing_ok=True)
    model.eval()


@dataclass
class _Best:
    """The best score so far, how many in a row were no better, and the weights that had it."""

    score: float = -math.inf
    misses: int = 0
    weights: dict[str, Tensor] | None = None

    def compare(self, score: float, moving: Mapping[str, nn.Parameter], stopping: Stopping) -> None:
        if score <= self.score:
            self.misses += 1
            return
        self.score, self.misses = score, 0
        if stopping.keep == "best":
            self.weights = {name: p.detach().cpu().clone() for name, p in moving.items()}

    def restore(self, moving: Mapping[str, nn.Parameter]) -> None:
        with torch.no_grad():
            for name, weight in (self.weights or {}).items():
                moving[name].copy_(weight)


def _validated(model: nn.Module, stopping: Stopping) -> float:
    model.eval()
    score = stopping.score(model)
    model.train()
    return score


def autocast(
    device: str | torch.device, precision: Literal["fp32", "bf16"]
) -> AbstractContextManager[None]:
    """Under it forward passes compute in `precision`; weights keep theirs."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _scheduler(
    optimiser: torch.optim.Optimizer, schedule: str, lr: float, steps: int, warmup: float
) -> LRScheduler:
    if schedule == "constant":
        return LambdaLR(optimiser, lambda step: 1.0)
    if schedule == "onecycle":
        total = steps + 1
        # the rise takes at least one step, or OneCycleLR divides by zero
        return OneCycleLR(
            optimiser, lr, total_steps=total, pct_start=min(1.0, max(warmup, 2 / total))
        )
    return get_cosine_schedule_with_warmup(optimiser, round(warmup * steps), steps)


def _save(
    path: Path,
    run: str,
    step: int,
    moving: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    scheduler: LRScheduler,
    best: _Best,
) -> None:
    state = {
        "run": run,
        "step": step,
        "weights": {name: p.detach() for name, p in moving.items()},
        "optimiser": optimiser.state_dict(),
        "scheduler": scheduler.state_dict(),
        "best": [best.score, best.misses, best.weights],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(PARTIAL)
    torch.save(state, partial)
    flush(partial)
    partial.replace(path)


def _restore(
    path: Path,
    run: str,
    moving: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    scheduler: LRScheduler,
    best: _Best,
) -> int:
    """Load what `_save` wrote of the same run, if anything; the number of steps done."""
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    if state.get("run") != run:
        return 0
    with torch.no_grad():
        for name, parameter in moving.items():
            parameter.copy_(state["weights"][name])
    optimiser.load_state_dict(state["optimiser"])
    scheduler.load_state_dict(state["scheduler"])
    best.score, best.misses, best.weights = state["best"]
    return state["step"]


def add_lora(
    model: nn.Module,
    targets: Iterable[str],
    r: int = 16,
    alpha: int = 16,
    seed: int = 0,
    kind: Literal["lora", "rslora", "dora"] = "lora",
) -> PeftModel:
    """Wrap a model with PEFT's LoRA on the named modules; only the factors require a gradient.

    targets: full names of the modules (linear layers) that get an adapter of rank `r`, scaled
    by alpha / r; "rslora" by alpha / sqrt(r) (arXiv 2312.03732), "dora" with a length of its own
    for each row of the weight (arXiv 2402.09353). The initial factors follow from `seed`.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(targets),
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, not ours to heed
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def save_expert(model: nn.Module, names: Iterable[str], folder: Path) -> None:
    """Write what was fine-tuned: `model.safetensors` with the named tensors, each of them once
    however many modules share it, or the adapter folder of a PEFT model."""
    if isinstance(model, PeftModel):
        return save_adapter(model, folder)
    state = model.state_dict()
    tensors = {name: state[name].cpu().contiguous() for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write a PEFT adapter folder, `adapter_config.json` and `adapter_model.safetensors`.

    PEFT's own writer adds a model card, asks the hub about the base, and orders target modules
    by their hash; this one gives the same bytes every time.
    """
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }
    config["inference_mode"] = True
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / "adapter_config.json").write_text(text + "\n")
    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: factor.detach().cpu().contiguous() for name, factor in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def expert_state(base: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Dense state dict of an expert: a checkpoint as it is, an adapter added to the base."""
    expert = open_checkpoint(path)
    if expert.partial:  # DoRA's lengths are those of the base's whole weights
        expert = expert.fitted(StateDict(base), {})
    return apply(base, expert)

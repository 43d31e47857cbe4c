"""How a model is fine-tuned: the settings, and the order in which it sees examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eval.training import Stopping
from merging.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """Settings of one fine-tuning by AdamW; a step is an update of the weights, of
    `accumulate` batches of `batch_size` examples. `r` and `alpha` are LoRA's.

    steps, or epochs: a number, or {task: number}.
    warmup: of the steps the fraction over which the learning rate rises, or warmup_steps.
    adapter: LoRA scaled by alpha / r, by alpha / sqrt(r), or with DoRA's lengths of rows.
    precision: "bf16" computes in mixed precision; None: as the suite does everywhere.
    validate_every, patience, keep: of `eval.training.Stopping`; 0: no stopping early.
    Of images: crop_scale, the area of random crops; targets of LoRA: "all" of attention and MLP,
    or "in_proj", q, k and v packed; checkpointing: recompute activations in the backward pass.
    recorded: the names of those that every key has, see `Settings`.
    """

    lr: float
    batch_size: int
    steps: int | None = None
    epochs: float | Mapping[str, float] | None = None
    accumulate: int = 1
    schedule: Literal["cosine", "onecycle", "constant"] = "onecycle"
    warmup: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    r: int = 0
    alpha: int = 0
    adapter: Literal["lora", "rslora", "dora"] = "lora"
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16"] | None = None
    validate_every: int = 0
    patience: int = 5
    keep: Literal["best", "last"] = "best"
    crop_scale: tuple[float, float] = (0.9, 1.0)
    targets: Literal["all", "in_proj"] = "all"
    checkpointing: bool = False
    settings: Settings | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise InputError("a fine-tuning recipe needs either steps or epochs")

    def key(self) -> dict[str, Any]:
        """For cache keys and records: without what came later, where it is as it was before."""
        later = self.settings.later
        return {
            name: value
            for name in self.settings.names
            if (value := getattr(self, name)) != later.get(name, _ALWAYS)
        }

    def length(self, task: str, examples: int) -> int:
        """Number of steps on a task with so many training examples."""
        if self.steps is not None:
            return self.steps
        rounds = self.epochs[task] if isinstance(self.epochs, Mapping) else self.epochs
        return max(1, round(rounds * examples / self.batch_size))

    def arguments(self, steps: int) -> dict[str, Any]:
        """Those that `training.train` takes, for a number of steps."""
        warmup = self.warmup
        if self.warmup_steps is not None:
            warmup = min(0.5, self.warmup_steps / steps)
        return {
            "lr": self.lr,
            "steps": steps,
            "accumulate": self.accumulate,
            "schedule": self.schedule,
            "warmup": warmup,
            "weight_decay": self.weight_decay,
            "clip": self.clip,
        }

    def stopping(self, score: Callable[[nn.Module], float]) -> Stopping | None:
        """When to stop early, by a score on validation examples."""
        if not self.validate_every:
            return None
        return Stopping(score, self.validate_every, self.patience, self.keep)


_ALWAYS = object()  # equals no value


@dataclass(frozen=True)
class Settings:
    """Which of a recipe's fields the recipes of a kind of suite have, with their defaults.

    later: those that came after the first records: they stand in keys only where they differ, so
        that the keys of before stay what they were.
    """

    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    later: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.required, *self.defaults, *self.later)

    def check(self, recipes: Mapping[str, Mapping[str, Any]], suite: str) -> None:
        """InputError for a field that a recipe does not have, or lacks."""
        for name, recipe in recipes.items():
            known = ", ".join(self.names)
            if unknown := sorted(set(recipe) - set(self.names)):
                raise InputError(
                    f"recipe {name!r} of suite {suite!r} has no {unknown[0]!r}",
                    f"it takes: {known}",
                )
            if missing := [key for key in self.required if key not in recipe]:
                raise InputError(
                    f"recipe {name!r} of suite {suite!r} lacks {missing[0]!r}", f"it takes: {known}"
                )

    def recipe(
        self, recipes: Mapping[str, Mapping[str, Any]], finetuning: str, suite: str
    ) -> Recipe:
        """The recipe of one kind of fine-tuning; InputError where a suite has none."""
        if finetuning not in recipes:
            raise InputError(
                f"suite {suite!r} has no recipe for finetuning {finetuning!r}",
                hint=f"known: {', '.join(recipes)}",
            )
        chosen = {**self.defaults, **self.later, **recipes[finetuning]}
        return Recipe(**chosen, settings=self)


SENTENCES = Settings(
    ("lr",),
    {"batch_size": 32, "epochs": 1, "warmup": 0.1, "weight_decay": 0.01, "r": 0, "alpha": 0},
    later={"adapter": "lora"},
)
LANGUAGE = Settings(
    ("lr", "steps", "batch_size"),
    {
        "accumulate": 1, "schedule": "onecycle", "warmup": 0.1, "weight_decay": 0.0, "r": 0,
        "alpha": 0,
    },
    later={"clip": 1.0, "validate_every": 0, "patience": 5, "keep": "best"},
)  # fmt: skip
IMAGES = Settings(
    ("lr",),
    {
        "batch_size": 128, "steps": None, "epochs": None, "warmup_steps": 500, "weight_decay": 0.1,
        "crop_scale": (0.9, 1.0), "precision": "fp32", "checkpointing": False, "r": 0, "alpha": 0,
    },
    later={"targets": "all", "schedule": "cosine"},
)  # fmt: skip


def batch_order(
    tokens: Sequence[list[int]], batch_size: int, epochs: int, seed: int, window: int = 8
) -> list[Tensor]:
    """Example numbers of each training batch: shuffled, then sorted by length within windows.

    Batches of similar lengths save most of the padding; a window of `window` batches is wide
    enough for that and narrow enough to leave the order of examples random.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(sentence) for sentence in tokens])
    batches: list[Tensor] = []
    for _ in range(epochs):
        shuffled = torch.randperm(len(tokens), generator=generator)
        epoch: list[Tensor] = []
        for part in shuffled.split(batch_size * window):
            epoch += part[lengths[part].argsort(stable=True)].split(batch_size)
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=generator)]
    return batches


def endless(
    tokens: Sequence[list[int]], batch_size: int, seed: int, first: int = 0
) -> Iterator[Tensor]:
    """Example numbers of training batches from number `first` on, epoch after epoch.

    The same number gives the same batch, whatever `first` was. Batches are of similar lengths.
    """
    epoch, skip = divmod(first, -(-len(tokens) // batch_size))
    while True:
        yield from batch_order(tokens, batch_size, 1, seed * 1_000_003 + epoch)[skip:]
        epoch, skip = epoch + 1, 0

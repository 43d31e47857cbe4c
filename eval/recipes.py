"""How a language model is fine-tuned: the settings, and the order in which it sees examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor, nn

from eval.language.text import batch_order
from eval.suite import Finetuning
from eval.training import Stopping
from merging.errors import InputError

FIRST = 9  # fields that a recipe had when the first records were made


@dataclass(frozen=True)
class Recipe:
    """Settings of one fine-tuning by AdamW; a step is an update of the weights, of
    `accumulate` batches of `batch_size` examples. `r` and `alpha` are LoRA's.

    validate_every, patience, keep: of `eval.training.Stopping`; 0: no stopping early.
    """

    lr: float
    steps: int
    batch_size: int
    accumulate: int = 1
    schedule: Literal["cosine", "onecycle", "constant"] = "onecycle"
    warmup: float = 0.1
    weight_decay: float = 0.0
    r: int = 0
    alpha: int = 0
    clip: float | None = 1.0
    validate_every: int = 0
    patience: int = 5
    keep: Literal["best", "last"] = "best"

    def key(self) -> dict[str, Any]:
        """For cache keys and records: without what came later, where it is as it was before."""
        later = {f.name: f.default for f in fields(self)[FIRST:]}
        return {k: v for k, v in asdict(self).items() if k not in later or v != later[k]}

    def arguments(self, tasks: int = 1) -> dict[str, Any]:
        """Those that `finetune.train` takes, to learn a number of tasks at once."""
        return {
            "lr": self.lr,
            "steps": tasks * self.steps,
            "accumulate": self.accumulate,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "weight_decay": self.weight_decay,
            "clip": self.clip,
        }

    def stopping(self, score: Callable[[nn.Module], float]) -> Stopping | None:
        """When to stop early, by a score on validation examples."""
        if not self.validate_every:
            return None
        return Stopping(score, self.validate_every, self.patience, self.keep)


def resolve(
    recipes: Mapping[Finetuning, Mapping[str, Any]], finetuning: Finetuning, suite: str
) -> Recipe:
    """The recipe of one kind of fine-tuning; InputError where a suite has none."""
    if finetuning not in recipes:
        raise InputError(
            f"suite {suite!r} has no recipe for finetuning {finetuning!r}",
            hint=f"known: {', '.join(recipes)}",
        )
    return Recipe(**recipes[finetuning])


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

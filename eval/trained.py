"""What suites that train their own experts share: checkpoints and statistics, made once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from eval import statistics
from eval.cache import cached
from eval.suite import Finetuning, Statistic, Suite, Unsupported
from eval.training import expert_state
from merging.errors import InputError


class TrainedSuite(Suite):
    """A suite says what determines an expert, how it is trained and how it is measured; from
    these hooks, the abstract methods below, follow the members of `Suite` that are cached."""

    examples: ClassVar[str] = "inputs"  # what error messages call its training examples

    # --- hooks ----------------------------------------------------------------------------------

    @abstractmethod
    def _expert_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """All that determines the expert of a task; InputError for an unknown one."""

    @abstractmethod
    def _statistics_key(self, kind: Statistic) -> dict[str, Any]:
        """All that determines statistics besides the experts and the number of examples."""

    @abstractmethod
    def _available(self, task: str) -> int:
        """Number of training examples of a task; InputError for an unknown one."""

    @abstractmethod
    def _finetune(
        self, tasks: Sequence[str], finetuning: Finetuning, seed: int, folder: Path
    ) -> None:
        """Train one model on these tasks and write its checkpoint into a folder, which holds
        what an interrupted call left there."""

    @abstractmethod
    def _load(self, state: Mapping[str, Tensor]) -> None:
        """Give the suite's working model these weights; InputError if they do not fit."""

    @abstractmethod
    def _moments(
        self, task: str, batches: int, batch_size: int, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """{weight name: (d_in, d_in)} second moments, in the working model, of the named layers'
        inputs (default: all layers)."""

    @abstractmethod
    def _fisher(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """{name: diagonal Fisher, of the parameter's shape} of the working model."""

    def _kfac(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """`eval.kfac.factors` of the working model's layers."""
        raise Unsupported(f"suite {self.name} does not measure gradients at the layers' outputs")

    # --- members of a suite -----------------------------------------------------------------------

    def expert(self, task: str, *, finetuning: Finetuning, seed: int) -> Path:
        """`model.safetensors` with every tensor of the base, or a PEFT adapter folder."""
        key = self._expert_key(task, finetuning, seed)
        return self._trained([task], key, finetuning, seed)

    def multi_task(self, *, finetuning: Finetuning, seed: int) -> Path:
        """Checkpoint of one model fine-tuned on all tasks at once, for as many steps as the
        experts together: what merging is measured by."""
        keys = [self._expert_key(task, finetuning, seed) for task in self.tasks]
        return self._trained(self.tasks, {"multi_task": keys}, finetuning, seed)

    def _trained(
        self, tasks: Sequence[str], key: dict[str, Any], finetuning: Finetuning, seed: int
    ) -> Path:
        build = partial(self._finetune, tasks, finetuning, seed)
        folder = cached("experts", key, build, resumable=True)
        return folder if finetuning == "lora" else folder / "model.safetensors"

    def statistics(
        self,
        task: str,
        kind: Statistic,
        *,
        finetuning: Finetuning,
        seed: int,
        batches: int = 10,
        batch_size: int = 32,
    ) -> Path:
        """What `_moments`, `_fisher` or `_kfac` find in the task's own expert, as safetensors.

        They look at `batches * batch_size` training examples drawn without replacement.
        """
        self._require_available(task, batches, batch_size)
        about = statistics.about(self, task, kind, finetuning=finetuning, seed=seed)
        key = {"about": about, "size": [batches, batch_size]} | self._statistics_key(kind)

        def build(folder: Path) -> None:
            expert = self.expert(task, finetuning=finetuning, seed=seed)
            self._load(expert_state(self.base(), expert))
            measures = {"covariance": self._moments, "fisher": self._fisher, "kfac": self._kfac}
            found = measures[kind](task, batches, batch_size)
            statistics.save(folder / f"{kind}.safetensors", found, about)

        return cached("statistics", key, build) / f"{kind}.safetensors"

    def second_moments(
        self,
        task: str,
        state: Mapping[str, Tensor],
        names: Iterable[str],
        *,
        batches: int,
        batch_size: int,
    ) -> dict[str, Tensor]:
        """Second moments of the named layers' inputs through a model with any state; not cached."""
        self._require_available(task, batches, batch_size)
        self._load(state)
        return self._moments(task, batches, batch_size, names)

    def _require_available(self, task: str, batches: int, batch_size: int) -> None:
        available = self._available(task)
        if batches * batch_size > available:
            raise InputError(
                f"task {task!r} has {available} training {self.examples}, statistics over "
                f"{batches} x {batch_size} of them were asked for",
                hint=f"ask for at most statistics.batches={max(available // batch_size, 1)}"
                + (f" statistics.batch_size={available}" if available < batch_size else ""),
            )

"""What a benchmark suite is to the rest of the repository: a base, experts, statistics, scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from merging.errors import InputError

if TYPE_CHECKING:
    from eval.requirements import Requirement
    from merging.layers import Layer

Finetuning = Literal["full", "lora"]
Split = Literal["validation", "test"]
Statistic = Literal["covariance", "fisher", "kfac"]


class Unsupported(InputError):
    """A suite has nothing that a method asks for; a sweep says so and goes on."""


class Score(NamedTuple):
    """One task's result: the fraction right in [0, 1] and the number of examples behind it.

    `constant` flags a predictor that gave every example the same answer: a broken task or a
    collapsed model, whose accuracy means nothing. `correct` says which examples were right, as
    `bits` writes it; empty where a figure is not of single examples.
    """

    accuracy: float
    count: int
    constant: bool
    correct: str = ""


def bits(right: Tensor) -> str:
    """Which of n examples are right (n,), as hexadecimal digits: the first example is the highest
    bit of the first byte, and zeros fill the last byte."""
    return np.packbits(right.cpu().numpy()).tobytes().hex()


def unpacked(correct: str, count: int) -> np.ndarray:
    """`bits` read back: (count,) of 0 and 1."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(correct), np.uint8), count=count)


class Suite(Protocol):
    """A benchmark: tasks that share one base. Built by Hydra from `configs/suite/NAME.yaml`.

    Implementations are frozen dataclasses whose fields are the keys of that file. Everything
    slow (data, experts, statistics) is cached by all it depends on; an unknown task is an
    `InputError`. What only some suites can do is typed below: `MultiTask`, `Measurable`, `OnDisk`.
    Two more, where a protocol asks for them: `rest`, the rule for all tensors that are no layer,
    whatever the method says of them; `unmeasured`, the layers through which no inputs are seen.
    Suites that train their experts inherit what is cached from `eval.trained.TrainedSuite`.
    """

    name: str
    tasks: tuple[str, ...]
    family: str  # which checkpoints: named in every table, never compared across
    metric: str

    def base(self) -> Mapping[str, Tensor]:
        """State dict of the part that experts fine-tune and that is merged."""
        ...

    def layers(self) -> dict[str, Layer]:
        """The linear layers among them, by weight name."""
        ...

    def expert(self, task: str, *, finetuning: Finetuning, seed: int) -> Path:
        """Checkpoint (file, or adapter folder for "lora") of one task; trained when absent."""
        ...

    def statistics(
        self,
        task: str,
        kind: Statistic,
        *,
        finetuning: Finetuning,
        seed: int,
        batches: int,
        batch_size: int,
    ) -> Path:
        """Safetensors {weight name: statistic} of `batches` x `batch_size` training inputs,
        measured through the task's own expert. Read it with `eval.statistics.load`."""
        ...

    def evaluate(
        self,
        state: Mapping[str, Tensor],
        split: Split,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Score]:
        """Scores of a state dict on `tasks` (all by default), `limit` examples of each."""
        ...

    def identity(self, *, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """All that determines the experts: goes into records and cache keys."""
        ...

    def protocol_key(self, *, statistics: bool = False) -> dict[str, Any]:
        """All that a score depends on beside the weights and the split: data and their revision,
        prompts, heads, generation, backend, precision, under `name` the protocol's name where a
        suite has several, and with `statistics`, under that name, what those are measured over.
        It goes into every record's key as `protocol`.

        Costs no download. Empty where the suite's code and `identity` leave nothing to choose;
        the key then has no such field, as in records made before there was one.
        """
        return {}

    def require(self, task: str) -> str:
        """The task, or an InputError that names those there are."""
        if task not in self.tasks:
            raise InputError(
                f"suite {self.name!r} has no task {task!r}", hint=f"known: {', '.join(self.tasks)}"
            )
        return task

    def check(self, tasks: Sequence[str]) -> None:
        """InputError for what can be told of these tasks before anything is downloaded."""

    @property
    def rest(self) -> Literal["average"] | None:
        """The rule for what is no layer, where a protocol has one for every method."""
        return None

    @property
    def unmeasured(self) -> frozenset[str]:
        """Layers that no input reaches: methods that need statistics merge them as the rest."""
        return frozenset()

    def sources(self) -> dict[str, str]:
        """What was downloaded for the latest work: {repository: resolved commit}."""
        return {}

    def requirements(
        self, tasks: Sequence[str], *, finetuning: Finetuning, inputs: bool, validation: bool
    ) -> list[Requirement]:
        """What a run on these tasks reads from elsewhere, told from headers.

        inputs: training inputs too, for statistics. validation: validation examples too.
        """
        return []

    def footprint(self, tasks: Sequence[str], images: int, inputs: bool) -> dict[str, int]:
        """Bytes of `disk` and `memory` that a run takes beside what it downloads."""
        return {}


@runtime_checkable
class MultiTask(Protocol):
    """A suite that trains one model on all tasks at once."""

    def multi_task(self, *, finetuning: Finetuning, seed: int) -> Path:
        """Its checkpoint."""
        ...


@runtime_checkable
class Measurable(Protocol):
    """A suite that measures second moments through a model with any state."""

    def second_moments(
        self,
        task: str,
        state: Mapping[str, Tensor],
        names: Iterable[str],
        *,
        batches: int,
        batch_size: int,
    ) -> dict[str, Tensor]:
        """{weight name: (d_in, d_in)} of the named layers' inputs; not cached."""
        ...


@runtime_checkable
class OnDisk(Protocol):
    """A suite whose models are too large to hold: merged and judged from folder to folder."""

    vocabulary: Literal["refuse", "common_rows"]

    def checkpoint(self) -> Path:
        """The base's model folder."""
        ...

    def companions(self) -> dict[str, bytes | Path]:
        """What makes a model folder of a merge's weights: configuration, tokenizer."""
        ...

    def evaluate_checkpoint(
        self,
        path: Path,
        split: Split,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Score]:
        """As `Suite.evaluate`, of a checkpoint where it lies."""
        ...

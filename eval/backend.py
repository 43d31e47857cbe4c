"""What a suite is made of: one backend says in what families of models and tasks differ.

All that suites share, keys and caching among it, is `eval.suite.Suite`. A backend is a frozen
dataclass whose fields are the keys of `configs/suite/NAME.yaml`, under the `kind` that
`eval.registry` knows it by. Two abilities are optional and have types of their own: `Trainable`
makes its experts here, `OnDisk` has models too large to hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
from torch import Generator, Tensor, nn

from eval.cache import digest
from merging.errors import InputError

if TYPE_CHECKING:
    from eval import recipes
    from eval.requirements import Requirement
    from eval.training import Loss, Stopping
    from merging.layers import Layer

Finetuning = Literal["full", "lora"]
Split = Literal["validation", "test"]
Statistic = Literal["covariance", "fisher", "kfac"]
Precision = Literal["fp32", "bf16"]
AdapterSeeds = Literal["shared", "independent"]


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


def require_protocol(protocol: str, known: Iterable[str]) -> None:
    """InputError for a protocol that a suite does not have."""
    if protocol not in (names := tuple(known)):
        raise InputError(f"protocol is {protocol!r}, expected one of: {', '.join(names)}")


class Backend(ABC):
    """The models and tasks of a suite. `name`, `tasks`, `family` and `metric` are fields or
    properties; an unknown task is an InputError by the time it comes here."""

    name: str
    tasks: Sequence[str]
    family: str  # which checkpoints: named in every table, never compared across
    metric: str
    device: str

    @abstractmethod
    def base(self) -> Mapping[str, Tensor]:
        """State dict of the part that experts fine-tune and that is merged."""

    @abstractmethod
    def layers(self) -> dict[str, Layer]:
        """The linear layers among them, by weight name."""

    @abstractmethod
    def score(
        self, state: Mapping[str, Tensor], tasks: Sequence[str], split: Split, limit: int | None
    ) -> dict[str, Score]:
        """Scores of a state dict on tasks, `limit` examples of each; InputError if it does not
        fit."""

    def given_expert(self, task: str, finetuning: Finetuning) -> Path | None:
        """The expert of a task where it is published or given; None where it is made here."""
        return None

    def measured(self) -> Iterable[str]:
        """Layers whose inputs are seen; methods that need statistics merge others as the rest."""
        return self.layers()

    @property
    def rest(self) -> Literal["average"] | None:
        """The rule for what is no layer, where a protocol has one for every method."""
        return None

    def protocol_key(self, *, statistics: bool = False) -> dict[str, Any]:
        """All that a score depends on beside the weights and the split: data and their revision,
        prompts, heads, generation, library, precision, under `name` the protocol's name where a
        suite has several, and with `statistics`, under that name, what those are measured over.
        It goes into every record's key as `protocol`.

        Costs no download. Empty where the suite's code and `Suite.identity` leave nothing to
        choose; the key then has no such field, as in records made before there was one.
        """
        return {}

    def check(self, tasks: Sequence[str]) -> None:  # noqa: B027
        """InputError for what can be told of these tasks before anything is downloaded."""

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


@dataclass(frozen=True)
class Lessons:
    """What a model is fine-tuned on.

    batches: `batches(first)` yields the micro-batches from number `first` on.
    mask: `mask(batch, weight name)` -> (batch, tokens) booleans, True for the tokens that are no
        padding, or None where every token counts.
    """

    steps: int
    batches: Callable[[int], Iterable[Any]]
    loss: Loss
    mask: Callable[[Any, str], Tensor | None] | None = None
    stopping: Stopping | None = None


class Trainable(Backend):
    """A backend whose experts are fine-tuned here, and measured in a model that it holds."""

    examples: ClassVar[str] = "inputs"  # what error messages call its training examples
    version: ClassVar[int]  # in every key: raise it when the code would give other experts
    settings: ClassVar[recipes.Settings]  # that its recipes have
    recipes: Mapping[str, Mapping[str, Any]]  # by kind of fine-tuning
    precision: Precision = "fp32"  # of forward passes
    sample_seed: int = 0  # of which training examples statistics see
    adapter_seeds: AdapterSeeds = "shared"  # one random A for all tasks, or one of its own for each

    def __post_init__(self) -> None:
        self.settings.check(self.recipes, self.name)
        if self.adapter_seeds not in (known := get_args(AdapterSeeds)):
            raise InputError(
                f"adapter_seeds of suite {self.name!r} is {self.adapter_seeds!r}",
                hint=f"known: {', '.join(known)}",
            )

    def recipe(self, finetuning: str) -> recipes.Recipe:
        """Of one kind of fine-tuning; InputError where there is none."""
        return self.settings.recipe(self.recipes, finetuning, self.name)

    # --- what an expert is determined by ------------------------------------------------------

    @property
    @abstractmethod
    def base_key(self) -> Any:
        """JSON that determines the base."""

    @abstractmethod
    def task_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """What determines the expert of a task beside base, recipe and seed: its data."""

    def given_key(self, task: str, finetuning: Finetuning) -> dict[str, Any] | None:
        """What stands for the expert of a task that is not made here."""
        return None

    def statistics_key(self, kind: Statistic) -> dict[str, Any]:
        """What determines statistics beside the expert and the number of examples."""
        return {}

    def identity_key(self, finetuning: Finetuning) -> dict[str, Any]:
        """What records say of the experts beside the digests that stand for them."""
        return {}

    def scale(self, task: str) -> float | None:
        """A factor on what the expert of a task has moved by; None: as it was trained."""
        return None

    def adapter_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, int]:
        """The seed of an adapter's random factor, where it is not that of the fine-tuning: the key
        of an expert that starts as the others do has none."""
        own = self.adapter_seeds == "independent" and finetuning == "lora"
        return {"adapter_seed": self.adapter_seed([task], seed)} if own else {}

    def adapter_seed(self, tasks: Sequence[str], seed: int) -> int:
        """What the adapters' random factors follow from; one model of all tasks has one anyway."""
        if self.adapter_seeds == "shared" or len(tasks) > 1:
            return seed
        return int(digest({"task": tasks[0], "seed": seed}), 16) % 2**31

    # --- how it is trained --------------------------------------------------------------------

    @abstractmethod
    def moved(self) -> list[str]:
        """Names of the parameters that full fine-tuning moves."""

    @abstractmethod
    def learner(
        self, tasks: Sequence[str], finetuning: Finetuning, recipe: recipes.Recipe, seed: int
    ) -> nn.Module:
        """A new model with the base's weights to be fine-tuned on tasks; for "lora" with adapters,
        the only parameters that require a gradient."""

    @abstractmethod
    def lessons(self, tasks: Sequence[str], recipe: recipes.Recipe, seed: int) -> Lessons:
        """What one model learns of one or several tasks."""

    # --- how it is measured -------------------------------------------------------------------

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The working model, whose weights are whatever was loaded last."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Give the working model these weights; InputError if they do not fit."""

    @abstractmethod
    def available(self, task: str) -> int:
        """Number of training examples of a task."""

    @abstractmethod
    def sample(self, task: str, count: int, batch_size: int) -> Iterable[Any]:
        """Batches of `count` training examples, the same for every expert."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on one batch, as far as its layers go."""
        return model(**batch) if isinstance(batch, Mapping) else model(batch)

    def mask(self, batch: Any, name: str) -> Tensor | None:
        """Which tokens of a batch count as inputs of a layer, as in `Lessons`."""
        return None

    @abstractmethod
    def log_prob(self, model: nn.Module, task: str, example: Any, generator: Generator) -> Tensor:
        """Log-probability of one label of a batch of one example, drawn by the generator from
        the model's own distribution."""

    def kfac_loss(self, model: nn.Module, task: str, batch: Any, generator: Generator) -> Tensor:
        """The loss of `eval.kfac.factors` on a batch, whose labels are drawn likewise."""
        raise Unsupported(f"suite {self.name} does not measure gradients at the layers' outputs")


class OnDisk(Backend):
    """A backend whose models are too large to hold: merged and judged from folder to folder."""

    vocabulary: Literal["refuse", "common_rows"]

    @abstractmethod
    def given_expert(self, task: str, finetuning: Finetuning) -> Path:
        """The expert's folder; nothing is trained."""

    @abstractmethod
    def digests(self) -> dict[str, Any]:
        """What determines base and experts: names and checksums."""

    @abstractmethod
    def checkpoint(self) -> Path:
        """The base's model folder."""

    @abstractmethod
    def companions(self) -> dict[str, bytes | Path]:
        """What makes a model folder of a merge's weights: configuration, tokenizer."""

    @abstractmethod
    def score_checkpoint(
        self, path: Path, tasks: Sequence[str], split: Split, limit: int | None
    ) -> dict[str, Score]:
        """As `score`, of a checkpoint where it lies."""

    @abstractmethod
    def moments_key(self, task: str, batches: int, batch_size: int) -> dict[str, Any]:
        """What determines second moments beside the experts; InputError without inputs."""

    @abstractmethod
    def write_moments(
        self, task: str, batches: int, batch_size: int, path: Path, about: Mapping[str, Any]
    ) -> None:
        """Stream the packed second moments of all layers into a file, or go on with it."""

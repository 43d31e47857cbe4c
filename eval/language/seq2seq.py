"""T5 suites: seven tasks asked in words, answered by ranking the choices.

An answer's score is the log-probability of its tokens, end of sequence included, given the prompt:
their mean (length-normalised rank classification) or, as in the ACTMat paper, their sum. The choice
with the highest score counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn

from eval import recipes, statistics, training
from eval.backend import Finetuning, Lessons, Score, Split, bits, require_protocol
from eval.cache import digest
from eval.language import checkpoints, prompts, promptsource, questions
from eval.language.pretrained import PretrainedBackend
from eval.language.questions import Asked, Example, Protocol, Questions, Splits
from eval.language.ranking import loss, rank, token_mask, training_batch
from eval.requirements import Requirement, of_checkpoints
from merging.errors import InputError
from merging.layers import Layer, linear_layers, paper_layers
from merging.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Seq2SeqBackend(PretrainedBackend):
    """The fields are the keys of the suite's YAML file.

    model: folder or hub name of the base.
    tasks: names in `eval.language.prompts.TASKS`.
    protocol: "paper" is the ACTMat paper's: one prompt a task, from promptsource where its
        templates are at hand, answers scored by sums, its test subsets, every matrix that it
        merges by the method; "ours" two prompts of our own, means, all that is published.
    templates: promptsource's folder `templates`; null: an installed promptsource's, if any.
    data: a folder with a data set folder per task (as `datasets.load_dataset` reads them), or per
        task a folder or OWNER/NAME[@REVISION] of the hub; what is not there comes from the hub.
    experts: checkpoint (folder, file or hub name) per task, the authors' pickles included.
    published: of tasks without one, a pattern such as "actmat/**/{task}/finetuned.pt" below
        $MODEL_MERGING_CHECKPOINTS; null: they are fine-tuned here. origin: for people: where what
        the pattern means is downloaded from.
    recipes: per fine-tuning the fields of `eval.recipes.Recipe` that `settings` names.
    validation, template: of protocol "ours": examples of each task kept from its training data,
        and which of a task's prompts asks for evaluation; training uses all in turn.
    train, test: at most so many examples.
    """

    name: str
    family: str
    model: str
    tasks: Sequence[str]
    recipes: Mapping[Finetuning, Mapping[str, Any]]
    protocol: Protocol = "ours"
    templates: str | None = None
    experts: Mapping[str, str | None] | None = None
    published: str | None = None
    origin: str | None = None
    data: str | Mapping[str, str | None] | None = None
    validation: int = 300
    train: int | None = None
    test: int | None = None
    split_seed: int = 0
    template: int = 0
    max_tokens: int = 128
    precision: Literal["fp32", "bf16"] = "fp32"
    evaluation_batch_size: int = 32
    device: str = "cpu"
    metric: str = "accuracy"

    version = 2
    loader = "AutoModelForSeq2SeqLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_protocol(self.protocol, get_args(Protocol))

    def layers(self) -> dict[str, Layer]:
        if self.protocol == "paper":
            return paper_layers({name: tuple(t.shape) for name, t in self._base.items()})
        return linear_layers(self.network)

    @property
    def rest(self) -> Literal["average"] | None:
        return "average" if self.protocol == "paper" else None

    def measured(self) -> dict[str, Layer]:
        """Layers that are a module's weight, so that inputs are seen."""
        return linear_layers(self.network)

    def moved(self) -> list[str]:
        return list(self._base)

    def check(self, tasks: Sequence[str]) -> None:
        for task in tasks:
            self._questions(task)

    def given_key(self, task: str, finetuning: Finetuning) -> dict[str, Any] | None:
        if (given := self._given(task)) is not None:
            return {"given": self._digests(given)}
        try:
            self._questions(task)
        except questions.Absent:
            return {"absent": task}
        return None

    def protocol_key(self, *, statistics: bool = False) -> dict[str, Any]:
        """Prompts and their words, data, subsets, score, lengths, precision."""
        asked = {}
        for task in self.tasks:
            with suppress(questions.Absent):  # then no figure of this key is of that task
                asked[task] = self._questions(task)
        return {
            "name": self.protocol,
            "prompts": {task: own.wording for task, own in asked.items()},
            "data": {task: own.source.key() for task, own in asked.items() if own.source},
            "score": "mean" if self._mean else "sum",
            "sizes": [self.validation, self.train, self.test, self.split_seed],
            "max_tokens": self.max_tokens,
            "precision": self.precision,
            "metric": self.metric,
        }

    def sources(self) -> dict[str, str]:
        """{repository: commit} of all that was taken from the hub so far."""
        return dict(sorted(self._commits.items()))

    def requirements(
        self, tasks: Sequence[str], *, finetuning: Finetuning, inputs: bool, validation: bool
    ) -> list[Requirement]:
        """The base, the experts that are given, and the splits of every task's data."""
        found = of_checkpoints({"base": self.model}, checkpoints.FILES)
        for task in tasks:
            found += [self._expert_requirement(task), self._data_requirement(task)]
        return found

    def _expert_requirement(self, task: str) -> Requirement:
        what = f"expert {task}"
        try:
            given = self._given(task)
        except InputError as error:
            place = (self.published or "").format(task=task)
            return Requirement(what, place, problem=error.message, hint=error.hint)
        if given is None:
            return Requirement(what, "fine-tuned here")
        return of_checkpoints({what: given}, checkpoints.FILES)[0]

    def _data_requirement(self, task: str) -> Requirement:
        what = f"data {task}"
        try:
            own = self._questions(task)
        except questions.Absent as error:
            return Requirement(what, "its authors", problem=error.message, hint=error.hint)
        return own.source.requirement(what, own.splits)

    def footprint(self, tasks: Sequence[str], images: int, inputs: bool) -> dict[str, int]:
        """Bytes that a run takes: `disk` for experts under the base's names and for second
        moments, `memory` for the base, a merge, the model and an expert."""
        shapes = {name: tensor.shape for name, tensor in self._empty.named_parameters()}
        model = sum(4 * shape.numel() for shape in shapes.values())
        widths = [shapes[name][-1] for name in linear_layers(self._empty)]
        moments = sum(4 * width**2 for width in widths) if inputs else 0
        return {"disk": len(tasks) * (model + moments), "memory": 4 * model + (1 << 30)}

    def given_expert(self, task: str, finetuning: Finetuning) -> Path | None:
        """The checkpoint that was given."""
        if given := self._given(task):
            return checkpoints.unwrapped(
                checkpoints.fetched(given, self._commits), self._base, self.name
            )
        return None

    def score(
        self, state: Mapping[str, Tensor], tasks: Sequence[str], split: Split, limit: int | None
    ) -> dict[str, Score]:
        """Accuracy of rank classification."""
        self.load(state)
        with training.autocast(self.device, self.precision):
            return {
                task: self._score(
                    self.network, f"evaluating {task}", self._splits(task)[split][:limit]
                )
                for task in tasks
            }

    def _score(self, model: PreTrainedModel, label: str, examples: Sequence[Example]) -> Score:
        size = self.evaluation_batch_size
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
        given = torch.empty(len(examples), dtype=torch.long)
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        for chunk in track(chunks, label):
            own = [examples[i] for i in chunk]
            given[chunk] = rank(model, own, self.device, mean=self._mean).cpu()
        right = given == torch.tensor([example.answer for example in examples])
        constant = len(examples) > 1 and len(given.unique()) == 1
        return Score(right.double().mean().item(), len(examples), constant, bits(right))

    # --- data -------------------------------------------------------------------------------

    @property
    def _mean(self) -> bool:
        """Whether an answer's score is the mean over its tokens."""
        return self.protocol != "paper"

    def _questions(self, task: str) -> Questions:
        if task not in prompts.TASKS:
            raise InputError(
                f"unknown task {task!r} in suite {self.name!r}",
                hint=f"known: {', '.join(prompts.TASKS)}",
            )
        return self._asking(Questions, task, questions.source(task, self.data))

    def _asking(
        self, kind: type[Questions], task: str, source: questions.Source | None
    ) -> Questions:
        sizes = (self.validation, self.train, self.test, self.split_seed)
        return kind(task, source, self.protocol, self._templates, self.template, *sizes)

    @cached_property
    def _templates(self) -> Path | None:
        return promptsource.folder(self.templates)

    @cached_property
    def _read(self) -> dict[str, Splits]:
        return {}

    def _splits(self, task: str) -> Splits:
        """The tokenised questions of a task, read when they are first asked for."""
        if task not in self._read:
            own = self._questions(task)
            told = {"files": checkpoints.tokenizer_digests(self.folder), "length": self.max_tokens}
            self._read[task], commit = questions.tokenised(own, told, self._encode)
            if commit and own.source:
                self._commits[f"datasets/{own.source.place}"] = commit
        return self._read[task]

    def _encode(self, asked: Asked) -> Example:
        prompt, choices, answer = asked
        return Example(self._tokens(prompt), [self._tokens(choice) for choice in choices], answer)

    def _tokens(self, text: str) -> list[int]:
        """At most `max_tokens`, the last of which is the end of the sequence."""
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*tokens[: self.max_tokens - 1], self._tokenizer.eos_token_id]

    # --- model ------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        return self.model

    @cached_property
    def folder(self) -> Path:
        return checkpoints.fetched(self.model, self._commits)

    @cached_property
    def _commits(self) -> dict[str, str]:
        return {}

    def _given(self, task: str) -> str | None:
        """The checkpoint of a task: as it was given, or the file that the pattern means."""
        if given := (self.experts or {}).get(task):
            return given
        if self.published is None:
            return None
        return checkpoints.unpacked(self.published.format(task=task), self.origin)

    def _digests(self, name: str) -> dict[str, str]:
        """SHA-256 of a checkpoint's weights; the hub is asked once."""
        if name not in self._known:
            self._known[name] = checkpoints.digests(name)
        return self._known[name]

    @cached_property
    def _known(self) -> dict[str, dict[str, str]]:
        return {}

    @cached_property
    def _empty(self) -> PreTrainedModel:
        """The base without weights, from its configuration alone."""
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        folder = checkpoints.part(self.model, ("config.json",))
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=False)

    # --- experts and statistics ---------------------------------------------------------------

    @property
    def base_key(self) -> dict[str, str]:
        return self._digests(self.model)

    def task_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        return {
            "questions": digest(self._questions(task).key() | {"length": self.max_tokens}),
            "precision": self.precision,
        }

    def lessons(self, tasks: Sequence[str], recipe: recipes.Recipe, seed: int) -> Lessons:
        examples = [example for task in tasks for example in self._splits(task)["train"]]
        prompts = [example.prompt for example in examples]

        def batches(first: int) -> Iterator[dict[str, Tensor]]:
            for numbers in recipes.endless(prompts, recipe.batch_size, seed, first):
                yield training_batch([examples[i] for i in numbers], self.device)

        stopping = recipe.stopping(lambda model: self._validated(model, tasks))
        return Lessons(len(tasks) * recipe.steps, batches, loss, token_mask, stopping)

    def _validated(self, model: nn.Module, tasks: Sequence[str]) -> float:
        """Mean accuracy of a model in training on the tasks' validation examples."""
        own = model.get_base_model() if isinstance(model, PeftModel) else model
        with training.autocast(self.device, self.precision):
            scores = [
                self._score(own, f"validating {t}", self._splits(t)["validation"]) for t in tasks
            ]
        return fmean(score.accuracy for score in scores)

    @property
    def sample_seed(self) -> int:
        return self.split_seed

    def available(self, task: str) -> int:
        return len(self._splits(task)["train"])

    def sample(self, task: str, count: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        examples = self._splits(task)["train"]
        generator = torch.Generator().manual_seed(self.sample_seed)
        for numbers in torch.randperm(len(examples), generator=generator)[:count].split(batch_size):
            yield training_batch([examples[i] for i in numbers], self.device)

    def mask(self, batch: dict[str, Tensor], name: str) -> Tensor:
        return token_mask(batch, name)

    def log_prob(
        self, model: nn.Module, task: str, example: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Of an answer's first token."""
        logits = model(**example, use_cache=False).logits.float()
        return statistics.sampled(logits[0, 0], generator)

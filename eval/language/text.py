"""Text suites: one sentence encoder, frozen zero-shot heads, short classification tasks.

A task's head is the normalised embeddings of its label descriptions under the base encoder, as
CLIP does for images: logits = scale * cos(sentence, description). Only the encoder's layers are
fine-tuned; embeddings and heads stay as they are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from eval import kfac, statistics, training
from eval.backend import (
    AdapterSeeds,
    Finetuning,
    Lessons,
    Score,
    Split,
    Statistic,
    Trainable,
    bits,
)
from eval.cache import cached, digest, file_sha256
from eval.data import bigbench
from eval.language.checkpoints import require_same
from eval.language.corpora import ENCODERS, ORANGE, READERS, VADER, Pairs
from eval.onednn import accelerate
from eval.recipes import SENTENCES, Recipe, batch_order
from merging.errors import InputError
from merging.layers import Layer, linear_layers


class Examples(NamedTuple):
    """Tokenised sentences with their labels' numbers."""

    tokens: list[list[int]]
    labels: Tensor  # (n,)


class Inputs(NamedTuple):
    """A batch of sentences that statistics see."""

    ids: Tensor  # (batch, longest sentence)
    mask: Tensor  # of the same shape, True for tokens that are no padding
    labels: Tensor  # (batch,)


@dataclass(frozen=True)
class TextBackend(Trainable):
    """The fields are the keys of the suite's YAML file.

    encoder: a name in `ENCODERS`.
    corpora: per task {reader: name in `READERS`, source: its argument, labels: {label:
        description}}.
    recipes: per fine-tuning the fields of `Recipe` that `settings` names.
    test, validation, train: at most so many examples of each task, cut in this order from a
        shuffle by `split_seed`; the training seed plays no part in it.
    moment_tokens: which tokens second moments count, those of the sentence or padding as well.
    fisher_labels: drawn from the model's own distribution, or the true ones.
    adapter_seeds: whether the adapters of all tasks start from one random A, or each from its
        own, as adapters made by different people do; the order of the examples is the same.
    additional: tasks that give way to the others: they leave out every text that those have, so
        that the others' splits, and with them the experts, are those of a suite without them.
    scales: per task a factor on what its expert has moved by; 1 for those it does not name.
    """

    name: str
    family: str
    encoder: str
    corpora: Mapping[str, Mapping[str, Any]]
    recipes: Mapping[Finetuning, Mapping[str, Any]]
    test: int = 600
    validation: int = 300
    train: int = 2000
    split_seed: int = 0
    max_tokens: int = 40
    logit_scale: float = 20.0
    moment_tokens: Literal["sentence", "all"] = "sentence"
    fisher_labels: Literal["sampled", "true"] = "sampled"
    adapter_seeds: AdapterSeeds = "shared"
    additional: Sequence[str] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    metric: str = "accuracy"

    version = 2
    settings = SENTENCES
    encoders: ClassVar = ENCODERS
    readers: ClassVar = READERS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in self.encoders:
            raise InputError(
                f"unknown encoder {self.encoder!r}", hint=f"known: {', '.join(self.encoders)}"
            )
        for key in ("scales", "additional"):
            for task in getattr(self, key):
                if task not in self.corpora:
                    raise InputError(f"{key} of suite {self.name!r} names an unknown task {task!r}")
        for task, corpus in self.corpora.items():
            whole = set(corpus) == {"reader", "source", "labels"}
            if not whole or corpus["reader"] not in self.readers:
                raise InputError(
                    f"task {task!r} of suite {self.name!r} is {dict(corpus)}, expected a reader "
                    f"among {', '.join(self.readers)}, its source, and labels with descriptions"
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.corpora)

    def base(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._base.items()}

    def layers(self) -> dict[str, Layer]:
        # the pooler is part of the published checkpoint, but mean pooling never runs it
        return {k: v for k, v in linear_layers(self.network).items() if k.startswith("encoder.")}

    def moved(self) -> list[str]:
        return [n for n, _ in self.network.named_parameters() if n.startswith("encoder.")]

    def score(
        self, state: Mapping[str, Tensor], tasks: Sequence[str], split: Split, limit: int | None
    ) -> dict[str, Score]:
        """Accuracy per task; all tasks' sentences share one pass, each batch of one length."""
        examples = {task: self._examples(task, split) for task in tasks}
        examples = {task: Examples(*(x[:limit] for x in part)) for task, part in examples.items()}
        sentences = [tokens for part in examples.values() for tokens in part.tokens]
        self.load(state)
        embeddings = self._embed_all(self.network, sentences)
        scores, start = {}, 0
        for task, part in examples.items():
            stop = start + len(part.tokens)
            predicted = (embeddings[start:stop] @ self._heads[task].T).argmax(1)
            right = predicted == part.labels
            constant = bool((predicted == predicted[0]).all())
            accuracy = right.double().mean().item()
            scores[task] = Score(accuracy, stop - start, constant, bits(right))
            start = stop
        return scores

    # --- data -------------------------------------------------------------------------------

    @cached_property
    def _texts(self) -> dict[str, dict[str, Pairs]]:
        """Per task and split, (text, label) pairs; no task learns from a text any is tested on."""
        # only where a suite has them: the key of the splits of before stays
        later = {"archives": [ORANGE.sha256], "tasks": [*self.additional]}
        key = ({"additional": later} if self.additional else {}) | {
            "version": self.version,
            "archives": [VADER.sha256, bigbench.BIGBENCH.sha256],
            "corpora": {task: [c["reader"], c["source"]] for task, c in self.corpora.items()},
            "sizes": [self.test, self.validation, self.train],
            "split_seed": self.split_seed,
        }
        splits = json.loads((cached("splits", key, self._split) / "splits.json").read_text())
        for task, parts in splits.items():
            found = {label for pairs in parts.values() for _, label in pairs}
            if found != (described := set(self.corpora[task]["labels"])):
                raise InputError(
                    f"task {task!r} of suite {self.name!r} describes the labels "
                    f"{sorted(described)}, its data has {sorted(found)}"
                )
        return splits

    def _split(self, folder: Path) -> None:
        shuffled: dict[str, Pairs] = {}
        for task, corpus in self.corpora.items():
            pairs = self.readers[corpus["reader"]](corpus["source"])
            shuffled[task] = list(
                {_canonical(text): (text, label) for text, label in pairs}.values()
            )
            random.Random(f"{self.split_seed}/{task}").shuffle(shuffled[task])
        first = [pairs for task, pairs in shuffled.items() if task not in self.additional]
        present = {_canonical(text) for pairs in first for text, _ in pairs}
        for task in self.additional:
            shuffled[task] = [pair for pair in shuffled[task] if _canonical(pair[0]) not in present]
        tests = {task: pairs[: self.test] for task, pairs in shuffled.items()}
        tested = {_canonical(text) for pairs in tests.values() for text, _ in pairs}
        splits = {}
        for task, pairs in shuffled.items():
            rest = [pair for pair in pairs[self.test :] if _canonical(pair[0]) not in tested]
            validation, train = rest[: self.validation], rest[self.validation :][: self.train]
            splits[task] = {"test": tests[task], "validation": validation, "train": train}
        (folder / "splits.json").write_text(json.dumps(splits))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_tokens)
        return tokenizer

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    @cached_property
    def _tokenised(self) -> dict[tuple[str, str], Examples]:
        return {}

    def _examples(self, task: str, split: str) -> Examples:
        """One split, tokenised the first time it is asked for."""
        if (task, split) not in self._tokenised:
            pairs = self._texts[task][split]
            numbers = {label: number for number, label in enumerate(self.corpora[task]["labels"])}
            labels = torch.tensor([numbers[label] for _, label in pairs])
            tokens = self._tokens([text for text, _ in pairs])
            self._tokenised[task, split] = Examples(tokens, labels)
        return self._tokenised[task, split]

    # --- model ------------------------------------------------------------------------------

    @cached_property
    def _folder(self) -> Path:
        return self.encoders[self.encoder]()

    @cached_property
    def network(self) -> BertModel:
        """A working copy whose weights are whatever was loaded last."""
        return accelerate(self.fresh().eval().requires_grad_(False))

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        return self.fresh().cpu().state_dict()

    def fresh(self) -> BertModel:
        model = BertModel(BertConfig.from_pretrained(self._folder))
        stored = load_file(self._folder / "model.safetensors")
        model.load_state_dict({name: stored[name] for name in model.state_dict()})
        return model.to(self.device)

    def load(self, state: Mapping[str, Tensor]) -> None:
        require_same(state, self._base, self.name)
        self.network.load_state_dict({name: state[name] for name in self._base})

    @cached_property
    def _heads(self) -> dict[str, Tensor]:
        """Per task the normalised embeddings of its label descriptions, (classes, d)."""
        model = self.fresh().eval()
        return {
            task: self._embed_all(model, self._tokens(corpus["labels"].values()))
            for task, corpus in self.corpora.items()
        }

    @torch.no_grad()
    def _embed_all(
        self, model: BertModel, sentences: Sequence[list[int]], tokens: int = 2048
    ) -> Tensor:
        """Embeddings (n, d) of sentences; batches of one length need no padding and no mask."""
        embeddings = torch.empty(len(sentences), model.config.hidden_size)
        lengths: dict[int, list[int]] = {}
        for i, sentence in enumerate(sentences):
            lengths.setdefault(len(sentence), []).append(i)
        for length, members in sorted(lengths.items()):
            for batch in torch.tensor(members).split(max(1, tokens // length)):
                ids = torch.tensor([sentences[i] for i in batch], device=self.device)
                embeddings[batch] = embed(model, ids).cpu()
        return embeddings

    # --- experts ------------------------------------------------------------------------------

    @cached_property
    def base_key(self) -> str:
        return file_sha256(self._folder / "model.safetensors")

    def task_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        return {
            "data": digest({"train": self._texts[task]["train"]}),
            "labels": dict(self.corpora[task]["labels"]),
            "max_tokens": self.max_tokens,
            "logit_scale": self.logit_scale,
        }

    def identity_key(self, finetuning: Finetuning) -> dict[str, Any]:
        return {"recipe": self.recipe(finetuning).key()}

    def scale(self, task: str) -> float | None:
        return self.scales.get(task)

    def learner(
        self, tasks: Sequence[str], finetuning: Finetuning, recipe: Recipe, seed: int
    ) -> nn.Module:
        if finetuning == "full":
            return self.fresh()
        targets = [name.removesuffix(".weight") for name in self.layers()]
        start = self.adapter_seed(tasks, seed)
        shape = (recipe.r, recipe.alpha)
        return training.add_lora(self.fresh(), targets, *shape, start, recipe.adapter)

    def lessons(self, tasks: Sequence[str], recipe: Recipe, seed: int) -> Lessons:
        """A batch is (task, example numbers); batches of several tasks are shuffled."""
        examples = {task: self._examples(task, "train") for task in tasks}
        heads = {task: self._heads[task].to(self.device) for task in tasks}

        def padded(batch: tuple[str, Tensor]) -> tuple[Tensor, Tensor]:
            task, members = batch
            return self._padded([examples[task].tokens[i] for i in members])

        def loss(model: nn.Module, batch: tuple[str, Tensor]) -> Tensor:
            task, members = batch
            logits = self.logit_scale * embed(model, *padded(batch)) @ heads[task].T
            return F.cross_entropy(logits, examples[task].labels[members].to(self.device))

        def mask(batch: tuple[str, Tensor], name: str) -> Tensor | None:
            return padded(batch)[1] if self.moment_tokens == "sentence" else None

        order = [
            (task, members)
            for task, part in examples.items()
            for members in batch_order(part.tokens, recipe.batch_size, recipe.epochs, seed)
        ]
        if len(tasks) > 1:
            random.Random(seed).shuffle(order)
        return Lessons(len(order), lambda first: order[first:], loss, mask)

    # --- statistics ---------------------------------------------------------------------------

    @property
    def sample_seed(self) -> int:
        return self.split_seed

    def statistics_key(self, kind: Statistic) -> dict[str, Any]:
        tokens, labels = self.moment_tokens, self.fisher_labels
        return {"mode": {"covariance": tokens, "fisher": labels, "kfac": [tokens, labels]}[kind]}

    def available(self, task: str) -> int:
        return len(self._texts[task]["train"])

    def sample(self, task: str, count: int, batch_size: int) -> Iterator[Inputs]:
        examples = self._examples(task, "train")
        generator = torch.Generator().manual_seed(self.sample_seed)
        for members in torch.randperm(len(examples.tokens), generator=generator)[:count].split(
            batch_size
        ):
            ids, mask = self._padded([examples.tokens[i] for i in members])
            yield Inputs(ids, mask, examples.labels[members])

    def forward(self, model: nn.Module, batch: Inputs) -> Tensor:
        return embed(model, batch.ids, batch.mask)

    def mask(self, batch: Inputs, name: str) -> Tensor | None:
        """Of the tokens that `moment_tokens` names."""
        return batch.mask if self.moment_tokens == "sentence" else None

    def log_prob(
        self, model: nn.Module, task: str, example: Inputs, generator: torch.Generator
    ) -> Tensor:
        """Of a label as `fisher_labels` says."""
        head = self._heads[task].to(self.device)
        logits = self.logit_scale * (embed(model, example.ids) @ head.T)[0]
        if self.fisher_labels == "true":
            return logits.log_softmax(0)[example.labels[0]]
        return statistics.sampled(logits, generator)

    def kfac_loss(
        self, model: nn.Module, task: str, batch: Inputs, generator: torch.Generator
    ) -> Tensor:
        head = self._heads[task].to(self.device)
        logits = self.logit_scale * embed(model, batch.ids, batch.mask) @ head.T
        if self.fisher_labels == "true":
            return F.cross_entropy(logits, batch.labels.to(self.device), reduction="sum")
        return kfac.drawn(logits, generator)

    def _padded(self, sentences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and booleans for the real ones, both (batch, longest sentence)."""
        longest = max(map(len, sentences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sentences], device=self.device)
        lengths = torch.tensor([len(s) for s in sentences], device=self.device)
        return ids, torch.arange(longest, device=self.device) < lengths[:, None]


def embed(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Unit sentence embeddings (batch, d) of token ids (batch, tokens): the mean over tokens.

    mask: booleans (batch, tokens), True for tokens that are no padding; None if all are.
    """
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state  # (batch, tokens, d)
    if mask is not None:
        hidden = hidden * mask[..., None]  # a sum is enough: normalising divides the count out
    return F.normalize(hidden.sum(1), dim=-1)


def _canonical(text: str) -> str:
    """What two texts share when they say the same words."""
    return " ".join(text.casefold().split())

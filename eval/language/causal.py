"""Decoders: examples of prompt and answer, and suites of published checkpoints.

Nothing is trained in such a suite: base and experts are checkpoints on this machine or the hub,
their tasks are the experts' names, and what is scored are benchmarks of lm-eval, each of which
belongs to one expert.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eval import statistics, streamed_statistics
from eval.cache import cache_root, cached
from eval.language import checkpoints, judge
from eval.suite import Finetuning, Score, Split, Statistic, Suite, Unsupported
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.layers import Layer, choose_layers, linear_layers

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # cross_entropy's mark of a position without a label


class Example(NamedTuple):
    """Tokens of a prompt and its answer, and how many of them are the prompt's."""

    tokens: list[int]
    prompt: int


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Example:
    """Tokenise as lm-eval scores it: the prompt alone, then prompt and answer as one string."""
    return Example(tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"]))


def collate(examples: Sequence[Example], device: str = "cpu") -> dict[str, Tensor]:
    """Examples padded on the right: input_ids, attention_mask and labels, each (b, L).

    Labels are `IGNORED` outside the answers.
    """
    length = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
    for i, (own, prompt) in enumerate(examples):
        tokens[i, : len(own)] = torch.tensor(own)
        mask[i, : len(own)] = 1
        labels[i, prompt : len(own)] = tokens[i, prompt : len(own)]
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def answer_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits where an answer token is predicted, and those tokens.

    Returns (b, n, vocabulary) float32 and (b, n), n the positions at which any example of the
    batch has an answer; the others of an example are `IGNORED`. The output head, a fifth of a
    small model's work, runs at these positions alone.
    """
    following = batch["labels"][:, 1:]
    at = (following != IGNORED).any(0).nonzero()[:, 0]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=at,
        use_cache=False,
    ).logits
    return logits.float(), following[:, at]


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens."""
    logits, tokens = answer_logits(model, batch)
    return cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=IGNORED)


# --- published checkpoints ------------------------------------------------------------------------


@dataclass(frozen=True)
class CausalSuite(Suite):
    """Implements `eval.suite.Suite` with one score per benchmark instead of one per task.

    model, experts: folders, files or hub names. Adapters are given as they are.
    benchmarks: per column the expert it belongs to and the fields of `judge.Benchmark`; `task`
        defaults to the column's name, `chat_template` to the suite's.
    backend, backend_options: of lm-eval's registry, e.g. vllm with {tensor_parallel_size: 4}.
    allow_code_execution: HumanEval and its like run what the model wrote. Use a sandbox.
    vocabulary: "refuse" embeddings of different sizes, or merge the rows all have and keep the
        base's others ("common_rows").
    texts: per expert the arguments of `datasets.load_dataset` and the `field` to read, inputs
        for methods that need second moments.
    moment_memory: bytes that running sums of second moments may take.
    samples: folder for every prompt and answer of an evaluation; null keeps none.
    """

    name: str
    family: str
    model: str
    experts: Mapping[str, str]
    benchmarks: Mapping[str, Mapping[str, Any]]
    backend: str = "hf"
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | str = "auto"
    chat_template: bool = False
    allow_code_execution: bool = False
    vocabulary: Literal["refuse", "common_rows"] = "refuse"
    texts: Mapping[str, Mapping[str, Any]] | None = None
    max_tokens: int = 2048
    moment_memory: int = 8 << 30
    samples: str | None = None
    device: str = "cpu"
    metric: str = "pass@1 or accuracy (lm-eval)"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.experts)

    def base(self) -> dict[str, Tensor]:
        source = open_checkpoint(self._checked["base"])
        return {name: source.read(name) for name in source.keys()}

    def layers(self) -> dict[str, Layer]:
        folder = self._checked["base"]
        source = open_checkpoint(folder)
        shapes = {name: source.shape(name) for name in source.keys()}
        source.close()
        return choose_layers(folder, shapes).layers

    def identity(self, *, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """Names and SHA-256 of the checkpoints; nothing depends on `seed`."""
        digests = {role: checkpoints.file_digests(path) for role, path in self._checked.items()}
        return {"suite": self.name, "model": self.model, "experts": digests}

    def expert(self, task: str, *, finetuning: Finetuning, seed: int) -> Path:
        self._require(task)
        path = self._checked[task]
        stored = "lora" if (path / "adapter_config.json").exists() else "full"
        if stored != finetuning:
            raise InputError(
                f"expert {task!r} of suite {self.name!r} is published as {stored}",
                hint=f"use finetuning={stored}",
            )
        return path

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
        """Packed second moments of every layer over all tokens of the task's texts, and beside
        them `cost.json` with the bytes, seconds and passes they took."""
        self._require(task)
        if kind != "covariance":
            raise Unsupported(
                f"suite {self.name!r} has no {kind} statistics",
                hint="use a method without data, or one that needs second moments",
            )
        about = statistics.about(self, task, kind, finetuning=finetuning, seed=seed)
        own = dict((self.texts or {}).get(task) or {})
        if not own:
            raise InputError(
                f"suite {self.name!r} has no texts for the second moments of {task!r}",
                hint=f"give suite.texts.{task}={{path: json, data_files: FILE, split: train, "
                "field: text}",
            )
        key = {"about": about, "texts": own, "size": [batches, batch_size, self.max_tokens]}

        def build(folder: Path) -> None:
            path = folder / "covariance.safetensors"
            given = self._texts(own, batches * batch_size)
            cost = self._moments(self._checked[task], given, batch_size, path, about)
            (folder / "cost.json").write_text(json.dumps(cost._asdict()))

        return cached("statistics", key, build, resumable=True) / "covariance.safetensors"

    def evaluate(
        self,
        state: Mapping[str, Tensor],
        split: Split,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Score]:
        """Scores of the benchmarks that belong to the given tasks, and "name@k" of those with k."""
        if split != "test":
            raise InputError(f"the benchmarks of suite {self.name!r} have no {split} split")
        chosen = {
            column: benchmark
            for column, benchmark in self._benchmarks.items()
            if self.benchmarks[column]["expert"] in (tasks or self.tasks)
        }
        manager = self._manager
        with self._lm(state) as lm:
            found = {
                column: judge.judge(
                    lm,
                    column,
                    benchmark,
                    manager,
                    limit=limit,
                    allow_code_execution=self.allow_code_execution,
                )
                for column, benchmark in chosen.items()
            }
        if self.samples:
            judge.keep(found, Path(self.samples) / self.name / judge.fingerprint(state))
        return {column: s for judgement in found.values() for column, s in judgement.scores.items()}

    # --- checks -------------------------------------------------------------------------------

    def _require(self, task: str) -> None:
        if task not in self.experts:
            raise InputError(
                f"suite {self.name!r} has no task {task!r}", hint=f"known: {', '.join(self.tasks)}"
            )

    @cached_property
    def _benchmarks(self) -> dict[str, judge.Benchmark]:
        found = {}
        for column, given in self.benchmarks.items():
            own = {"task": column, "chat_template": self.chat_template} | dict(given)
            if (expert := own.pop("expert", None)) not in self.experts:
                raise InputError(
                    f"benchmark {column!r} belongs to expert {expert!r}, which suite "
                    f"{self.name!r} does not have",
                    hint=f"known: {', '.join(self.tasks)}",
                )
            known = {f.name for f in fields(judge.Benchmark)}
            if unknown := sorted(set(own) - known):
                raise InputError(
                    f"benchmark {column!r} has no setting {unknown[0]!r}",
                    hint=f"known: expert, {', '.join(sorted(known))}",
                )
            found[column] = judge.Benchmark(**own)
        return found

    @cached_property
    def _manager(self) -> TaskManager:
        return judge.task_manager(
            self._benchmarks.values(), allow_code_execution=self.allow_code_execution
        )

    @cached_property
    def _checked(self) -> dict[str, Path]:
        """Where base and experts are, everything having been checked that can be before a merge:
        benchmarks, shards and indices, tokenizers, what adapters belong to."""
        _ = self._manager
        base = checkpoints.local(self.model)
        experts = {task: checkpoints.local(name) for task, name in self.experts.items()}
        checkpoints.require_mergeable(base, experts, vocabulary=self.vocabulary, name=self.model)
        if any(b.chat_template for b in self._benchmarks.values()):
            checkpoints.require_chat_template(base)
        return {"base": base} | experts

    # --- model --------------------------------------------------------------------------------

    @contextmanager
    def _lm(self, state: Mapping[str, Tensor]) -> Iterator[LM]:
        """lm-eval's model of a state dict, by way of a checkpoint folder that every backend
        reads, and that is removed afterwards."""
        cache_root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_root(), prefix="judged-") as scratch:
            folder = Path(scratch) / "model"
            checkpoints.write(state, folder, like=self._checked["base"])
            arguments = {"pretrained": str(folder)} | dict(self.backend_options)
            yield judge.load_lm(
                self.backend, arguments, batch_size=self.batch_size, device=self.device
            )

    def _texts(self, given: dict[str, Any], count: int) -> list[str]:
        from datasets import load_dataset

        column = given.pop("field", "text")
        try:
            texts = load_dataset(**given)[column][:count]
        except Exception as error:  # datasets has a dozen kinds for "not there"
            raise InputError(f"texts {given} cannot be loaded: {error}") from error
        if len(texts) < count:
            raise InputError(f"texts {given} are {len(texts)}, {count} were asked for")
        return texts

    def _moments(
        self,
        expert: Path,
        texts: Sequence[str],
        batch_size: int,
        path: Path,
        about: Mapping[str, Any],
    ) -> streamed_statistics.Cost:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self._checked["base"]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False
        ).to(self.device)
        source = open_checkpoint(expert)
        with torch.no_grad():
            checkpoints.load_into(model, source)
        texts = [tokenizer(text)["input_ids"][: self.max_tokens] for text in texts]
        examples = [Example(tokens, len(tokens)) for tokens in texts if tokens]
        return streamed_statistics.collect(
            model,
            lambda: (
                collate(examples[i : i + batch_size], self.device)
                for i in range(0, len(examples), batch_size)
            ),
            linear_layers(model),
            path,
            about=about,
            memory=self.moment_memory,
            forward=lambda model, batch: model.base_model(
                batch["input_ids"], batch["attention_mask"], use_cache=False
            ),
            mask=lambda batch, name: batch["attention_mask"],
        )

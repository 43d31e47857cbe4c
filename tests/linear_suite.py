"""A suite small enough to check by hand: one 2 x 2 layer, and scores read off its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from eval.backend import Backend, Score, Unsupported, bits
from merging.layers import Layer

NAME = "layer.weight"
DELTAS = {"first": [[1.0, 0.0], [0.0, 0.0]], "second": [[0.0, 0.0], [0.0, 1.0]]}


@dataclass
class LinearSuite(Backend):
    """What commands ask of `eval.suite.Suite`, with itself as the backend.

    Experts move one diagonal entry from 0 to 1; a task's accuracy peaks where its entry is at
    `best[split]`. So the average (0.5 on both entries) can be scored without a computer."""

    folder: Path
    name: str = "linear"
    family: str = "by hand"
    metric: str = "accuracy"
    tasks: tuple[str, ...] = ("first", "second")
    best: dict[str, float] = field(default_factory=lambda: {"validation": 0.4, "test": 1.0})
    evaluated: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    collected: list[str] = field(default_factory=list)

    trainable = on_disk = None
    unmeasured = frozenset()

    @property
    def backend(self):
        return self

    def multi_task(self, *, finetuning, seed):
        raise Unsupported(f"suite {self.name} has no model trained on all tasks at once")

    def base(self):
        return {NAME: torch.zeros(2, 2), "bias": torch.zeros(2)}

    def layers(self):
        return {NAME: Layer()}

    def expert(self, task, *, finetuning, seed):
        path = self.folder / f"{task}-{finetuning}-{seed}.safetensors"
        if not path.exists():
            save_file({NAME: torch.tensor(DELTAS[task]), "bias": torch.zeros(2)}, path)
        return path

    def statistics(self, task, kind, *, finetuning, seed, batches, batch_size):
        self.collected.append(task)
        path = self.folder / f"{task}-{kind}-{batches}x{batch_size}.safetensors"
        if not path.exists():
            save_file({NAME: torch.eye(2)}, path)
        return path

    def evaluate(self, state, split, tasks=None, limit=None):
        tasks = tuple(tasks or self.tasks)
        self.evaluated.append((split, tasks))
        return self.score(state, tasks, split, limit)

    def score(self, state, tasks, split, limit):
        entries = dict(zip(self.tasks, state[NAME].diagonal().tolist(), strict=True))
        accuracy = {task: 1 - abs(self.best[split] - entries[task]) / 2 for task in tasks}
        count = limit or 100
        right = {task: torch.arange(count) < round(count * accuracy[task]) for task in tasks}
        return {task: Score(accuracy[task], count, False, bits(right[task])) for task in tasks}

    def identity(self, *, finetuning, seed):
        return {"suite": self.name, "seed": seed, "finetuning": finetuning}


@dataclass
class BenchmarkSuite(LinearSuite):
    """The same, judged as language models are: two benchmarks belong to the first task, one of
    them with ten attempts, one to the second; and the protocol is chosen."""

    protocol: str = "paper"
    columns: tuple[tuple[str, str], ...] = (
        ("sums", "first"), ("sums@10", "first"), ("proofs", "first"), ("code", "second"),
    )  # fmt: skip

    def evaluate(self, state, split, tasks=None, limit=None):
        scores = super().evaluate(state, split, tasks, limit)
        return {column: scores[task] for column, task in self.columns if task in scores}

    def protocol_key(self, *, statistics=False):
        return {"name": self.protocol} | ({"statistics": "inputs"} if statistics else {})

    def sources(self):
        return {"owner/model": "0" * 40}

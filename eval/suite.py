"""What a benchmark suite is to the rest of the repository: a base, experts, statistics, scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval import kfac, statistics, training
from eval.backend import (
    Backend,
    Finetuning,
    OnDisk,
    Score,
    Split,
    Statistic,
    Trainable,
    Unsupported,
)
from eval.cache import cached, digest
from eval.scaled import scaled
from merging.errors import InputError
from merging.layers import Layer
from merging.progress import track


@dataclass(frozen=True)
class Suite:
    """A benchmark: tasks that share one base, `backend` says which. Everything slow (experts,
    statistics) is cached by all it depends on; an unknown task is an InputError."""

    backend: Backend

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.backend.tasks)

    @property
    def family(self) -> str:
        return self.backend.family

    @property
    def metric(self) -> str:
        return self.backend.metric

    @property
    def trainable(self) -> Trainable | None:
        """The backend, where experts are made here: fine-tuned, measured, on all tasks at once."""
        return self.backend if isinstance(self.backend, Trainable) else None

    @property
    def on_disk(self) -> OnDisk | None:
        """The backend, where models are merged and judged from folder to folder."""
        return self.backend if isinstance(self.backend, OnDisk) else None

    def require(self, task: str) -> str:
        """The task, or an InputError that names those there are."""
        if task not in self.tasks:
            raise InputError(
                f"suite {self.name!r} has no task {task!r}", hint=f"known: {', '.join(self.tasks)}"
            )
        return task

    # --- models -------------------------------------------------------------------------------

    def base(self) -> Mapping[str, Tensor]:
        """State dict of the part that experts fine-tune and that is merged."""
        return self.backend.base()

    def layers(self) -> dict[str, Layer]:
        """The linear layers among them, by weight name."""
        return self.backend.layers()

    @property
    def unmeasured(self) -> frozenset[str]:
        """Layers that no input reaches: methods that need statistics merge them as the rest."""
        return frozenset(self.layers()) - frozenset(self.backend.measured())

    def evaluate(
        self,
        state: Mapping[str, Tensor] | Path,
        split: Split,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Score]:
        """Scores of a state dict, or of a checkpoint of a suite `on_disk`, on `tasks` (all by
        default), `limit` examples of each."""
        chosen = [self.require(task) for task in tasks or self.tasks]
        if not isinstance(state, Path):
            return self.backend.score(state, chosen, split, limit)
        if self.on_disk is None:
            raise Unsupported(f"suite {self.name} judges no checkpoint where it lies")
        return self.on_disk.score_checkpoint(state, chosen, split, limit)

    # --- experts ------------------------------------------------------------------------------

    def identity(self, *, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """All that determines the experts: goes into records and cache keys. Of experts that are
        made here, a digest per task that stands for its data, too."""
        if self.on_disk is not None:
            return {"suite": self.name} | self.on_disk.digests()
        backend, experts = self._trainer(), {}
        for task in self.tasks:
            key = backend.given_key(task, finetuning) or self._key(task, finetuning, seed)
            scale = backend.scale(task)
            experts[task] = digest(key if scale is None else key | {"scale": scale})
        return {
            "suite": self.name,
            "family": self.family,
            "finetuning": finetuning,
            "seed": seed,
            "experts": experts,
        } | backend.identity_key(finetuning)

    def expert(self, task: str, *, finetuning: Finetuning, seed: int) -> Path:
        """Checkpoint of one task, trained when absent: `model.safetensors` with every tensor of
        the base, or an adapter folder for "lora"; or as it was published."""
        self.require(task)
        if (path := self.backend.given_expert(task, finetuning)) is not None:
            return path
        backend, key = self._trainer(), self._key(task, finetuning, seed)
        path = self._trained([task], key, finetuning, seed)
        factor = backend.scale(task)
        return path if factor is None else scaled(path, backend.base(), factor, key)

    def multi_task(self, *, finetuning: Finetuning, seed: int) -> Path:
        """Checkpoint of one model fine-tuned on all tasks at once, for as many steps as the
        experts together: what merging is measured by."""
        if self.trainable is None:
            raise Unsupported(f"suite {self.name} has no model trained on all tasks at once")
        keys = [self._key(task, finetuning, seed) for task in self.tasks]
        return self._trained(self.tasks, {"multi_task": keys}, finetuning, seed)

    def training(
        self, tasks: Sequence[str], *, finetuning: Finetuning, seed: int
    ) -> training.Training:
        """The fine-tuning on one or several tasks, on a model of its own."""
        backend = self._trainer()
        recipe = backend.recipe(finetuning)
        model = backend.learner(tasks, finetuning, recipe, seed)
        lessons = backend.lessons(tasks, recipe, seed)
        settings = recipe.arguments(lessons.steps) | {
            "parameters": None if finetuning == "lora" else backend.moved(),
            "stopping": lessons.stopping,
            "seed": seed,
            "device": backend.device,
            "precision": recipe.precision or backend.precision,
            "label": f"{', '.join(tasks)} ({finetuning}, seed {seed})",
        }
        return training.Training(model, lessons.batches, lessons.loss, lessons.mask, settings)

    def _trainer(self) -> Trainable:
        if self.trainable is None:
            raise Unsupported(f"suite {self.name} trains no experts")
        return self.trainable

    def _key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """All that determines the expert of a task that is made here."""
        backend = self._trainer()
        adapter = backend.adapter_key(task, finetuning, seed)
        return (
            backend.task_key(task, finetuning, seed)
            | adapter
            | {
                "version": backend.version,
                "base": backend.base_key,
                "task": task,
                "finetuning": finetuning,
                "recipe": backend.recipe(finetuning).key(),
                "seed": seed,
            }
        )

    def _trained(
        self, tasks: Sequence[str], key: dict[str, Any], finetuning: Finetuning, seed: int
    ) -> Path:
        build = partial(self._finetune, tasks, finetuning, seed)
        folder = cached("experts", key, build, resumable=True)
        return folder if finetuning == "lora" else folder / "model.safetensors"

    def _finetune(
        self, tasks: Sequence[str], finetuning: Finetuning, seed: int, folder: Path
    ) -> None:
        """Train one model on these tasks and write its checkpoint into a folder, which holds
        what an interrupted call left there."""
        model, batches, loss, _, settings = self.training(tasks, finetuning=finetuning, seed=seed)
        training.train(model, batches, loss, output=folder, **settings)
        training.save_expert(model, self.base(), folder)

    # --- statistics ---------------------------------------------------------------------------

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
        """Safetensors {weight name: statistic} of `batches` x `batch_size` training inputs, drawn
        without replacement, in the task's own expert. Read it with `eval.statistics.load`."""
        self.require(task)
        if self.on_disk is not None:
            return self._streamed(task, kind, finetuning, seed, batches, batch_size)
        backend = self._trainer()
        self._require_available(task, batches, batch_size)
        about = statistics.about(self, task, kind, finetuning=finetuning, seed=seed)
        key = {"about": about, "size": [batches, batch_size], "version": backend.version}

        def build(folder: Path) -> None:
            expert = self.expert(task, finetuning=finetuning, seed=seed)
            backend.load(training.expert_state(self.base(), expert))
            measures = {"covariance": self._moments, "fisher": self._fisher, "kfac": self._kfac}
            found = measures[kind](task, batches, batch_size)
            statistics.save(folder / f"{kind}.safetensors", found, about)

        folder = cached("statistics", key | backend.statistics_key(kind), build)
        return folder / f"{kind}.safetensors"

    def second_moments(
        self,
        task: str,
        state: Mapping[str, Tensor],
        names: Iterable[str],
        *,
        batches: int,
        batch_size: int,
    ) -> dict[str, Tensor]:
        """{weight name: (d_in, d_in)} second moments of the named layers' inputs through a model
        with any state; not cached."""
        self.require(task)
        self._require_available(task, batches, batch_size)
        self._trainer().load(state)
        return self._moments(task, batches, batch_size, names)

    def _streamed(
        self,
        task: str,
        kind: Statistic,
        finetuning: Finetuning,
        seed: int,
        batches: int,
        batch_size: int,
    ) -> Path:
        """Packed second moments of every layer of a model too large to hold several of."""
        disk = self.on_disk
        if kind != "covariance":
            raise Unsupported(
                f"suite {self.name!r} has no {kind} statistics",
                hint="use a method without data, or one that needs second moments",
            )
        key = disk.moments_key(task, batches, batch_size)
        about = statistics.about(self, task, kind, finetuning=finetuning, seed=seed)

        def build(folder: Path) -> None:
            disk.write_moments(task, batches, batch_size, folder / f"{kind}.safetensors", about)

        folder = cached("statistics", {"about": about} | key, build, resumable=True)
        return folder / f"{kind}.safetensors"

    def _require_available(self, task: str, batches: int, batch_size: int) -> None:
        backend = self._trainer()
        available = backend.available(task)
        if batches * batch_size > available:
            raise InputError(
                f"task {task!r} has {available} training {backend.examples}, statistics over "
                f"{batches} x {batch_size} of them were asked for",
                hint=f"ask for at most statistics.batches={max(available // batch_size, 1)}"
                + (f" statistics.batch_size={available}" if available < batch_size else ""),
            )

    def _moments(
        self, task: str, batches: int, batch_size: int, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Second moments in the working model, by default of all layers that inputs reach."""
        backend = self._trainer()
        sample = backend.sample(task, batches * batch_size, batch_size)
        with training.autocast(backend.device, backend.precision):
            return statistics.second_moments(
                backend.network,
                track(sample, f"second moments of {task}", batches),
                backend.measured() if names is None else names,
                forward=backend.forward,
                mask=backend.mask,
            )

    def _fisher(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """{name: diagonal Fisher, of the parameter's shape} of what full fine-tuning moves."""
        backend, count = self._trainer(), batches * batch_size
        generator = torch.Generator(backend.device).manual_seed(backend.sample_seed)
        sample = track(backend.sample(task, count, 1), f"Fisher information of {task}", count)
        with training.autocast(backend.device, backend.precision):
            return statistics.diagonal_fisher(
                backend.network,
                sample,
                lambda model, example: backend.log_prob(model, task, example, generator),
                backend.moved(),
            )

    def _kfac(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """`eval.kfac.factors` of the working model's layers."""
        backend = self._trainer()
        generator = torch.Generator(backend.device).manual_seed(backend.sample_seed)
        return kfac.factors(
            backend.network,
            backend.sample(task, batches * batch_size, batch_size),
            list(backend.measured()),
            lambda model, batch: backend.kfac_loss(model, task, batch, generator),
            mask=backend.mask,
        )

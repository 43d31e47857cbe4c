"""Vision suites: a CLIP vision tower behind frozen heads, one head per image data set.

With published CLIP weights the heads are the text tower's embeddings of the class names; with a
tower pre-trained here they are the class means of the base's own embeddings. Either way
logits = scale * cos(image, class), and only the tower is fine-tuned and merged.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eval import kfac, statistics, training
from eval.cache import cached, digest
from eval.data import hub
from eval.language.checkpoints import require_same
from eval.requirements import Requirement
from eval.suite import Finetuning, Score, Split, Statistic, bits
from eval.trained import TrainedSuite
from eval.vision import models
from eval.vision.data import (
    ImageSet,
    Part,
    cropped,
    epochs,
    image_size,
    normalise,
    pixels,
    sample,
    training_batches,
)
from eval.vision.models import Published
from eval.vision.pretrain import Pretraining
from merging.errors import InputError
from merging.layers import Layer, linear_layers, paper_layers

# Goes into every cache key: raise it when the code below would give other experts or statistics.
VERSION = 1
BATCH = 64

Protocol = Literal["ours", "paper"]
Batch = tuple[str, Tensor, Tensor]  # task, images (batch, 3, size, size), labels (batch,)


@dataclass(frozen=True)
class Recipe:
    """How one expert is fine-tuned; `r` and `alpha` are LoRA's.

    steps, or epochs: a number, or {task: number}. crop_scale: area of the random crops.
    targets: what LoRA adapts: "all" of attention and MLP, or "in_proj", q, k and v packed.
    precision: "bf16" computes in mixed precision. checkpointing: recompute activations in the
        backward pass instead of keeping them.
    """

    lr: float
    batch_size: int = 128
    steps: int | None = None
    epochs: float | Mapping[str, float] | None = None
    warmup_steps: int = 500
    weight_decay: float = 0.1
    crop_scale: tuple[float, float] = (0.9, 1.0)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = False
    r: int = 0
    alpha: int = 0
    targets: Literal["all", "in_proj"] = "all"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise InputError("a fine-tuning recipe needs either steps or epochs")

    def key(self) -> dict[str, Any]:
        """All of it, for cache keys; `targets` only where it is not what it was before it was."""
        fields = asdict(self)
        return fields if self.targets != "all" else {k: fields[k] for k in fields if k != "targets"}

    def length(self, task: str, images: int) -> int:
        """Number of steps on a task with so many training images."""
        if self.steps is not None:
            return self.steps
        rounds = self.epochs[task] if isinstance(self.epochs, Mapping) else self.epochs
        return max(1, round(rounds * images / self.batch_size))


@dataclass(frozen=True)
class VisionSuite(TrainedSuite):
    """Implements `eval.suite.Suite`; the fields are the keys of the suite's YAML file.

    model: open_clip's name of the architecture.
    datasets: {task: fields of `ImageSet`}. recipes: per fine-tuning the fields of `Recipe`.
    clip: where the whole pre-trained model is published (fields of `Published`); or
    pretraining: the fields of `Pretraining`, where the base is made here.
    base_tower: the family's own base, where it is published apart from `clip`.
    experts, adapters: where fine-tuned towers and LoRA experts (adapters, or whole towers with
        the adapter merged in) are published; None: trained here. In them, as in `clip`, {model},
        {hub_model}, {timm_model} and {task} are filled in, {task} by `task_names`.
    heads: where the family publishes its heads; None: embeddings of the class names.
    class_names: {task: `ImageSet.classes`} under which the family's experts were fine-tuned,
        where they are not the data set's; tasks that the suite does not have are ignored.
    protocol: "paper" merges by the method every matrix that the ACTMat paper does, averages all
        other tensors whatever the method says of them, evaluates in float32 and trains by the
        recipe "paper_<finetuning>" where there is one.
    shots: where the base is pre-trained here, the number of labelled training images behind
        each class's head; None: all of them.
    """

    name: str
    family: str
    model: str
    datasets: Mapping[str, Mapping[str, Any]]
    recipes: Mapping[str, Mapping[str, Any]]
    clip: Mapping[str, Any] | None = None
    pretraining: Mapping[str, Any] | None = None
    base_tower: Mapping[str, Any] | None = None
    experts: Mapping[str, Any] | None = None
    adapters: Mapping[str, Any] | None = None
    task_names: Mapping[str, str] | None = None
    heads: Mapping[str, Any] | None = None
    class_names: Mapping[str, Sequence[str] | str] | None = None
    protocol: Protocol = "ours"
    shots: int | None = None
    logit_scale: float = 100.0
    workers: int = 0
    device: str = "cpu"
    metric: str = "accuracy"

    examples = "images"  # a constant of the class, not a field

    def __post_init__(self) -> None:
        if (self.clip is None) == (self.pretraining is None):
            raise InputError(f"suite {self.name!r} needs either clip or pretraining")
        if self.protocol not in get_args(Protocol):
            known = ", ".join(get_args(Protocol))
            raise InputError(f"protocol is {self.protocol!r}, expected one of: {known}")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.datasets)

    @property
    def architecture(self) -> str:
        """open_clip's name with the activation: OpenAI's, wherever weights are published."""
        return f"{self.model}-quickgelu" if self.clip is not None else self.model

    def base(self) -> dict[str, Tensor]:
        return dict(self._base)

    def layers(self) -> dict[str, Layer]:
        if self.protocol == "paper":
            return paper_layers({name: tuple(t.shape) for name, t in self._base.items()})
        return linear_layers(self._tower)

    @property
    def rest(self) -> Literal["average"] | None:
        """The rule for what is no layer, where the protocol has one for every method."""
        return "average" if self.protocol == "paper" else None

    @property
    def unmeasured(self) -> frozenset[str]:
        """Layers that are no module's weight, so that no inputs are seen."""
        return frozenset(self.layers()) - frozenset(linear_layers(self._tower))

    def identity(self, *, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        """What determines the experts, with a digest per task that stands for its data."""
        experts = {task: digest(self._expert_key(task, finetuning, seed)) for task in self.tasks}
        return {
            "suite": self.name,
            "family": self.family,
            "model": self.model,
            "finetuning": finetuning,
            "seed": seed,
            "experts": experts,
        }

    def protocol_key(self, *, statistics: bool = False) -> dict[str, Any]:
        """What a score depends on beside the towers: data, class names, templates, precision.
        Of a base made here, whose heads and data `identity` holds, a lower precision alone."""
        if self.clip is None:
            return {"precision": "float16"} if self._half else {}
        data = {task: asdict(images) for task, images in self._sets.items()}
        return {
            "name": self.protocol,
            "data": {task: digest(fields) for task, fields in data.items()},
            "paths": {task: [f["path"], f["config"], f["revision"]] for task, f in data.items()},
            "heads": "class names" if self.heads is None else self._place(self.heads, "*").name(),
            "clip": self._place(self.clip).name(),
            "precision": "float16" if self._half else "float32",
        }

    def sources(self) -> dict[str, str]:
        """{repository: commit} of all that was taken from the hub so far."""
        loaded = [images for task, images in self._sets.items() if task in self._used]
        commits = {f"datasets/{images.path}": images.commit() for images in loaded}
        return dict(sorted((self._commits | {k: v for k, v in commits.items() if v}).items()))

    def requirements(
        self, tasks: Sequence[str], *, finetuning: Finetuning, inputs: bool, validation: bool
    ) -> list[Requirement]:
        """What is read from elsewhere; `inputs`: training images too, for statistics."""
        if self.clip is None:
            return []
        found = [self._place(self.clip).requirement("CLIP")]
        if self.base_tower is not None:
            found.append(self._place(self.base_tower).requirement("base"))
        for task in tasks:
            parts: list[Part] = ["test"] + ["validation"] * validation
            if (published := self._published(task, finetuning)) is not None:
                found.append(published.requirement(f"expert {task}"))
            if inputs or published is None:
                parts.append("train")
            if self.heads is not None:
                found.append(self._place(self.heads, task).requirement(f"head {task}"))
            found.append(self._sets[task].requirement(f"images {task}", parts))
        return found

    def footprint(self, tasks: Sequence[str], images: int, inputs: bool) -> dict[str, int]:
        """Bytes that a run takes: `disk` for decoded images, converted towers and second moments,
        `memory` for the base, a merge, the model, one expert at a time and the text tower."""
        shapes = models.build_meta(self.architecture)
        tower = 4 * sum(t.numel() for t in shapes.values())
        pixels = 3 * math.prod(image_size(self._preprocessing))
        layers = [n for n, t in shapes.items() if t.ndim == 2 and n.startswith("transformer.")]
        moments = sum(4 * shapes[name].shape[-1] ** 2 for name in layers) if inputs else 0
        disk = images * pixels + (len(tasks) + 1) * tower + len(tasks) * moments
        return {"disk": disk, "memory": 5 * tower + (1 << 30)}

    def expert(self, task: str, *, finetuning: Finetuning, seed: int) -> Path:
        """`model.safetensors` with the tower's state dict, or a PEFT adapter folder."""
        if published := self._published(task, finetuning):
            self._fetch(published)
            return models.tower_checkpoint(published, self.architecture, self._base_path)
        return super().expert(task, finetuning=finetuning, seed=seed)

    def evaluate(
        self,
        state: Mapping[str, Tensor],
        split: Split,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Score]:
        """Accuracy per task on the whole split, or on `limit` images drawn from it."""
        chosen = {task: self._images(task) for task in tasks or self.tasks}
        heads = {task: self._head(task) for task in chosen}  # made from the base: before loading
        self._load(state)
        return {task: self._score(chosen[task], heads[task], split, limit) for task in chosen}

    def _score(self, images: ImageSet, head: Tensor, split: Split, limit: int | None) -> Score:
        data, labels = pixels(images, split, self._preprocessing, self.workers)
        chosen = sample(len(labels), limit)
        embedded = self._embed(data[part.numpy()] for part in chosen.split(BATCH))
        predicted = (embedded @ head.T).argmax(1)
        right = predicted == labels[chosen]
        constant = bool((predicted == predicted[0]).all())
        return Score(right.double().mean().item(), len(chosen), constant, bits(right))

    # --- data and heads -----------------------------------------------------------------------

    @cached_property
    def _sets(self) -> dict[str, ImageSet]:
        names = self.class_names or {}
        own = {task: {"classes": names[task]} for task in self.datasets if task in names}
        return {t: ImageSet(**fields | own.get(t, {})) for t, fields in self.datasets.items()}

    def _require(self, task: str) -> None:
        if task not in self._sets:
            raise InputError(
                f"suite {self.name!r} has no task {task!r}", hint=f"known: {', '.join(self.tasks)}"
            )

    def _images(self, task: str) -> ImageSet:
        """The data set of a task, which from now on is one that was used."""
        self._require(task)
        self._used.add(task)
        return self._sets[task]

    @cached_property
    def _used(self) -> set[str]:
        return set()

    @cached_property
    def _commits(self) -> dict[str, str]:
        """{repository: commit} of the checkpoints that came from the hub."""
        return {}

    def _fetch(self, published: Published) -> Path:
        """A published checkpoint on this machine, its commit noted."""
        path = published.path()
        if published.hub and (commit := hub.commit(path)):
            self._commits[published.hub] = commit
        return path

    @cached_property
    def _preprocessing(self) -> PreprocessCfg:
        return models.preprocessing(self.architecture)

    def _head(self, task: str) -> Tensor:
        """The unit vectors of a task's classes, (classes, d)."""
        if self.clip is None:
            return self._prototypes[task]
        if task not in self._text_heads:
            data, clip = self._images(task), self._fetch(self._place(self.clip))
            head = models.text_head(
                clip,
                self.architecture,
                data.names,
                data.templates,
                device=self.device,
                label=task,
            )
            if self.heads is not None:
                published = self._fetch(self._place(self.heads, task))
                head = models.published_head(published, head, task)
            self._text_heads[task] = head
        return self._text_heads[task]

    @cached_property
    def _text_heads(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _prototypes(self) -> dict[str, Tensor]:
        key = {"version": VERSION, "base": self._base_key, "shots": self.shots}
        key |= {"data": {task: data.identity() for task, data in self._sets.items()}}
        folder = cached("heads", key, self._write_prototypes)
        return load_file(folder / "heads.safetensors")

    def _write_prototypes(self, folder: Path) -> None:
        """Each class's mean embedding under the base, over `shots` training images of it."""
        self._load(self._base)
        heads = {}
        for task, data in self._sets.items():
            images, labels = pixels(data, "train", self._preprocessing, self.workers)
            members = [(labels == c).nonzero()[: self.shots, 0] for c in range(len(data.names))]
            means = [self._embed([images[m.numpy()]]).mean(0) for m in members]
            heads[task] = F.normalize(torch.stack(means), dim=-1)
        save_file(heads, folder / "heads.safetensors")

    # --- model ----------------------------------------------------------------------------------

    def _place(self, fields: Mapping[str, Any], task: str = "") -> Published:
        """A published checkpoint with the placeholders of its fields filled in."""
        names = models.published_names(self.model)
        names["task"] = (self.task_names or {}).get(task, task)

        def fill(value: str | Sequence[str] | None) -> str | list[str] | None:
            if isinstance(value, str) or value is None:
                return value.format(**names) if value else value
            return [item.format(**names) for item in value]

        return Published(**{key: fill(value) for key, value in fields.items()})

    def _published(self, task: str, finetuning: Finetuning) -> Published | None:
        """Where the expert of a task is published; None where it is trained here."""
        self._require(task)
        fields = self.experts if finetuning == "full" else self.adapters
        if fields is None and self.experts is not None:
            raise InputError(
                f"the {self.family} family publishes no LoRA experts",
                hint="fine-tune them here: suite/checkpoints=finetuned",
            )
        return self._place(fields, task) if fields is not None else None

    @cached_property
    def _pretraining(self) -> Pretraining:
        return Pretraining(**self.pretraining)

    @cached_property
    def _base_key(self) -> dict[str, Any]:
        """What determines the base; costs no training and no download."""
        if self.clip is None:
            return self._pretraining.key(self.model, self._sets)
        return self._place(self.base_tower or self.clip).stamp()

    @cached_property
    def _base_path(self) -> Path:
        if self.clip is None:
            return self._pretraining.tower(self.model, self._sets, self.device)
        published = self._place(self.base_tower or self.clip)
        self._fetch(published)
        return models.tower_checkpoint(published, self.architecture)

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        return load_file(self._base_path)

    @cached_property
    def _tower(self) -> nn.Module:
        """A working copy whose weights are whatever was loaded last."""
        tower = models.build(self.architecture).visual
        return tower.eval().requires_grad_(False).to(self.device)

    def _load(self, state: Mapping[str, Tensor]) -> None:
        require_same(state, self._base, self.name)
        self._tower.load_state_dict({name: state[name] for name in self._base})

    @torch.inference_mode()
    def _embed(self, batches: Iterable[np.ndarray]) -> Tensor:
        """(n, d) unit embeddings of preprocessed images."""
        kind = torch.device(self.device).type
        found = []
        with torch.autocast(kind, torch.float16, enabled=self._half):
            for images in batches:
                x = normalise(images, self._preprocessing, self.device)
                found.append(F.normalize(self._tower(x).float(), dim=-1).cpu())
        return torch.cat(found)

    @property
    def _half(self) -> bool:
        """Whether towers are evaluated in half precision: on a GPU, but not as the paper did."""
        return torch.device(self.device).type == "cuda" and self.protocol != "paper"

    # --- experts and statistics -----------------------------------------------------------------

    def _recipe(self, finetuning: Finetuning) -> Recipe:
        if self.protocol == "paper" and f"paper_{finetuning}" in self.recipes:
            return Recipe(**self.recipes[f"paper_{finetuning}"])
        if finetuning not in self.recipes:
            raise InputError(
                f"suite {self.name!r} has no recipe for finetuning {finetuning!r}",
                hint=f"known: {', '.join(self.recipes)}",
            )
        return Recipe(**self.recipes[finetuning])

    def _expert_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        key = {"version": VERSION, "model": self.model, "base": self._base_key, "task": task}
        if published := self._published(task, finetuning):
            return key | {"published": published.stamp()}
        data = self._images(task)
        return key | {
            "data": data.identity(),
            "head": [data.names, list(data.templates), self.shots],
            "logit_scale": self.logit_scale,
            "finetuning": finetuning,
            "recipe": self._recipe(finetuning).key(),
            "seed": seed,
        }

    def _statistics_key(self, kind: Statistic) -> dict[str, Any]:
        return {"version": VERSION}

    def _available(self, task: str) -> int:
        return len(self._images(task).rows("train"))

    def training(
        self, tasks: Sequence[str], *, finetuning: Finetuning, seed: int
    ) -> training.Training:
        """The fine-tuning on one or several tasks, on a model of its own."""
        recipe = self._recipe(finetuning)
        heads = {task: self._head(task).to(self.device) for task in tasks}
        lengths = {t: recipe.length(t, len(self._images(t).rows("train"))) for t in tasks}
        turns = [task for task in tasks for _ in range(lengths[task])]
        random.Random(seed).shuffle(turns)
        model: nn.Module = models.build(self.architecture).visual
        model.load_state_dict(self._base)
        model.set_grad_checkpointing(recipe.checkpointing)
        names = None
        if finetuning == "lora":
            targets = models.lora_targets(model, recipe.targets)
            model = training.add_lora(model, targets, recipe.r, recipe.alpha, seed)
            if recipe.targets == "in_proj":
                models.freeze_all_but_packed(model)
        else:
            names = [name for name, _ in model.named_parameters()]

        def batches(first: int) -> Iterator[Batch]:
            done = Counter(turns[:first])
            streams = {t: self._training_batches(t, lengths[t], recipe, seed) for t in tasks}
            started = {task: stream(done[task]) for task, stream in streams.items()}
            for task in turns[first:]:
                yield task, *next(started[task])

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            task, images, labels = batch
            embedded = F.normalize(model(images.to(self.device)).float(), dim=-1)
            logits = self.logit_scale * embedded @ heads[task].T
            return F.cross_entropy(logits, labels.to(self.device))

        settings = {
            "steps": len(turns),
            "lr": recipe.lr,
            "warmup": min(0.5, recipe.warmup_steps / len(turns)),
            "weight_decay": recipe.weight_decay,
            "parameters": names,
            "seed": seed,
            "device": self.device,
            "precision": recipe.precision,
            "label": f"{', '.join(tasks)} ({finetuning}, seed {seed})",
        }
        return training.Training(model, batches, loss, None, settings)

    def _training_batches(
        self, task: str, steps: int, recipe: Recipe, seed: int
    ) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
        data = self._images(task)
        return training_batches(
            data.rows("train"),
            data.labels("train"),
            self._preprocessing,
            order=epochs(len(data.rows("train")), steps, recipe.batch_size, seed),
            batch_size=recipe.batch_size,
            crop_scale=tuple(recipe.crop_scale),
            seed=seed,
            workers=self.workers,
            column=data.image,
            path=data.path,
        )

    def _finetune(
        self, tasks: Sequence[str], finetuning: Finetuning, seed: int, folder: Path
    ) -> None:
        model, batches, loss, _, settings = self.training(tasks, finetuning=finetuning, seed=seed)
        training.train(model, batches, loss, output=folder, **settings)
        training.save_expert(model, self._base, folder)

    def _training_sample(self, task: str, count: int) -> tuple[Tensor, Tensor]:
        """(count, 3, size, size) training images without augmentation, the same for every
        expert, and their labels."""
        data = self._images(task)
        chosen = sample(len(data.rows("train")), count)
        images = cropped(data, "train", self._preprocessing, chosen)
        return normalise(images, self._preprocessing, self.device), data.labels("train")[chosen]

    def _moments(
        self, task: str, batches: int, batch_size: int, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Over all tokens of images without augmentation."""
        images, _ = self._training_sample(task, batches * batch_size)
        chosen = linear_layers(self._tower) if names is None else names
        return statistics.second_moments(self._tower, images.split(batch_size), chosen)

    def _fisher(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """Of every tower parameter, for labels drawn from the model's own distribution."""
        images, _ = self._training_sample(task, batches * batch_size)
        head = self._head(task).to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)

        def log_prob(model: nn.Module, image: Tensor) -> Tensor:
            logits = self.logit_scale * F.normalize(model(image[None])[0], dim=-1) @ head.T
            return statistics.sampled(logits, generator)

        names = [name for name, _ in self._tower.named_parameters()]
        return statistics.diagonal_fisher(self._tower, images, log_prob, names)

    def _kfac(self, task: str, batches: int, batch_size: int) -> dict[str, Tensor]:
        """Over all tokens of images without augmentation, for labels drawn from the model."""
        images, _ = self._training_sample(task, batches * batch_size)
        head = self._head(task).to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            logits = self.logit_scale * F.normalize(model(batch), dim=-1) @ head.T
            return kfac.drawn(logits, generator)

        layers = linear_layers(self._tower)
        return kfac.factors(self._tower, images.split(batch_size), layers, loss)

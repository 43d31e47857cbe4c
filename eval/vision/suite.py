"""Vision suites: a CLIP vision tower behind frozen heads, one head per image data set.

With published CLIP weights the heads are the text tower's embeddings of the class names; with a
tower pre-trained here they are the class means of the base's own embeddings. Either way
logits = scale * cos(image, class), and only the tower is fine-tuned and merged.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from eval import backend, kfac, statistics
from eval.backend import AdapterSeeds, Finetuning, Lessons, Score, Split, Trainable
from eval.cache import cached, digest
from eval.language.checkpoints import require_same
from eval.recipes import IMAGES, Recipe
from eval.requirements import Requirement
from eval.vision import models
from eval.vision.data import (
    ImageSet,
    Part,
    cropped,
    lesson_batches,
    normalise,
    pixels,
    sample,
)
from eval.vision.heads import prototypes, published_head, text_head
from eval.vision.pretrain import Pretraining
from eval.vision.published import Family, Published
from merging.errors import InputError
from merging.layers import Layer, linear_layers, paper_layers

Protocol = Literal["ours", "paper"]
Batch = tuple[str, Tensor, Tensor]  # task, images (batch, 3, size, size), labels (batch,)


@dataclass(frozen=True)
class VisionBackend(Trainable):
    """The fields are the keys of the suite's YAML file.

    model: open_clip's name of the architecture.
    datasets: {task: fields of `ImageSet`}. recipes: per fine-tuning the fields of
        `Recipe` that `settings` names.
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
    adapter_seeds: as `eval.language.text.TextBackend` has it.
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
    adapter_seeds: AdapterSeeds = "shared"
    workers: int = 0
    device: str = "cpu"
    metric: str = "accuracy"

    examples = "images"  # constants of the class, not fields
    version = 1
    settings = IMAGES

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.clip is None) == (self.pretraining is None):
            raise InputError(f"suite {self.name!r} needs either clip or pretraining")
        backend.require_protocol(self.protocol, get_args(Protocol))

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
        return linear_layers(self.network)

    @property
    def rest(self) -> Literal["average"] | None:
        """The rule for what is no layer, where the protocol has one for every method."""
        return "average" if self.protocol == "paper" else None

    def measured(self) -> dict[str, Layer]:
        """Those that run as modules: a ResNet's pool applies its four matrices itself."""
        own = linear_layers(self.network)
        return {name: kind for name, kind in own.items() if not name.startswith("attnpool.")}

    def moved(self) -> list[str]:
        return [name for name, _ in self.network.named_parameters()]

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
            "heads": head.name() if (head := self._published.head("*")) else "class names",
            "clip": self._clip.name(),
            "precision": "float16" if self._half else "float32",
        }

    def sources(self) -> dict[str, str]:
        """{repository: commit} of all that was taken from the hub so far."""
        loaded = [images for task, images in self._sets.items() if task in self._used]
        commits = {f"datasets/{images.path}": images.commit() for images in loaded}
        own = {path: commit for path, commit in commits.items() if commit}
        return dict(sorted((self._published.commits | own).items()))

    def requirements(
        self, tasks: Sequence[str], *, finetuning: Finetuning, inputs: bool, validation: bool
    ) -> list[Requirement]:
        """What is read from elsewhere; `inputs`: training images too, for statistics."""
        if self.clip is None:
            return []
        found = [self._clip.requirement("CLIP")]
        for task in tasks:
            parts: list[Part] = ["test"] + ["validation"] * validation
            if inputs or self._published.expert(task, finetuning) is None:
                parts.append("train")
            found += self._published.requirements(task, finetuning)
            found.append(self._sets[task].requirement(f"images {task}", parts))
        if self.base_tower is not None:
            found.insert(1, self._published.base.requirement("base"))
        return found

    def footprint(self, tasks: Sequence[str], images: int, inputs: bool) -> dict[str, int]:
        """`disk` for decoded images, converted towers and second moments, `memory` for the base, a
        merge, the model, one expert at a time and the text tower."""
        tower, pixels, moments = models.footprint(self.architecture)
        disk = images * pixels + (len(tasks) + 1) * tower + inputs * len(tasks) * moments
        return {"disk": disk, "memory": 5 * tower + (1 << 30)}

    def given_expert(self, task: str, finetuning: Finetuning) -> Path | None:
        if (place := self._published.expert(task, finetuning)) is None:
            return None
        self._published.fetch(place)
        return models.tower_checkpoint(place, self.architecture, self._base_path)

    def score(
        self, state: Mapping[str, Tensor], tasks: Sequence[str], split: Split, limit: int | None
    ) -> dict[str, Score]:
        """Accuracy per task on the whole split, or on `limit` images drawn from it."""
        chosen = {task: self._images(task) for task in tasks}
        heads = {task: self._head(task) for task in chosen}  # made from the base: before loading
        self.load(state)
        return {task: self._score(chosen[task], heads[task], split, limit) for task in chosen}

    def _score(self, images: ImageSet, head: Tensor, split: Split, limit: int | None) -> Score:
        data, labels = pixels(images, split, self._preprocessing, self.workers)
        chosen = sample(len(labels), limit)
        embedded = self._embed(data[part.numpy()] for part in chosen.split(64))
        predicted = (embedded @ head.T).argmax(1)
        right = predicted == labels[chosen]
        constant = bool((predicted == predicted[0]).all())
        return Score(right.double().mean().item(), len(chosen), constant, backend.bits(right))

    # --- data and heads -----------------------------------------------------------------------

    @cached_property
    def _sets(self) -> dict[str, ImageSet]:
        names = self.class_names or {}
        own = {task: {"classes": names[task]} for task in self.datasets if task in names}
        return {t: ImageSet(**fields | own.get(t, {})) for t, fields in self.datasets.items()}

    def _images(self, task: str) -> ImageSet:
        """The data set of a task, which from now on is one that was used."""
        self._used.add(task)
        return self._sets[task]

    @cached_property
    def _used(self) -> set[str]:
        return set()

    @cached_property
    def _preprocessing(self) -> PreprocessCfg:
        return models.preprocessing(self.architecture)

    def _head(self, task: str) -> Tensor:
        """The unit vectors of a task's classes, (classes, d)."""
        if self.clip is None:
            return self._prototypes[task]
        if task not in self._text_heads:
            data, clip = self._images(task), self._published.fetch(self._clip)
            words = data.names, data.templates
            head = text_head(clip, self.architecture, *words, device=self.device, label=task)
            if (place := self._published.head(task)) is not None:
                head = published_head(self._published.fetch(place), head, task)
            self._text_heads[task] = head
        return self._text_heads[task]

    @cached_property
    def _text_heads(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _prototypes(self) -> dict[str, Tensor]:
        key = {"version": self.version, "base": self.base_key, "shots": self.shots}
        key |= {"data": {task: data.identity() for task, data in self._sets.items()}}
        return load_file(cached("heads", key, self._write_prototypes) / "heads.safetensors")

    def _write_prototypes(self, folder: Path) -> None:
        self.load(self._base)
        heads = {}
        for task, data in self._sets.items():
            images, labels = pixels(data, "train", self._preprocessing, self.workers)
            heads[task] = prototypes(self._embed, images, labels, len(data.names), self.shots)
        save_file(heads, folder / "heads.safetensors")

    # --- model ----------------------------------------------------------------------------------

    @cached_property
    def _published(self) -> Family:
        names = ("model", "clip", "base_tower", "experts", "adapters", "heads")
        places = {name: getattr(self, name) for name in names}
        return Family(self.family, **places, task_names=self.task_names or {})

    @property
    def _clip(self) -> Published:
        return self._published.place(self.clip)

    @cached_property
    def base_key(self) -> dict[str, Any]:
        """What determines the base; costs no training and no download."""
        if self.clip is None:
            return Pretraining(**self.pretraining).key(self.model, self._sets)
        return self._published.base.stamp()

    @cached_property
    def _base_path(self) -> Path:
        if self.clip is None:
            return Pretraining(**self.pretraining).tower(self.model, self._sets, self.device)
        self._published.fetch(self._published.base)
        return models.tower_checkpoint(self._published.base, self.architecture)

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        return load_file(self._base_path)

    @cached_property
    def network(self) -> nn.Module:
        """A working copy whose weights are whatever was loaded last."""
        return self._tower().eval().requires_grad_(False).to(self.device)

    def _tower(self) -> nn.Module:
        tower: nn.Module = models.build(self.architecture).visual
        return tower if self.pretraining is None else models.constant_norms(tower)

    def load(self, state: Mapping[str, Tensor]) -> None:
        require_same(state, self._base, self.name)
        self.network.load_state_dict({name: state[name] for name in self._base})

    @torch.inference_mode()
    def _embed(self, batches: Iterable[np.ndarray]) -> Tensor:
        """(n, d) unit embeddings of preprocessed images."""
        kind, found = torch.device(self.device).type, []
        with torch.autocast(kind, torch.float16, enabled=self._half):
            for images in batches:
                x = normalise(images, self._preprocessing, self.device)
                found.append(F.normalize(self.network(x).float(), dim=-1).cpu())
        return torch.cat(found)

    @property
    def _half(self) -> bool:
        """Whether towers are evaluated in half precision: on a GPU, but not as the paper did."""
        return torch.device(self.device).type == "cuda" and self.protocol != "paper"

    # --- experts and statistics -----------------------------------------------------------------

    def recipe(self, finetuning: str) -> Recipe:
        paper = f"paper_{finetuning}"
        own = self.protocol == "paper" and paper in self.recipes
        return super().recipe(paper if own else finetuning)

    def task_key(self, task: str, finetuning: Finetuning, seed: int) -> dict[str, Any]:
        data = self._images(task)
        return {
            "model": self.model,
            "data": data.identity(),
            "head": [data.names, list(data.templates), self.shots],
            "logit_scale": self.logit_scale,
        }

    def given_key(self, task: str, finetuning: Finetuning) -> dict[str, Any] | None:
        if (place := self._published.expert(task, finetuning)) is None:
            return None
        key = {"version": self.version, "model": self.model, "base": self.base_key, "task": task}
        return key | {"published": place.stamp()}

    def identity_key(self, finetuning: Finetuning) -> dict[str, Any]:
        return {"model": self.model}

    def available(self, task: str) -> int:
        return len(self._images(task).rows("train"))

    def learner(
        self, tasks: Sequence[str], finetuning: Finetuning, recipe: Recipe, seed: int
    ) -> nn.Module:
        tower = self._tower()
        tower.load_state_dict(self._base)
        tower.set_grad_checkpointing(recipe.checkpointing)
        if finetuning == "full":
            return tower
        return models.adapted(tower, recipe, self.adapter_seed(tasks, seed))

    def lessons(self, tasks: Sequence[str], recipe: Recipe, seed: int) -> Lessons:
        heads = {task: self._head(task).to(self.device) for task in tasks}
        lengths = {t: recipe.length(t, self.available(t)) for t in tasks}
        turns = [task for task in tasks for _ in range(lengths[task])]
        random.Random(seed).shuffle(turns)

        def batches(first: int) -> Iterator[Batch]:
            done = Counter(turns[:first])
            streams = {
                t: lesson_batches(
                    self._images(t), self._preprocessing, lengths[t], recipe, seed, self.workers
                )
                for t in tasks
            }
            started = {task: stream(done[task]) for task, stream in streams.items()}
            for task in turns[first:]:
                yield task, *next(started[task])

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            task, images, labels = batch
            embedded = F.normalize(model(images.to(self.device)).float(), dim=-1)
            logits = self.logit_scale * embedded @ heads[task].T
            return F.cross_entropy(logits, labels.to(self.device))

        return Lessons(len(turns), batches, loss)

    def sample(self, task: str, count: int, batch_size: int) -> Sequence[Tensor]:
        """(batch, 3, size, size) images without augmentation."""
        data = self._images(task)
        images = cropped(data, "train", self._preprocessing, sample(self.available(task), count))
        return normalise(images, self._preprocessing, self.device).split(batch_size)

    def log_prob(
        self, model: nn.Module, task: str, example: Tensor, generator: torch.Generator
    ) -> Tensor:
        head = self._head(task).to(self.device)
        logits = self.logit_scale * F.normalize(model(example)[0], dim=-1) @ head.T
        return statistics.sampled(logits, generator)

    def kfac_loss(
        self, model: nn.Module, task: str, batch: Tensor, generator: torch.Generator
    ) -> Tensor:
        head = self._head(task).to(self.device)
        logits = self.logit_scale * F.normalize(model(batch), dim=-1) @ head.T
        return kfac.drawn(logits, generator)

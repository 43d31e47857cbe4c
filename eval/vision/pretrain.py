"""Pre-training a small vision tower here, on the images of a suite's own tasks.

The tower learns to tell the classes of all tasks apart in one softmax over unit vectors, as CLIP
tells captions apart; the vectors are thrown away. Some classes of each task stay unseen, which
is what fine-tuning can improve on, and no validation or test image takes part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from eval.cache import cached
from eval.training import train
from eval.vision import models
from eval.vision.data import ImageSet, training_batches

# Goes into the cache key: raise it when the code below would give another tower.
VERSION = 1


@dataclass(frozen=True)
class Pretraining:
    """How the base is made: AdamW, cosine schedule.

    seen: of each task's classes every how-many-th takes part (2: every second, 1: all).
    crop_scale: area of the random crops. The seed also sets the initial weights.
    """

    steps: int
    lr: float = 1e-3
    batch_size: int = 128
    warmup: float = 0.05
    weight_decay: float = 0.05
    crop_scale: tuple[float, float] = (0.6, 1.0)
    seen: int = 2
    seed: int = 0

    def key(self, model: str, sets: Mapping[str, ImageSet]) -> dict[str, Any]:
        """What determines the tower."""
        data = {task: images.identity() for task, images in sets.items()}
        return {"version": VERSION, "model": model, "recipe": asdict(self), "data": data}

    def tower(self, model: str, sets: Mapping[str, ImageSet], device: str) -> Path:
        """`model.safetensors` of the pre-trained tower; trained when it is not in the cache."""
        build = partial(self._build, model, sets, device)
        return cached("bases", self.key(model, sets), build, resumable=True) / "model.safetensors"

    def _build(self, model: str, sets: Mapping[str, ImageSet], device: str, folder: Path) -> None:
        tower = models.build(model, self.seed).visual
        rows, labels, weights = _mixture(sets, self.seen)
        learner = _Learner(tower, int(labels.max()) + 1)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.multinomial(
            weights, self.steps * self.batch_size, replacement=True, generator=generator
        )
        batches = training_batches(
            rows,
            labels,
            models.preprocessing(model),
            order=order,
            batch_size=self.batch_size,
            crop_scale=tuple(self.crop_scale),
            seed=self.seed,
        )
        train(
            learner,
            batches,
            lambda learner, batch: learner(*(x.to(device) for x in batch)),
            steps=self.steps,
            lr=self.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            output=folder,
            seed=self.seed,
            device=device,
            label="pre-training the base",
        )
        constant = models.constant_norms(tower)
        state = {name: t.cpu().contiguous() for name, t in constant.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


class _Learner(nn.Module):
    """A tower with one unit vector per class and a learned temperature."""

    def __init__(self, tower: nn.Module, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tower = tower
        self.vectors = nn.Parameter(torch.randn(classes, tower.output_dim, generator=generator))
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the labels (batch,)."""
        cosines = F.normalize(self.tower(images), dim=-1) @ F.normalize(self.vectors, dim=-1).mT
        return F.cross_entropy(self.log_scale.exp().clamp(max=100) * cosines, labels)


def _mixture(sets: Mapping[str, ImageSet], every: int) -> tuple[datasets.Dataset, Tensor, Tensor]:
    """Rows of the seen classes of all tasks, labels counted through, and sampling weights.

    A task is drawn in proportion to the square root of its size.
    """
    rows, labels, weights, offset = [], [], [], 0
    for data in sets.values():
        own = data.labels("train")
        seen = (own % every == 0).nonzero().flatten()
        rows.append(data.rows("train").select(seen.tolist()).select_columns([data.image]))
        labels.append(own[seen] // every + offset)
        weights.append(torch.full((len(seen),), len(seen) ** -0.5))
        offset += -(-len(data.names) // every)
    return datasets.concatenate_datasets(rows), torch.cat(labels), torch.cat(weights)

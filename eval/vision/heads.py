"""Frozen heads, one unit vector a class: embeddings of class names, published ones, class means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from eval.cache import cached
from eval.vision.models import VERSION, build
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.progress import track

CLASSES = 10  # whose prompts go through the text tower together


def prototypes(
    embed: Callable[[Iterable[np.ndarray]], Tensor],
    images: np.ndarray,
    labels: Tensor,
    classes: int,
    shots: int | None,
) -> Tensor:
    """(classes, d): each class's mean embedding over `shots` images of it (None: all).

    embed: batches of preprocessed images -> (n, d) unit vectors. labels: (n,).
    """
    members = [(labels == c).nonzero()[:shots, 0] for c in range(classes)]
    means = [embed([images[m.numpy()]]).mean(0) for m in members]
    return F.normalize(torch.stack(means), dim=-1)


def text_head(
    clip: Path,
    name: str,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    device: str = "cpu",
    label: str = "a task",
) -> Tensor:
    """(classes, d) unit embeddings of the class names by CLIP's zero-shot protocol, cached.

    clip: a checkpoint of the whole model in open_clip's layout. Each class is the normalised
    mean over `templates` of the text tower's normalised embeddings.

    Source: Radford et al., arXiv 2103.00020, section 3.1.4.
    """
    source = open_checkpoint(clip)
    key = {
        "version": VERSION,
        "model": name,
        "clip": [[Path(file).name, size] for file, size, _ in source.stamp()],
        "classes": list(classes),
        "templates": list(templates),
    }

    def write(folder: Path) -> None:
        model = build(name)
        absent = [k for k in model.state_dict() if k not in source]
        if absent:
            raise InputError(
                f"{clip} is no whole {name}: {absent[0]!r} is missing",
                hint="the heads need the text tower as well",
            )
        model.load_state_dict({k: source.read(k) for k in model.state_dict()})
        model.to(device).eval()
        tokenizer = open_clip.get_tokenizer(name.removesuffix("-quickgelu"))
        chunks = [list(classes[i : i + CLASSES]) for i in range(0, len(classes), CLASSES)]
        parts = []
        with torch.inference_mode():
            for chunk in track(chunks, f"building the head of {label}"):
                part = open_clip.build_zero_shot_classifier(
                    model, tokenizer, chunk, list(templates), device=device
                )
                parts.append(part.mT.cpu())
        save_file({"head": torch.cat(parts).contiguous()}, folder / "head.safetensors")

    return load_file(cached("heads", key, write) / "head.safetensors")["head"]


def published_head(path: Path, built: Tensor, task: str) -> Tensor:
    """(classes, d) unit vectors of a head that a family publishes, in the order of `built`.

    path: a ClassificationHead of the task-vector authors, `weight` (classes, d). Its rows are in
        the order of its authors' data set, which need not be ours; rows go to classes so that they
        are as near as may be to the embeddings of their names.
    built: (classes, d) unit embeddings of the class names.
    """
    source = open_checkpoint(path)
    if "weight" not in source.keys() or source.shape("weight") != tuple(built.shape):
        found = tuple(source.shape("weight")) if "weight" in source.keys() else "no weight"
        raise InputError(f"{path} is no head of {task}: {found}, expected {tuple(built.shape)}")
    rows = F.normalize(source.read("weight").float(), dim=-1)
    nearness = (built @ rows.T).numpy()
    order = torch.from_numpy(linear_sum_assignment(nearness, maximize=True)[1])
    if (built * rows[order]).sum(-1).median() < 0.9:
        raise InputError(
            f"{path} belongs to other classes than those of {task}: its rows are far from the "
            "embeddings of their names",
            hint="give the family's names under suite.class_names, or suite.heads=null",
        )
    return rows[order]

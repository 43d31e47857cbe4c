"""CLIP vision towers for `experiments.bench`: from files to embeddings of the merged model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import merging
from eval.vision import models
from experiments.bench.files import tensors
from merging.formats.checkpoints import open_checkpoint


def towers(folder: Path, model: str, experts: int) -> tuple[Path, dict[str, Path]]:
    """Base and experts at the model's shapes, drawn at random, as single float16 files."""
    shapes = {name: tuple(t.shape) for name, t in models.build_meta(model).items()}
    paths = [folder / f"{model}-{t}.safetensors" for t in range(experts + 1)]
    for t, path in enumerate(paths):
        save_file(tensors(shapes, t, torch.float16), path)
    return paths[0], {path.stem: path for path in paths[1:]}


def round_trip(
    model: str, base: Path, experts: Mapping[str, Path], method: str, output: Path, images: int
) -> dict[str, Any]:
    """Merge the files, load what was written as every suite does, embed random images.

    `tensors` counts those of the tower, every one of which the merge gave a rule and the written
    file holds; `layers` those that the method itself merged.
    """
    report = merging.merge_checkpoints(
        base, experts, merging.create(method), output, layers=_tower(model)
    )
    start = time.perf_counter()
    state = models.tower_state(open_checkpoint(output), model)  # refuses any gap
    tower = _tower(model).eval()
    tower.load_state_dict(state, assign=True)
    loaded = time.perf_counter()
    size = models.preprocessing(model).size
    with torch.inference_mode():
        embedded = tower(torch.randn(images, 3, size, size))
    done = time.perf_counter()
    if set(report.rules) != set(state) or not embedded.isfinite().all():
        raise RuntimeError(f"the merged {model} is not whole")
    return {
        "tensors": len(state),
        "layers": sum(rule.startswith(method) for rule in report.rules.values()),
        "seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
        "bytes_read": report.bytes_read,
        "load_seconds": loaded - start,
        "embed_seconds": done - loaded,
    }


def _tower(model: str) -> nn.Module:
    with torch.device("meta"):
        return models.build(model).visual

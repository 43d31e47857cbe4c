"""Second moments of models too large to hold them all: a few layers at a time, halves only.

A 7B decoder's second moments are 28 GB in float32. The model runs over the same batches once per
group of layers whose running sums fit the memory allowed; each finished group goes to disk as
upper triangles, and an interrupted collection continues with the next group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from eval.statistics import Forward, Mask, second_moments
from merging.errors import InputError
from merging.formats.writer import Writer
from merging.layers import Layer
from merging.progress import track
from merging.triangles import pack


class Cost(NamedTuple):
    """What a collection took: bytes on disk, wall-clock seconds, passes over the batches."""

    bytes: int
    seconds: float
    passes: int


def collect(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    layers: Mapping[str, Layer],
    output: Path,
    *,
    about: Mapping[str, Any],
    memory: int = 4 << 30,
    forward: Forward | None = None,
    mask: Mask | None = None,
) -> Cost:
    """Write the packed second moments of all layers to a safetensors file.

    batches: starts the same sequence of batches anew for each pass.
    about: what the file says it is about, see `eval.statistics.about`; also what an interrupted
        collection must share with this one to be continued.
    memory: bytes that running sums (float64) may take; at least one layer is measured per pass.
    Other arguments as in `second_moments`. The file is atomic: it appears when it is whole.
    """
    start = time.perf_counter()
    widths = {name: _width(model, name, layer) for name, layer in layers.items()}
    shapes = {name: ((d * (d + 1) // 2,), torch.float32) for name, d in widths.items()}
    told = json.dumps(dict(about), sort_keys=True)
    passes = 0
    with Writer(output, shapes, key=told, metadata={"about": told}) as writer:
        groups = list(_groups({n: d for n, d in widths.items() if n not in writer.done}, memory))
        for group in track(groups, "second moments, groups of layers"):
            passes += 1
            moments = second_moments(model, batches(), group, forward=forward, mask=mask)
            for name in group:
                writer.write(name, pack(moments[name]))
        writer.finish()
    return Cost(output.stat().st_size, time.perf_counter() - start, passes)


def _width(model: nn.Module, name: str, layer: Layer) -> int:
    if layer.experts:
        raise InputError(
            f"{name!r} holds {layer.experts} experts, whose second moments are not streamed",
            hint="choose a method that needs no statistics",
        )
    return model.get_parameter(name).flatten(1).shape[0 if layer.transposed else 1]


def _groups(widths: Mapping[str, int], memory: int) -> Iterator[list[str]]:
    """Consecutive layers whose float64 sums fit `memory`, counted as if none shared its input."""
    group, used = [], 0
    for name, d in widths.items():
        if group and used + 8 * d * d > memory:
            yield group
            group, used = [], 0
        group.append(name)
        used += 8 * d * d
    if group:
        yield group

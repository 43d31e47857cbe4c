"""RegMean++: block after block, second moments measured through the part that is merged already.

RegMean measures a layer's inputs through each task's own expert. In the merged model the layer
receives something else: what the merged blocks below it pass on (arXiv 2508.03121, section 4).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

import merging
from merging.layers import Layer
from merging.progress import track

_NUMBER = re.compile(r"((?:.*?\.)?)(\d+)\.")  # of a block: what precedes it, and the number


class Sequential(Protocol):
    """What a suite offers for it."""

    def layers(self) -> dict[str, Layer]: ...

    def second_moments(
        self,
        task: str,
        state: Mapping[str, Tensor],
        names: Iterable[str],
        *,
        batches: int,
        batch_size: int,
    ) -> dict[str, Tensor]:
        """{weight name: (d_in, d_in)} of some layers' inputs, through a model with this state."""
        ...


def merge_blocks(
    suite: Sequential,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    method: merging.Method,
    *,
    batches: int,
    batch_size: int,
    device: str = "cpu",
    report: merging.Report | None = None,
) -> tuple[dict[str, Tensor], float]:
    """The merged state dict, and the seconds that measuring took.

    experts: task -> dense state dict. A block's second moments of task t are measured with the
    merged blocks below it and the expert t's own block and all above.
    """
    layers, merged, seconds = suite.layers(), {}, 0.0
    for names in track(blocks(base, layers), "merging block by block"):
        own = {name: layers[name] for name in names if name in layers}
        start = time.perf_counter()
        statistics = {
            task: suite.second_moments(
                task, {**state, **merged}, own, batches=batches, batch_size=batch_size
            )
            if own
            else {}
            for task, state in experts.items()
        }
        seconds += time.perf_counter() - start
        merged |= merging.merge_state_dicts(
            {name: base[name] for name in names},
            {task: {name: state[name] for name in names} for task, state in experts.items()},
            method,
            layers=own,
            statistics=statistics,
            device=device,
            report=report,
        )
    return {name: merged[name] for name in base}, seconds


def blocks(names: Iterable[str], layers: Iterable[str] = ()) -> list[list[str]]:
    """Tensor names grouped in the order a forward pass needs them, whatever order they come in.

    A block is what shares the name up to its first number (`encoder.layer.3`). Blocks come by
    their numbers, stacks of blocks by the place of their first layer.
    layers: names of the linear layers as the model holds its modules, which is the order it runs
        them in. What has no number comes first (embeddings, norms: they ask for no inputs), but
        for layers behind the first block (a pooler), which come last.
    """
    place = {name: i for i, name in enumerate(layers)}
    start = min((i for name, i in place.items() if _NUMBER.match(name)), default=len(place))
    groups: dict[tuple[float, int], list[str]] = {}
    stacks: dict[str, float] = {}
    for name, i in place.items():
        if match := _NUMBER.match(name):
            stacks.setdefault(match[1], i)
    for name in names:
        if match := _NUMBER.match(name):
            rank = stacks.setdefault(match[1], len(place) + len(stacks))
            key = (rank, int(match[2]))
        else:
            key = (math.inf, 0) if place.get(name, -1) > start else (-1, 0)
        groups.setdefault(key, []).append(name)
    return [groups[key] for key in sorted(groups)]

"""RegMean++: block after block, second moments measured through the part that is merged already.

RegMean measures a layer's inputs through each task's own expert. In the merged model the layer
receives something else: what the merged blocks below it pass on (arXiv 2508.03121, section 4).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

import merging
from merging.layers import Layer
from merging.progress import track


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
    for names in track(blocks(base), "merging block by block"):
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


def blocks(names: Iterable[str]) -> list[list[str]]:
    """Tensor names grouped in the order a forward pass needs them.

    A block is what shares the name up to its first number (`encoder.layer.3`); what has no
    number (embeddings, final norms) comes first, as it depends on no block's inputs.
    """
    groups: dict[str, list[str]] = {"": []}
    for name in names:
        match = re.match(r"(.*?\.)?\d+(?=\.)", name)
        groups.setdefault(match.group() if match else "", []).append(name)
    return [group for group in groups.values() if group]

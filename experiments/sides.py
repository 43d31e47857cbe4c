"""Both sides of a layer: what its differences, or an adapter's factors, know of either."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from eval import spectra, theory
from merging.layers import Layer, of_outputs
from merging.method.registry import OUTPUTS


def compare(
    stream: Iterable[tuple[str, str, Tensor]],
    inputs: Mapping[str, Tensor],
    both: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    share: float,
) -> Iterator[dict[str, Any]]:
    """D^T D beside the inputs' measured moment, D D^T beside that of the output gradients, and the
    identity beside either: layer, side, and what `near` finds.

    stream: (weight name, part's name, (1, d_out, d_in)) of one task, as `blocks` yields them.
    inputs, both: its statistics of kind covariance, and of kind kfac.
    """
    for name, part, (D,) in stream:
        at = theory.part_names(name, layers[name]).index(part)
        G = of_outputs(both[name + OUTPUTS], layers[name], at)
        for side, moment, estimate in (
            ("inputs", inputs[name], D.mT @ D),
            ("outputs", G, D @ D.mT),
        ):
            identity = torch.eye(len(moment))
            for row in near(moment, share, delta=estimate, identity=identity):
                yield {"layer": part, "side": side} | row


def near(C: Tensor, share: float, **found: Tensor) -> Iterator[dict[str, Any]]:
    """How near estimates of C, by name, come to it."""
    k = math.ceil(share * len(C))
    leading = theory.leading_directions(C, k)
    for name, estimate in found.items():
        if name in {"identity", "random"}:
            overlap = k / len(C)  # in the mean over random subspaces
        else:
            own = theory.leading_directions(estimate, k)
            overlap = theory.subspace_overlap(own, leading)
        yield {"estimate": name, "cosine": theory.cosine(estimate, C), "overlap": overlap}


def adapters(experts: Mapping[str, Any], layers: Mapping[str, Layer]) -> pd.DataFrame:
    """Columns task, layer, side, randomness, overlap, chance of adapters' factors, A on the inputs'
    side and B on the outputs': `eval.spectra.randomness`, the mean overlap of its space with those
    of the other tasks, and what two random spaces of these ranks would have. Empty of dense ones.
    """
    rows = []
    for name in layers if all(expert.is_adapter for expert in experts.values()) else ():
        factors = {task: expert.factors(name) for task, expert in experts.items()}
        for side, of in (("inputs", lambda f: f.A.mT), ("outputs", lambda f: f.B)):
            spaces = {task: torch.linalg.qr(of(f).double())[0] for task, f in factors.items()}
            for task, own in spaces.items():
                others = [theory.subspace_overlap(own, x) for t, x in spaces.items() if t != task]
                rows.append(
                    {
                        "task": task,
                        "layer": name,
                        "side": side,
                        "randomness": spectra.randomness(of(factors[task])),
                        "overlap": fmean(others) if others else math.nan,
                        "chance": own.shape[1] / len(own),
                    }
                )
    return pd.DataFrame(rows)

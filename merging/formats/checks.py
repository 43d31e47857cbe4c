"""What keeps checkpoints from being merged, told before any work and tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from merging.errors import InputError
from merging.experts import Expert, Source


def problems(
    base: Source, experts: Mapping[str, Expert], *, common_rows: bool = False
) -> list[str]:
    """Everything that keeps the experts from being merged into the base, one sentence each.

    experts: as `fit` tells them in the base's names.
    Read from headers only: missing and additional tensors, shapes (vocabulary sizes among them),
    kinds of dtype, adapter targets, adapters of different bases. A tensor that one side saved
    and the other dropped as a tied copy is no problem, nor, with `common_rows`, are embeddings
    of different vocabularies. Empty means mergeable.
    """
    faults = []
    for task, expert in experts.items():
        sentences = expert.problems(base, common_rows)
        faults += [f"expert {task!r} ({expert.path}): {problem}" for problem in sentences]
    names = {task: expert.base_name for task, expert in experts.items() if expert.hub_base}
    hubs = {task: name for task, name in names.items() if name}
    if len({model_name(name) for name in hubs.values()}) > 1:
        trained = ", ".join(f"{task!r} on {name}" for task, name in hubs.items())
        faults.append(
            f"the adapters were trained on different bases: {trained} (if they are one model, name "
            "it alike in their adapter_config.json)"
        )
    return faults


def check_apart(output: str | Path, inputs: Mapping[str, str | Path]) -> None:
    """InputError for an output whose place is an input's: to write it would replace that.

    inputs: {what it is: where it lies}.
    """
    place = Path(output).resolve()
    for label, path in inputs.items():
        source = Path(path).resolve()
        inside = source in place.parents and place.is_file()
        if inside or place in (source, *source.parents):
            raise InputError(
                f"the output {output} is, holds or is a file of {label} ({path}), which it would "
                "replace",
                hint="write it elsewhere",
            )


def model_name(name: str) -> str:
    """What a hub name says of the model: mirrors differ in their owner and in how they store it."""
    short = re.sub(
        r"(-unsloth)?(-bnb-4bit|-4bit|-bf16|-fp16|-hf)$", "", name.rpartition("/")[2].lower()
    )
    return short.removeprefix("meta-")


DAMAGED = "the checkpoint is damaged or its training diverged"


class NotFinite(InputError):
    """A tensor has a value that is NaN or infinite."""


def check_finite(
    tensor: Tensor,
    name: str,
    path: str,
    hint: str = DAMAGED,
) -> None:
    """Raise NotFinite if any value is NaN or infinite, naming the first one's position."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    low, high = values.aminmax()  # one pass, and NaN propagates
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = (~torch.isfinite(values)).nonzero()
    raise NotFinite(
        f"{path}: tensor {name!r} has {len(bad)} values that are not finite, "
        f"the first at {bad[0].tolist()}",
        hint,
    )


def not_finite(source: Source | Expert, label: str) -> list[str]:
    """A sentence for each tensor with values that are not finite; reads every tensor."""
    sentences = []
    for name, tensor in source.stored():
        try:
            check_finite(tensor, name, f"{label} ({source.path})")
        except NotFinite as error:
            sentences.append(error.message)
    return sentences

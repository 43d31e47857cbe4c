"""What keeps checkpoints from being merged, told before any work and tensor by tensor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from merging.errors import InputError
from merging.formats.checkpoints import Source
from merging.formats.peft import Adapter


def problems(
    base: Source, experts: Mapping[str, Source | Adapter], *, common_rows: bool = False
) -> list[str]:
    """Everything that keeps the experts from being merged into the base, one sentence each.

    Read from headers only: missing and additional tensors, shapes (vocabulary sizes among them),
    kinds of dtype, adapter targets, adapters of different bases. A tensor that one side saved
    and the other dropped as a tied copy is no problem, nor, with `common_rows`, are embeddings
    and heads of different vocabularies. Empty means mergeable.
    """
    found = []
    for task, expert in experts.items():
        check = check_adapter if isinstance(expert, Adapter) else _check_dense
        told = check(expert, base, common_rows)
        found += [f"expert {task!r} ({expert.path}): {problem}" for problem in told]
    hubs = {t: e.base_name for t, e in experts.items() if isinstance(e, Adapter) and e.hub_base}
    if len(set(hubs.values())) > 1:
        trained = ", ".join(f"{task!r} on {name}" for task, name in hubs.items())
        found.append(f"the adapters were trained on different bases: {trained}")
    return found


def _check_dense(expert: Source, base: Source, common_rows: bool) -> list[str]:
    ours, theirs = dict.fromkeys(base.keys()), dict.fromkeys(expert.keys())
    known = {expert.tied.get(name, name) for name in theirs if name in ours}
    found = [
        f"tensor {name!r} of {base.path} is missing"
        for name in ours
        if name not in theirs and base.tied.get(name) not in theirs
    ]
    for name in theirs:
        if name not in ours:
            if expert.tied.get(name, name) not in known:
                found.append(f"tensor {name!r} is not in {base.path}")
            continue
        found += _compare(name, expert.shape(name), base, common_rows)
        if expert.dtype(name).is_floating_point != base.dtype(name).is_floating_point:
            found.append(f"tensor {name!r} is {expert.dtype(name)}, the base's {base.dtype(name)}")
    return found


def check_adapter(adapter: Adapter, base: Source, common_rows: bool = False) -> list[str]:
    """What keeps an adapter from being applied to `base`: absent targets and other shapes."""
    shapes = {n: adapter.shape(n)[:: -1 if adapter.transposed else 1] for n in adapter.keys()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.dense.items()}
    found, ours = [], set(base.keys())
    for name, shape in shapes.items():
        if name in ours:
            found += _compare(name, shape, base, common_rows)
        else:
            found.append(f"the target {name!r} is not in {base.path}")
    return found


def _compare(name: str, shape: tuple[int, ...], base: Source, common_rows: bool) -> list[str]:
    expected = base.shape(name)
    if shape == expected:
        return []
    rows_only = 0 < len(shape) == len(expected) and shape[1:] == expected[1:]
    if rows_only and any(word in name for word in ("embed", "head", "wte", "shared")):
        if common_rows:
            return []
        return [f"tensor {name!r} has a vocabulary of {shape[0]}, the base's has {expected[0]}"]
    return [f"tensor {name!r} has shape {list(shape)}, the base's has {list(expected)}"]


class NotFinite(InputError):
    """A tensor has a value that is NaN or infinite."""


def check_finite(
    tensor: Tensor,
    name: str,
    path: str,
    hint: str = "the checkpoint is damaged or its training diverged",
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


def not_finite(source: Source | Adapter, label: str) -> list[str]:
    """A sentence for each tensor with values that are not finite; reads every tensor."""
    if isinstance(source, Adapter):
        factors = ((name, x) for name in source.keys() for x in source.factors(name)[:2])
        tensors = itertools.chain(factors, source.dense.items())
    else:
        tensors = ((name, source.read(name)) for name in source.keys())
    found = []
    for name, tensor in tensors:
        try:
            check_finite(tensor, name, f"{label} ({source.path})")
        except NotFinite as error:
            found.append(error.message)
    return found

"""What a user chooses of a merge: weights of experts, methods of parts, the form of the output."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal, get_args

import torch

from merging.errors import InputError
from merging.experts import Expert, Scaled
from merging.layers.parts import matcher
from merging.method.ranges import is_whole
from merging.method.registry import Method, create

WeightsOn = Literal["delta", "task"]
_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Part:
    """A part of the model that is merged by a method of its own."""

    match: str
    method: Method

    def __repr__(self) -> str:
        return f"{self.match}: {self.method!r}"


def read_parts(parts: Iterable[Mapping[str, Any]]) -> tuple[Part, ...]:
    """Parts from {match, method, hyperparameters}; the method may be a name or a `Method`."""
    read = []
    for part in parts:
        if missing := {"match", "method"} - set(part):
            raise InputError(f"a part lacks {sorted(missing)[0]!r}: {dict(part)}")
        settings = {k: v for k, v in part.items() if k not in {"match", "method"}}
        method = part["method"]
        if isinstance(method, Mapping):  # as the merge's own method is written
            settings, method = {**method, **settings}, method.get("name")
            settings.pop("name", None)
        if not isinstance(method, str | Method):
            raise InputError(f"the method of part {part['match']!r} is {method!r}, expected a name")
        made = create(method, **settings) if isinstance(method, str) else method
        read.append(Part(str(part["match"]), made))
        matcher(read[-1].match)
    for method in (part.method for part in read):
        check_gradients(method)
    return tuple(read)


def assign(parts: Sequence[Part], names: Iterable[str]) -> dict[str, Part]:
    """{tensor: the first part that matches it}.

    Raises InputError for a part that matches nothing, or nothing that earlier ones left.
    """
    tests = [matcher(part.match) for part in parts]
    matches = {n: [i for i, test in enumerate(tests) if test(n)] for n in names}
    for i, part in enumerate(parts):
        if not any(i in matching for matching in matches.values()):
            raise InputError(
                f"match={part.match!r} matches no tensor of the base",
                hint=f"the first tensors are: {', '.join(list(matches)[:3])}",
            )
        if not any(matching and matching[0] == i for matching in matches.values()):
            raise InputError(
                f"match={part.match!r} matches only what earlier parts match: the first match wins"
            )
    return {name: parts[matching[0]] for name, matching in matches.items() if matching}


# --- gradients over depth -------------------------------------------------------------------------


def check_gradients(method: Method) -> None:
    """InputError for a list of values that cannot be interpolated."""
    for key, values in _gradients(method).items():
        if not values or not all(isinstance(v, int | float) for v in values):
            raise InputError(
                f"{key} of method {method.name!r} is {list(values)}, expected numbers to "
                "interpolate from the first to the last block"
            )


def at_depth(method: Method, depth: float) -> Method:
    """The method with its lists of values interpolated linearly at a depth in [0, 1].

    The values stand at equal distances from the first block to the last.
    """
    gradients = _gradients(method)
    if not gradients:
        return method
    settings = dict(method.hyperparameters)
    for key, values in gradients.items():
        parameter = signature(method.function).parameters.get(key)
        whole = isinstance(create(method.name).hyperparameters[key], int) or (
            parameter is not None and is_whole(str(parameter.annotation))
        )
        place = depth * (len(values) - 1)
        i = min(int(place), max(len(values) - 2, 0))
        following = values[min(i + 1, len(values) - 1)]
        value = values[i] + (place - i) * (following - values[i])
        settings[key] = round(value) if whole else value
    return replace(create(method.name, **settings), rest=method.rest)


def _gradients(method: Method) -> dict[str, Sequence[Any]]:
    return {k: v for k, v in method.hyperparameters.items() if isinstance(v, list | tuple)}


# --- weights of experts ---------------------------------------------------------------------------


def weigh(
    experts: Mapping[str, Expert],
    weights: Mapping[str, float] | None,
    weights_on: WeightsOn | None,
    method: Method,
) -> tuple[dict[str, Expert], tuple[float, ...] | None]:
    """The experts that take part, and the weights (T,) of their tasks, if those have any.

    An expert of weight 0 is left out. Others without a weight have 1.
    """
    if not weights:
        return dict(experts), None
    if unknown := sorted(set(weights) - set(experts)):
        raise InputError(
            f"weights names {unknown[0]!r}, which is no expert", f"experts: {', '.join(experts)}"
        )
    for task, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InputError(f"the weight of expert {task!r} is {weight!r}, expected a number")
    known = {task: float(weights.get(task, 1)) for task in experts}
    taking = {task: expert for task, expert in experts.items() if known[task]}
    if not taking:
        raise InputError("every expert has weight 0: nothing is left to merge")
    if (weights_on or ("task" if method.name == "average" else "delta")) == "delta":
        return {
            task: expert if known[task] == 1 else Scaled(expert, known[task])
            for task, expert in taking.items()
        }, None
    if negative := [task for task in taking if known[task] < 0]:
        raise InputError(
            f"the weight of expert {negative[0]!r} is negative, a task's counts for 0 or more",
            hint="weights_on=delta takes it as a factor on what the expert learnt",
        )
    return taking, tuple(known[task] for task in taking)


def check_task_weights(methods: Iterable[Method]) -> None:
    """InputError for a method that knows no weights of tasks."""
    for method in methods:
        if "weights" not in method.context:
            raise InputError(
                f"method {method.name!r} has no weights of tasks",
                hint="weights_on=delta takes them as factors on what the experts learnt",
            )


# --- the output -----------------------------------------------------------------------------------


def check_choices(**choices: tuple[str | None, Any]) -> None:
    """InputError for a value that is none of a Literal's; name=(value, Literal)."""
    for name, (choice, known) in choices.items():
        if choice is not None and choice not in get_args(known):
            raise InputError(f"{name} is {choice!r}, expected one of: {', '.join(get_args(known))}")


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype by its name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        known = dtype
    else:
        known = getattr(torch, str(dtype), None)
    if dtype is not None and (not isinstance(known, torch.dtype) or known.itemsize < 2):
        known = None
    if dtype is not None and (known is None or not known.is_floating_point):
        raise InputError(
            f"dtype is {dtype!r}, expected float32, float16, bfloat16 or float64",
            hint="without dtype= the output has the base's",
        )
    return known


def read_bytes(size: str | int) -> int:
    """A number of bytes, as in "5GB" or "500 MB" (powers of ten)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B|)", str(size).upper())
    number = int(float(match[1]) * _BYTES[match[2]]) if match else 0
    if number < 1:
        raise InputError(f"shard_size is {size!r}, expected a size such as 5GB or 500MB")
    return number

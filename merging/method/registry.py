"""The table of methods: a name, a pure function on tensors, what the engine must know of it.

    @merging.register("norm_mean", source="an example", rest="method", row_space=True)
    def norm_mean(deltas):
        '''sum_t |D_t| D_t / sum_t |D_t|, (T, *shape) -> (*shape).'''
        norms = deltas.reshape(len(deltas), -1).norm(dim=1)
        return torch.einsum("t,t...->...", norms / norms.sum().clamp_min(1e-30), deltas)

adds one, from a module of this package as from any other.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from difflib import get_close_matches
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from merging.errors import HOW_TO_MEASURE, InputError
from merging.linalg import in_span_of_rows
from merging.method.ranges import outside

# What a method may ask for beside the deltas, by the name of a keyword. Everything else in a
# signature is a hyperparameter.
CONTEXT = {
    "covariances": "(T, d_in, d_in) second moments of each task's inputs",
    "gradients": "(T, d_out, d_out) second moments of the gradients at each task's outputs",
    "fishers": "(T, *shape) diagonal Fisher information of each expert",
    "layer_shape": "(d_out, d_in) of the layer itself, in whatever space it is merged",
    "base": "(*shape) the base's own values, for methods that run on the whole matrix",
    "weights": "(T,) what each expert counts for; none is 1 for all",
    "d_in": "the layer's own width, where deltas come in a basis of their rows",
    "d_out": "its height, where deltas come in a basis of their columns",
    "adapters": "whether all experts' files say that adapters made the deltas",
    "depth": "place of the tensor's block along the model, 0 to 1",
    "in_block": "whether the tensor lies in a numbered block at all",
    "length_ratio": "of the length of all deltas' sum to that of a merge, over the whole model",
    "thresholds": "what the method's own pass over the whole model has found",
    "majority": "the sign that most entries of the whole model elect, from the same pass",
    "draws": "random numbers for each task, for a tensor whose rows come block by block in order",
}

Arguments = Mapping[str, Any]
Flag = bool | Callable[[Arguments], bool]  # or a function of the arguments
Needs = Literal["covariance", "fisher", "kfac"]
Rest = Literal["average", "base", "method"]
Law = Literal["scale", "outputs", "inputs", "expert"]


class Stream(Protocol):
    """Passes over the whole model, in pieces (name, (T, *shape)).

    It may have a method `few`, whose pass goes through a small sample of the same entries, and
    their number per task, `numel`.
    """

    def __call__(self) -> Iterable[tuple[str, Tensor]]: ...


OUTPUTS = "@outputs"  # behind a weight's name in statistics "kfac": what names its `gradients`
_STATISTIC_ARGUMENT = {"covariance": "covariances", "fisher": "fishers", "kfac": "gradients"}
_DATA: dict[Needs | None, Literal["none", "inputs", "gradients"]] = {
    None: "none", "covariance": "inputs", "fisher": "gradients", "kfac": "gradients",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table; `register` says what the fields mean."""

    name: str
    function: Callable[..., Tensor]
    source: str
    formula: str
    needs: Needs | Callable[[Arguments], Needs | None] | None
    rest: Rest | Callable[[Arguments], Rest]
    alpha: float
    row_space: Flag
    column_space: Flag
    elementwise: Flag
    sequential: bool
    batched: Callable[..., Iterable[Tensor | None]] | None
    prepare: Callable[[Stream, Arguments], dict[str, Any]] | None
    per_tensor: Flag
    breaks: frozenset[Law]
    settable: tuple[str, ...] | None
    preset: Arguments

    def arguments(self) -> dict[str, Any]:
        """Every keyword of the function that is not context, with this name's value for it."""
        parameters = inspect.signature(self.function).parameters.values()
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in CONTEXT]
        return {p.name: p.default for p in keywords} | dict(self.preset)

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters a user may set, with their default values, `alpha` included."""
        arguments = self.arguments()
        names = arguments if self.settable is None else self.settable
        return {k: arguments[k] for k in names} | {"alpha": self.alpha}


_TABLE: dict[str, Entry] = {}


def register(
    name: str,
    *,
    source: str,
    formula: str = "",
    needs: Needs | Callable[[Arguments], Needs | None] | None = None,
    rest: Rest | Callable[[Arguments], Rest] = "average",
    alpha: float = 1.0,
    row_space: Flag = False,
    column_space: Flag = False,
    elementwise: Flag = False,
    sequential: bool = False,
    batched: Callable[..., Iterable[Tensor | None]] | None = None,
    prepare: Callable[[Stream, Arguments], dict[str, Any]] | None = None,
    per_tensor: Flag = False,
    breaks: tuple[Law, ...] = (),
    settable: tuple[str, ...] | None = None,
    **preset: Any,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function `(deltas (T, d_out, d_in), *, hyperparameters) -> (d_out, d_in)`.

    source: the paper, and the equation or section if it has several.
    formula: what it computes, in a line; the first line of its docstring if not given.
    needs: the statistic it wants for each layer, or None (or a function of the arguments).
    rest: how tensors that are no linear layer's matrix are merged: "average" of their
        differences, "base" (kept), or "method" (the function itself, on (T, *shape)).
    alpha: default factor on the result.
    row_space: f(D Q^T) = f(D) Q^T for orthonormal Q, so that it may run in a narrow basis.
    column_space: f(P D) = P f(D) for orthonormal P, so that it may run on few rows.
    elementwise: each entry is merged by itself (given the context), so any block of rows may be.
    sequential: its statistics are measured through the merged model, layer after layer.
    batched: the function on layers of one shape, (B, T, d_out, d_in) -> B of (d_out, d_in), with
        the same keywords: what a GPU merges in one call. None for one to be merged by itself.
    prepare: whole-model pass, `(stream, hyperparameters) -> context` for every later call.
    per_tensor: that pass goes over each tensor by itself; given its context, blocks of the tensor's
        rows may be merged one by one, in their order.
    breaks: laws that its formula breaks with its defaults: "scale" (f(s D) = s f(D)), "outputs"
        and "inputs" (f(P D) = P f(D), f(D Q) = f(D) Q for rotations), "expert" (one alone is
        returned). The others are tested by the method's name.
    preset: arguments of the function that differ from its own defaults under this name.
    settable: the arguments a user may change under this name; None is all of them.
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _TABLE:
            raise ValueError(f"method {name!r} is registered twice")
        _TABLE[name] = Entry(
            name=name, function=function, source=source,
            formula=formula or (inspect.getdoc(function) or name).partition("\n")[0],
            needs=needs, rest=rest, alpha=alpha, row_space=row_space, column_space=column_space,
            elementwise=elementwise, sequential=sequential, batched=batched, prepare=prepare,
            per_tensor=per_tensor, breaks=frozenset(breaks), settable=settable, preset=preset,
        )  # fmt: skip
        return function

    return add


@dataclass(frozen=True)
class Method:
    """A registered function with its hyperparameters bound; call it on a stack of deltas."""

    name: str
    hyperparameters: Arguments
    _: KW_ONLY
    function: Callable[..., Tensor] = field(repr=False)
    arguments: Arguments = field(repr=False)  # what it is called with: fixed ones too, no alpha
    context: frozenset[str] = field(repr=False)  # what of `CONTEXT` it takes
    source: str = field(repr=False)
    formula: str = field(repr=False)
    needs: Needs | None = field(repr=False)
    rest: Rest = field(repr=False)
    row_space: bool = field(repr=False)
    column_space: bool = field(repr=False)
    elementwise: bool = field(repr=False)
    sequential: bool = field(repr=False)
    breaks: frozenset[Law] = field(repr=False)
    batched: Callable[..., Iterable[Tensor | None]] | None = field(repr=False)
    whole_model: Callable[[Stream, Arguments], dict[str, Any]] | None = field(repr=False)
    one_tensor: Callable[[Stream, Arguments], dict[str, Any]] | None = field(repr=False)
    space: str = field(default="full", repr=False)  # see `merging.method.space`

    def __post_init__(self) -> None:
        values = ", ".join(f"{k}={v!r}" for k, v in self.hyperparameters.items())
        facts = f"{self.formula}\n\nSource: {self.source}\nHyperparameters: {values}\n\n"
        rest = (inspect.getdoc(self.function) or "").removeprefix(self.formula).lstrip()
        object.__setattr__(self, "__doc__", facts + rest)

    @property
    def data(self) -> Literal["none", "inputs", "gradients"]:
        """What of the training data the method sees."""
        return _DATA[self.needs]

    @property
    def alpha(self) -> float:
        """Factor on the result."""
        return float(self.hyperparameters["alpha"])

    def prepare(self, stream: Stream) -> dict[str, Any]:
        """Context from one pass over the whole model; empty for most methods."""
        return self.whole_model(stream, self.hyperparameters) if self.whole_model else {}

    def prepare_tensor(self, stream: Stream) -> dict[str, Any]:
        """Context from one pass over a single tensor, with which blocks of its rows may be merged
        in their order; empty for most methods."""
        return self.one_tensor(stream, self.hyperparameters) if self.one_tensor else {}

    def __call__(self, deltas: Tensor, **context: Any) -> Tensor:
        """Merge one layer.

        deltas: (T, d_out, d_in), floating point, float32 or better.
        context: any of `CONTEXT`, e.g. covariances (T, d_in, d_in); what the method does not
            use is ignored, what it needs and does not get is an InputError.
        Returns (d_out, d_in), `alpha` applied: the merged weight is W_0 + method(deltas).
        """
        self._require(context)
        used = {k: v for k, v in context.items() if k in self.context and v is not None}
        call, rows, Q = dict(self.arguments) | used, deltas, None
        if self.row_space and not self.elementwise and "d_in" not in used:
            rows, Q = in_span_of_rows(deltas)
        if Q is not None and "d_in" in self.context:
            call["d_in"] = deltas.shape[-1]
        merged = self.function(rows, **call)
        if Q is not None:
            merged = (merged @ Q.mT).to(deltas.dtype)
        return merged if self.alpha == 1 else self.alpha * merged

    def many(self, deltas: Tensor, **context: Any) -> Tensor:
        """Merge layers of one shape, (B, T, d_out, d_in) -> (B, d_out, d_in); `context` of each.

        In one call where the method has one for several layers, else one after another.
        """
        if self.batched is None or self.needs:
            return torch.stack([self(layer, **context) for layer in deltas])
        used = {k: v for k, v in context.items() if k in self.context and v is not None}
        merged = self.batched(deltas, **dict(self.arguments) | used)
        return torch.stack(
            [
                self(layer, **context) if found is None else self.alpha * found
                for layer, found in zip(deltas, merged, strict=True)
            ]
        )

    def _require(self, context: Mapping[str, Any]) -> None:
        if unknown := set(context) - set(CONTEXT):
            raise InputError(
                f"method {self.name!r} was called with {sorted(unknown)}, "
                f"expected only {sorted(CONTEXT)}"
            )
        if self.needs and context.get(_STATISTIC_ARGUMENT[self.needs]) is None:
            raise InputError(
                f"method {self.name!r} needs {_STATISTIC_ARGUMENT[self.needs]}, none were given",
                hint=HOW_TO_MEASURE,
            )


def methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_TABLE)


def create(name: str, **hyperparameters: Any) -> Method:
    """A method by name, its hyperparameters overridden by the given ones.

    `lambda` is accepted for the papers' symbol: the ridge `lam` where a method has one, else
    the factor `alpha`. Raises InputError for an unknown name or hyperparameter.
    """
    if name not in _TABLE:
        close = get_close_matches(name, _TABLE, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown method {name!r}", hint=f"{hint}known: {', '.join(methods())}")
    entry = _TABLE[name]
    defaults = entry.defaults()
    if "lambda" in hyperparameters:
        symbol = "lam" if "lam" in defaults else "alpha"
        hyperparameters[symbol] = hyperparameters.pop("lambda")
    if unknown := set(hyperparameters) - set(defaults):
        raise InputError(
            f"method {name!r} has no hyperparameter {sorted(unknown)[0]!r}",
            hint=f"it takes: {', '.join(sorted(defaults))}",
        )
    for key, value in hyperparameters.items():
        _check_number(entry, key, defaults[key], value)
    return _bind(entry, defaults | hyperparameters)


def _check_number(entry: Entry, key: str, default: Any, value: Any) -> None:
    """InputError for what is no finite number where one belongs; lists are gradients over depth."""
    parameter = inspect.signature(entry.function).parameters.get(key)
    told = "float" if key == "alpha" or parameter is None else str(parameter.annotation)
    words = set(re.findall(r"\w+", told))
    others = {"str", "bool"} & words
    numeric = isinstance(default, Real | None) and not isinstance(default, bool) and not others
    if not numeric or (value is None and (default is None or {"None", "Optional"} & words)):
        return
    if isinstance(value, list | tuple):
        for end in value:
            _check_number(entry, key, default, end)
    elif isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{key} of method {entry.name!r} is {value!r}, expected a number")
    elif expected := outside(told, value):
        raise InputError(f"{key} = {value} is not {expected}", f"method {entry.name!r}")


def _context(function: Callable[..., Tensor]) -> frozenset[str]:
    """What of `CONTEXT` a function takes: where it hands it on as `**context`, all of it but the
    weights, which what it hands them to may not know."""
    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return frozenset(CONTEXT) - {"weights"} if anything else frozenset(CONTEXT) & set(parameters)


def _bind(entry: Entry, hyperparameters: dict[str, Any]) -> Method:
    """The method with everything resolved that depends on its arguments."""
    arguments = entry.arguments() | {k: v for k, v in hyperparameters.items() if k != "alpha"}
    per_tensor = entry.per_tensor(arguments) if callable(entry.per_tensor) else entry.per_tensor

    def resolved(flag: Any) -> Any:
        return flag(arguments) if callable(flag) else flag

    return Method(
        entry.name,
        hyperparameters,
        function=entry.function,
        arguments=arguments,
        context=_context(entry.function),
        source=entry.source,
        formula=entry.formula,
        needs=resolved(entry.needs),
        rest=resolved(entry.rest),
        row_space=resolved(entry.row_space),
        column_space=resolved(entry.column_space),
        elementwise=resolved(entry.elementwise),
        sequential=entry.sequential,
        breaks=entry.breaks,
        batched=entry.batched,
        whole_model=None if per_tensor else entry.prepare,
        one_tensor=entry.prepare if per_tensor else None,
    )

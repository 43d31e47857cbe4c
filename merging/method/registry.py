"""The table of methods: a name, a pure function on tensors, what the engine must know of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor

from merging.errors import InputError
from merging.linalg import row_space, working_dtype

# What the engine can hand to a method beside the deltas. Everything else in a signature is a
# hyperparameter. `d_in` and `d_out` are the layer's own when deltas are given in a basis of their
# rows and columns.
CONTEXT = frozenset({"covariances", "fishers", "d_in", "d_out", "depth", "generator", "thresholds"})

Flag = bool | Callable[[Mapping[str, Any]], bool]  # or a function of the arguments

Needs = Literal["covariance", "fisher"]
Rest = Literal["average", "base", "method"]
_STATISTIC_ARGUMENT = {"covariance": "covariances", "fisher": "fishers"}


@dataclass(frozen=True)
class Entry:
    """One row of the table; see `method` for the meaning of the fields."""

    name: str
    function: Callable[..., Tensor]
    source: str
    needs: Needs | Callable[[Mapping[str, Any]], Needs | None] | None
    rest: Rest
    alpha: float
    row_space: Flag
    column_space: Flag
    elementwise: Flag
    sequential: bool
    prepare: Callable[..., dict[str, Any]] | None
    preset: Mapping[str, Any]
    settable: tuple[str, ...] | None

    def arguments(self) -> dict[str, Any]:
        """Every keyword of the function that is not context, with this name's value for it."""
        parameters = inspect.signature(self.function).parameters.values()
        own = {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in CONTEXT
        }
        return own | self.preset

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters a user may set, with their default values, `alpha` included."""
        own = self.arguments()
        names = own if self.settable is None else self.settable
        return {k: own[k] for k in names} | {"alpha": self.alpha}


_TABLE: dict[str, Entry] = {}


def method(
    name: str,
    *,
    source: str,
    needs: Needs | Callable[[Mapping[str, Any]], Needs | None] | None = None,
    rest: Rest = "average",
    alpha: float = 1.0,
    row_space: Flag = False,
    column_space: Flag = False,
    elementwise: Flag = False,
    sequential: bool = False,
    prepare: Callable[..., dict[str, Any]] | None = None,
    settable: tuple[str, ...] | None = None,
    **preset: Any,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function `(deltas (T, d_out, d_in), *, hyperparameters) -> (d_out, d_in)`.

    needs: the statistic it wants for each layer, or None (or a function of the arguments).
    rest: how tensors that are no linear layer's matrix are merged: "average" of their
        differences, "base" (kept), or "method" (the function itself, on (T, *shape)).
    alpha: default factor on the result.
    row_space: f(D Q^T) = f(D) Q^T for orthonormal Q, so that it may run in a narrow basis.
    column_space: f(P D) = P f(D) for orthonormal P, so that it may run on few rows.
    elementwise: each entry is merged by itself (given the context), so any block of rows may be.
    sequential: its statistics are measured through the merged model, layer after layer.
    prepare: whole-model pass, `(stream, hyperparameters) -> context` for every later call.
    preset: arguments of the function that differ from its own defaults under this name.
    settable: the arguments a user may change under this name; None is all of them.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _TABLE:
            raise ValueError(f"method {name!r} is registered twice")
        _TABLE[name] = Entry(
            name,
            function,
            source,
            needs,
            rest,
            alpha,
            row_space,
            column_space,
            elementwise,
            sequential,
            prepare,
            preset,
            settable,
        )
        return function

    return register


@dataclass(frozen=True)
class Method:
    """A registered function with its hyperparameters bound; call it on a stack of deltas."""

    entry: Entry = field(repr=False)
    name: str
    hyperparameters: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the function is called with: fixed and settable arguments, without `alpha`."""
        own = self.entry.arguments() | dict(self.hyperparameters)
        return {k: v for k, v in own.items() if k != "alpha"}

    @property
    def needs(self) -> Needs | None:
        needs = self.entry.needs
        return needs(self.arguments) if callable(needs) else needs

    @property
    def source(self) -> str:
        return self.entry.source

    @property
    def rest(self) -> Rest:
        return self.entry.rest

    @property
    def row_space(self) -> bool:
        return self._holds(self.entry.row_space)

    @property
    def column_space(self) -> bool:
        return self._holds(self.entry.column_space)

    @property
    def elementwise(self) -> bool:
        return self._holds(self.entry.elementwise)

    def _holds(self, flag: Flag) -> bool:
        return flag(self.arguments) if callable(flag) else flag

    @property
    def sequential(self) -> bool:
        return self.entry.sequential

    @property
    def data(self) -> Literal["none", "inputs", "gradients"]:
        """What of the training data the method sees."""
        return {None: "none", "covariance": "inputs", "fisher": "gradients"}[self.needs]

    @property
    def alpha(self) -> float:
        return self.hyperparameters["alpha"]

    def prepare(self, stream: Callable[[], Any]) -> dict[str, Any]:
        """Context from one pass over the whole model; empty for most methods."""
        return self.entry.prepare(stream, self.hyperparameters) if self.entry.prepare else {}

    def __call__(self, deltas: Tensor, **context: Any) -> Tensor:
        """Merge one layer.

        deltas: (T, d_out, d_in), floating point, float32 or better.
        context: any of `CONTEXT`, e.g. covariances (T, d_in, d_in); what the method does not
            use is ignored, what it needs and does not get is an InputError.
        Returns (d_out, d_in), `alpha` applied: the merged weight is W_0 + method(deltas).
        """
        if unknown := set(context) - CONTEXT:
            raise InputError(
                f"method {self.name!r} was called with {sorted(unknown)}, "
                f"expected only {sorted(CONTEXT)}"
            )
        if self.needs and context.get(_STATISTIC_ARGUMENT[self.needs]) is None:
            raise InputError(
                f"method {self.name!r} needs {_STATISTIC_ARGUMENT[self.needs]}, none were given",
                hint="collect them with: python -m experiments.statistics",
            )
        wanted = inspect.signature(self.entry.function).parameters
        given = {k: v for k, v in context.items() if k in wanted and v is not None}
        narrower = deltas.ndim == 3 and len(deltas) * deltas.shape[1] < deltas.shape[2]
        if self.row_space and narrower and "d_in" not in given and not self.elementwise:
            # fewer rows in all than columns: the same problem in their span is smaller
            Q = row_space(deltas.to(working_dtype(deltas)))
            narrow = {"d_in": deltas.shape[-1]} if "d_in" in wanted else {}
            merged = self.entry.function(deltas.to(Q) @ Q, **self.arguments, **given, **narrow)
            merged = (merged @ Q.mT).to(deltas.dtype)
        else:
            merged = self.entry.function(deltas, **self.arguments, **given)
        return merged if self.alpha == 1 else self.alpha * merged


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
    return Method(entry, name, defaults | hyperparameters)

"""Any method in a space that all adapters share: their core space, or KnOTS' left basis.

What a method makes of single entries or of ranks depends on the axes it sees. In the coordinates of
a space they are the directions that the adapters use, and the merge stays one of their joint rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from merging.errors import InputError
from merging.linalg import product
from merging.method.core_space import bases
from merging.method.knots import left_basis
from merging.method.registry import Method, Stream

Space = Literal["full", "core", "knots"]


class Coordinates(NamedTuple):
    """Deltas (T, d_out, d_in) as left @ inner_t @ right: nothing is lost. All in float64."""

    left: Tensor  # (d_out, j)
    inner: Tensor  # (T, j, k), or (T, j, d_in) without `right`
    right: Tensor | None  # (k, d_in)


def core(deltas: Tensor) -> Coordinates:
    """Singular vectors of [D_1 .. D_T] side by side and above each other (arXiv 2509.17786)."""
    U, V = bases(deltas)
    return Coordinates(U, U.mT @ deltas.double() @ V, V.mT)


def knots(deltas: Tensor) -> Coordinates:
    """[D_1 .. D_T] = U diag(s) [V_1^T .. V_T^T], inner_t = diag(s) V_t^T (arXiv 2410.19735)."""
    U, inner = left_basis(deltas, "inside")
    return Coordinates(U, inner, None)


_SPACES: dict[str, Callable[[Tensor], Coordinates]] = {"core": core, "knots": knots}


def within(method: Method, space: Space) -> Method:
    """The method on the coordinates of a space, back on the layer's own axes afterwards.

    For matrices only. What it counts (ranks, shares of entries, thresholds of the whole model) it
    counts in the space, unless it asks for the `layer_shape`.
    """
    if space == "full":
        return method
    enter = _SPACES[space]

    sized = "layer_shape" in method.context

    def function(
        deltas: Tensor, *, d_in: int | None = None, d_out: int | None = None, **call: Any
    ) -> Tensor:
        """(T, d_out, d_in) -> (d_out, d_in)"""
        if sized:
            call["layer_shape"] = d_out or deltas.shape[1], d_in or deltas.shape[2]
        left, inner, right = enter(deltas)
        if not inner.numel():  # no expert has moved
            return torch.zeros_like(deltas[0])
        merged = product(left, method.function(inner, **call))
        return (merged if right is None else product(merged, right)).to(deltas)

    whole_model = method.whole_model

    def prepare(stream: Stream, arguments: Any) -> dict[str, Any]:
        def inside() -> Iterator[tuple[str, Tensor]]:
            return ((name, enter(deltas).inner) for name, deltas in stream())

        return whole_model(inside, arguments) if whole_model else {}

    own_axes = {"base"} if sized else {"base", "d_in", "d_out"}
    return replace(
        method, name=f"{method.name} in {space} space", function=function, space=space,
        whole_model=whole_model and prepare, batched=None, context=method.context - own_axes,
        row_space=space == "core" or method.row_space, column_space=True, elementwise=False,
        one_tensor=None, rest="average",
    )  # fmt: skip


def check_space(method: Method, space: Space, experts: int) -> str | None:
    """InputError for a method that has no meaning in a space; a note where it changes nothing.

    experts: how many are merged.
    """
    if space == "full":
        return None
    if method.needs:
        raise InputError(
            f"method {method.name!r} needs {method.needs} statistics, which are of the layer's own "
            f"axes, not of space={space}",
            hint="use space=full",
        )
    try:
        deltas = _adapters(max(2, min(experts, 3)))
        if _linear(method, deltas):
            raise InputError(
                f"method {method.name!r} is linear: its merge is the same in every space",
                hint="space= is for methods that change single entries or count ranks, such as "
                "TIES; use space=full",
            )
        same = _same(method, space, deltas)
    except InputError as error:
        raise InputError(f"space={space}: {error.message}", error.hint) from None
    note = f"space={space}: method {method.name!r} gives there what it gives without"
    return note if same else None


def _adapters(T: int) -> Tensor:
    """(T, 12, 13): deltas of rank 2 that share one direction of their inputs."""
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 13), (1, 13), (12, 2))
    shared, apart, B = (torch.randn(T, *x, generator=g, dtype=torch.float64) for x in shapes)
    return B @ torch.cat([shared[:1].expand(T, -1, -1), apart], dim=1)


def _linear(method: Method, deltas: Tensor) -> bool:
    """Whether f(X + 2 Y) = f(X) + 2 f(Y); some ask for entries of a certain size."""
    square = deltas.mT[:, :12, :12].abs()
    other = torch.cat([square, square[:, :, :1]], dim=2)  # in none of the adapters' directions
    return all(
        _close(method(s * deltas + 2 * s * other), method(s * deltas) + 2 * method(s * other))
        for s in (1, 1e-5)
    )


def _same(method: Method, space: Space, deltas: Tensor) -> bool:
    """Whether a method commutes with a space's bases."""
    inside = within(method, space)
    return all(_close(method(s * deltas), inside(s * deltas)) for s in (1, 1e-5))


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6 * one.abs().max().item())

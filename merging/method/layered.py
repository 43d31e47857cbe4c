"""What is done to any merge entry by entry or block by block: LiNeS' scaling, consensus masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from merging.errors import InputError
from merging.method.ranges import Count, NonNegative
from merging.method.registry import Method, Rest, Stream, create, register
from merging.method.sparse import agreed


def _of(name: str) -> Method:
    """The method a name stands for; "sum" is task arithmetic with alpha 1."""
    method = create("task_arithmetic", alpha=1.0) if name == "sum" else create(name)
    if method.needs:
        raise InputError(f"method {name!r} needs statistics, expected one that needs none")
    return method


def _rest(arguments: Mapping[str, Any]) -> Rest:
    return _of(arguments["of"]).rest


def _elementwise(arguments: Mapping[str, Any]) -> bool:
    return _of(arguments["of"]).elementwise


def _row_space(arguments: Mapping[str, Any]) -> bool:
    if arguments["after"] not in ("end", "start"):
        raise InputError(f"unknown after {arguments['after']!r}", "known: end, start")
    return _of(arguments["of"]).row_space


def _prepared(stream: Stream, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return _of(arguments["of"]).prepare(stream)


def _lengths(stream: Stream, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """|sum_t D_t| / |merge| over all that the method merges."""
    if arguments["of"] == "sum" or arguments["start"] is not None:
        return _prepared(stream, arguments)
    method, context = _of(arguments["of"]), _prepared(stream, arguments)
    summed = merged = 0.0
    for _, deltas in stream():
        summed += deltas.sum(0).double().square().sum().item()
        merged += method(deltas, **context).double().square().sum().item()
    return context | {"length_ratio": (summed / merged) ** 0.5 if merged else 1.0}


@register(
    "lines", source="arXiv 2410.17146", rest=_rest, row_space=_row_space,
    elementwise=_elementwise, prepare=_lengths,
    formula="(1 / T + beta l / (L - 1)) sum_t D_t in block l of L",
)  # fmt: skip
def lines(
    deltas: Tensor,
    *,
    of: str = "sum",
    start: float | None = None,
    beta: float = 0.5,
    after: str = "end",
    depth: float = 0.0,
    in_block: bool = True,
    length_ratio: float = 1.0,
    **context: Any,
) -> Tensor:
    """LiNeS: (start + beta depth) sum_t D_t, (T, *shape) -> (*shape) (arXiv 2410.17146).

    depth: l / (L - 1) of the tensor's block l of L; 0 for what lies before the blocks.
    of: what is scaled: the "sum", or any method's merge by name.
    start: scale of the first block, the paper's alpha; None is its choice 1 / T, of another merge
        than the sum times |sum_t D_t| / |merge| (over the whole model), as in its code.
    beta: how much the scale grows to the last block; tuned on validation data in the paper.
    after: how tensors behind the last block scale, as at its "end", or as at the "start", as the
        authors' code scales whatever has no block number.
    """
    start = length_ratio / len(deltas) if start is None else start
    scale = start + beta * (depth if in_block or after == "end" else 0.0)
    return scale * (deltas.sum(0) if of == "sum" else _of(of)(deltas, **context))


@register(
    "consensus", source="arXiv 2405.07813", rest=_rest, elementwise=_elementwise,
    prepare=_prepared, breaks=("outputs", "inputs"),
    formula="a merge S where at least agree tasks have |D_t| > lam |S - D_t|",
)  # fmt: skip
def consensus(
    deltas: Tensor, *, of: str = "tsv_m", lam: NonNegative = 0.4, agree: Count = 2, **context: Any
) -> Tensor:
    """Consensus masks on any merge S, (T, *shape) -> (*shape) (arXiv 2405.07813).

    of: the merge that is masked, by name. lam, agree: as in `consensus_ta`, which is of="sum".
    """
    return agreed(_of(of)(deltas, **context), deltas, lam, agree)

"""Baselines that drop entries before they merge: by magnitude or by agreement.

All accept deltas of any shape (T, *shape). Shares of entries are rounded down to a count.

Equal magnitudes, of which half precision has thousands: masks of one tensor (TACT, Breadcrumbs)
keep exactly the count, the first in row-major order; TIES' trim, whose threshold belongs to
a whole model, keeps all that are as large as the last one kept, as its authors' code does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.method.order import kth_largest, kth_largest_entry, largest
from merging.method.ranges import Count, NonNegative, Share
from merging.method.registry import Stream, register

# --- TIES -------------------------------------------------------------------------------------


def whole_model(arguments: Mapping[str, Any]) -> bool:
    """Whether a method's thresholds are those of the whole model, not of each tensor; given them,
    it is elementwise."""
    if arguments["scope"] not in ("model", "layer"):
        raise InputError(f"unknown scope {arguments['scope']!r}", "known: model, layer")
    return bool(arguments["scope"] == "model")


def _by_tensor(arguments: Mapping[str, Any]) -> bool:
    return not whole_model(arguments)


def _magnitude_thresholds(stream: Stream, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    def magnitudes(passes: Stream) -> Iterable[Tensor]:
        return (deltas.abs() for _, deltas in passes())

    k, few = hyperparameters["k"], getattr(stream, "few", None)
    sample = None if few is None else partial(magnitudes, few)
    context = {"thresholds": kth_largest(partial(magnitudes, stream), k, sample)}
    if hyperparameters["cancelled"] == "majority":
        pieces = (trim(deltas, k, context["thresholds"]) for _, deltas in stream())
        context["majority"] = torch.stack([signs(piece).sum() for piece in pieces]).sum().sign()
    return context


@register(
    "ties", source="arXiv 2306.01708", rest="method", breaks=("outputs", "inputs"),
    formula="the mean of the entries in the top share k that agree with the sign of their sum",
    elementwise=whole_model, prepare=_magnitude_thresholds, per_tensor=_by_tensor,
)  # fmt: skip
def ties(
    deltas: Tensor,
    *,
    k: Share = 0.2,
    merge: str = "mean",
    scope: str = "model",
    cancelled: str = "zero",
    thresholds: Tensor | None = None,
    majority: Tensor | None = None,
) -> Tensor:
    """Trim, elect signs, merge what agrees, (T, *shape) -> (*shape) (arXiv 2306.01708, alg. 1).

    k: share of each task vector's entries that is kept, the largest by magnitude.
    merge: "mean" of the kept entries that carry the elected sign (alpha 1), or their "sum"
        (alpha 0.3).
    scope: "model" trims the whole flattened task vector, as the paper does; "layer" each tensor.
    cancelled: of entries whose kept values sum to exactly 0 (1 to 12 % in bfloat16), "zero" elects
        no sign, "majority" the one most entries elect, as the authors' code does.
    thresholds: (T,) smallest magnitude kept, from the whole model; without them this tensor is
        the whole vector. majority: the sign that most of the model's entries elect.
    """
    return elect(trim(deltas, k, thresholds), merge, cancelled, majority)


def trim(deltas: Tensor, k: float, thresholds: Tensor | None = None) -> Tensor:
    """(T, *shape) with the entries below each task's threshold set to 0 (default: top share k)."""
    if thresholds is None:
        thresholds = kth_largest_entry(deltas.abs(), k)
    below = torch.nextafter(thresholds.to(deltas), thresholds.new_tensor(-torch.inf).to(deltas))
    kept = torch.empty_like(deltas)
    for delta, limit, out in zip(deltas, below.tolist(), kept, strict=True):
        torch.hardshrink(delta, limit, out=out)  # 0 unless |D| > limit: in one go, without a mask
    return kept


def elect(
    deltas: Tensor, merge: str, cancelled: str = "zero", majority: Tensor | None = None
) -> Tensor:
    """Merge the entries whose sign is that of the sum over tasks, (T, *shape) -> (*shape).

    Zeros take no part. An entry whose sum is exactly 0 elects no sign and merges to 0 (the paper
    leaves this case open), or with `cancelled` "majority" the sign that most entries elect
    (`majority`, of these deltas if not given).
    """
    for value, known in ((merge, ("mean", "sum")), (cancelled, ("zero", "majority"))):
        if value not in known:
            raise InputError(f"unknown merge function {value!r}", f"known: {', '.join(known)}")
    sign = signs(deltas).to(deltas)
    if cancelled == "majority":
        most = sign.sum(dtype=torch.float64).sign() if majority is None else majority
        sign = torch.where(sign == 0, most.to(deltas), sign)
    agree = (deltas * sign).relu_()  # |D| where it agrees, else 0: numbers are faster than masks
    total = agree.sum(0)
    if merge == "mean":
        total /= agree.sign_().sum(0).clamp_min_(1)
    return (total * sign).add_(0.0)  # no -0


def signs(deltas: Tensor) -> Tensor:
    """Sign of the sum over tasks, (T, *shape) -> (*shape), float64.

    Summed in float64, where it does not depend on the order of the tasks in practice: a sign,
    unlike a value, can turn on the last bit.
    """
    return deltas.sum(0, dtype=torch.float64).sign()


# --- Fixed masks ------------------------------------------------------------------------------


@register(
    "breadcrumbs",
    source="arXiv 2312.06795",
    formula="sum_t of D_t without the share beta of its smallest and gamma of its largest entries",
    breaks=("outputs", "inputs"),
    rest="method",
    alpha=0.3,
)
def breadcrumbs(
    deltas: Tensor, *, beta: Share = 0.9, gamma: Share = 0.01, scope: str = "layer"
) -> Tensor:
    """sum_t of each delta without its smallest and its largest entries (2312.06795).

    beta, gamma: shares of a tensor's entries dropped at the small and at the large end, rounded
        down to counts. The authors search 5 to 20 % kept, .1 to 1 % removed at the large end.
    scope: what the shares are of, a "layer" (the paper's words) or each "row" of it (their code).
    """
    return _crumbs(deltas, beta, gamma, scope).sum(0)


@register(
    "breadcrumbs_ties",
    source="arXiv 2312.06795, mergekit",
    formula="the mean of breadcrumbs' entries that agree with the sign of their sum",
    breaks=("outputs", "inputs"),
    rest="method",
)
def breadcrumbs_ties(
    deltas: Tensor,
    *,
    beta: Share = 0.9,
    gamma: Share = 0.01,
    scope: str = "layer",
    merge: str = "mean",
) -> Tensor:
    """Breadcrumbs' masks, then TIES' election and merge, (T, *shape) -> (*shape)."""
    return elect(_crumbs(deltas, beta, gamma, scope), merge)


def _crumbs(deltas: Tensor, beta: float, gamma: float, scope: str) -> Tensor:
    """(T, *shape) with the smallest and the largest entries of each tensor, or row, at 0."""
    if scope not in ("layer", "row"):
        raise InputError(f"unknown scope {scope!r}", "known: layer, row")
    by_row = scope == "row" and deltas.ndim > 2
    rows = (
        deltas.abs().reshape(-1, deltas.shape[-1])
        if by_row
        else deltas.abs().reshape(len(deltas), -1)
    )
    n = rows.shape[1]
    kept = largest(rows, n - int(beta * n))
    kept &= ~largest(rows, int(gamma * n))
    return torch.where(kept.view_as(deltas), deltas, 0)


def keep_largest(deltas: Tensor, count: int) -> Tensor:
    """(T, *shape) with all but each task's `count` largest magnitudes at 0."""
    kept = largest(deltas.abs().reshape(len(deltas), -1), count)
    return torch.where(kept.view_as(deltas), deltas, 0)


@register(
    "consensus_ta",
    source="arXiv 2405.07813",
    formula="sum_t D_t where at least agree tasks have |D_t| > lam |sum D - D_t|",
    breaks=("outputs", "inputs"),
    rest="method",
    alpha=0.3,
    elementwise=True,
)
def consensus_ta(deltas: Tensor, *, lam: NonNegative = 0.4, agree: Count = 2) -> Tensor:
    """Task arithmetic on the entries that several tasks need (arXiv 2405.07813).

    Task t needs an entry when |D_t| > lam |S - D_t|, S = sum_t D_t; entries needed by
    fewer than `agree` tasks are set to 0, so a single expert needs agree = 1. The paper tunes
    lam in 0.2 .. 0.6 for each task on validation data; here all tasks share one.
    """
    return agreed(deltas.sum(0), deltas, lam, agree)


@register(
    "consensus_ties",
    source="arXiv 2405.07813",
    formula="consensus_ta with the TIES merge in place of the sum",
    breaks=("outputs", "inputs"),
    rest="method",
    alpha=0.3,
    elementwise=whole_model,
    prepare=_magnitude_thresholds,
    per_tensor=_by_tensor,
)
def consensus_ties(
    deltas: Tensor,
    *,
    lam: NonNegative = 0.4,
    agree: Count = 2,
    k: Share = 0.2,
    merge: str = "sum",
    scope: str = "model",
    cancelled: str = "zero",
    thresholds: Tensor | None = None,
    majority: Tensor | None = None,
) -> Tensor:
    """`consensus_ta` with S the TIES merge; k, merge, scope, cancelled as in `ties`."""
    merged = elect(trim(deltas, k, thresholds), merge, cancelled, majority)
    return agreed(merged, deltas, lam, agree)


def agreed(merged: Tensor, deltas: Tensor, lam: float, agree: int) -> Tensor:
    """A merge (*shape) where at least `agree` tasks need it, 0 elsewhere."""
    surplus = (merged - deltas).abs_().mul_(-lam).add_(deltas.abs())
    needed = surplus.sign_().relu_().sum(0)  # in how many tasks |D| > lam |S - D|
    return needed.sub_(agree - 0.5).sign_().relu_().mul_(merged).add_(0.0)

"""Baselines that drop entries before they merge: by magnitude, at random, or by agreement.

All accept deltas of any shape (T, *shape). Shares of entries are rounded down to a count.

Equal magnitudes, of which half precision has thousands: masks of one tensor (TACT, Breadcrumbs,
DELLA) keep exactly the count, the first in row-major order; TIES' trim, whose threshold belongs to
a whole model, keeps all that are as large as the last one kept, as its authors' code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.method.averages import in_chunks
from merging.method.order import kth_largest, kth_largest_entry, largest, share
from merging.method.registry import Stream, register

# --- TIES -------------------------------------------------------------------------------------


def whole_model(arguments: Mapping[str, Any]) -> bool:
    """Whether a method's thresholds are those of the whole model; given them, it is elementwise."""
    if arguments["scope"] not in ("model", "layer"):
        raise InputError(f"unknown scope {arguments['scope']!r}", "known: model, layer")
    return bool(arguments["scope"] == "model")


def _magnitude_thresholds(stream: Stream, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    if not whole_model(hyperparameters):
        return {}

    def magnitudes(passes: Stream) -> Iterable[Tensor]:
        return (deltas.abs() for _, deltas in passes())

    k, few = share("k", hyperparameters["k"]), getattr(stream, "few", None)
    sample = None if few is None else partial(magnitudes, few)
    context = {"thresholds": kth_largest(partial(magnitudes, stream), k, sample)}
    if hyperparameters["cancelled"] == "majority":
        pieces = (trim(deltas, k, context["thresholds"]) for _, deltas in stream())
        context["majority"] = torch.stack([signs(piece).sum() for piece in pieces]).sum().sign()
    return context


@register(
    "ties", source="arXiv 2306.01708", rest="method", breaks=("outputs", "inputs"),
    formula="the mean of the entries in the top share k that agree with the sign of their sum",
    elementwise=whole_model, prepare=_magnitude_thresholds,
)  # fmt: skip
def ties(
    deltas: Tensor,
    *,
    k: float = 0.2,
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
        thresholds = kth_largest_entry(deltas.abs(), share("k", k))
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


# --- Random masks -----------------------------------------------------------------------------


@register(
    "dare",
    source="arXiv 2311.03099",
    formula="alpha sum_t of D_t with a random share p of its entries dropped, the rest over 1 - p",
    breaks=("scale", "outputs", "inputs"),
    rest="method",
    alpha=0.3,
)
def dare(deltas: Tensor, *, p: float = 0.9, seed: int = 0) -> Tensor:
    """sum_t of each delta with a share p dropped and the rest over 1 - p (2311.03099, section 3.2).

    p: probability that an entry is dropped; seed: of the masks, see `uniform`.
    """
    dropped = _dropping(deltas, share("1 - p", 1 - p), seed)
    return in_chunks(lambda D: dropped(D).sum(0), deltas)


@register(
    "dare_ties",
    source="arXiv 2311.03099",
    formula="as dare, then the mean of the entries that agree with the sign of their sum",
    breaks=("scale", "outputs", "inputs"),
    rest="method",
)
def dare_ties(deltas: Tensor, *, p: float = 0.9, seed: int = 0, merge: str = "mean") -> Tensor:
    """DARE, then TIES' election and merge, (T, *shape) -> (*shape) (2311.03099, section 3.3).

    TIES' trim is left out: it keeps the top 20 %, and so everything DARE leaves for p >= 0.8.
    """
    dropped = _dropping(deltas, share("1 - p", 1 - p), seed)
    return in_chunks(lambda D: elect(dropped(D), merge), deltas)


@register(
    "della",
    source="arXiv 2406.11617",
    formula="as dare_ties, an entry kept more probably the larger it is in its row",
    breaks=("scale", "outputs", "inputs"),
    rest="method",
    alpha=1.1,
)
def della(
    deltas: Tensor,
    *,
    density: float = 0.7,
    eps: float = 0.07,
    merge: str = "mean",
    seed: int = 0,
) -> Tensor:
    """MagPrune, then TIES' election and merge, (T, *shape) -> (*shape) (2406.11617).

    The i-th smallest of a row's n magnitudes is kept with probability
    density - eps + 2 eps (i - 1) / (n - 1), and divided by it. A vector is one row; equal
    magnitudes rank by position. Defaults: the authors' drop rate 0.3, window 0.14, lambda 1.1.
    """
    return elect(_mag_prune(deltas, density, eps, seed), merge)


@register(
    "della_linear",
    source="arXiv 2406.11617",
    formula="alpha sum_t of D_t dropped and rescaled as in della",
    breaks=("scale", "outputs", "inputs"),
    rest="method",
    alpha=0.3,
)
def della_linear(
    deltas: Tensor, *, density: float = 0.7, eps: float = 0.07, seed: int = 0
) -> Tensor:
    """MagPrune without an election, (T, *shape) -> (*shape): mergekit's della_linear."""
    return _mag_prune(deltas, density, eps, seed).sum(0)


def _mag_prune(deltas: Tensor, density: float, eps: float, seed: int) -> Tensor:
    """(T, *shape) with each entry kept by the rank of its magnitude in its row, and rescaled."""
    share("density - eps", density - eps)
    share("density + eps", density + eps)
    rows = deltas.reshape(len(deltas), -1, deltas.shape[-1] if deltas.ndim > 1 else 1)
    rank = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(deltas)
    n = rows.shape[-1]
    keep = density - eps + 2 * eps * rank / (n - 1) if n > 1 else torch.full_like(rank, density)
    return drop(deltas, keep.view_as(deltas), seed)


def drop(deltas: Tensor, keep: float | Tensor, seed: int) -> Tensor:
    """Keep each entry with probability `keep`, divided by it; the expectation is unchanged."""
    return _dropping(deltas, keep, seed)(deltas)


def _dropping(deltas: Tensor, keep: float | Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """`drop` for (T, n) entries at a time, in their order: a task's draws go on from the last.

    The tasks draw at the same time, each from a generator of its own.
    """
    generators = [_generator(delta, seed) for delta in deltas]

    def dropped(D: Tensor) -> Tensor:
        def drawn(generator: torch.Generator) -> Tensor:
            return torch.rand(D.shape[1:], generator=generator)

        with ThreadPoolExecutor(len(D)) as pool:
            draws = torch.stack(list(pool.map(drawn, generators))).to(D)
        kept = draws.neg_().add_(keep).sign_().relu_()  # 1 where draw < keep, else 0
        return kept.mul_(D).div_(keep + (keep == 0)).add_(0.0)

    return dropped


def uniform(delta: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) of delta's shape, a function of (seed, delta's values) alone.

    Not of its place among the tasks, so that their order changes nothing; equal deltas get equal
    numbers. Drawn on the CPU: every device sees the same.
    """
    return torch.rand(delta.shape, generator=_generator(delta, seed)).to(delta)


def _generator(delta: Tensor, seed: int) -> torch.Generator:
    flat = delta.detach().flatten()
    sample = flat[:: max(1, len(flat) // 2**16)].to("cpu", torch.float32).contiguous()
    digest = blake2b(sample.numpy().tobytes(), digest_size=8, salt=seed.to_bytes(8, "little"))
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)


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
    deltas: Tensor, *, beta: float = 0.9, gamma: float = 0.01, scope: str = "layer"
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
    beta: float = 0.9,
    gamma: float = 0.01,
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
    kept = largest(rows, n - int(share("beta", beta) * n))
    kept &= ~largest(rows, int(share("gamma", gamma) * n))
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
def consensus_ta(deltas: Tensor, *, lam: float = 0.4, agree: int = 2) -> Tensor:
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
)
def consensus_ties(
    deltas: Tensor,
    *,
    lam: float = 0.4,
    agree: int = 2,
    k: float = 0.2,
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

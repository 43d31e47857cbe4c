"""Baselines that drop entries before they merge: by magnitude, at random, or by agreement.

All accept deltas of any shape (T, *shape). Shares of entries are rounded down to a count, at
least 1; an entry exactly as large as the last one kept is kept too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.method.registry import register

_CHUNK = 2**22  # entries per task that are looked at together
_DIGIT = 16  # bits resolved by one pass over the model
_LAYOUT = {torch.float32: (torch.int32, 1 << 31), torch.float64: (torch.int64, -(1 << 63))}


# --- TIES -------------------------------------------------------------------------------------


def _whole_model(arguments: Mapping[str, Any]) -> bool:
    if arguments["scope"] not in ("model", "layer"):
        raise InputError(f"unknown scope {arguments['scope']!r}", "known: model, layer")
    return arguments["scope"] == "model"


def _magnitude_thresholds(stream: Callable, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    if not _whole_model(hyperparameters):
        return {}

    def magnitudes() -> Iterable[Tensor]:
        return (deltas.abs() for _, deltas in stream())

    return {"thresholds": kth_largest(magnitudes, share("k", hyperparameters["k"]))}


@register(
    "ties", source="arXiv 2306.01708", breaks=("outputs", "inputs"), rest="method",
    elementwise=_whole_model, prepare=_magnitude_thresholds,
)  # fmt: skip
def ties(
    deltas: Tensor,
    *,
    k: float = 0.2,
    merge: str = "mean",
    scope: str = "model",
    thresholds: Tensor | None = None,
) -> Tensor:
    """Trim, elect signs, merge what agrees, (T, *shape) -> (*shape) (arXiv 2306.01708, alg. 1).

    k: share of each task vector's entries that is kept, the largest by magnitude.
    merge: "mean" of the kept entries that carry the elected sign (alpha 1), or their "sum"
        (alpha 0.3).
    scope: "model" trims the whole flattened task vector, as the paper does; "layer" each tensor.
    thresholds: (T,) smallest magnitude kept, from the whole model; without them this tensor is
        the whole vector.
    """
    return elect(trim(deltas, k, thresholds), merge)


def trim(deltas: Tensor, k: float, thresholds: Tensor | None = None) -> Tensor:
    """(T, *shape) with the entries below each task's threshold set to 0 (default: top share k)."""
    if thresholds is None:
        thresholds = _kth_largest_entry(deltas.abs(), share("k", k))
    return torch.where(deltas.abs() >= _per_task(thresholds, deltas), deltas, 0)


def elect(deltas: Tensor, merge: str) -> Tensor:
    """Merge the entries whose sign is that of the sum over tasks, (T, *shape) -> (*shape).

    Zeros take no part. An entry whose sum is exactly 0 elects no sign and merges to 0 (the paper
    leaves this case open). The sum is taken in float64, where it does not depend on the order of
    the tasks in practice: a sign, unlike a value, can turn on the last bit.
    """
    if merge not in ("mean", "sum"):
        raise InputError(f"unknown merge function {merge!r}", "known: mean, sum")
    sign = deltas.sum(0, dtype=torch.float64).sign().to(deltas)
    agree = deltas * sign > 0
    total = torch.where(agree, deltas, 0).sum(0)
    return total if merge == "sum" else total / agree.sum(0).clamp_min(1)


# --- Random masks -----------------------------------------------------------------------------


@register(
    "dare",
    source="arXiv 2311.03099",
    breaks=("scale", "outputs", "inputs"),
    rest="method",
    alpha=0.3,
)
def dare(deltas: Tensor, *, p: float = 0.9, seed: int = 0) -> Tensor:
    """sum_t of each delta with a share p dropped and the rest over 1 - p (2311.03099, section 3.2).

    p: probability that an entry is dropped; seed: of the masks, see `uniform`.
    """
    return drop(deltas, share("1 - p", 1 - p), seed).sum(0)


@register(
    "dare_ties", source="arXiv 2311.03099", breaks=("scale", "outputs", "inputs"), rest="method"
)
def dare_ties(deltas: Tensor, *, p: float = 0.9, seed: int = 0, merge: str = "mean") -> Tensor:
    """DARE, then TIES' election and merge, (T, *shape) -> (*shape) (2311.03099, section 3.3).

    TIES' trim is left out: it keeps the top 20 %, and so everything DARE leaves for p >= 0.8.
    """
    return elect(drop(deltas, share("1 - p", 1 - p), seed), merge)


@register(
    "della",
    source="arXiv 2406.11617",
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
    share("density - eps", density - eps)
    share("density + eps", density + eps)
    rows = deltas.reshape(len(deltas), -1, deltas.shape[-1] if deltas.ndim > 1 else 1)
    rank = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(deltas)
    n = rows.shape[-1]
    keep = density - eps + 2 * eps * rank / (n - 1) if n > 1 else torch.full_like(rank, density)
    return elect(drop(deltas, keep.view_as(deltas), seed), merge)


def drop(deltas: Tensor, keep: float | Tensor, seed: int) -> Tensor:
    """Keep each entry with probability `keep`, divided by it; the expectation is unchanged."""
    draws = torch.stack([uniform(delta, seed) for delta in deltas])
    return torch.where(draws < keep, deltas / keep, 0)


def uniform(delta: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) of delta's shape, a function of (seed, delta's values) alone.

    Not of its place among the tasks, so that their order changes nothing; equal deltas get equal
    numbers. Drawn on the CPU: every device sees the same.
    """
    flat = delta.detach().flatten()
    sample = flat[:: max(1, len(flat) // 2**16)].to("cpu", torch.float32).contiguous()
    digest = blake2b(sample.numpy().tobytes(), digest_size=8, salt=seed.to_bytes(8, "little"))
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
    return torch.rand(delta.shape, generator=generator).to(delta)


# --- Fixed masks ------------------------------------------------------------------------------


@register(
    "breadcrumbs", source="arXiv 2312.06795", breaks=("outputs", "inputs"), rest="method", alpha=0.3
)
def breadcrumbs(deltas: Tensor, *, beta: float = 0.9, gamma: float = 0.01) -> Tensor:
    """sum_t of each delta without its smallest and its largest entries (2312.06795).

    beta, gamma: shares of a tensor's entries dropped at the small and at the large end. Here
    counts are rounded down (0 drops nothing) and an entry as large as a dropped one is dropped.
    """
    flat = deltas.abs().reshape(len(deltas), -1)
    n = flat.shape[1]
    small, large = int(share("beta", beta) * n), int(share("gamma", gamma) * n)
    kept = drop_smallest(deltas, small)
    if large:
        cut = _per_task(flat.kthvalue(n - large + 1).values, deltas)
        kept = torch.where(deltas.abs() < cut, kept, 0)
    return kept.sum(0)


def drop_smallest(deltas: Tensor, count: int) -> Tensor:
    """(T, *shape) with the `count` smallest magnitudes of each task, and any equal to them, at 0.

    The counterpart of `trim`, which keeps what is as large as the last entry kept.
    """
    if count <= 0:
        return deltas
    cut = torch.stack([delta.abs().flatten().kthvalue(count).values for delta in deltas])
    return torch.where(deltas.abs() > _per_task(cut, deltas), deltas, 0)


@register(
    "consensus_ta",
    source="arXiv 2405.07813",
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
    return _consensus(deltas.sum(0), deltas, lam, agree)


@register(
    "consensus_ties",
    source="arXiv 2405.07813",
    breaks=("outputs", "inputs"),
    rest="method",
    alpha=0.3,
    elementwise=_whole_model,
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
    thresholds: Tensor | None = None,
) -> Tensor:
    """`consensus_ta` with S the TIES merge; k, merge, scope, thresholds as in `ties`."""
    return _consensus(elect(trim(deltas, k, thresholds), merge), deltas, lam, agree)


def _consensus(merged: Tensor, deltas: Tensor, lam: float, agree: int) -> Tensor:
    needed = deltas.abs() > lam * (merged - deltas).abs()  # (T, *shape)
    return torch.where(needed.sum(0) >= agree, merged, 0)


# --- PCB --------------------------------------------------------------------------------------


def _competition_thresholds(stream: Callable, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    if not _whole_model(hyperparameters):
        return {}
    ranges = [torch.stack(_range(deltas.abs())) for _, deltas in stream()]
    low = torch.stack([r[0] for r in ranges]).amin(0)
    high = torch.stack([r[1] for r in ranges]).amax(0)

    def scores() -> Iterable[Tensor]:
        return (competition(deltas, low, high) for _, deltas in stream())

    top = torch.stack([_range(score)[1] for score in scores()]).amax(0)
    cut = kth_largest(scores, share("ratio", hyperparameters["ratio"]))
    return {"thresholds": torch.stack([low, high, cut.to(low), top])}


@register(
    "pcb",
    source="arXiv 2410.02396",
    breaks=("scale", "outputs", "inputs", "expert"),
    rest="method",
    alpha=1.2,
    elementwise=_whole_model,
    prepare=_competition_thresholds,
)
def pcb(
    deltas: Tensor, *, ratio: float = 0.1, scope: str = "model", thresholds: Tensor | None = None
) -> Tensor:
    """Mean weighted by the entries' competition scores, (T, *shape) -> (*shape) (2410.02396).

    A task's weight is 0 up to its `ratio`-th largest score and grows linearly to 1 at the largest
    (as in the authors' code, whose clipping of the magnitudes' outermost 1e-4 is left
    out); entries that no task weighs are 0.
    thresholds: (4, T), over the whole model, of the magnitudes their smallest and largest, of
        the scores the cut and the largest. scope: as in `ties`.
    """
    if thresholds is None:
        low, high = _range(deltas.abs())
        score = competition(deltas, low, high)
        cut, top = _kth_largest_entry(score, share("ratio", ratio)), _range(score)[1]
    else:
        low, high, cut, top = thresholds.to(deltas)
        score = competition(deltas, low, high)
    weight = (score - _per_task(cut, deltas)).clamp_min(0)
    weight = weight / _per_task(torch.where(top > cut, top - cut, 1), deltas)
    return (weight * deltas).sum(0) / weight.sum(0).clamp_min(1e-12)


def competition(deltas: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """exp(T self) tanh(D_t sum_t D_t), self = ((|D_t| - low) / (high - low))^2.

    deltas: (T, *shape); low, high: (T,), range of each task's magnitudes. Returns (T, *shape).
    """
    width = _per_task(torch.where(high > low, high - low, 1), deltas)
    own = ((deltas.abs() - _per_task(low, deltas)) / width).square()
    return torch.exp(len(deltas) * own) * torch.tanh(deltas * deltas.sum(0))


# --- Order statistics -------------------------------------------------------------------------


def kth_largest(stream: Callable[[], Iterable[Tensor]], share: float) -> Tensor:
    """Exact (share n)-th largest of n values per task, without holding them, as (T,) on the CPU.

    stream: called once a pass, yields (T, *shape) pieces, the same ones every time.
    share: in (0, 1]; share n is rounded down, and at least 1.
    Radix selection on the values' bit patterns, 16 bits a pass: 2 passes over float32, 4 over
    float64 (decided by the first piece).
    """
    dtype, bits, done = None, _DIGIT, 0
    while done < bits:
        counts = 0
        for piece in stream():
            if dtype is None:
                dtype = piece.dtype if piece.dtype == torch.float64 else torch.float32
                bits = torch.finfo(dtype).bits
                found = torch.zeros(len(piece), dtype=torch.int64)  # leading bits of the answer
            counts = counts + _histogram(piece.to(dtype), done, found)
        if done == 0:
            rank = (counts.sum(1).double() * share).long().clamp_min(1)  # among those sharing them
        at_least = counts.flip(1).cumsum(1).flip(1)  # (T, 2^16) values with this digit or a larger
        digit = (at_least >= rank[:, None]).sum(1) - 1
        rank = rank - (at_least - counts).gather(1, digit[:, None])[:, 0]
        found = (found << _DIGIT) | digit
        done += _DIGIT
    return _from_keys(found, dtype)


def _histogram(piece: Tensor, done: int, found: Tensor) -> Tensor:
    """Counts (T, 2^16) of the digit after the `done` leading bits, where those are `found`."""
    shift = torch.finfo(piece.dtype).bits - done - _DIGIT
    counts = torch.zeros(len(piece), 2**_DIGIT, dtype=torch.int64)
    for t, row in enumerate(piece.reshape(len(piece), -1)):
        for chunk in row.split(_CHUNK):
            keys = _keys(chunk)
            if done:
                higher = (keys >> (shift + _DIGIT)) & ((1 << done) - 1)
                keys = keys[higher == found[t].to(keys.device)]
            digits = (keys >> shift) & (2**_DIGIT - 1)
            counts[t] += torch.bincount(digits, minlength=2**_DIGIT).cpu()
    return counts


def _keys(values: Tensor) -> Tensor:
    """Bit patterns (int64) that are in the order of the floats when read as unsigned integers.

    The bits below the sign of a negative float run backwards: flip them, then the sign bit.
    """
    integer, sign = _LAYOUT[values.dtype]
    keys = values.view(integer).long()
    return torch.where(keys < 0, ~keys, keys ^ sign)


def _from_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    integer, sign = _LAYOUT[dtype]
    keys = torch.where((keys & sign) == 0, ~keys, keys ^ sign)
    return keys.to(integer).view(dtype)


def _kth_largest_entry(values: Tensor, share: float) -> Tensor:
    """The same for one tensor (T, *shape) -> (T,)."""
    flat = values.reshape(len(values), -1)
    k = max(1, int(share * flat.shape[1]))
    return flat.kthvalue(flat.shape[1] - k + 1).values


def _range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each task, (T, *shape) -> (T,), (T,)."""
    flat = values.reshape(len(values), -1)
    return flat.amin(1), flat.amax(1)


def _per_task(values: Tensor, deltas: Tensor) -> Tensor:
    """(T,) shaped to broadcast against (T, *shape)."""
    return values.to(deltas).view(-1, *[1] * (deltas.ndim - 1))


def share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"{name} = {value} is not a share between 0 and 1")
    return value

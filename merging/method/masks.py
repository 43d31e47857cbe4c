"""Baselines that drop entries at random before they merge: DARE and DELLA.

All accept deltas of any shape (T, *shape). A mask is a function of the seed and the delta's values
alone, drawn on the CPU: every device, and every order of the tasks, sees the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from merging.method.averages import in_chunks
from merging.method.order import share
from merging.method.ranges import Seed, Share
from merging.method.registry import Stream, register
from merging.method.sparse import elect

_DRAWN = 2**18  # entries per task that are drawn at a time: they stay in a CPU's last-level cache
_SAMPLED = 2**16  # entries of a delta, about, that tell it from others


class Draws:
    """Numbers in [0, 1) for T tasks, each from a generator of its own, where it left off.

    The tasks draw at the same time.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._pool = ThreadPoolExecutor(len(seeds))

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next of them, (T, *shape), on the CPU: every device sees the same."""
        drawn = torch.empty(len(self._generators), *shape)
        done = [
            self._pool.submit(torch.rand, shape, generator=generator, out=out)
            for generator, out in zip(self._generators, drawn, strict=True)
        ]
        for task in done:
            task.result()
        return drawn


def seeds(deltas: Tensor, seed: int) -> list[int]:
    """Of each task's draws, a function of (seed, the delta's values) alone, from (T, *shape).

    Not of its place among the tasks, so that their order changes nothing; equal deltas get equal
    numbers.
    """
    flat = deltas.detach().reshape(len(deltas), -1)
    return _seeds(flat[:, :: _step(flat.shape[1])], seed)


def _step(numel: int) -> int:
    return max(1, numel // _SAMPLED)


def _seeds(sample: Tensor, seed: int) -> list[int]:
    salt = seed.to_bytes(8, "little")
    rows = sample.to("cpu", torch.float32).contiguous().numpy()
    digests = [blake2b(row.tobytes(), digest_size=8, salt=salt) for row in rows]
    return [int.from_bytes(digest.digest(), "little") >> 1 for digest in digests]


def _draws_of(stream: Stream, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The draws of a tensor that streams by, as `seeds` of the whole of it has them."""
    numel = getattr(stream, "numel", None)
    step = _step(sum(d[0].numel() for _, d in stream()) if numel is None else numel)
    samples, start = [], 0
    for _, deltas in stream():
        flat = deltas.reshape(len(deltas), -1)
        samples.append(flat[:, -start % step :: step].clone())
        start += flat.shape[1]
    return {"draws": Draws(_seeds(torch.cat(samples, dim=1), hyperparameters["seed"]))}


@register(
    "dare",
    source="arXiv 2311.03099",
    formula="alpha sum_t of D_t with a random share p of its entries dropped, the rest over 1 - p",
    breaks=("scale", "outputs", "inputs"),
    rest="method",
    alpha=0.3,
    prepare=_draws_of,
    per_tensor=True,
)
def dare(deltas: Tensor, *, p: Share = 0.9, seed: Seed = 0, draws: Draws | None = None) -> Tensor:
    """sum_t of each delta with a share p dropped and the rest over 1 - p (2311.03099, section 3.2).

    p: probability that an entry is dropped; seed: of the masks, see `uniform`.
    draws: of the masks, where the deltas are the next rows of a tensor.
    """
    keep, draws = share("1 - p", 1 - p), draws or Draws(seeds(deltas, seed))
    return in_chunks(lambda D: _dropped(D, keep, draws).sum(0), deltas, size=_DRAWN)


@register(
    "dare_ties",
    source="arXiv 2311.03099",
    formula="as dare, then the mean of the entries that agree with the sign of their sum",
    breaks=("scale", "outputs", "inputs"),
    rest="method",
    prepare=_draws_of,
    per_tensor=True,
)
def dare_ties(
    deltas: Tensor, *, p: Share = 0.9, seed: Seed = 0, merge: str = "mean",
    draws: Draws | None = None,
) -> Tensor:  # fmt: skip
    """DARE, then TIES' election and merge, (T, *shape) -> (*shape) (2311.03099, section 3.3).

    TIES' trim is left out: it keeps the top 20 %, and so everything DARE leaves for p >= 0.8.
    """
    keep, draws = share("1 - p", 1 - p), draws or Draws(seeds(deltas, seed))
    return in_chunks(lambda D: elect(_dropped(D, keep, draws), merge), deltas, size=_DRAWN)


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
    density: Share = 0.7,
    eps: float = 0.07,
    merge: str = "mean",
    seed: Seed = 0,
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
    deltas: Tensor, *, density: Share = 0.7, eps: float = 0.07, seed: Seed = 0
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
    return _dropped(deltas, keep, Draws(seeds(deltas, seed)))


def _dropped(deltas: Tensor, keep: float | Tensor, draws: Draws) -> Tensor:
    """`drop` by the next of the draws."""
    kept = draws(deltas.shape[1:]).to(deltas)
    kept = kept.neg_().add_(keep).sign_().relu_()  # 1 where draw < keep, else 0
    return kept.mul_(deltas).div_(keep + (keep == 0)).add_(0.0)


def uniform(delta: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) of delta's shape, a function of (seed, delta's values): see `seeds`."""
    return Draws(seeds(delta[None], seed))(delta.shape)[0].to(delta)

"""Order statistics of magnitudes: of one tensor, or of a whole model that streams by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from merging.errors import InputError
from merging.threads import each

_CHUNK = 2**22  # entries per task that are looked at together
_BLOCK = 2**19  # the same where a pass stays in a CPU's cache
_WAITING = 2**21  # values that are counted together
_DIGIT = 16  # bits resolved by one pass over the model
_LAYOUT = {torch.float32: (torch.int32, 1 << 31), torch.float64: (torch.int64, -(1 << 63))}


def kth_largest(
    stream: Callable[[], Iterable[Tensor]],
    share: float,
    few: Callable[[], Iterable[Tensor]] | None = None,
) -> Tensor:
    """Exact (share n)-th largest of n values per task, without holding them, as (T,) on the CPU.

    stream: called once a pass, yields (T, *shape) pieces, the same ones every time.
    share: in (0, 1]; share n is rounded down, and at least 1.
    few: yields a small sample of the same values, from which the answer is guessed. One pass then
        counts each value around the guess by itself, and how many are larger: exact as well, and
        enough unless the guess was far off, or the values are float64.
    Else by radix selection on the values' bit patterns, 16 bits a pass: 2 passes over float32, 4
    over float64 (decided by the first piece).
    """
    near = None if few is None else _near(stream, share, few)
    return _by_digits(stream, share) if near is None else near


def _near(
    stream: Callable[[], Iterable[Tensor]], share: float, few: Callable[[], Iterable[Tensor]]
) -> Tensor | None:
    """The answer from one pass, (T,), if it lies near a sample's; else None."""
    sample = [piece.reshape(len(piece), -1) for piece in few()]
    if not sample or sample[0].dtype != torch.float32:
        return None
    values = torch.cat(sample, dim=1)
    room = max(0.01, 4 / values.shape[1] ** 0.5)  # many times a sample's error of a share
    above = [_at(values, share - room, torch.inf), _at(values, share + room, -torch.inf)]
    counts = [_Counts(*bounds) for bounds in zip(*above, strict=True)]
    total = 0
    for piece in stream():
        rows = piece.reshape(len(piece), -1)
        total += rows.shape[1]
        for _ in each(_count, zip(counts, rows, strict=True)):
            pass
    rank = max(1, int(total * share))
    keys = [count.kth(rank) for count in counts]
    return None if None in keys else torch.from_numpy(_values(np.array(keys, dtype=np.int32)))


def _count(of_task: tuple[_Counts, Tensor]) -> None:
    """Add a task's values (n,) to its counts."""
    counts, row = of_task
    for chunk in row.cpu().split(_BLOCK):
        counts.add(chunk.numpy())


def _at(values: Tensor, share: float, beyond: float) -> list[float]:
    """Each task's value at a share from above, (T, n) -> T numbers; `beyond` outside 0 to 1."""
    inside = 0 < share < 1
    return kth_largest_entry(values, share).tolist() if inside else [beyond] * len(values)


class _Counts:
    """How often each value between two bounds occurs, and how many are larger.

    In NumPy, which compares and counts several times faster than torch. 0 and -0 are one value.
    """

    def __init__(self, high: float, low: float) -> None:
        self.low, self.high = np.float32(low), np.float32(high)
        self.larger = 0
        self.keys = self.counts = np.zeros(0, dtype=np.int64)  # keys ascending
        self._waiting: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Values (n,) in float32."""
        above = values > self.high
        near = values >= self.low
        near ^= above
        self.larger += int(np.count_nonzero(above))
        self._waiting.append(values[np.flatnonzero(near)])
        if sum(map(len, self._waiting)) > _WAITING:
            self._settle()

    def _settle(self) -> None:
        """Add what waits to the counts, key by key."""
        values, self._waiting = np.concatenate([*self._waiting, np.zeros(0, np.float32)]), []
        keys, counts = np.unique(_order(values + np.float32(0)), return_counts=True)
        self.keys, places = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        both = np.concatenate([self.counts, counts])
        self.counts = np.bincount(places, both, len(self.keys)).astype(np.int64)  # exact to 2^53

    def kth(self, rank: int) -> int | None:
        """The key of the rank-th largest value of all; None where it is none of those counted."""
        self._settle()
        at_least = self.counts[::-1].cumsum()[::-1] + self.larger
        if not len(at_least) or not self.larger < rank <= at_least[0]:
            return None
        return int(self.keys[(at_least >= rank).sum() - 1])


def _order(values: np.ndarray) -> np.ndarray:
    """int32 in the order of float32 values: below the sign, negative floats run backwards."""
    keys = np.ascontiguousarray(values).view(np.int32)
    return keys ^ ((keys >> 31) & 0x7FFFFFFF)


def _values(keys: np.ndarray) -> np.ndarray:
    bits: np.ndarray = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    return bits.view(np.float32)


def _by_digits(stream: Callable[[], Iterable[Tensor]], share: float) -> Tensor:
    dtype, bits, known = torch.float32, _DIGIT, 0
    answer = rank = torch.empty(0, dtype=torch.int64)  # leading bits; rank among what has them
    while known < bits:
        counts = torch.zeros(1, 2**_DIGIT, dtype=torch.int64)
        for piece in stream():
            if not len(answer):  # the first piece of all
                dtype = torch.float64 if piece.dtype == torch.float64 else torch.float32
                bits = torch.finfo(dtype).bits
                answer = torch.zeros(len(piece), dtype=torch.int64)
            counts = counts + _histogram(piece.to(dtype), known, answer)  # (T, 2^16)
        if known == 0:
            rank = (counts.sum(1).double() * share).long().clamp_min(1)
        at_least = counts.flip(1).cumsum(1).flip(1)  # (T, 2^16) values with this digit or a larger
        digit = (at_least >= rank[:, None]).sum(1) - 1
        rank = rank - (at_least - counts).gather(1, digit[:, None])[:, 0]
        answer = (answer << _DIGIT) | digit
        known += _DIGIT
    return _from_keys(answer, dtype)


def _histogram(piece: Tensor, known: int, leading: Tensor) -> Tensor:
    """Counts (T, 2^16) of the digit after the `known` leading bits, where those are `leading`."""
    shift = torch.finfo(piece.dtype).bits - known - _DIGIT
    counts = torch.zeros(len(piece), 2**_DIGIT, dtype=torch.int64)
    for t, row in enumerate(piece.reshape(len(piece), -1)):
        for chunk in row.split(_CHUNK):
            keys = _keys(chunk)
            if known:
                higher = (keys >> (shift + _DIGIT)) & ((1 << known) - 1)
                keys = keys[higher == leading[t].to(keys.device)]
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


def kth_largest_entry(values: Tensor, share: float) -> Tensor:
    """The same for one tensor (T, *shape) -> (T,)."""
    flat = values.reshape(len(values), -1)
    k = max(1, int(share * flat.shape[1]))
    return flat.kthvalue(flat.shape[1] - k + 1).values


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """Which entries of each row (R, n) are its `count` largest; of equal ones the first, (R, n).

    Values of half precision lie on a grid, where thousands of entries are equal to the threshold:
    all in or all out would miss the share that was asked for by far.
    """
    n = magnitudes.shape[1]
    if not 0 < count < n:
        return torch.full_like(magnitudes, count > 0, dtype=torch.bool)
    cut = magnitudes.kthvalue(n - count + 1, dim=1, keepdim=True).values
    kept = magnitudes >= cut
    for row, magnitude, threshold in zip(kept, magnitudes, cut, strict=True):
        if (surplus := int(row.sum()) - count) > 0:
            row[(magnitude == threshold).nonzero()[-surplus:, 0]] = False
    return kept


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each task, (T, *shape) -> (T,), (T,)."""
    flat = values.reshape(len(values), -1)
    return flat.amin(1), flat.amax(1)


def per_task(values: Tensor, deltas: Tensor) -> Tensor:
    """(T,) shaped to broadcast against (T, *shape)."""
    return values.to(deltas).view(-1, *[1] * (deltas.ndim - 1))


def share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"{name} = {value} is not a share between 0 and 1")
    return value

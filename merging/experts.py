"""What is merged: experts, asked in the names and layouts of their base, whatever holds them.

A dense checkpoint and an adapter answer the same questions, so that nothing which merges, checks
or evaluates an expert asks which of the two it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from merging.factors import Factors

if TYPE_CHECKING:
    from merging.formats.hashes import Hashes
    from merging.formats.into import Part
    from merging.layers import Layer


class Source(Protocol):
    """Named tensors, read one by one.

    `tied` maps a name to the earlier name whose memory it shares: merge that one only.
    """

    path: str
    tied: Mapping[str, str]
    quantised: str  # the format of weights that are worked out when they are read; "": none are
    partial: bool  # it holds what it changes of a base: it can be none itself

    @property
    def bytes_read(self) -> int: ...

    def keys(self) -> list[str]:
        """Names in file order."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or those rows of its first dimension: on the CPU, in the stored dtype."""
        ...

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name."""
        ...

    def file(self, name: str) -> Path | None:
        """The file that holds a tensor; None: it lies in memory."""
        ...

    def stamp(self) -> object:
        """Changes whenever what it holds may have."""
        ...

    def with_ties(self, tied: Mapping[str, str]) -> Source:
        """The same tensors, of which other names count as one."""
        ...

    def hash_files(self, path: str | Path, hashes: Hashes) -> None:
        """From now on show what is read to `hashes`, as that of the checkpoint at `path`."""
        ...

    def close(self) -> None: ...


class Values(NamedTuple):
    """What an expert says of a tensor, or of some rows of it."""

    tensor: Tensor  # may lack the last rows: the expert does not have them
    moved: bool  # the tensor is the difference to the base already
    scale: float = 1.0  # a factor on the difference

    def weight(self, W0: Tensor) -> Tensor:
        """The expert's own weight; one that is a difference, in W0's dtype and place."""
        if not self.moved:
            return self.tensor
        return (lift(W0) + self.tensor.to(W0.device)).to(W0.dtype)

    def difference(self, W0: Tensor, out: Tensor | None = None) -> Tensor:
        """D = W - W0 in float32 or better; 0 in rows that the expert lacks.

        W0: float32 or float64. out: where to write it.
        """
        delta = torch.empty_like(W0) if out is None else out
        tensor, ours, rest = self.tensor, W0, delta
        if tensor.shape != W0.shape:
            rest[len(tensor) :].zero_()
            ours, rest = W0[: len(tensor)], rest[: len(tensor)]
        if self.moved:
            rest.copy_(tensor)
        else:
            rest.copy_(tensor).sub_(ours)
        return delta if self.scale == 1 else delta.mul_(self.scale)


class Expert(Protocol):
    """A fine-tuned model, or what turns its base into it."""

    path: str
    base_name: str | None  # the base it says it belongs to
    partial: bool  # it holds what it changes only: all else is as in the base
    is_adapter: bool  # what it changes it holds as factors
    notes: Sequence[str]  # what was left out of it, or taken from the base for it

    @property
    def hub_base(self) -> bool:
        """Whether `base_name` is an "owner/name" id, comparable between experts."""
        ...

    @property
    def bytes_read(self) -> int: ...

    def names(self) -> list[str]:
        """The base's tensors that it holds or changes."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base stores the tensor."""
        ...

    def values(self, name: str, rows: slice | None = None) -> Values | None:
        """Of a tensor or those of its rows that the expert has; None: it is as in the base."""
        ...

    def rank(self, name: str) -> int | None:
        """Of the factors that hold the difference, 0 where there is none; None: no factors do."""
        ...

    def factors(self, name: str) -> Factors:
        """The difference (d_out, d_in), whatever way round the base stores it; rank is not 0."""
        ...

    def adapted(self, name: str) -> bool:
        """Whether it keeps the tensor, or moves it by an adapter, DoRA's too, as its file says."""
        ...

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that it holds, by the base's names."""
        ...

    def fitted(self, base: Source, layers: Mapping[str, Layer], part: Part | None = None) -> Expert:
        """The expert in the names and layouts of a base with these linear layers.

        part: of the base, if it is an expert of that alone.
        """
        ...

    def problems(self, base: Source, common_rows: bool = False) -> list[str]:
        """What headers tell that keeps it from being merged into the base, a sentence each.

        common_rows: embeddings and heads may have more or fewer rows than the base's.
        """
        ...

    def stamp(self) -> object:
        """Changes whenever what it holds may have."""
        ...

    def close(self) -> None: ...


class Dense(Source):
    """An expert stored in full: all that a source of named tensors needs to be one."""

    partial, hub_base, is_adapter = False, False, False
    base_name: str | None = None
    notes: Sequence[str] = ()
    quantised = ""

    def names(self) -> list[str]:
        return self.keys()

    def values(self, name: str, rows: slice | None = None) -> Values | None:
        if name not in self:
            return None
        shape = self.shape(name)
        if rows is None or not shape:
            return Values(self.read(name), moved=False)
        start, stop, _ = rows.indices(shape[0])
        return Values(self.read(name, slice(start, max(start, stop))), moved=False)

    def rank(self, name: str) -> int | None:
        return None

    def factors(self, name: str) -> Factors:
        raise ValueError(f"{name!r} is stored in full")

    def adapted(self, name: str) -> bool:
        return False

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.read(name)) for name in self.keys())

    def fitted(self, base: Source, layers: Mapping[str, Layer], part: Part | None = None) -> Expert:
        from merging.formats.fit import fit_dense  # which makes experts of this class

        return fit_dense(self, base, part)

    def problems(self, base: Source, common_rows: bool = False) -> list[str]:
        return self.fitted(base, {}).problems(base, common_rows)

    def with_ties(self, tied: Mapping[str, str]) -> Source:
        """The same tensors, of which other names count as one."""
        other = copy.copy(self)
        other.tied = dict(tied)
        return other

    def hash_files(self, path: str | Path, hashes: Hashes) -> None:
        """What lies in memory has no files."""


class Scaled:
    """An expert whose differences count `weight` times: W_0 + weight D."""

    def __init__(self, expert: Expert, weight: float) -> None:
        self.expert, self.scale = expert, weight

    def __getattr__(self, name: str) -> Any:  # all else is the expert's own
        return getattr(self.expert, name)

    def values(self, name: str, rows: slice | None = None) -> Values | None:
        values = self.expert.values(name, rows)
        return values and values._replace(scale=self.scale)

    def factors(self, name: str) -> Factors:
        factors = self.expert.factors(name)
        return factors._replace(scale=self.scale * factors.scale)

    def stamp(self) -> object:
        return self.scale, self.expert.stamp()


def apply(base: Mapping[str, Tensor], expert: Expert) -> dict[str, Tensor]:
    """The state dict of an expert: a dense one's as it is, an adapter's on top of its base's.

    base: of which an adapter's targets are needed, in the names it was opened with.
    """
    state = dict(base) if expert.partial else {}
    for name in expert.names():
        if (values := expert.values(name)) is not None:
            state[name] = values.weight(base[name]) if values.moved else values.tensor
    return state


def difference(W0: Tensor, expert: Expert, name: str) -> Tensor:
    """D = W - W0 of one tensor, float32 or better, as the base stores it; 0 if it is not changed.

    W0: the whole tensor of the base, on the CPU.
    """
    values = expert.values(name, slice(0, len(W0)) if W0.ndim else None)
    base = lift(W0)
    return torch.zeros_like(base) if values is None else values.difference(base)


def lift(tensor: Tensor) -> Tensor:
    """float64 stays; everything else is computed in float32 whatever it is stored in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()

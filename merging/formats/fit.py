"""Experts told in their base's names, and what the two do not have in common.

Public files of one model differ in the prefixes of their names, in buffers, in tied copies, in
heads and towers. What follows from the base is taken from it and noted; the rest is a problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from merging.experts import Dense, Expert, Source
from merging.formats.into import Part, parts_of
from merging.formats.names import apart, is_buffer, listed, renamed, top_parts
from merging.formats.shapes import compare_shapes
from merging.layers import Layer

_WINDOW = 1 << 24  # entries that are compared at a time


class Fitted(Dense):
    """A dense expert in its base's names: tensors that only one of the two has are left out.

    names: {the base's name: the expert's}. lacking: the base's that the expert should have.
    surplus: the expert's that the base should have. notes: what was left out or taken from the
    base, for a person.
    """

    def __init__(
        self,
        source: Source,
        names: Mapping[str, str],
        lacking: Sequence[str] = (),
        surplus: Sequence[str] = (),
        notes: Sequence[str] = (),
        *,
        partial: bool = False,
    ) -> None:
        self.source, self._names, self.path = source, dict(names), source.path
        self.lacking, self.surplus = list(lacking), list(surplus)
        self.notes, self.partial, self.quantised = list(notes), partial, source.quantised
        here = {theirs: ours for ours, theirs in self._names.items()}
        self.tied = {
            here[name]: here[first]
            for name, first in source.tied.items()
            if name in here and first in here
        }

    @property
    def bytes_read(self) -> int:
        return self.source.bytes_read

    def keys(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self._names[name])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.source.read(self._names[name], rows)

    def file(self, name: str) -> Path | None:
        return self.source.file(self._names[name])

    def stamp(self) -> object:
        return self.source.stamp(), sorted(self._names.items())  # `into` decides them

    def close(self) -> None:
        self.source.close()

    def problems(self, base: Source, common_rows: bool = False) -> list[str]:
        faults = []
        if self.lacking:
            is_are = "is" if len(self.lacking) == 1 else "are"
            faults.append(f"{_tensors(self.lacking)} of {base.path} {is_are} missing")
        if self.surplus:
            is_are = "is" if len(self.surplus) == 1 else "are"
            faults.append(f"{_tensors(self.surplus)} {is_are} not in {base.path}")
        for name in self.keys():
            faults += compare_shapes(name, self.shape(name), base, common_rows)
            mine, ours = self.dtype(name), base.dtype(name)
            if mine.is_floating_point != ours.is_floating_point:
                faults.append(f"tensor {name!r} is {mine}, the base's {ours}")
        return faults


def fit(
    base: Source,
    experts: Mapping[str, Expert],
    layers: Mapping[str, Layer] | None = None,
    into: Mapping[str, str] | None = None,
    model: nn.Module | Path | None = None,
) -> dict[str, Expert]:
    """The experts in the names and layouts of their base; those that are already stay as they are.

    layers: the base's linear layers, which say how a square matrix is stored.
    into: {expert: the part of the base that it is an expert of}; model: the base's, if it is known.
    """
    parts = parts_of(base, into or {}, experts, model)
    return {t: expert.fitted(base, layers or {}, parts.get(t)) for t, expert in experts.items()}


def fit_dense(expert: Dense, base: Source, part: Part | None) -> Fitted:
    """A dense expert in the names of its base, or of a part of it, and what does not match."""
    if part:
        return _fit_part(expert, base, part)
    ours, theirs = base.keys(), expert.keys()
    there = renamed(theirs, ours)  # {theirs: ours}
    names = _same_kind(there, base, expert)
    lost, more = _unplaced(ours, names, there, base, expert)
    kept, lacking = apart(lost, names)
    left, surplus = apart(more, there)
    identity = bool(there) and all(a == b for a, b in there.items())
    if identity:  # a head of its own, where the base ties
        surplus += [name for name in left if name.endswith("lm_head.weight")]
        left = [name for name in left if not name.endswith("lm_head.weight")]
    tied = _tied_heads(kept, names, base) if identity else {}
    names, kept = names | tied, [name for name in kept if name not in tied]
    notes = _rounding(expert, base)
    if kept:
        notes.append(f"has nothing of {_parts(kept)}: there the base's values count for it")
    if tied:
        notes.append(f"ties {listed(list(tied))} to its embedding, where the base does not")
    if left:
        notes.append(f"has {_parts(left)}, which the base has not: left out")
    return Fitted(expert, names, lacking, surplus, notes, partial=bool(kept))


def _fit_part(expert: Dense, base: Source, part: Part) -> Fitted:
    """An expert that is all of a part of the base and nothing else of it."""
    ours = list(part.tensors.values())
    there = part.names(expert)
    names = _same_kind(there, base, expert)
    lacking, more = _unplaced(ours, names, there, base, expert)
    tied = _tied_heads(lacking, names, base)
    names, lacking = names | tied, [name for name in lacking if name not in tied]
    notes = [*_rounding(expert, base), part.note(names, base)]
    if tied:
        notes.append(f"ties {listed(list(tied))} to its embedding, where the base does not")
    return Fitted(expert, names, lacking, more, notes, partial=True)


def _same_kind(there: Mapping[str, str], base: Source, expert: Source) -> dict[str, str]:
    """{the base's name: the expert's}, without buffers that differ."""
    return {
        name: other
        for other, name in there.items()
        if not _differing_buffer(name, other, base, expert)
    }


def _unplaced(
    ours: Sequence[str], names: Mapping[str, str], there: Mapping[str, str], base: Source,
    expert: Source,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """What the expert lacks of the base's names, and what it has more; copies are neither."""
    lost = [n for n in ours if n not in names and not is_buffer(n, base.shape(n))]
    lost = [n for n in lost if not _tied_to_any(n, names, base)]
    more = [n for n in expert.keys() if n not in there and not is_buffer(n, expert.shape(n))]
    return lost, [n for n in more if not _copy_of_any(n, there, expert)]


def _rounding(expert: Source, base: Source) -> list[str]:
    if not expert.quantised or base.quantised:
        return []
    return [f"is quantised ({expert.quantised}), and its rounding counts as a difference"]


def _tied_heads(lacking: Sequence[str], names: Mapping[str, str], base: Source) -> dict[str, str]:
    """{head that a whole model lacks: the expert's table that it is then tied to}."""
    tables = [name for name in names if "embed_tokens" in name or name.endswith("wte.weight")]
    return {
        head: names[table]
        for head in lacking
        for table in tables[:1]
        if head.endswith("lm_head.weight") and base.shape(head) == base.shape(table)
    }


def _differing_buffer(name: str, other: str, base: Source, expert: Source) -> bool:
    return is_buffer(name, base.shape(name)) and (
        base.shape(name) != expert.shape(other)
        or base.dtype(name).is_floating_point != expert.dtype(other).is_floating_point
    )


def _tied_to_any(name: str, names: Mapping[str, str], base: Source) -> bool:
    """Whether a tensor of the base is tied to one that the expert has, in memory or by value."""
    return base.tied.get(name) in names or any(
        same_values(base, name, other) for other in names if "embed" in other or "wte" in other
    )


def _copy_of_any(name: str, there: Mapping[str, str], expert: Source) -> bool:
    """Whether a tensor of an expert is a copy of one that the base has, in memory or by value."""
    if expert.tied.get(name, name) in {expert.tied.get(other, other) for other in there}:
        return True
    tables = [other for other in there if "embed" in other or "wte" in other or "shared" in other]
    return any(same_values(expert, name, other) for other in tables)


def same_values(source: Source, name: str, other: str) -> bool:
    """Whether two tensors of a source are equal in every value; read in windows, none kept."""
    if source.tied.get(name, name) == source.tied.get(other, other):
        return True
    shape = source.shape(name)
    if shape != source.shape(other) or source.dtype(name) != source.dtype(other) or not shape:
        return False
    step = max(1, _WINDOW // max(1, torch.Size(shape[1:]).numel()))
    windows = (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    return all(torch.equal(source.read(name, rows), source.read(other, rows)) for rows in windows)


def still_tied(base: Source, experts: Mapping[str, Expert]) -> dict[str, str]:
    """What of the base's ties no expert has broken: {name: the earlier name it shares with}.

    An expert breaks a tie that holds the two apart, with values of their own; one that holds one
    of the two keeps it. A copy that the base stores apart counts as tied where experts lack it.
    """
    stored = {n: o for n in base.keys() if (o := _stored_copy(n, base, experts))}
    return {
        name: first
        for name, first in (dict(base.tied) | stored).items()
        if not any(_breaks(expert, name, first) for expert in experts.values())
    }


def _stored_copy(name: str, base: Source, experts: Mapping[str, Expert]) -> str | None:
    """The table that a tensor is a stored copy of, for one that a dense expert lacks as a copy."""
    lacking = [e for e in experts.values() if not e.partial and name not in e.names()]
    if not lacking or not base.dtype(name).is_floating_point or name in base.tied:
        return None
    tables = [n for n in base.keys() if n != name and ("embed" in n or "wte" in n or "shared" in n)]
    return next((other for other in tables if same_values(base, name, other)), None)


def _breaks(expert: Expert, name: str, first: str) -> bool:
    held = expert.names()
    if name not in held:
        return False
    if expert.partial and first not in held:
        return True
    return first in held and not (isinstance(expert, Dense) and same_values(expert, name, first))


def notes(experts: Mapping[str, Expert]) -> Iterator[str]:
    """What was left out of experts, or taken from the base for them: a sentence each."""
    for task, expert in experts.items():
        for note in expert.notes:
            yield f"expert {task!r} ({expert.path}) {note}"


def _parts(names: Sequence[str]) -> str:
    parts = [f"{part} ({count})" for part, count in top_parts(names).items()]
    return ", ".join(parts[:6]) + (f" and {len(parts) - 6} parts more" if len(parts) > 6 else "")


def _tensors(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]!r}"
    return f"{len(names)} tensors ({listed(names)})"

"""Low-rank adapters as experts: factors by the base's names, whatever file they came from."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.experts import Source, Values
from merging.factors import Factors
from merging.formats.hashes import Hashes
from merging.formats.into import Part
from merging.formats.names import apart, listed, renamed, top_parts
from merging.formats.shapes import compare_shapes
from merging.layers import Layer


@dataclass(frozen=True)
class Pair:
    """Where the factors of one weight's difference, scale * B A, are stored.

    a: (r, d_in) or, of a convolution, (r, channels, kernel ...); b: (d_out, r) or (d_out, r, 1 ..).
    magnitude: the lengths of the weight's rows (DoRA): W = m (W_0 + s B A) / |W_0 + s B A|.
    table: the difference is of an embedding's transpose.
    """

    a: str
    b: str
    scale: float
    magnitude: str | None = None
    table: bool = False


class Adapter:
    """LoRA factors by base weight name: the expert's weight is W + scale * B @ A (an `Expert`).

    pairs, dense: {base weight name: where it is stored}; `dense` are tensors saved in full.
    config: the settings it was saved with. `base_name` is the base the file names.
    flat: names have "_" for "." and are told apart by the base's own.

    `fitted` gives the adapter in a base's names and layouts. Before, matrices are taken to be
    stored (d_in, d_out) where the settings say so (`fan_in_fan_out`, as of GPT-2's Conv1D).
    `factors` are those of (d_out, d_in) all the same.
    """

    partial = is_adapter = True

    def __init__(
        self,
        path: str,
        source: Source,
        pairs: Mapping[str, Pair],
        dense: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        flat: bool = False,
    ) -> None:
        self.path, self.source, self.config = path, source, dict(config or {})
        self.pairs, self.flat = dict(pairs), flat
        self.dense = {name: source.read(key) for name, key in (dense or {}).items()}
        name = self.config.get("base_model_name_or_path")
        self.base_name = name if isinstance(name, str) and name else None
        self.transposed = bool(self.config.get("fan_in_fan_out"))
        self.notes: Sequence[str] = []
        self.unknown: list[str] = []  # targets that the base has not
        self.own_names: dict[str, str] = {}  # {the base's name: the adapter's}, where they differ
        self._base: Source | None = None
        self._stored_back: dict[str, bool] = {}

    @property
    def bytes_read(self) -> int:
        return self.source.bytes_read

    def hash_files(self, path: str | Path, hashes: Hashes) -> None:
        """As `Source.hash_files`."""
        self.source.hash_files(path, hashes)

    @property
    def hub_base(self) -> bool:
        """Whether `base_name` is an "owner/name" id, comparable between adapters."""
        return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.base_name or ""))

    @property
    def stored_back(self) -> bool:
        """Whether any of its matrices is stored (d_in, d_out) in the base."""
        return any(self._back(name) and not pair.table for name, pair in self.pairs.items())

    def stamp(self) -> object:
        """Changes whenever the weights or their scales may have."""
        return self.source.stamp(), sorted((n, pair.scale) for n, pair in self.pairs.items())

    def keys(self) -> list[str]:
        return list(self.pairs)

    def __contains__(self, name: str) -> bool:
        return name in self.pairs

    def names(self) -> list[str]:
        return [*self.pairs, *self.dense]

    def _matrix(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of a difference, all of a kernel's inputs in one."""
        a, b = self.source.shape(self.pairs[name].a), self.source.shape(self.pairs[name].b)
        return b[0], torch.Size(a[1:]).numel()

    def _back(self, name: str) -> bool:
        return self.pairs[name].table or self._stored_back.get(name, self.transposed)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base stores the tensor."""
        if name in self.dense:
            return tuple(self.dense[name].shape)
        kernel = self.source.shape(self.pairs[name].a)[2:]
        if kernel:
            return (self._matrix(name)[0], *self.source.shape(self.pairs[name].a)[1:])
        return self._matrix(name)[::-1] if self._back(name) else self._matrix(name)

    def rank(self, name: str) -> int | None:
        if name in self.dense:
            return None
        if name not in self.pairs:
            return 0
        pair, shape = self.pairs[name], self.source.shape(self.pairs[name].a)
        return None if pair.magnitude or len(shape) > 2 else shape[0]

    def adapted(self, name: str) -> bool:
        return name not in self.dense

    def factors(self, name: str) -> Factors:
        """A (r, d_in) and B (d_out, r) in float32, and the scale; d_out of a table is its rows."""
        a, b, scale = self._held(name)
        return Factors(b.mT, a.mT, scale) if self.pairs[name].table else Factors(a, b, scale)

    def _held(self, name: str) -> Factors:
        """The factors as the file has them: of an embedding those of its transpose."""
        pair = self.pairs[name]
        a, b = (self.source.read(key).float().flatten(1) for key in (pair.a, pair.b))
        return Factors(a, b, pair.scale)

    def delta(self, name: str, rows: slice = slice(None)) -> Tensor:
        """scale * B @ A in float32, or those rows of it, laid out as the base stores the weight."""
        a, b, scale = self._held(name)
        left, right = (a.mT, b.mT) if self._back(name) else (b, a)
        moved = scale * (left[rows] @ right)
        return moved.reshape(-1, *self.shape(name)[1:])

    def values(self, name: str, rows: slice | None = None) -> Values | None:
        if name in self.pairs:
            if magnitude := self.pairs[name].magnitude:
                return Values(self._rescaled(name, magnitude, rows), moved=False)
            return Values(self.delta(name, rows or slice(None)), moved=True)
        if name not in self.dense:
            return None
        tensor = self.dense[name]
        return Values(tensor[rows] if rows and tensor.ndim else tensor, moved=False)

    def _rescaled(self, name: str, magnitude: str, rows: slice | None) -> Tensor:
        """DoRA's weight in float32: m (W_0 + s B A) / |W_0 + s B A|, row by row of (d_out, d_in).

        Source: arXiv 2402.09353, eq. 5; peft's DoraLinearLayer.
        """
        if self._base is None:
            raise ValueError("magnitudes are those of whole weights: fit the adapter to its base")
        lengths = self.source.read(magnitude).float().reshape(-1)
        if self._back(name):  # a row of (d_out, d_in) is a column of what is stored
            whole = self._base.read(name).float() + self.delta(name)
            norms = self._directed(whole.norm(dim=0), name)
            return whole.mul(lengths / norms)[rows or slice(None)]
        chosen = rows or slice(None)
        moved = self._base.read(name, rows).float() + self.delta(name, chosen)
        norms = self._directed(moved.norm(dim=1), name)
        return moved.mul((lengths[chosen] / norms)[:, None])

    def _directed(self, norms: Tensor, name: str) -> Tensor:
        """Lengths of rows, none of which may be 0: nothing says where DoRA's length points."""
        if not norms.all():
            raise InputError(
                f"{self.path}: {int((norms == 0).sum())} outputs of {name!r} are 0 in base and "
                "adapter together, and have no direction that DoRA's magnitude could scale"
            )
        return norms

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        factors = ((name, x) for name in self.keys() for x in self.factors(name)[:2])
        lengths = (
            (f"{name} (magnitudes)", self.source.read(pair.magnitude))
            for name, pair in self.pairs.items()
            if pair.magnitude
        )
        return itertools.chain(factors, lengths, self.dense.items())

    def fitted(
        self, base: Source, layers: Mapping[str, Layer], part: Part | None = None
    ) -> Adapter:
        """The adapter in the base's names, with the base's own layout of each matrix.

        part: of the base, if it is an adapter of that alone; None: told by comparing all names.
        What belongs to a head or a tower that the base lacks is left out, and noted.
        """
        ours = base.keys()
        if part:
            there = part.names(self)
        else:
            there = self._flat_names(ours) if self.flat else renamed(self.names(), ours)
        left, unknown = apart([n for n in self.names() if n not in there], there.values())
        fitted = copy.copy(self)
        fitted.pairs = {there[n]: pair for n, pair in self.pairs.items() if n in there}
        fitted.dense = {there[n]: tensor for n, tensor in self.dense.items() if n in there}
        fitted.own_names = {
            new: self.own_names.get(old, old) for old, new in there.items() if old != new
        } or self.own_names
        fitted.unknown, fitted._base = unknown, base
        if left:
            parts = ", ".join(f"{top} ({n})" for top, n in list(top_parts(left).items())[:6])
            fitted.notes = [f"has {parts}, which the base has not: left out"]
        if part:
            fitted.notes = [*fitted.notes, part.note(there, base)]
        fitted._stored_back = {n: fitted._is_back(n, base, layers) for n in fitted.pairs}
        return fitted

    def _flat_names(self, ours: list[str]) -> dict[str, str]:
        """{own name: the base's} for names in which "_" stands for "." (kohya's)."""
        flat = {name.removesuffix(".weight").replace(".", "_"): name for name in ours}
        ends = {f"_{short}": name for short, name in flat.items()}
        matched = {}
        for name in self.names():
            short = re.sub(r"^(lora|lycoris)_(unet|te\d?|transformer|prior_unet)_", "", name)
            short = short.removesuffix(".weight")
            if short in flat:
                matched[name] = flat[short]
            elif len(whole := [n for end, n in ends.items() if end.endswith(f"_{short}")]) == 1:
                matched[name] = whole[0]
        return matched

    def _is_back(self, name: str, base: Source, layers: Mapping[str, Layer]) -> bool:
        """Whether the base stores a matrix (d_in, d_out): its layer says, else its shape.

        The settings' own word is not asked: peft corrects it on loading, too.
        """
        if name in layers:
            return layers[name].transposed
        d_out, d_in = self._matrix(name)
        if d_out != d_in:
            return base.shape(name) == (d_in, d_out)
        return self.transposed and (not layers or any(x.transposed for x in layers.values()))

    def problems(self, base: Source, common_rows: bool = False) -> list[str]:
        """What keeps it from being applied to `base`: absent targets and other shapes."""
        faults, ours = [], set(base.keys())
        if unknown := [*self.unknown, *(name for name in self.names() if name not in ours)]:
            target = "the target" if len(unknown) == 1 else f"{len(unknown)} targets:"
            is_are = "is" if len(unknown) == 1 else "are"
            faults.append(f"{target} {listed(unknown)} {is_are} not in {base.path}")
        for name in self.names():
            if name in ours:
                faults += compare_shapes(name, self.shape(name), base, common_rows)
        for name, pair in self.pairs.items():
            if pair.magnitude and self.source.shape(pair.magnitude) not in _lengths(self, name):
                faults.append(f"the magnitudes of {name!r} do not fit its rows")
        return faults

    def close(self) -> None:
        self.source.close()


def _lengths(adapter: Adapter, name: str) -> list[tuple[int, ...]]:
    rows = adapter._matrix(name)[0]
    return [(rows,), (rows, 1), (1, rows)]


def joint_settings(adapters: Mapping[str, Adapter], base: str) -> dict[str, Any]:
    """What the adapter_config.json of a merge of adapters says, ranks and scales aside.

    base: what the merge belongs to where the adapters do not agree on a name.
    Raises InputError for what one adapter could not hold.
    """
    configs = [adapter.config for adapter in adapters.values()]
    saved = sorted({module for config in configs for module in config.get("modules_to_save") or ()})
    for task, adapter in adapters.items():
        for name, pair in adapter.pairs.items():
            refusal = (
                f"expert {task!r} ({adapter.path}): the difference of {name!r} cannot be written"
            )
            if not name.endswith(".weight"):
                raise InputError(f"{name!r} of a packed attention cannot be written as an adapter")
            if adapter.rank(name) is None or pair.table:
                kind = "with DoRA's magnitudes" if pair.magnitude else "of a convolution or table"
                raise InputError(f"{refusal} as an adapter {kind}", hint="use form=dense")
        for name in adapter.dense:
            if not any(f".{module}." in f".{name}" for module in saved):
                raise InputError(
                    f"expert {task!r} ({adapter.path}) trained {name!r}, which is no factor and "
                    "in none of its modules_to_save: an adapter of the merge cannot hold it"
                )
    names = {adapter.base_name for adapter in adapters.values()}
    kinds = {config.get("task_type") for config in configs}
    return {
        "base_model_name_or_path": (len(names) == 1 and names.pop()) or base,
        "task_type": kinds.pop() if len(kinds) == 1 else None,
        "fan_in_fan_out": any(adapter.stored_back for adapter in adapters.values()),
        "modules_to_save": saved or None,
    }

"""Checkpoints as lazily read, named tensors: safetensors and PyTorch files, shards, adapters.

`open_checkpoint(path)` looks at headers only. Nothing in a file is ever executed, no name in a
file can point outside its folder, and whatever is wrong is an InputError naming file and tensor.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from merging.errors import InputError
from merging.formats.peft import Adapter
from merging.formats.pickles import pickled_slots
from merging.formats.slots import Slot, read_json, safetensors_slots
from merging.formats.writer import Writer, write_adapter

__all__ = [
    "Adapter",
    "Checkpoint",
    "NotFinite",
    "Source",
    "StateDict",
    "Writer",
    "check_adapter",
    "check_finite",
    "not_finite",
    "open_checkpoint",
    "problems",
    "write_adapter",
]

# File names a folder is searched for, in this order: transformers', then open_clip's.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


class Source(Protocol):
    """Named tensors, read one by one.

    `tied` maps a name to the earlier name whose memory it shares: merge that one only.
    """

    path: str
    bytes_read: int
    tied: Mapping[str, str]

    def keys(self) -> list[str]:
        """Names in file order."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or those rows of its first dimension: on the CPU, in the stored dtype."""
        ...

    def close(self) -> None: ...


class StateDict:
    """A `Source` over tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], path: str = "state dict") -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"{path}: entry {name!r} is a {type(tensor).__name__}, expected a tensor"
                )
        self.path, self.bytes_read, self._tensors = path, 0, tensors
        self.tied = _tied({k: _identity(t) for k, t in tensors.items() if t.numel()})

    def keys(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        tensor = (tensor if rows is None else tensor[rows]).cpu()
        self.bytes_read += tensor.nbytes
        return tensor

    def close(self) -> None:
        pass


class Checkpoint:
    """A `Source` over one or more files, each opened once; safe to read from several threads.

    A file that changes after its header was read is an InputError, not silent nonsense.
    """

    def __init__(self, path: Path, slots: Mapping[str, Slot]) -> None:
        if not slots:
            raise InputError(f"{path} holds no tensors")
        self.path, self.bytes_read, self._slots = str(path), 0, slots
        self.tied = _tied({k: s for k, s in slots.items() if s.nbytes})
        self._stamps = {file: _stamp(file) for file in {s.path: None for s in slots.values()}}
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def keys(self) -> list[str]:
        return list(self._slots)

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slots[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._slots[name].dtype

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._slots[name].path

    def stamp(self) -> list[tuple[str, int, int]]:
        """Path, size and time of change of each file: changes whenever the content may have."""
        return [(str(file.absolute()), *stamp) for file, stamp in sorted(self._stamps.items())]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        slot = self._slots[name].rows(rows)
        with self._lock:
            if slot.path not in self._files:
                self._files[slot.path] = os.open(slot.path, os.O_RDONLY)
            file = self._files[slot.path]
            self.bytes_read += slot.nbytes
        if _stamp(file) != self._stamps[slot.path]:
            raise InputError(f"{slot.path} changed while it was being read")
        return slot.load(file)

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _stamp(file: Path | int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _identity(tensor: Tensor) -> tuple:
    """What two names of one and the same tensor have in common."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _tied(identities: Mapping[str, object]) -> dict[str, str]:
    """name -> the first name of the same identity, for all names but the first."""
    first: dict[object, str] = {}
    owners = {name: first.setdefault(identity, name) for name, identity in identities.items()}
    return {name: owner for name, owner in owners.items() if name != owner}


def open_checkpoint(path: str | Path) -> Checkpoint | Adapter:
    """A checkpoint file or folder as a lazily read source.

    path: a .safetensors file; a .bin, .pt or .pth file with a state dict (bare, or under
        "state_dict", "model_state_dict", "model" or "module"; a "module." prefix common to all
        names is dropped) or a whole pickled nn.Module; an index .json; or a folder with one of
        `WEIGHT_FILES`, a PEFT LoRA adapter, or a single weight file of any name.
    Raises InputError for anything unreadable, inconsistent or hostile.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist", hint="expected a checkpoint file or folder")
        if path.is_dir() and (path / "adapter_config.json").exists():
            return _open_adapter(path)
        file = _weight_file(path) if path.is_dir() else path
        return Checkpoint(path, (_indexed_slots if file.suffix == ".json" else _slots)(file))
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from None


def _weight_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    found = [p for p in sorted(folder.iterdir()) if p.suffix in suffixes]
    if len(found) != 1:
        listed = ", ".join(p.name for p in found) or "none"
        raise InputError(
            f"{folder} should hold model.safetensors, an index or exactly one weight file, "
            f"it has: {listed}"
        )
    return found[0]


def _slots(path: Path) -> dict[str, Slot]:
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return (safetensors_slots if path.suffix == ".safetensors" else pickled_slots)(path)


def _indexed_slots(index: Path) -> dict[str, Slot]:
    """The tensors of all shards; index and shards must list the same names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map from tensor names to shard files")
    present = {p.name for p in index.parent.iterdir()}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or shard == "..":
            raise InputError(
                f"{index}: tensor {name!r} is placed in {shard!r}, "
                "expected the name of a file in the same folder"
            )
        if shard not in present:
            raise InputError(f"{index}: the shard {shard!r} of tensor {name!r} is missing")
    slots: dict[str, Slot] = {}
    for shard in sorted(set(weight_map.values())):
        for name, slot in _slots(index.parent / shard).items():
            if name in slots:
                raise InputError(
                    f"{index}: tensor {name!r} is in {slots[name].path.name} and {shard}"
                )
            if weight_map.get(name) != shard:
                raise InputError(f"{index} does not list tensor {name!r} of {shard}")
            slots[name] = slot
    if absent := [name for name in weight_map if name not in slots]:
        raise InputError(
            f"{index} places tensor {absent[0]!r} in {weight_map[absent[0]]}, "
            f"which does not hold it ({len(absent)} such tensors)"
        )
    return slots


def _open_adapter(folder: Path) -> Adapter:
    config = folder / "adapter_config.json"
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            source = Checkpoint(folder / name, _slots(folder / name))
            return Adapter(folder, read_json(config), source)
    raise InputError(f"{folder} has an adapter_config.json but no adapter_model.safetensors")


def problems(
    base: Source, experts: Mapping[str, Source | Adapter], *, common_rows: bool = False
) -> list[str]:
    """Everything that keeps the experts from being merged into the base, one sentence each.

    Read from headers only: missing and additional tensors, shapes (vocabulary sizes among them),
    kinds of dtype, adapter targets, adapters of different bases. A tensor that one side saved
    and the other dropped as a tied copy is no problem, nor, with `common_rows`, are embeddings
    and heads of different vocabularies. Empty means mergeable.
    """
    found = []
    for task, expert in experts.items():
        check = check_adapter if isinstance(expert, Adapter) else _check_dense
        told = check(expert, base, common_rows)
        found += [f"expert {task!r} ({expert.path}): {problem}" for problem in told]
    hubs = {t: e.base_name for t, e in experts.items() if isinstance(e, Adapter) and e.hub_base}
    if len(set(hubs.values())) > 1:
        trained = ", ".join(f"{task!r} on {name}" for task, name in hubs.items())
        found.append(f"the adapters were trained on different bases: {trained}")
    return found


def _check_dense(expert: Source, base: Source, common_rows: bool) -> list[str]:
    ours, theirs = dict.fromkeys(base.keys()), dict.fromkeys(expert.keys())
    known = {expert.tied.get(name, name) for name in theirs if name in ours}
    found = [
        f"tensor {name!r} of {base.path} is missing"
        for name in ours
        if name not in theirs and base.tied.get(name) not in theirs
    ]
    for name in theirs:
        if name not in ours:
            if expert.tied.get(name, name) not in known:
                found.append(f"tensor {name!r} is not in {base.path}")
            continue
        found += _compare(name, expert.shape(name), base, common_rows)
        if expert.dtype(name).is_floating_point != base.dtype(name).is_floating_point:
            found.append(f"tensor {name!r} is {expert.dtype(name)}, the base's {base.dtype(name)}")
    return found


def check_adapter(adapter: Adapter, base: Source, common_rows: bool = False) -> list[str]:
    """What keeps an adapter from being applied to `base`: absent targets and other shapes."""
    shapes = {n: adapter.shape(n)[:: -1 if adapter.transposed else 1] for n in adapter.keys()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.dense.items()}
    found, ours = [], set(base.keys())
    for name, shape in shapes.items():
        if name in ours:
            found += _compare(name, shape, base, common_rows)
        else:
            found.append(f"the target {name!r} is not in {base.path}")
    return found


def _compare(name: str, shape: tuple[int, ...], base: Source, common_rows: bool) -> list[str]:
    expected = base.shape(name)
    if shape == expected:
        return []
    rows_only = 0 < len(shape) == len(expected) and shape[1:] == expected[1:]
    if rows_only and any(word in name for word in ("embed", "head", "wte", "shared")):
        if common_rows:
            return []
        return [f"tensor {name!r} has a vocabulary of {shape[0]}, the base's has {expected[0]}"]
    return [f"tensor {name!r} has shape {list(shape)}, the base's has {list(expected)}"]


class NotFinite(InputError):
    """A tensor has a value that is NaN or infinite."""


def check_finite(
    tensor: Tensor,
    name: str,
    path: str,
    hint: str = "the checkpoint is damaged or its training diverged",
) -> None:
    """Raise NotFinite if any value is NaN or infinite, naming the first one's position."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    low, high = values.aminmax()  # one pass, and NaN propagates
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = (~torch.isfinite(values)).nonzero()
    raise NotFinite(
        f"{path}: tensor {name!r} has {len(bad)} values that are not finite, "
        f"the first at {bad[0].tolist()}",
        hint,
    )


def not_finite(source: Source | Adapter, label: str) -> list[str]:
    """A sentence for each tensor with values that are not finite; reads every tensor."""
    if isinstance(source, Adapter):
        factors = ((name, x) for name in source.keys() for x in source.factors(name)[:2])
        tensors = itertools.chain(factors, source.dense.items())
    else:
        tensors = ((name, source.read(name)) for name in source.keys())
    found = []
    for name, tensor in tensors:
        try:
            check_finite(tensor, name, f"{label} ({source.path})")
        except NotFinite as error:
            found.append(error.message)
    return found

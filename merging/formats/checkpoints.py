"""Checkpoints as lazily read, named tensors: safetensors and PyTorch files, shards, adapters.

`open_checkpoint(path)` looks at headers only. Nothing in a file is ever executed, no name in a
file can point outside its folder, and whatever is wrong is an InputError naming file and tensor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.experts import Dense
from merging.formats.adapter import Adapter
from merging.formats.folders import WEIGHT_FILES, indexed_slots, weight_file
from merging.formats.hashes import Hashes
from merging.formats.json_files import read_json
from merging.formats.lora_files import is_lora, open_lora
from merging.formats.peft import open_peft
from merging.formats.quantised import dequantised
from merging.formats.readers import file_slots
from merging.formats.slots import Slot

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


class StateDict(Dense):
    """A `Source` over tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], path: str = "state dict") -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"{path}: entry {name!r} is a {type(tensor).__name__}, expected a tensor"
                )
        self.path, self._bytes_read, self._tensors = path, 0, tensors
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
        self._bytes_read += tensor.nbytes
        return tensor

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def file(self, name: str) -> None:
        return None

    def stamp(self) -> object:
        return [(name, _identity(tensor)) for name, tensor in self._tensors.items()]

    def close(self) -> None:
        pass


class Checkpoint(Dense):
    """A `Source` over one or more files, each opened once; safe to read from several threads.

    `quantised` names the format of weights that are worked out when they are read, in float32; ""
    where all are stored as they are. A file that changes after its header was read is an
    InputError, not silent nonsense.

    settings: how the weights are quantised, as the model's config.json says.
    """

    def __init__(
        self, path: Path, slots: Mapping[str, Slot], settings: Mapping[str, Any] | None = None
    ) -> None:
        if not slots:
            raise InputError(f"{path} holds no tensors")
        slots, self.quantised = dequantised(slots, path, settings or {})
        self.path, self._bytes_read, self._slots = str(path), 0, slots
        self.tied = _tied({k: s for k, s in slots.items() if s.nbytes})
        files = {file: None for slot in slots.values() for file in slot.files}
        self._stamps = {file: _stamp(file) for file in files}
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._hashes: Hashes | None = None

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

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
        return self._slots[name].files[0]

    def stamp(self) -> list[tuple[str, int, int]]:
        """Path, size and time of change of each file: changes whenever the content may have."""
        return [(str(file.absolute()), *stamp) for file, stamp in sorted(self._stamps.items())]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        slot = self._slots[name]
        slot = slot if rows is None else slot.rows(rows)
        with self._lock:
            self._bytes_read += slot.nbytes
        tensor = slot.load(self._opened)
        if self._hashes:
            self._hashes.see(slot, tensor)
        return tensor

    def hash_files(self, path: str | Path, hashes: Hashes) -> None:
        """As `Source.hash_files`."""
        self._hashes = hashes
        hashes.watch(path, self._opened, *self._stamps)

    def _opened(self, path: Path) -> int:
        """The file's descriptor, after checking that the file is still what it was."""
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            file = self._files[path]
        if _stamp(file) != self._stamps[path]:
            raise InputError(f"{path} changed while it was being read")
        return file

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


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """What two names of one and the same tensor have in common."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _tied(identities: Mapping[str, object]) -> dict[str, str]:
    """name -> the first name of the same identity, for all names but the first."""
    first: dict[object, str] = {}
    owners = {name: first.setdefault(identity, name) for name, identity in identities.items()}
    return {name: owner for name, owner in owners.items() if name != owner}


def open_checkpoint(path: str | Path) -> Checkpoint | Adapter:
    """A checkpoint file or folder as a lazily read source.

    path: a .safetensors file; a .bin, .pt, .pth or .ckpt file with a state dict (bare, or under a
        key; a "module." prefix common to all names is dropped) or a whole pickled nn.Module; an
        index .json; a LoRA file in kohya's or diffusers' keys; or a folder with one of
        `WEIGHT_FILES`, a PEFT LoRA adapter, or a single weight file of any name.
    Raises InputError for anything unreadable, inconsistent or hostile.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist", hint="expected a checkpoint file or folder")
        if (folder := _adapter_folder(path)) is not None:
            return _open_adapter(folder)
        file = weight_file(path) if path.is_dir() else path
        slots = (indexed_slots if file.suffix == ".json" else file_slots)(file)
        if is_lora(slots):
            return open_lora(path, Checkpoint(path, slots))
        return Checkpoint(path, slots, _quantisation(file.parent))
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from None


def open_base(path: str | Path) -> Checkpoint:
    """A whole checkpoint, as `open_checkpoint` reads it; InputError for an adapter."""
    source = open_checkpoint(path)
    if isinstance(source, Adapter):
        source.close()
        raise InputError(f"base {path} is an adapter, expected a whole checkpoint")
    return source


def _adapter_folder(path: Path) -> Path | None:
    """The folder of a peft adapter that a path is, or is the weight file of."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.stem == "adapter_model"
    if not named or not (folder / "adapter_config.json").exists():
        return None
    held = any((folder / name).is_file() for name in ADAPTERS)
    # merging an adapter into its model leaves the configuration behind
    whole = not held and any((folder / name).is_file() for name in WEIGHT_FILES)
    return None if whole else folder


def _quantisation(folder: Path) -> dict[str, Any]:
    """What the config.json beside weights says of how they are quantised."""
    config = folder / "config.json"
    settings = read_json(config).get("quantization_config") if config.is_file() else None
    return settings if isinstance(settings, dict) else {}


def _open_adapter(folder: Path) -> Adapter:
    config = folder / "adapter_config.json"
    for name in ADAPTERS:
        if (folder / name).is_file():
            source = Checkpoint(folder / name, file_slots(folder / name))
            return open_peft(folder, read_json(config), source)
    raise InputError(f"{folder} has an adapter_config.json but no adapter_model.safetensors")

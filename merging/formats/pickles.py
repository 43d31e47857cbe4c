"""PyTorch's pickled files, read without running anything they ask for.

`merging.formats.unpickler` interprets the pickle. Here its tensors are found by the names of a
state dict, and become places in the file.
"""

from __future__ import annotations

import io
import mmap
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merging.errors import InputError
from merging.formats.slots import Strided
from merging.formats.unpickler import Global, Interpreter, Storage, StoredTensor, Stub

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_WRAPPED_LIMIT = 4  # a state dict in a wrapper in a wrapper ...
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_WALK_LIMIT = 500_000  # entries visited in a module; sharing could make a small file endless
_DEPTH_LIMIT = 100
_NAME_LIMIT = 10_000  # characters


def pickled_slots(path: Path) -> dict[str, Strided]:
    """The tensors of a .pt, .pth or .bin file by state dict name, in file order.

    Takes what torch.save writes, in its zip and its older format: a state dict, a state dict
    under one of `WRAPPERS` or under any other key that is the only one, or a whole nn.Module. What
    lies beside a wrapped state dict (epoch, optimizer, arguments) is left out; inside it every
    entry must be a dense tensor.
    Raises InputError for everything else, and for a file that asks for code to be run.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        root, places = (_read_zip if zipped else _read_legacy)(path)
        entries = _named_entries(root, path)
    except InputError:
        raise
    except Exception as error:  # a malformed pickle can raise anything at all
        reason = f"{type(error).__name__}: {error}"[:200]
        raise InputError(
            f"{path} is not a readable PyTorch checkpoint ({reason})",
            hint="expected a file written by torch.save; save it again as safetensors",
        ) from None
    slots = {name: _locate(tensor, name, path, places) for name, tensor in entries.items()}
    return dict(sorted(slots.items(), key=lambda item: item[1].offset))


def _read_zip(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The pickled object, and (offset, bytes) of each storage in the file."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {info.filename: info for info in archive.infolist()}
        roots = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1 or any(name.endswith("/constants.pkl") for name in records):
            raise InputError(
                f"{path} is no checkpoint written by torch.save (a TorchScript or other archive)",
                hint="save its state_dict() with torch.save or safetensors",
            )
        folder = roots[0].removesuffix("data.pkl")
        extents = {name: _extent(info, file, path) for name, info in records.items()}

        def content(name: str) -> bytes:
            offset, size = extents[name]
            return os.pread(file.fileno(), size, offset)

        if (order := folder + "byteorder") in records and content(order) != b"little":
            raise InputError(f"{path} was written on a big-endian machine, expected little-endian")
        root = Interpreter(io.BytesIO(content(roots[0])), path).load()
    data = folder + "data/"
    return root, {n.removeprefix(data): e for n, e in extents.items() if n.startswith(data)}


def _extent(info: zipfile.ZipInfo, file: io.BufferedReader, path: Path) -> tuple[int, int]:
    """(offset, bytes) of a record's data; torch stores records uncompressed."""
    header = os.pread(file.fileno(), 30, info.header_offset)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    offset = info.header_offset + 30 + names
    plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    end = offset + info.file_size
    if not plain or header[:4] != b"PK\x03\x04" or end > os.fstat(file.fileno()).st_size:
        raise InputError(f"{path}: the record {info.filename!r} is compressed, cut or damaged")
    return offset, info.file_size


def _read_legacy(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The format before torch 1.6: five pickles, then each storage's length and bytes."""
    if not path.stat().st_size:
        raise InputError(f"{path} is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if Interpreter(data, path).load() != _LEGACY_MAGIC:
            raise InputError(
                f"{path} is a pickle, but no checkpoint written by torch.save",
                hint="save the model's state_dict() with torch.save or safetensors",
            )
        for _ in range(2):  # protocol version, byte order and type sizes
            Interpreter(data, path).load()
        interpreter = Interpreter(data, path)
        root = interpreter.load()
        places = {}
        for key in Interpreter(data, path).load():
            if not isinstance(key, str):  # looking up a nested tuple could take forever
                raise ValueError("a storage without a name")
            itemsize = interpreter.storages[key].itemsize
            nbytes = int.from_bytes(data.read(8), "little") * itemsize
            places[key] = data.tell(), nbytes
            if data.tell() + nbytes > len(data):
                raise InputError(f"{path} is truncated in storage {key!r}")
            data.seek(nbytes, os.SEEK_CUR)
        return root, places


def _named_entries(root: Any, path: Path) -> dict[str, StoredTensor]:
    """State dict names -> tensors, from a state dict, a wrapped one, or a module."""
    for _ in range(_WRAPPED_LIMIT):
        if isinstance(root, dict):
            root = _unwrapped(root, path)
    if _is_module(root):
        root = dict(_walk(root, path))
    if not isinstance(root, dict):
        raise InputError(
            f"{path} holds a {_kind(root)}, expected a state dict or an nn.Module",
            hint="save the model's state_dict() with torch.save or safetensors",
        )
    # what modules beyond their tensors save, such as the scaling history of a linear layer in FP8
    extra = {n for n in root if isinstance(n, str) and n.endswith("_extra_state")}
    root = {name: value for name, value in root.items() if name not in extra}
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            label = repr(name) if isinstance(name, str) else f"of a {_kind(name)} as its name"
            raise InputError(
                f"{path}: entry {label} is a {_kind(value)}, expected a dense tensor",
                hint="save the model's state_dict() alone, or under 'state_dict'",
            )
    if root and all(name.startswith("module.") for name in root):  # DistributedDataParallel
        return {name.removeprefix("module."): tensor for name, tensor in root.items()}
    tensors: dict[str, StoredTensor] = root
    return tensors


def _unwrapped(root: dict[Any, Any], path: Path) -> Any:
    """What a wrapper holds: a state dict under one of `WRAPPERS`, or the only one under any key."""
    known = [root[k] for k in WRAPPERS if k in root and isinstance(root[k], dict | Stub)]
    for value in known:
        if isinstance(value, dict) or _is_module(value):
            return value
    if any(isinstance(value, StoredTensor) for value in root.values()):
        return root
    held = {key: value for key, value in root.items() if _holds_tensors(value)}
    if len(held) > 1:
        listed = ", ".join(sorted(repr(str(key))[:80] for key in held))
        raise InputError(
            f"{path} holds {len(held)} state dicts: {listed}",
            hint="save the one that is meant alone with torch.save or safetensors",
        )
    return next(iter(held.values()), root)


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    """Whether a value is a module or a state dict, perhaps wrapped (an optimizer's is none)."""
    if _is_module(value):
        return True
    if not isinstance(value, dict) or not value or not all(isinstance(k, str) for k in value):
        return False
    if any(isinstance(v, StoredTensor) for v in value.values()):
        return True
    plain = depth and "param_groups" not in value and len(value) < 100
    return bool(plain) and any(_holds_tensors(v, depth - 1) for v in value.values())


def _kind(value: Any) -> str:
    """What a message calls a value; never its repr, which shared parts can make endless."""
    names = {StoredTensor: "tensor", Global: "global", Storage: "storage"}
    return value.kind if isinstance(value, Stub) else names.get(type(value), type(value).__name__)


def _is_module(value: Any) -> bool:
    return isinstance(value, Stub) and {"_parameters", "_modules"} <= value.state.keys()


def _walk(root: Stub, path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of root.state_dict(), by its naming rules."""
    waiting, visited = [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        parameters, buffers, children = (
            module.state.get(k) or {} for k in ("_parameters", "_buffers", "_modules")
        )
        transient = module.state.get("_non_persistent_buffers_set") or []
        visited += 1 + len(parameters) + len(buffers) + len(children) + len(transient)
        if visited > _WALK_LIMIT or prefix.count(".") > _DEPTH_LIMIT or len(prefix) > _NAME_LIMIT:
            raise InputError(f"{path}: its module is nested without end")
        dropped = {name for name in transient if isinstance(name, str)}
        kept = {name: buffer for name, buffer in buffers.items() if name not in dropped}
        for name, tensor in (*parameters.items(), *kept.items()):
            if tensor is not None:
                yield prefix + name, tensor
        for name, child in reversed(children.items()):
            if _is_module(child):
                waiting.append((f"{prefix}{name}.", child))
            elif child is not None:
                raise InputError(f"{path}: {prefix}{name} is a {_kind(child)}, expected a module")


def _locate(
    tensor: StoredTensor, name: str, path: Path, places: Mapping[str, tuple[int, int]]
) -> Strided:
    """The tensor's place in the file, after checking that it lies inside its storage."""
    storage = tensor.storage
    start, stored = places.get(storage.key, (0, -1))
    start += storage.start + tensor.offset * tensor.dtype.itemsize
    slot = Strided(path, tensor.dtype, tensor.shape, tensor.strides, start)
    extent = (tensor.offset + slot.span) * tensor.dtype.itemsize
    if extent > storage.nbytes or storage.start + storage.nbytes > stored:
        raise InputError(f"{path}: tensor {name!r} lies outside the data stored for it")
    if slot.nbytes > storage.nbytes:
        raise InputError(f"{path}: tensor {name!r} repeats its data; save it with .contiguous()")
    return slot

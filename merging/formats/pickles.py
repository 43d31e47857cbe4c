"""PyTorch's pickled files, read without running anything they ask for.

A pickle is a program. Here it is interpreted with every global replaced by its name: tensors
become places in the file (`Slot`), modules become inert stubs whose `_parameters`, `_buffers`
and `_modules` are walked, and everything else stays an inert stub. No class is imported, no
function of the file's choice is called, no memory is taken beyond the file's own size.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from merging.errors import InputError
from merging.formats.slots import Slot, contiguous_strides, integers, shape_of

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_WALK_LIMIT = 500_000  # entries visited in a module; sharing could make a small file endless
_DEPTH_LIMIT = 100
_NAME_LIMIT = 10_000  # characters

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}

# Of the standard library, what pickled modules and training arguments are known to mention.
# All of it stays a name; the list is there so that a file that asks for more is refused.
_STANDARD = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_codecs": "encode",
        "argparse": "Namespace",
        "builtins": "getattr set frozenset list dict tuple slice complex range object type "
        "int float bool str bytes",
        "collections": "OrderedDict defaultdict deque Counter",
        "copyreg": "_reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "functools": "partial",
        "pathlib": "Path PurePath PosixPath PurePosixPath WindowsPath",
        "types": "SimpleNamespace",
    }.items()
    for name in names.split()
)
# Functions that honest files call beside those of `_REBUILD`; here the call yields a stub.
_INERT_CALLS = (
    "torch._utils._rebuild_",
    "torch.serialization._get_layout",
    "torch.device",
    "numpy.dtype",
    "numpy.core.multiarray.",
    "numpy._core.multiarray.",
    "numpy.random._pickle.",
)


@dataclass(frozen=True)
class _Global:
    """A class or function that the file mentions: only its name."""

    name: str


@dataclass(eq=False, repr=False)
class _Stub:
    """An object of a class that is never imported; `state` is what its pickle set."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)

    def append(self, _: Any) -> None:
        """Entries of list subclasses are of no use here."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Entries of dict subclasses are of no use here."""


@dataclass(frozen=True, eq=False, repr=False)
class _Storage:
    key: str
    dtype: torch.dtype
    start: int  # bytes from the start of the stored bytes
    nbytes: int


@dataclass(frozen=True, eq=False, repr=False)
class _Tensor:
    storage: _Storage
    dtype: torch.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def pickled_slots(path: Path) -> dict[str, Slot]:
    """The tensors of a .pt, .pth or .bin file by state dict name, in file order.

    Takes what torch.save writes, in its zip and its older format: a state dict, a state dict
    under one of `WRAPPERS`, or a whole nn.Module. What lies beside a wrapped state dict (epoch,
    optimizer, arguments) is left out; inside the state dict every entry must be a dense tensor.
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
        root = _Interpreter(io.BytesIO(content(roots[0])), path).load()
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
        if _Interpreter(data, path).load() != _LEGACY_MAGIC:
            raise InputError(
                f"{path} is a pickle, but no checkpoint written by torch.save",
                hint="save the model's state_dict() with torch.save or safetensors",
            )
        for _ in range(2):  # protocol version, byte order and type sizes
            _Interpreter(data, path).load()
        interpreter = _Interpreter(data, path)
        root = interpreter.load()
        places = {}
        for key in _Interpreter(data, path).load():
            if not isinstance(key, str):  # looking up a nested tuple could take forever
                raise ValueError("a storage without a name")
            itemsize = interpreter.storages[key].itemsize
            nbytes = int.from_bytes(data.read(8), "little") * itemsize
            places[key] = data.tell(), nbytes
            if data.tell() + nbytes > len(data):
                raise InputError(f"{path} is truncated in storage {key!r}")
            data.seek(nbytes, os.SEEK_CUR)
        return root, places


def _named_entries(root: Any, path: Path) -> dict[str, _Tensor]:
    """State dict names -> tensors, from a state dict, a wrapped one, or a module."""
    for _ in WRAPPERS:
        if isinstance(root, dict):
            inner = (root.get(key) for key in WRAPPERS)
            root = next((v for v in inner if isinstance(v, dict) or _is_module(v)), root)
    if _is_module(root):
        root = dict(_walk(root, path))
    if not isinstance(root, dict):
        raise InputError(
            f"{path} holds a {_kind(root)}, expected a state dict or an nn.Module",
            hint="save the model's state_dict() with torch.save or safetensors",
        )
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            label = repr(name) if isinstance(name, str) else f"of a {_kind(name)} as its name"
            raise InputError(
                f"{path}: entry {label} is a {_kind(value)}, expected a dense tensor",
                hint=f"a state dict beside other things is read from under {', '.join(WRAPPERS)}",
            )
    if root and all(name.startswith("module.") for name in root):  # DistributedDataParallel
        return {name.removeprefix("module."): tensor for name, tensor in root.items()}
    return root


def _kind(value: Any) -> str:
    """What a message calls a value; never its repr, which shared parts can make endless."""
    kind = value.kind if isinstance(value, _Stub) else type(value).__name__
    return kind.lstrip("_").lower() if isinstance(value, _Tensor | _Global | _Storage) else kind


def _is_module(value: Any) -> bool:
    return isinstance(value, _Stub) and {"_parameters", "_modules"} <= value.state.keys()


def _walk(root: _Stub, path: Path) -> Iterator[tuple[str, Any]]:
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


def _locate(tensor: _Tensor, name: str, path: Path, places: Mapping[str, tuple[int, int]]) -> Slot:
    """The tensor's place in the file, after checking that it lies inside its storage."""
    storage = tensor.storage
    start, stored = places.get(storage.key, (0, -1))
    start += storage.start + tensor.offset * tensor.dtype.itemsize
    slot = Slot(path, tensor.dtype, tensor.shape, tensor.strides, start)
    extent = (tensor.offset + slot.span) * tensor.dtype.itemsize
    if extent > storage.nbytes or storage.start + storage.nbytes > stored:
        raise InputError(f"{path}: tensor {name!r} lies outside the data stored for it")
    if slot.nbytes > storage.nbytes:
        raise InputError(f"{path}: tensor {name!r} repeats its data; save it with .contiguous()")
    return slot


def _rebuild_tensor(
    storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any
) -> _Tensor | _Stub:
    """torch._utils._rebuild_tensor and _v2, whose rest is (requires_grad, hooks, flags)."""
    if rest[2:] and rest[2]:  # lazily conjugated or negated: the stored numbers are not the values
        return _Stub("conjugated or negated tensor")
    shape, strides = shape_of(size), integers(stride)
    if integers([offset]) is None or shape is None or strides is None or len(shape) != len(strides):
        raise ValueError("a tensor with impossible sizes")
    # strides that are never used need not make sense
    used = [n > 1 and 0 not in shape for n in shape]
    plain = contiguous_strides(shape)
    strides = tuple(s if use else p for use, s, p in zip(used, strides, plain, strict=True))
    return _Tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(storage: _Storage, *args: Any) -> _Tensor | _Stub:
    """torch._utils._rebuild_tensor_v3: the dtype is given beside an untyped storage."""
    offset, size, stride, _, hooks, dtype, *flags = args
    typed = replace(storage, dtype=_DTYPES[dtype.name])
    return _rebuild_tensor(typed, offset, size, stride, False, hooks, *flags)


# The only calls that are carried out, each by a function of this module.
_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data, *_: data,
    "torch.Size": lambda size=(): size,
    "collections.OrderedDict": lambda: {},
    "builtins.set": lambda items=(): items,  # a list serves, and cannot be slow to hash
}


class _Interpreter(pickle._Unpickler):
    """Python's own pickle machine with every step that could act on the world replaced.

    The Python implementation is used because the C one allocates memory at a pickle's word.
    """

    dispatch = pickle._Unpickler.dispatch.copy()
    for _opcode in (
        pickle.BYTEARRAY8,  # allocates the announced size before reading
        pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
    ):
        del dispatch[_opcode[0]]

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path
        self.storages: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> _Global:
        if (module, name) in NAME_MAPPING:  # protocols up to 2 name things as Python 2 did
            module, name = NAME_MAPPING[module, name]
        module = IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if not full.replace(".", "_").isidentifier():
            raise ValueError("a global that is no name")
        if module.split(".")[0] in sys.stdlib_module_names and full not in _STANDARD:
            self._refuse(full)
        return _Global(full)

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "module":  # old files add the source code of a class, which is not looked at
            return rest[0]
        if kind != "storage":
            raise ValueError("an unknown kind of persistent id")
        kind, key, _, numel, *view = rest  # the device it was on does not matter
        dtype = _STORAGES[kind.name.split(".")[-1]]
        if not isinstance(key, str) or integers([numel]) is None:
            raise ValueError("a storage with an impossible size")
        self.storages[key] = dtype
        start, length = 0, numel
        if view and view[0] is not None:
            _, start, length = view[0]
            if integers([start, length]) is None or start + length > numel:
                raise ValueError("a view outside its storage")
        return _Storage(key, dtype, start * dtype.itemsize, length * dtype.itemsize)

    def call(self, function: Any, args: Any) -> Any:
        """The value of function(*args), without calling what the file names."""
        if isinstance(function, _Stub):  # functools.partial(...)(), a bound method
            return _Stub(function.kind)
        name = function.name
        if name in ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"):
            function, _, args, *_ = args  # a subclass of Tensor, read as a plain one
            return self.call(function, args)
        if name in _REBUILD:
            return _REBUILD[name](*args)
        if name == "copyreg._reconstructor":  # how protocols 0 and 1 make an object
            return _Stub(args[0].name)
        is_class = name.rpartition(".")[2][:1].isupper()
        if is_class or name in _STANDARD or name.startswith(_INERT_CALLS):
            return _Stub(name)
        return self._refuse(name)

    def _refuse(self, name: str) -> Any:
        raise InputError(
            f"{self.path} asks for {name} to be run, which no checkpoint needs; nothing was run",
            hint="do not load this file elsewhere; ask its author for safetensors",
        )

    def _instantiate(self, kind: Any, args: Any) -> None:
        self.append(self.call(kind, tuple(args)))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
            state = state[0]
        if isinstance(self.stack[-1], _Stub) and isinstance(state, dict):
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_key(k): v for k, v in zip(items[::2], items[1::2], strict=True)})

    def load_set(self) -> None:
        self.append(self.pop_mark())

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(items)

    for _opcode, _step in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_reduce),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.EMPTY_SET, lambda self: self.append([])),
        (pickle.FROZENSET, load_set),
        (pickle.ADDITEMS, load_additems),
    ):
        dispatch[_opcode[0]] = _step


def _key(value: Any) -> Any:
    """A dictionary key, unless shared parts could make it endless to hash."""
    if isinstance(value, tuple) and any(isinstance(part, tuple) for part in value):
        raise ValueError("a nested tuple as dictionary key")
    return value

"""Python's pickle machine, with every step that could act on the world replaced.

A pickle is a program. Here it is interpreted with every global replaced by its name: tensors
become places in the file, modules and everything else inert stubs. No class is imported, no
function of the file's choice is called, no memory is taken beyond the file's own size.
"""

from __future__ import annotations

import pickle
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from merging.errors import InputError
from merging.formats.slots import contiguous_strides, integers, shape_of

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

# Of the standard library, what checkpoints are known to mention beside their tensors: settings,
# paths, dates, identifiers. All of it stays a name; the list is there so that a file that asks for
# more is refused. Of the modules in `_PLAIN` every class only holds data.
_PLAIN = frozenset(
    {"decimal", "enum", "fractions", "ipaddress", "numbers", "pathlib", "pathlib._local"}
    | {"random", "statistics", "typing", "uuid", "zoneinfo"}
)
_STANDARD = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_codecs": "encode",
        "_io": "BytesIO StringIO",
        "argparse": "Namespace",
        "array": "array _array_reconstructor",
        "builtins": "getattr set frozenset list dict tuple slice complex range object type "
        "int float bool str bytes bytearray NoneType Ellipsis NotImplemented",
        "collections": "OrderedDict defaultdict deque Counter ChainMap UserDict UserList",
        "copyreg": "_reconstructor __newobj__",
        "dataclasses": "_MISSING_TYPE MISSING Field",
        "datetime": "date datetime time timedelta timezone",
        "functools": "partial",
        "inspect": "_empty Parameter _ParameterKind",
        "io": "BytesIO StringIO",
        "logging": "Logger getLogger",
        "operator": "attrgetter itemgetter",
        "re": "_compile Pattern RegexFlag",
        "time": "struct_time",
        "types": "SimpleNamespace MappingProxyType NoneType GenericAlias UnionType",
        "zoneinfo": "ZoneInfo._unpickle",
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
    "numpy.core.numeric._frombuffer",
    "numpy._core.multiarray.",
    "numpy._core.numeric._frombuffer",
    "numpy.random._pickle.",
    "pandas._libs.internals._unpickle_block",
    "pandas.core.indexes.base._new_Index",
)


@dataclass(frozen=True)
class Global:
    """A class or function that the file mentions: only its name."""

    name: str


@dataclass(eq=False, repr=False)
class Stub:
    """An object of a class that is never imported; `state` is what its pickle set."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)

    def append(self, _: Any) -> None:
        """Entries of list subclasses are of no use here."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Entries of dict subclasses are of no use here."""


@dataclass(frozen=True, eq=False, repr=False)
class Storage:
    key: str
    dtype: torch.dtype
    start: int  # bytes from the start of the stored bytes
    nbytes: int


@dataclass(frozen=True, eq=False, repr=False)
class StoredTensor:
    storage: Storage
    dtype: torch.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(
    storage: Storage, offset: int, size: Any, stride: Any, *rest: Any
) -> StoredTensor | Stub:
    """torch._utils._rebuild_tensor and _v2, whose rest is (requires_grad, hooks, flags)."""
    if rest[2:] and rest[2]:  # lazily conjugated or negated: the stored numbers are not the values
        return Stub("conjugated or negated tensor")
    shape, strides = shape_of(size), integers(stride)
    if integers([offset]) is None or shape is None or strides is None or len(shape) != len(strides):
        raise ValueError("a tensor with impossible sizes")
    # strides that are never used need not make sense
    used = [n > 1 and 0 not in shape for n in shape]
    plain = contiguous_strides(shape)
    strides = tuple(s if use else p for use, s, p in zip(used, strides, plain, strict=True))
    return StoredTensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(storage: Storage, *args: Any) -> StoredTensor | Stub:
    """torch._utils._rebuild_tensor_v3: the dtype is given beside an untyped storage."""
    offset, size, stride, _, hooks, dtype, *flags = args
    typed = replace(storage, dtype=_DTYPES[dtype.name])
    return _rebuild_tensor(typed, offset, size, stride, False, hooks, *flags)


def _local_part(args: Any, state: Any) -> StoredTensor | Stub:
    """The values of a DTensor, where the file has all of them: one rank, or every rank a copy."""
    local = state[0].get("_local_tensor") if state and isinstance(state[0], dict) else None
    if isinstance(local, StoredTensor) and local.shape == shape_of(args[2]):
        return local
    return Stub("part of a distributed tensor (gather it from all ranks before saving)")


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


class Interpreter(pickle._Unpickler):
    """Python's own pickle machine with every step that could act on the world replaced.

    The Python implementation is used because the C one allocates memory at a pickle's word.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    dispatch = pickle._Unpickler.dispatch.copy()
    for _opcode in (
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

    def find_class(self, module: str, name: str) -> Global:
        if (module, name) in NAME_MAPPING:  # protocols up to 2 name things as Python 2 did
            module, name = NAME_MAPPING[module, name]
        module = IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if not full.replace(".", "_").isidentifier():
            raise ValueError("a global that is no name")
        standard = module.split(".")[0] in sys.stdlib_module_names
        if standard and full not in _STANDARD and not (module in _PLAIN and _is_class(name)):
            self._refuse(full)
        return Global(full)

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
        return Storage(key, dtype, start * dtype.itemsize, length * dtype.itemsize)

    def call(self, function: Any, args: Any) -> Any:
        """The value of function(*args), without calling what the file names."""
        if isinstance(function, Stub):  # functools.partial(...)(), a bound method
            return Stub(function.kind)
        name = function.name
        if name in ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"):
            function, _, args, *state = args  # a subclass of Tensor, read as a plain one
            if function.name == "torch._utils._rebuild_wrapper_subclass":
                return _local_part(args, state)
            return self.call(function, args)
        if name in _REBUILD:
            return _REBUILD[name](*args)
        if name == "copyreg._reconstructor":  # how protocols 0 and 1 make an object
            return Stub(args[0].name)
        honest = _is_class(name) or name in _STANDARD or name.startswith(_INERT_CALLS)
        if honest or ".__pyx_unpickle_" in name:  # the last is what Cython makes for every class
            return Stub(name)
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

    def load_bytearray8(self) -> None:  # Python's own allocates the announced size first
        size = int.from_bytes(self.read(8), "little")
        data = self.read(size)
        if len(data) != size:
            raise EOFError("a byte array that ends early")
        self.append(data)

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
            state = state[0]
        if isinstance(self.stack[-1], Stub) and isinstance(state, dict):
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

    _steps: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
        (pickle.BYTEARRAY8, load_bytearray8),
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
    )
    for _opcode, _step in _steps:
        dispatch[_opcode[0]] = _step


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_")[:1].isupper()


def _key(value: Any) -> Any:
    """A dictionary key, unless shared parts could make it endless to hash."""
    if isinstance(value, tuple) and any(isinstance(part, tuple) for part in value):
        raise ValueError("a nested tuple as dictionary key")
    return value

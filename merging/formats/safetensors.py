"""The safetensors format: a header of names, dtypes and places, then the tensors' bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from merging.errors import InputError
from merging.formats.json_files import HEADER_LIMIT, parse_json
from merging.formats.slots import Strided, contiguous_strides, integers, shape_of

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_slots(path: Path) -> dict[str, Strided]:
    """The tensors of a safetensors file in file order, from its header alone.

    The checks are those of the safetensors library (header length, known dtypes, offsets that
    cover the data without hole or overlap), told with the tensor's name. Raises InputError.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise InputError(
                f"{path} is no safetensors file or is truncated: "
                f"its header should have {length} bytes, the file has {size}"
            )
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    slots = {name: _slot(path, name, entry, start) for name, entry in header.items()}
    slots = dict(sorted(slots.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end, previous = start, "the header"
    for name, slot in slots.items():
        if slot.offset != end:
            kind = "overlaps" if slot.offset < end else "leaves a hole after"
            raise InputError(f"{path}: the data of tensor {name!r} {kind} {previous}")
        end, previous = end + slot.nbytes, repr(name)
        if end > size:
            raise InputError(
                f"{path} is truncated: tensor {name!r} ends at byte {end}, the file has {size}",
                hint="download or copy the file again",
            )
    if end != size:
        raise InputError(f"{path} has {size - end} bytes after its last tensor, expected none")
    return slots


def _slot(path: Path, name: str, entry: Any, start: int) -> Strided:
    """One entry of a safetensors header: {"dtype", "shape", "data_offsets"}."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{path}: tensor {name!r} should have a dtype, a shape and data_offsets in the header"
        )
    dtype = SAFETENSORS_DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise InputError(f"{path}: tensor {name!r} has the unsupported dtype {entry['dtype']!r}")
    shape, offsets = shape_of(entry["shape"]), integers(entry["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:
        raise InputError(f"{path}: tensor {name!r} has an impossible shape or impossible offsets")
    slot = Strided(path, dtype, shape, contiguous_strides(shape), start + offsets[0])
    if slot.nbytes != offsets[1] - offsets[0]:
        raise InputError(
            f"{path}: tensor {name!r} has {offsets[1] - offsets[0]} bytes, "
            f"its shape {list(shape)} and dtype {entry['dtype']} need {slot.nbytes}"
        )
    return slot

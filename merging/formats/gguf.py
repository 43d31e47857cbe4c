"""GGUF files of llama.cpp, dequantised by the gguf library, under transformers' names.

transformers' own tables say which tensor of a model a GGUF tensor is, and how it was turned.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.errors import InputError
from merging.formats.slots import OpenFiles, Slot

_HINT = "convert it with transformers: from_pretrained(folder, gguf_file=...).save_pretrained(...)"
# Architectures whose tensors correspond one to one; those of experts are put together from many.
_ONE_TO_ONE = {
    "TensorProcessor", "LlamaTensorProcessor", "GPT2TensorProcessor", "Gemma2TensorProcessor",
    "NemotronTensorProcessor",
}  # fmt: skip
_PLAIN = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Tile:
    """One tensor of a GGUF file, and rows of it."""

    path: Path
    name: str  # as GGUF has it
    kind: str  # of quantisation, such as Q4_K
    offset: int
    nbytes: int
    stored: tuple[int, ...]  # shape of the bytes as gguf's `dequantize` takes them
    shape: tuple[int, ...]
    processor: Any = field(compare=False, repr=False)
    only: tuple[int, int] | None = None  # rows
    dtype = torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def quantised(self) -> str:
        """What a message calls its format; "" where the numbers are what they are."""
        return "" if self.kind in _PLAIN else f"GGUF {self.kind}"

    def rows(self, rows: slice) -> Tile:
        first = self.only[0] if self.only else 0
        start, stop, _ = rows.indices(self.shape[0])
        stop = max(start, stop)
        values = dict(vars(self)) | {
            "shape": (stop - start, *self.shape[1:]),
            "only": (first + start, first + stop),
        }
        return Tile(**values)

    def load(self, files: OpenFiles) -> Tensor:
        from gguf import GGMLQuantizationType, dequantize

        data = os.pread(files(self.path), self.nbytes, self.offset)
        if len(data) != self.nbytes:
            raise InputError(f"{self.path} ends within tensor {self.name!r}")
        kind = GGMLQuantizationType[self.kind]
        dtype = {"F32": np.float32, "F16": np.float16}.get(self.kind, np.uint8)
        values = dequantize(np.frombuffer(data, dtype).reshape(self.stored), kind)
        turned = self.processor.process(values.astype(np.float32), self.name).weights
        kept = turned if self.only is None else turned[slice(*self.only)]
        return torch.from_numpy(np.ascontiguousarray(kept))


def gguf_slots(path: Path) -> dict[str, Slot]:
    """The tensors of a GGUF file by the names of the transformers model, from its header.

    Raises InputError for unreadable files and for architectures that have no such names.
    """
    try:
        import gguf
        import transformers.modeling_gguf_pytorch_utils as tables
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise InputError(f"{path} needs the packages gguf and transformers: {error}") from None
    try:
        reader = gguf.GGUFReader(path)
        architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
        config = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        kind: Any = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)
        if kind.__name__ not in _ONE_TO_ONE:
            raise InputError(f"{path}: GGUF files of {architecture} are not read here", _HINT)
        processor = kind(config=config.to_dict())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = tables.get_gguf_hf_weights_map(model, processor)
    except InputError:
        raise
    except Exception as error:  # of the libraries, given any file
        reason = str(error).splitlines()[:1]
        raise InputError(f"{path} is no GGUF file that can be read: {reason}", _HINT) from None
    others = [tensor.name for tensor in reader.tensors if tensor.name not in names]
    if strange := [name for name in others if "rope_" not in name]:
        raise InputError(f"{path}: tensor {strange[0]!r} has no name in transformers", _HINT)
    known = [tensor for tensor in reader.tensors if tensor.name in names]
    return {names[tensor.name]: _tile(path, tensor, processor) for tensor in known}


def _tile(path: Path, tensor: Any, processor: Any) -> Tile:
    shape = tuple(int(n) for n in tensor.shape[::-1])
    empty = np.broadcast_to(np.float32(0), shape)
    return Tile(
        path=path,
        name=tensor.name,
        kind=tensor.tensor_type.name,
        offset=int(tensor.data_offset),
        nbytes=int(tensor.n_bytes),
        stored=tuple(tensor.data.shape),
        shape=tuple(processor.process(empty, tensor.name).weights.shape),
        processor=processor,
    )

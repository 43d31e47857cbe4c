"""Quantised weights: numbers in the file that stand for others, as each format's own rule says.

`dequantised` takes the tensors of a checkpoint as they lie in its files and gives the weights they
stand for, in float32, worked out when they are read. What has no rule here is refused: codes are
never merged, and never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merging.errors import InputError
from merging.formats import bitsandbytes, mxfp4
from merging.formats.slots import OpenFiles, Slot

CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
# Of a tensor's name, where the scales of its codes lie: DeepSeek and Qwen, compressed-tensors and
# fbgemm, ComfyUI.
_SCALES = ("{name}_scale_inv", "{name}_scale", "{module}scale_weight")
# Beside quantised weights: what the inputs of a layer or a cache are quantised with.
_INPUTS = (
    "input_scale", "activation_scale", "scale_input", "input_zero_point", "output_scale",
    "k_scale", "v_scale", "q_scale", "kv_scale", "scaled_fp8", "weight_format", "input_scale_ub",
)  # fmt: skip
_NO_RULE = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors in packed integers or NVFP4",
    "weight_global_scale": "NVFP4",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "weight._data": "quanto",
    "weight_scale_2": "ModelOpt's NVFP4",
}


_BLOCKS = [(128, 128), *((1, n) for n in (16, 32, 64, 128, 256))]  # where no config says it


class Found(NamedTuple):
    """A weight that some tensors of a file stand for."""

    name: str
    slot: Slot
    used: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Scaled:
    """(code - zero) * scale, the scale one number, one a row, or one a block of the last two axes.

    first: the row of the whole matrix at which `codes` starts.
    """

    codes: Slot  # (..., rows, columns)
    scale: Slot
    block: tuple[int, int] | None = None
    zero: Slot | None = None
    first: int = 0
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.codes.files, *self.scale.files, *(self.zero.files if self.zero else ()))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def rows(self, rows: slice) -> Scaled:
        start = rows.indices(self.shape[0])[0]
        if len(self.shape) == 2:
            return replace(self, codes=self.codes.rows(rows), first=self.first + start)
        scale = self.scale.rows(rows) if self.scale.shape[:1] == self.shape[:1] else self.scale
        return replace(self, codes=self.codes.rows(rows), scale=scale)

    def load(self, files: OpenFiles) -> Tensor:
        codes = self.codes.load(files).float()  # a copy: codes are no float32
        if self.zero is not None:
            codes -= self._spread(self.zero.load(files).float())
        return codes.mul_(self._spread(self.scale.load(files).float()))

    def _spread(self, scale: Tensor) -> Tensor:
        """A scale for each code, or what broadcasts to it."""
        if scale.numel() == 1:
            return scale.reshape(())
        if len(self.shape) > 2 and scale.numel() == self.shape[0]:
            return scale.reshape(-1, *(1 for _ in self.shape[1:]))
        rows = torch.arange(self.first, self.first + self.shape[-2])
        if self.block is None:
            return scale.reshape(*self.shape[:-2], -1, 1)[..., rows, :]
        columns = torch.arange(self.shape[-1])
        return scale[..., rows // self.block[0], :][..., columns // self.block[1]]


def dequantised(
    slots: Mapping[str, Slot], path: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, Slot], str]:
    """The weights that a checkpoint's tensors stand for, and the name of their format ("": as is).

    settings: `quantization_config` of the model's config.json, empty where there is none.
    Raises InputError for codes without a rule, without their scales, or of impossible shapes.
    """
    _refuse_unknown(slots, path)
    weights = dict(slots)
    used: set[str] = set()
    kinds: dict[str, None] = {}  # in the order they were met
    for name in slots:
        for rule in RULES:
            if name not in used and (weight := rule(name, slots, path, settings)):
                used.update(weight.used)
                kinds[weight.kind] = None
                weights[weight.name] = weight.slot
    kinds |= {kind: None for slot in slots.values() if (kind := getattr(slot, "quantised", ""))}
    if kinds:
        used |= {name for name in slots if name.rpartition(".")[2] in _INPUTS}
    made = {name for name, slot in weights.items() if slots.get(name) is not slot}
    weights = {name: slot for name, slot in weights.items() if name in made or name not in used}
    _refuse_codes(weights, path)
    return weights, " and ".join(kinds)


def _scaled(
    name: str, slots: Mapping[str, Slot], path: Path, settings: Mapping[str, Any]
) -> Found | None:
    """FP8 and INT8 weights with their scales."""
    codes = slots[name]
    module = name.removesuffix("weight")
    places = [place.format(name=name, module=module) for place in _SCALES]
    place = next((place for place in places if place in slots), None)
    if codes.dtype not in CODES or place is None or len(codes.shape) < 2:
        return None
    scale, zero = slots[place], slots.get(f"{name}_zero_point")
    block = _block(name, codes.shape, scale.shape, path, settings)
    used = [name, place, *([f"{name}_zero_point"] if zero else [])]
    kind = "INT8 with scales" if codes.dtype == torch.int8 else "FP8 with scales"
    if zero and (len(codes.shape) != 2 or zero.shape != scale.shape):
        raise InputError(f"{path}: the zero point of tensor {name!r} does not fit its scales")
    return Found(name, Scaled(codes, scale, block, zero), tuple(used), kind)


def _block(
    name: str,
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    path: Path,
    settings: Mapping[str, Any],
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None for one a tensor or one a row."""
    count = torch.Size(scales).numel()
    if count in {1, torch.Size(shape[:-1]).numel()} or (len(shape) > 2 and count == shape[0]):
        return None
    stated = settings.get("weight_block_size")
    sizes = [tuple(stated)] if isinstance(stated, list) else _BLOCKS
    for block in sizes:
        fits = len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        if fits and scales == (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])):
            return block
    raise InputError(
        f"{path}: the scales of tensor {name!r} have shape {list(scales)}, which does not fit "
        f"{list(shape)} in blocks of {list(sizes[0])}",
        hint="weight_block_size in the config.json beside the weights says how large blocks are",
    )


Rule = Callable[[str, Mapping[str, Slot], Path, Mapping[str, Any]], "Found | None"]


def _four_bit(
    name: str, slots: Mapping[str, Slot], path: Path, settings: Mapping[str, Any]
) -> Found | None:
    weight = bitsandbytes.four_bit(name, slots, path)
    return weight and Found(name, *weight, "bitsandbytes in 4 bits")


def _eight_bit(
    name: str, slots: Mapping[str, Slot], path: Path, settings: Mapping[str, Any]
) -> Found | None:
    scale = name.removesuffix("weight") + "SCB"
    if scale not in slots or scale == name + "SCB" or slots[name].dtype != torch.int8:
        return None
    slot = bitsandbytes.eight_bit(name, slots[name], slots[scale], path)
    return Found(name, slot, (name, scale), "bitsandbytes in 8 bits")


def _mxfp4(
    name: str, slots: Mapping[str, Slot], path: Path, settings: Mapping[str, Any]
) -> Found | None:
    scales = f"{name.removesuffix('_blocks')}_scales"
    if not name.endswith("_blocks") or scales not in slots:
        return None
    slot = mxfp4.experts(name, slots[name], slots[scales], path)
    return Found(name.removesuffix("_blocks"), slot, (name, scales), "MXFP4")


# To add a format: a function that knows a weight by its name, or gives None.
RULES: tuple[Rule, ...] = (_scaled, _four_bit, _eight_bit, _mxfp4)


def _refuse_unknown(slots: Mapping[str, Slot], path: Path) -> None:
    for name in slots:
        for ending, kind in _NO_RULE.items():
            if name == ending or name.endswith(f".{ending}"):
                raise InputError(
                    f"{path} is quantised: tensor {name!r} is in the format of {kind}, which is "
                    "not read here",
                    hint="take the checkpoint it was made from, or dequantise it with its library",
                )


def _refuse_codes(weights: Mapping[str, Slot], path: Path) -> None:
    """What is left of matrices of integers stands for numbers that nothing here can tell."""
    for name, slot in weights.items():
        matrix = len(slot.shape) > 1 and name.endswith(("weight", "_blocks", "_proj"))
        if matrix and slot.dtype in {torch.int8, torch.uint8, torch.int32}:
            raise InputError(
                f"{path}: tensor {name!r} holds quantised weights ({slot.dtype}) without the "
                "scales of a known format",
                hint="take the checkpoint it was made from, or dequantise it with its library",
            )

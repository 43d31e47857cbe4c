"""Which files of a folder hold the weights: the ones that its own library would load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from merging.errors import InputError
from merging.formats.json_files import read_json
from merging.formats.readers import READERS, file_slots
from merging.formats.slots import Slot

# Searched in this order, which is the libraries': transformers, diffusers, open_clip.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def weight_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    files = [p for p in sorted(folder.iterdir()) if p.suffix in READERS]
    if len(files) != 1:
        listed = ", ".join(p.name for p in files) or "none"
        raise InputError(
            f"{folder} should hold model.safetensors, an index or exactly one weight file, "
            f"it has: {listed}",
            hint=_where_weights_are(folder),
        )
    return files[0]


def _where_weights_are(folder: Path) -> str:
    """A hint for a folder of several models, as a pipeline of diffusers is."""
    inner = [p.name for p in sorted(folder.iterdir()) if p.is_dir()]
    held = [n for n in inner if any(f.suffix in READERS for f in (folder / n).iterdir())]
    return f"give the one that is meant: {', '.join(held[:8])} in this folder" if held else ""


def indexed_slots(index: Path) -> dict[str, Slot]:
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
        for name, slot in file_slots(index.parent / shard).items():
            if name in slots:
                raise InputError(
                    f"{index}: tensor {name!r} is in {slots[name].files[0].name} and {shard}"
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


def output_files(files: Mapping[str, Path]) -> dict[str, str] | None:
    """{tensor: file name} for an output with the base's shards, in names its library looks for.

    files: where the base's tensors lie. None: one file of any name, which becomes
    model.safetensors.
    """
    names = {tensor: _output_name(file) for tensor, file in files.items()}
    outputs = set(names.values())
    return names if len(outputs) > 1 or outputs & _SINGLE else None


# Single files that other libraries than transformers look for.
_SINGLE = {
    f"{stem}.safetensors" for stem in ("diffusion_pytorch_model", "open_clip_model", "consolidated")
}


def _output_name(file: Path) -> str:
    stem = file.name.removesuffix(file.suffix)
    stem = re.sub(r"^open_clip_pytorch_model", "open_clip_model", stem)
    return re.sub(r"^pytorch_model", "model", stem) + ".safetensors"

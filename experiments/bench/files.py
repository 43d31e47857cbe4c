"""Checkpoints that `experiments.bench` merges from files, and the plain scripts beside it."""

from __future__ import annotations

import functools
import json
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from experiments.bench.cost import Repeats, read_file, write_file
from merging.formats.disk import remove

RELATIVE_MOVE = 0.02
_CHUNK = 1 << 24  # bytes written at a time
Merge = Callable[[Path, Mapping[str, Path], str, Path], dict[str, Any]]
SCRIPTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "average": lambda deltas: deltas.mean(0),
    "task_arithmetic": lambda deltas: 0.3 * deltas.sum(0),
}


@functools.cache
def _draw() -> Tensor:
    return torch.randn(2**22 - 3, generator=torch.Generator().manual_seed(0))


def noise(shape: Sequence[int], place: int) -> Tensor:
    """Random numbers, the same for the same place: a window on one draw, which copies fast."""
    n = torch.Size(shape).numel()
    start = 7919 * place % len(_draw())
    times = -(-(start + n) // len(_draw()))
    return _draw().repeat(times)[start : start + n].view(*shape)


def tensors(
    shapes: Mapping[str, Sequence[int]], expert: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights of the base (expert 0) or of an expert, which is the base moved a little."""
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        weight = 0.02 * noise(shape, i)
        if expert:
            weight += 0.02 * RELATIVE_MOVE * noise(shape, 1009 * expert + i)
        made[name] = weight.to(dtype)
    return made


# --- A CLIP vision tower ----------------------------------------------------------------------


def vision(folder: Path, blocks: int, width: int, experts: int) -> tuple[Path, dict[str, Path]]:
    """Base and experts as single float32 files."""
    shapes = {"conv1.weight": (width, 3, 32, 32), "positional_embedding": (50, width)}
    for i in range(blocks):
        block = f"transformer.resblocks.{i}"
        shapes |= {
            f"{block}.ln_1.weight": (width,),
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
        }
    paths = [folder / f"vision-{t}.safetensors" for t in range(experts + 1)]
    for t, path in enumerate(paths):
        save_file(tensors(shapes, t, torch.float32), path)
    return paths[0], {path.stem: path for path in paths[1:]}


# --- A decoder in shards ----------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """Base and experts of a decoder's first blocks, a bfloat16 shard each, made when needed."""

    folder: Path
    experts: int
    hidden: int
    intermediate: int
    vocabulary: int

    def shapes(self, shard: str) -> dict[str, tuple[int, ...]]:
        """Tensors of a shard, "vocabulary" or the number of a block."""
        d, wide = self.hidden, self.intermediate
        if shard == "vocabulary":
            whole = (self.vocabulary, d)
            return {"model.embed_tokens.weight": whole, "lm_head.weight": whole}
        block = f"model.layers.{shard}"
        attention = {f"{block}.self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        return attention | {
            f"{block}.mlp.gate_proj.weight": (wide, d),
            f"{block}.mlp.up_proj.weight": (wide, d),
            f"{block}.mlp.down_proj.weight": (d, wide),
            f"{block}.post_attention_layernorm.weight": (d,),
        }

    def keep(self, runs: Iterable[tuple[int, bool]]) -> None:
        """Remove the shards that none of these runs needs."""
        needed = {shard for run in runs for shard in _shards(*run)}
        for path in self.folder.glob("shard-*"):
            if path.stem.split("-")[1] not in needed:
                path.unlink()

    def models(self, blocks: int, vocabulary: bool) -> tuple[Path, dict[str, Path]]:
        """Folders with an index, of the base and of the experts."""
        folders = [self.folder / f"model-{t}" for t in range(self.experts + 1)]
        for folder in folders:  # all, before shards are made: links hold removed shards' space
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for t, folder in enumerate(folders):
            index = {}
            for shard in _shards(blocks, vocabulary):
                shapes = self.shapes(shard)
                path = self.folder / f"shard-{shard}-{t}.safetensors"
                if not path.exists():
                    save_file(tensors(shapes, t, torch.bfloat16), path)
                link = folder / f"{shard}.safetensors"
                link.hardlink_to(path)
                index |= dict.fromkeys(shapes, link.name)
            text = json.dumps({"metadata": {}, "weight_map": index})
            (folder / "model.safetensors.index.json").write_text(text)
        return folders[0], {folder.name: folder for folder in folders[1:]}


def _shards(blocks: int, vocabulary: bool) -> list[str]:
    return [*map(str, range(blocks)), *(["vocabulary"] if vocabulary else [])]


# --- Merging files ----------------------------------------------------------------------------


def merge(base: Path, experts: Mapping[str, Path], method: str, output: Path) -> dict[str, Any]:
    """The library's merge; what it took."""
    report = merging.merge_checkpoints(base, experts, merging.create(method), output)
    return {
        "seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
        "bytes_read": report.bytes_read,
    }


def repeatedly(
    repeats: Repeats, merge: Merge, base: Path, experts: Mapping[str, Path], method: str, out: Path
) -> dict[str, Any]:
    """The first merge's costs with the median of the seconds of all; reading and writing likewise.

    In turn, so that a disk or a neighbour that is slow for a while slows both.
    """
    costs = []
    while repeats.wanted([cost["seconds"] for cost in costs]):
        remove(out)
        cost = merge(base, experts, method, out)
        moved = read_and_write([base, *experts.values()], out)
        costs.append(cost | {"read_and_write_seconds": moved})
    remove(out)
    names = ("seconds", "read_and_write_seconds")
    return costs[0] | {name: statistics.median(cost[name] for cost in costs) for name in names}


def textbook_merge(
    base: Path, experts: Mapping[str, Path], method: str, output: Path
) -> dict[str, Any]:
    """The usual script: load everything, stack, merge, save."""
    start = time.perf_counter()
    W0 = load_file(base)
    loaded = [load_file(path) for path in experts.values()]
    merged = {
        name: W0[name] + SCRIPTS[method](torch.stack([state[name] - W0[name] for state in loaded]))
        for name in W0
    }
    save_file(merged, output)
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_read": sum(path.stat().st_size for path in (base, *experts.values())),
    }


def read_and_write(inputs: Sequence[Path], output: Path) -> float:
    """Seconds to read all inputs and write as many bytes as the output has, and nothing else."""
    copy, count = output.with_suffix(".copy"), sum(path.stat().st_size for path in _files(output))
    data = memoryview(bytearray(_CHUNK))
    start = time.perf_counter()
    for path in (file for folder in inputs for file in _files(folder)):
        read_file(path)
    write_file(copy, (data[: count - done] for done in range(0, count, _CHUNK)))
    seconds = time.perf_counter() - start
    copy.unlink()
    return seconds


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]

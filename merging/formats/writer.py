"""Streamed, atomic, resumable safetensors output.

An unfinished output lives in a hidden folder beside its final place: `.NAME.part/files` has the
final byte layout from the start, `.NAME.part/journal` a line per finished tensor with its CRC-32.
Only a complete output is renamed into place. A rerun takes up the tensors whose bytes still
match the journal, so that it may follow a kill or a power cut without trusting the disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from merging.errors import InputError
from merging.formats.disk import (
    FULL,
    check_space,
    flush,
    publish,
    remove,
    reserve,
    write_at,
    write_synced,
)
from merging.formats.safetensors import SAFETENSORS_DTYPES
from merging.formats.slots import bytes_of

SYNC_SECONDS = 2.0  # work that a power cut may cost; a kill costs only the tensor being written
_CHUNK = 16 << 20
INDEXED = ("model", "diffusion_pytorch_model")  # what libraries look for an index of
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """Write named tensors, in any order, into a safetensors file or folder that appears at the end.

    output: "X.safetensors", or a folder.
    tensors: {name: (shape, dtype)}, in the order they should have in the file; larger dtypes
        come first so that every tensor is aligned.
    shards: {name: file name} inside a folder; None is one model.safetensors.
    key: what the output is made from. An unfinished output of the same key and layout is
        continued (`done` tells which tensors it has), any other is started over.
    metadata: strings for the files' headers; must not vary between runs.
    overwrite: replace an existing output (at the very end) instead of refusing.

    Use as a context manager, or call `close`: leaving without `finish` keeps the work for later.
    Raises InputError if the output exists, another process writes it, or the disk is too small.
    """

    def __init__(
        self,
        output: str | Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        shards: Mapping[str, str] | None = None,
        key: str = "",
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.output, self._overwrite = Path(output).absolute(), overwrite
        self._folder = self.output.suffix != ".safetensors"
        if shards is None or not self._folder:
            file = "model.safetensors" if self._folder else self.output.name
            shards = dict.fromkeys(tensors, file)
        self._shards = {name: shards[name] for name in tensors}
        headers, self._places, self._size = _layout(tensors, self._shards, metadata or {})
        self._work = self.output.with_name(f".{self.output.name}.part")
        self._files, self._aside = self._work / "files", self._work / "replaced"
        self._pieces: dict[str, tuple[int, int]] = {}  # name -> (rows written, their CRC-32)
        self._open: dict[str, int] = {}
        self._synced = time.monotonic()
        self.done: set[str] = set()
        with self._told():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._work.with_suffix(".lock"))
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise InputError(f"another process is writing {self.output}") from None
            try:
                self._start(headers, key)
            except BaseException:
                self.close()
                raise

    def _start(self, headers: Mapping[str, bytes], key: str) -> None:
        if self._aside.exists() and not self.output.exists():
            os.rename(self._aside, self.output)  # killed between the two steps of `publish`
        self._refuse_existing()
        layout = zlib.crc32(b"".join(headers.values()) + json.dumps(self._shards).encode())
        first = json.dumps({"key": key, "layout": layout})
        journal = self._work / "journal"
        crcs = _read_journal(journal, first) if self._files.is_dir() else None
        if crcs is None:
            remove(self._work)
            check_space(self.output, sum(self._size.values()))
            self._files.mkdir(parents=True)
        for stray in set(os.listdir(self._files)) - set(headers):
            remove(self._files / stray)
        for file, header in headers.items():
            self._open[file] = os.open(self._files / file, os.O_RDWR | os.O_CREAT, 0o644)
            reserve(self._open[file], self._size[file])
            write_at(self._open[file], header, 0)
        crcs = {name: crc for name, crc in (crcs or {}).items() if name in self._places}
        kept = {name: crc for name, crc in crcs.items() if self._stored_crc(name) == crc}
        lines = [first, *(json.dumps([name, crc]) for name, crc in kept.items())]
        write_synced(journal, "".join(line + "\n" for line in lines))
        self._open["../journal"] = os.open(journal, os.O_WRONLY | os.O_APPEND)
        self.done = set(kept)

    def write(self, name: str, tensor: Tensor, rows: slice | None = None) -> None:
        """Write a tensor, or the next `rows` of it; pieces come in row order, without gaps.

        The last piece adds the journal line. Raises ValueError for a tensor that was not
        announced so, InputError if the disk refuses.
        """
        place = self._places[name]
        count = place.shape[0] if place.shape else 1
        start, stop, _ = (rows or slice(None)).indices(count)
        expected, crc = self._pieces.get(name, (0, 0))
        if start and start != expected:
            raise ValueError(f"rows {start}.. of {name!r} were written out of order")
        shape = (stop - start, *place.shape[1:]) if place.shape else ()
        if tuple(tensor.shape) != shape or tensor.dtype != place.dtype:
            raise ValueError(
                f"{name!r} was announced as {shape} {place.dtype}, "
                f"not {tuple(tensor.shape)} {tensor.dtype}"
            )
        data = bytes_of(tensor.cpu().contiguous())
        row_bytes = place.nbytes // count if count else 0
        with self._told():
            write_at(self._open[place.file], data, place.offset + start * row_bytes)
            crc = zlib.crc32(data, crc if start else 0)
            self._pieces[name] = stop, crc
            if stop == count:
                os.write(self._open["../journal"], (json.dumps([name, crc]) + "\n").encode())
                self.done.add(name)
                self._sync(SYNC_SECONDS)

    def finish(self, extra: Mapping[str, bytes | Path] | None = None) -> None:
        """Add extra files (folder outputs only: name -> content or file) and publish the output.

        Raises ValueError if a tensor is missing.
        """
        if missing := self._places.keys() - self.done:
            raise ValueError(
                f"{len(missing)} tensors were not written, among them {min(missing)!r}"
            )
        files = dict(extra or {})
        if (files and not self._folder) or files.keys() & self._size.keys():
            raise ValueError("extra files need a folder as output, and names of their own")
        names = set(self._shards.values())
        if self._folder and (len(names) > 1 or any("-of-" in name for name in names)):
            stem = re.sub(r"-\d+-of-\d+", "", min(names)).removesuffix(".safetensors")
            known = stem if stem in INDEXED else INDEXED[0]
            files[f"{known}.safetensors.index.json"] = self._index()
        with self._told():
            for name, content in files.items():
                target = self._files / name
                if not target.resolve().is_relative_to(self._files.resolve()):
                    raise ValueError(f"the extra file {name!r} would leave the folder")
                data = content if isinstance(content, bytes) else Path(content).read_bytes()
                write_synced(target, data)
            self._sync(0)
            flush(self._files)
            self._refuse_existing()
            whole = self._files if self._folder else self._files / self.output.name
            publish(whole, self.output, self._aside)
            remove(self._work)
        self.close()

    def close(self) -> None:
        """Release files and lock; an unfinished output can be continued later."""
        while self._open:
            os.close(self._open.popitem()[1])
        if self._lock.is_locked:  # the file goes while it is held; whoever waits for it notices
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_existing(self) -> None:
        if self.output.exists() and not self._overwrite:
            raise InputError(
                f"{self.output} exists already", hint="remove it, or say overwrite=true"
            )
        held = os.listdir(self.output) if self.output.is_dir() else []
        if held and not any(name.endswith(".safetensors") for name in held):
            raise InputError(
                f"{self.output} is a folder without a checkpoint: it is not replaced",
                hint="give the merge a folder of its own",
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of the file system, as one sentence."""
        try:
            yield
        except OSError as error:
            full = error.errno in FULL
            reason = "the disk is full" if full else error.strerror or str(error)
            raise InputError(
                f"cannot write {self.output}: {reason}",
                hint="free some space and run again: finished tensors are kept" if full else "",
            ) from None

    def _sync(self, every: float) -> None:
        if time.monotonic() - self._synced >= every:
            for file in self._open.values():
                os.fsync(file)
            self._synced = time.monotonic()

    def _stored_crc(self, name: str) -> int:
        place, crc = self._places[name], 0
        for start in range(0, place.nbytes, _CHUNK):
            size = min(_CHUNK, place.nbytes - start)
            crc = zlib.crc32(os.pread(self._open[place.file], size, place.offset + start), crc)
        return crc

    def _index(self) -> bytes:
        total = sum(place.nbytes for place in self._places.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(self._shards.items())),
        }
        return (json.dumps(index, indent=2) + "\n").encode()


def write_adapter(
    output: str | Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    config: Mapping[str, Any],
    *,
    dense: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PEFT LoRA adapter folder whose difference is B @ A exactly (scale 1), atomically.

    factors: {base weight name: (A (r, d_in), B (d_out, r))}, of any rank each.
    config: taken over into adapter_config.json (base_model_name_or_path, task_type,
        fan_in_fan_out, modules_to_save ...), except what the factors determine.
    dense: tensors saved in full (modules_to_save), by base name.
    extra: further files of the folder, by name.
    """
    if packed := [name for name in factors if not name.endswith(".weight")]:
        raise InputError(
            f"{output}: an adapter cannot hold {packed[0]!r}: peft versions apply the parts of an "
            "nn.MultiheadAttention with different factors",
            hint="write the merged model as a dense checkpoint",
        )
    tensors = {f"base_model.model.{name}": tensor for name, tensor in (dense or {}).items()}
    for name, (a, b) in factors.items():
        module = name.removesuffix(".weight")
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    settings = _adapter_settings(factors, config)
    layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    shards = dict.fromkeys(tensors, "adapter_model.safetensors")
    with Writer(output, layout, shards=shards, overwrite=overwrite) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        content = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        writer.finish({**(extra or {}), "adapter_config.json": content.encode()})


def _adapter_settings(
    factors: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """adapter_config.json, with what the factors determine: ranks, and the scale 1."""
    ranks = {name.removesuffix(".weight"): len(a) for name, (a, _) in factors.items()}
    rank = max(ranks.values())
    # peft reads a key as a regular expression that may match a module's last names alone
    others = {"^" + m.replace(".", r"\."): other for m, other in ranks.items() if other != rank}
    return dict(config) | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "init_lora_weights": True,
        "bias": "none",
        "inference_mode": True,
    }


def _layout(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    shards: Mapping[str, str],
    metadata: Mapping[str, str],
) -> tuple[dict[str, bytes], dict[str, _Place], dict[str, int]]:
    """(header bytes, place of each tensor, size) by file, in the safetensors format."""
    headers, places, sizes = {}, {}, {}
    for file in sorted(set(shards.values())):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata)}
        members = [(name, *tensors[name]) for name in tensors if shards[name] == file]
        end = 0
        for name, shape, dtype in sorted(members, key=lambda item: -item[2].itemsize):
            if dtype not in _NAMES:
                raise InputError(f"tensor {name!r} is {dtype}, which safetensors cannot hold")
            place = _Place(file, end, dtype, tuple(shape))
            start, end = end, end + place.nbytes
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            places[name] = place
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + end
    shifted = {
        name: _Place(p.file, p.offset + len(headers[p.file]), p.dtype, p.shape)
        for name, p in places.items()
    }
    return headers, shifted, sizes


def _read_journal(path: Path, first: str) -> dict[str, int] | None:
    """{tensor: CRC-32}, or None if the journal is absent or of something else."""
    try:
        head, *lines = path.read_text().split("\n")
    except (OSError, ValueError):
        return None
    if head != first:
        return None
    crcs = {}
    for line in lines[:-1]:  # what follows the last newline was cut off
        with suppress(ValueError, TypeError):
            name, crc = json.loads(line)
            crcs[name] = crc
    return crcs

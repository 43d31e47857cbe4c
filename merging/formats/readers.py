"""The file formats: a suffix and the function that reads such a file's header.

To add one, write `(path) -> {tensor name: Slot}` in a file of its own and name it in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from merging.errors import InputError
from merging.formats.gguf import gguf_slots
from merging.formats.pickles import pickled_slots
from merging.formats.safetensors import safetensors_slots
from merging.formats.slots import Slot

Reader = Callable[[Path], Mapping[str, Slot]]

READERS: dict[str, Reader] = {
    ".safetensors": safetensors_slots,
    ".bin": pickled_slots,
    ".pt": pickled_slots,
    ".pth": pickled_slots,
    ".ckpt": pickled_slots,
    ".gguf": gguf_slots,
}


def file_slots(path: Path) -> Mapping[str, Slot]:
    """The tensors of one weight file by name, from its header; other suffixes count as torch's."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return READERS.get(path.suffix, pickled_slots)(path)

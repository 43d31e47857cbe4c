"""An expert that moved further than it did: its difference to the base times a factor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from eval.cache import cached
from eval.training import expert_state
from merging.formats.checkpoints import Adapter, open_checkpoint


def scaled(expert: Path, base: Mapping[str, Tensor], factor: float, key: Mapping[str, Any]) -> Path:
    """The expert base + factor (expert - base) beside it in the cache, in the form it has.

    key: what determines the expert. An adapter keeps its factors and gets another `lora_alpha`.
    """
    build = partial(_write, expert, base, factor)
    folder = cached("experts", {"scaled": dict(key), "factor": factor}, build)
    return folder if expert.is_dir() else folder / "model.safetensors"


def _write(expert: Path, base: Mapping[str, Tensor], factor: float, folder: Path) -> None:
    if isinstance(open_checkpoint(expert), Adapter):
        config = json.loads((expert / "adapter_config.json").read_text())
        config["lora_alpha"] *= factor
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n")
        shutil.copyfile(expert / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        return
    state = expert_state(base, expert)
    moved = {
        name: (W0 + factor * (state[name] - W0)).contiguous() if W0.is_floating_point() else W0
        for name, W0 in base.items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})

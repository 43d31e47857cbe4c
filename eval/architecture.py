"""The model behind a checkpoint folder, without its weights: to choose layers by module type."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from merging.layers import Layer, linear_layers

log = logging.getLogger(__name__)


def layers_of(folder: Path, names: Collection[str]) -> dict[str, Layer] | None:
    """The linear layers among a checkpoint's tensor names, told by its folder's configuration.

    None, with the reason logged, where no configuration says what the model is; the layers are
    then inferred from names and shapes.
    """
    model = skeleton(folder)
    if model is None:
        return None
    layers = linear_layers(model)
    # a backbone is often saved alone while its config names the whole model, or the reverse
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed = [
        layers,
        {name.removeprefix(prefix): layer for name, layer in layers.items()},
        {prefix + name: layer for name, layer in layers.items()},
    ]
    found = max(({k: v for k, v in r.items() if k in names} for r in renamed), key=len)
    if not found:
        log.warning("%s: no layer of %s is in the checkpoint", folder, type(model).__name__)
    return found or None


def skeleton(folder: Path) -> nn.Module | None:
    """The model that `config.json` or `open_clip_config.json` describes, on the meta device.

    Code that a checkpoint brings along is never run; a model that needs it gives None.
    """
    for file, build in (("open_clip_config.json", _open_clip), ("config.json", _transformers)):
        if (folder / file).is_file():
            try:
                with torch.device("meta"):
                    return build(folder / file)
            except (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError) as error:
                log.warning("%s: %s", folder / file, str(error).splitlines()[0])
                return None
    log.warning("%s has no config.json", folder)
    return None


def _transformers(path: Path) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    (name, *_) = config.architectures or ["AutoModel"]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise ValueError(f"transformers has no architecture {name!r}")
    if hasattr(architecture, "from_config"):
        return architecture.from_config(config)
    return architecture(config)


def _open_clip(path: Path) -> nn.Module:
    import open_clip

    config = json.loads(path.read_text())["model_cfg"]
    custom = config.pop("custom_text", False)
    model = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return model(**config)

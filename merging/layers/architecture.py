"""The model behind a checkpoint folder, without its weights: to choose layers by module type.

transformers, open_clip, timm and diffusers are imported when a folder is one of theirs.
"""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


def skeleton(folder: Path) -> nn.Module | None:
    """The model that `config.json` or `open_clip_config.json` describes, on the meta device.

    None, with the reason logged, where no configuration says what the model is. Code that a
    checkpoint brings along is never run; a model that needs it gives None.
    """
    for file, build in (("open_clip_config.json", _open_clip), ("config.json", _configured)):
        if (folder / file).is_file():
            try:
                with torch.device("meta"):
                    return build(folder / file)
            except Exception as error:  # a configuration may be wrong in any way: go by names
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                log.warning("%s: %s; layers are told by their names", folder / file, reason[:200])
                return None
    log.warning("%s has no config.json; layers are told by their names", folder)
    return None


def _configured(path: Path) -> nn.Module:
    """A config.json: transformers', diffusers' (`_class_name`) or timm's (`architecture`)."""
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"is a {type(config).__name__}, expected an object")
    if isinstance(config.get("_class_name"), str):
        return _diffusers(config)
    if isinstance(config.get("architecture"), str):
        return _timm(config)
    return _transformers(path)


def _transformers(path: Path) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    (name, *_) = config.architectures or ["AutoModel"]
    architecture: Any = getattr(transformers, name, None)
    if architecture is None:
        raise ValueError(f"transformers has no architecture {name!r}")
    build = getattr(architecture, "from_config", architecture)
    model: nn.Module = build(config)
    return model


def _diffusers(config: dict[str, Any]) -> nn.Module:
    architecture: Any = getattr(importlib.import_module("diffusers"), config["_class_name"], None)
    if not _is_model(architecture):
        raise ValueError(f"diffusers has no model {config['_class_name']!r}")
    model: nn.Module = architecture.from_config(config)
    return model


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _timm(config: dict[str, Any]) -> nn.Module:
    timm = importlib.import_module("timm")
    arguments = config.get("model_args") or {}
    classes = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    name = config["architecture"]
    model: nn.Module = timm.create_model(name, pretrained=False, **classes | arguments)
    return model


def _open_clip(path: Path) -> nn.Module:
    open_clip = importlib.import_module("open_clip")
    config = json.loads(path.read_text())["model_cfg"]
    custom = config.pop("custom_text", False)
    model: nn.Module = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    return model

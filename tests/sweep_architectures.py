"""What share of a model's matrices the method reaches, for every model type that can be built.

    python -m tests.sweep_architectures [transformers|timm|open_clip|diffusers] [NAME ...]

Each type is built on the meta device with few layers and default widths, its tensors are named as
save_pretrained writes them, and `choose_layers` is asked as a merge asks it. Embeddings, tables of
positions and output heads are no matrices here; all other tensors of two dimensions or more are.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from merging.layers import choose_layers
from merging.layers.names import EMBEDDING, HEAD, is_table

LIMIT = 0.9
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
          "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth",
          "layers")  # fmt: skip


class Reach(NamedTuple):
    share: float  # of the matrices' weights that the method merges
    matrices: int  # their weights
    left: dict[str, int]  # reason -> weights left to the average
    largest: str  # the largest tensor left, with its shape


def reach(shapes, choice, tables=frozenset()):
    """Reach of a choice over a checkpoint's floating-point shapes; tables: embeddings' names."""
    merged, left, sizes = 0, Counter(), {}
    for name, shape in shapes.items():
        reason = choice.reasons.get(name)
        owner, _, leaf = name.rpartition(".")
        if len(shape) < 2 or name in tables or reason in (EMBEDDING, HEAD):
            continue
        if is_table(leaf) or is_table(owner) or torch.Size(shape).numel() == max(shape):
            continue
        size = torch.Size(shape).numel()
        if name in choice.layers:
            merged += size
        else:
            left[reason] += size
            sizes[name] = size
    largest = max(sizes, key=sizes.get, default="")
    total = merged + sum(left.values())
    told = f"{largest} {list(shapes[largest])}" if largest else ""
    return Reach(merged / total if total else 1.0, total, dict(left), told)


def shallow(config, depth=2):
    """The configuration with few layers, in its sub-configurations too."""
    for name in DEPTHS:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > depth:
            with contextlib.suppress(Exception):
                setattr(config, name, depth)
    kinds = getattr(config, "layer_types", None)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(kinds, list) and isinstance(layers, int) and len(kinds) > layers:
        with contextlib.suppress(Exception):
            config.layer_types = shortest(kinds, layers)
    for name in getattr(config, "sub_configs", None) or {}:
        if getattr(config, name, None) is not None:
            shallow(getattr(config, name), depth)
    return config


def shortest(kinds, count):
    """As many of the layers' kinds as there is room for, the different ones first."""
    unique = list(dict.fromkeys(kinds))
    return (unique + kinds)[:count]


def on_disk(model):
    """{name as save_pretrained writes it: tensor}, tied copies once."""
    from transformers.core_model_loading import revert_weight_conversion

    seen, state = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return revert_weight_conversion(model, state)


AUTO = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_MAPPING")  # fmt: skip


def model_types():
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def build(model_type):
    """A transformers model of this type on the meta device, or None where it has none."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind = transformers.CONFIG_MAPPING[model_type]
    mappings = [getattr(modeling_auto, name) for name in AUTO]
    classes = [mapping[kind] for mapping in mappings if kind in mapping]
    if not classes:
        return None
    cls = classes[0][0] if isinstance(classes[0], (tuple, list)) else classes[0]
    with torch.device("meta"):
        try:
            return cls(shallow(kind()))
        except Exception:  # its default number of layers is then the only one that goes together
            return cls(kind())


def transformers_reach(model_type, through_folder=False):
    model = build(model_type)
    if model is None:
        return None
    tensors = {n: t for n, t in on_disk(model).items() if t.is_floating_point()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables = {name for name, t in tensors.items() if id(t) in looked_up}
    if not through_folder:
        return reach(shapes, choose_layers(model, shapes), tables)
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        return reach(shapes, choose_layers(None, shapes, Path(folder)), tables)


def plain_reach(model):
    """Of a model whose files carry its own names."""
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if t.is_floating_point()}
    tables = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)}
    return reach(shapes, choose_layers(model, shapes), tables)


def timm_reach(name):
    import timm

    with torch.device("meta"):
        return plain_reach(timm.create_model(name, pretrained=False))


def open_clip_reach(name):
    import open_clip

    config = open_clip.get_model_config(name)
    custom = config.pop("custom_text", False)
    with torch.device("meta"):
        return plain_reach((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config))


def diffusers_reach(name):
    import diffusers

    with torch.device("meta"):
        return plain_reach(getattr(diffusers, name)())


def timm_names():
    """The first model of each of timm's modules."""
    import timm

    return [timm.list_models(module=module)[0] for module in timm.list_modules()
            if timm.list_models(module=module)]  # fmt: skip


def open_clip_names():
    import open_clip

    return [n for n in open_clip.list_models() if "roberta" not in n and "mt5" not in n]


def diffusers_names():
    import diffusers

    return sorted(n for n in dir(diffusers.models) if n.endswith(("Model", "Model2D", "Model3D"))
                  or n.startswith("Autoencoder"))  # fmt: skip


LIBRARIES = {
    "transformers": (model_types, transformers_reach),
    "timm": (timm_names, timm_reach),
    "open_clip": (open_clip_names, open_clip_reach),
    "diffusers": (diffusers_names, diffusers_reach),
}


def sweep(library, wanted=()):
    """{name: Reach}, and {name: why it could not be built}."""
    listed, measure = LIBRARIES[library]
    found, failed = {}, {}
    for name in wanted or listed():
        try:
            result = measure(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:90]}"
            continue
        if result is not None and result.matrices:
            found[name] = result
            if result.share < LIMIT:
                print(f"{name:32} {result.share:6.1%}  {result.left}  {result.largest}", flush=True)
    return found, failed


def main(library="transformers", *wanted):
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    found, failed = sweep(library, wanted)
    for name, why in failed.items():
        print(f"{name:32} not built: {why}")
    below = sum(r.share < LIMIT for r in found.values())
    weights = sum(r.matrices for r in found.values())
    reached = sum(r.share * r.matrices for r in found.values())
    print(f"{library}: {len(found)} types, {below} leave more than a tenth to the average; "
          f"{reached / max(weights, 1):.1%} of all matrices' weights by the method; "
          f"{len(failed)} could not be built")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])

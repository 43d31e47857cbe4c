"""CLIP vision towers through open_clip: built, read from every published format, given heads.

What is merged is the tower, `model.visual`, under open_clip's names without a prefix:
"conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", ... Checkpoints of other layouts
are converted to these names tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from open_clip.utils import freeze_batch_norm_2d
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eval import training
from eval.cache import cached
from eval.recipes import Recipe
from eval.vision.data import image_size
from eval.vision.published import Published
from merging.errors import InputError
from merging.experts import Source
from merging.formats.checkpoints import Adapter, open_checkpoint
from merging.formats.writer import write_adapter

# Goes into the key of what is cached here: raise it when conversion or heads change.
VERSION = 1
open_clip.add_model_config(Path(__file__).parent / "open_clip")

# Where the tower's tensors stand in a checkpoint: bare, a CLIP's, task-vectors' ImageEncoder's.
_PREFIXES = ("", "visual.", "model.visual.", "image_encoder.model.visual.")
_HF_PREFIXES = ("", "vision_model.", "model.vision_model.")
_PACKED = ("q_proj", "k_proj", "v_proj")  # in the order of in_proj's rows


def build(name: str, seed: int = 0) -> open_clip.CLIP:
    """A CLIP with random weights in open_clip's architecture `name`.

    "-quickgelu" behind any name asks for the activation of OpenAI's weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(**_config(name))


def _config(name: str) -> dict[str, Any]:
    plain = name.removesuffix("-quickgelu")
    config = open_clip.get_model_config(plain)
    if config is None:
        raise InputError(
            f"open_clip knows no model {plain!r}",
            hint="list them with: python -c 'import open_clip; print(open_clip.list_models())'",
        )
    return config | {"quick_gelu": name != plain or config.get("quick_gelu", False)}


def constant_norms(tower: nn.Module) -> nn.Module:
    """The tower with its BatchNorms' statistics, scales and offsets as constants.

    Batches of one task then leave no trace in them: they are the same in all experts, and whatever
    merges the weights finds them as they were.
    """
    return freeze_batch_norm_2d(tower)


def preprocessing(name: str) -> PreprocessCfg:
    """OpenAI's preprocessing at the size the model takes."""
    return PreprocessCfg(size=_config(name)["vision_cfg"]["image_size"])


def tower_checkpoint(published: Published, name: str, base: Path | None = None) -> Path:
    """The tower of a published checkpoint under open_clip's names, converted once and cached.

    name: open_clip's model, whose shapes it must have. base: a converted tower to take `proj`
        from, which Hugging Face's CLIPVisionModel lacks.
    Returns `model.safetensors`, or an adapter's folder.
    """
    key = {"version": VERSION, "model": name, "checkpoint": published.stamp()}
    source = open_checkpoint(published.path())
    if isinstance(source, Adapter):
        return cached("towers", key, partial(_convert_adapter, source, name)) / "adapter"

    def convert(folder: Path) -> None:
        fallback = load_file(base) if base else {}
        tensors = tower_state(source, name, fallback)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return cached("towers", key, convert) / "model.safetensors"


def tower_state(
    source: Source, name: str, fallback: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """{open_clip name: tensor} of the tower in a checkpoint of any known layout.

    fallback: a tower's tensors for those the layout does not have.
    Raises InputError when the layout is unknown or a shape is not model `name`'s.
    """
    readers = _readers(source)
    state = {}
    for target, expected in build_meta(name).items():
        if target in readers:
            tensor = readers[target]().float().contiguous()  # half precision would round deltas
        elif fallback and target in fallback:
            tensor = fallback[target].float()
        else:
            raise InputError(f"{source.path} has no tensor for {target!r} of {name}")
        if tensor.shape != expected.shape:
            raise InputError(
                f"{source.path} is no {name}: its {target!r} has shape {list(tensor.shape)}, "
                f"expected {list(expected.shape)}"
            )
        state[target] = tensor
    if additional := sorted(set(readers) - set(state)):
        raise InputError(f"{source.path} is no {name}: it also has {additional[0]!r}")
    return state


def build_meta(name: str) -> dict[str, Tensor]:
    """The tower's state dict as shapes without memory."""
    with torch.device("meta"):
        return build(name).visual.state_dict()


def _readers(source: Source) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor of the tower, by open_clip's name."""
    keys = set(source.keys())
    for prefix in _PREFIXES:
        if f"{prefix}conv1.weight" in keys:
            names = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}
            own = {k: v for k, v in names.items() if not k.startswith(("visual.", "model."))}
            return {k: partial(source.read, v) for k, v in own.items()}
    for prefix in _HF_PREFIXES:
        if f"{prefix}embeddings.patch_embedding.weight" in keys:
            return _huggingface_readers(source, prefix)
    raise InputError(
        f"{source.path} holds no CLIP vision tower that is known here: neither open_clip's "
        "names (visual.conv1.weight) nor Hugging Face's (embeddings.patch_embedding.weight)"
    )


def _huggingface_readers(source: Source, prefix: str) -> dict[str, Callable[[], Tensor]]:
    """Hugging Face's CLIPVisionModel: q, k, v stacked into in_proj, other tensors renamed."""
    readers: dict[str, Callable[[], Tensor]] = {}
    for key in source.keys():
        if key == "visual_projection.weight":
            readers["proj"] = lambda: source.read("visual_projection.weight").mT
        if not key.startswith(prefix) or key.endswith("position_ids"):
            continue
        name = key.removeprefix(prefix)
        if name.startswith(("text_model.", "vision_model.")):
            continue
        if ".self_attn.q_proj." in name:
            parts = [key.replace("q_proj", part) for part in _PACKED]
            target = openclip_name(name)
            readers[target] = lambda p=parts: torch.cat([source.read(k) for k in p])
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name) and (target := openclip_name(name)):
            readers[target] = partial(source.read, key)
    return readers


_HF_TOP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm": "ln_pre",  # the spelling is theirs
    "post_layernorm": "ln_post",
}
_HF_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def openclip_name(name: str) -> str | None:
    """open_clip's name of a CLIPVisionModel tensor; q, k and v all get the packed name.

    None for what is no part of the tower.
    """
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        block, module, leaf = match.groups()
        stem = f"transformer.resblocks.{block}"
        if module.removeprefix("self_attn.") in _PACKED:
            return f"{stem}.attn.in_proj_{leaf}"
        return f"{stem}.{_HF_BLOCK[module]}.{leaf}" if module in _HF_BLOCK else None
    if name in _HF_TOP:
        return _HF_TOP[name]
    module, _, leaf = name.rpartition(".")
    return f"{_HF_TOP[module]}.{leaf}" if module in _HF_TOP else None


def _convert_adapter(adapter: Adapter, name: str, folder: Path) -> None:
    write_adapter(folder / "adapter", _as_stored(adapter_factors(adapter, name)), _STORED)


# From this version on PEFT adds both adapted weights of an nn.MultiheadAttention once, as `Adapter`
# then reads them.
_STORED = {"peft_version": "0.22.0"}


def _as_stored(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors under PEFT's names for an attention, one module with two weights of one rank.

    The smaller rank is filled up with zeros; a weight that was not adapted differs by zero.
    """
    stored = {name: pair for name, pair in factors.items() if ".attn." not in name}
    blocks = dict.fromkeys(n.partition(".attn.")[0] for n in factors if ".attn." in n)
    for attention in (f"{block}.attn" for block in blocks):
        pairs = [factors.get(f"{attention}.{x}") for x in ("in_proj_weight", "out_proj.weight")]
        rank, width = map(max, zip(*(pair[0].shape for pair in pairs if pair), strict=True))
        names = (f"{attention}.weight", f"{attention}.base_layer.out_proj.weight")
        for name, pair, rows in zip(names, pairs, (3 * width, width), strict=True):
            A, B = pair or (torch.zeros(0, width), torch.zeros(rows, 0))
            missing = rank - len(A)
            stored[name] = (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)))
    return stored


def adapter_factors(adapter: Adapter, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{open_clip weight name: (A, B)} of an adapter with either naming, its scale put into B.

    The adapters of q, k and v become one of three times the rank on the packed projection:
    A = [A_q; A_k; A_v] and B block-diagonal, so that B A is [B_q A_q; B_k A_k; B_v A_v].
    """
    shapes = {k: v.shape for k, v in build_meta(name).items()}
    blocks: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for key in adapter.keys():
        a, b, scale = adapter.factors(key)
        target, place = _adapter_target(key)
        if target not in shapes:
            raise InputError(f"{adapter.path} adapts {key!r}, which {name} does not have")
        blocks.setdefault(target, {})[place] = (a, scale * b)
    factors = {}
    for target, parts in blocks.items():
        rows = shapes[target][0]
        if -1 in parts:
            factors[target] = parts[-1]
            continue
        A = torch.cat([parts[i][0] for i in sorted(parts)])
        B = torch.zeros(rows, len(A))
        column = 0
        for i in sorted(parts):
            b, step = parts[i][1], rows // 3
            B[i * step : (i + 1) * step, column : column + b.shape[1]] = b
            column += b.shape[1]
        factors[target] = (A, B)
    for target, (A, B) in factors.items():
        if (len(B), A.shape[1]) != tuple(shapes[target]):
            raise InputError(
                f"{adapter.path} is no adapter of {name}: its difference for {target!r} has "
                f"shape {[len(B), A.shape[1]]}, expected {list(shapes[target])}"
            )
    return factors


def _adapter_target(key: str) -> tuple[str, int]:
    """open_clip's weight name, and which third of its rows is adapted (-1: all of them)."""
    bare = key
    for prefix in sorted((*_PREFIXES, *_HF_PREFIXES), key=len, reverse=True):
        bare = bare.removeprefix(prefix)
    if name := openclip_name(bare):
        part = next((i for i, p in enumerate(_PACKED) if f".{p}." in bare), -1)
        return name, part
    return bare, -1


def adapted(tower: nn.Module, recipe: Recipe, seed: int) -> PeftModel:
    """A tower with a recipe's adapters, whose random factors follow from `seed`."""
    targets = lora_targets(tower, recipe.targets)
    model = training.add_lora(tower, targets, recipe.r, recipe.alpha, seed)
    if recipe.targets == "in_proj":
        freeze_all_but_packed(model)
    return model


def freeze_all_but_packed(model: nn.Module) -> None:
    """Train no LoRA pair but those of in_proj: the others stay the zero that they start as."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "out_proj" in name:
            parameter.requires_grad_(False)


def lora_targets(tower: nn.Module, targets: str = "all") -> list[str]:
    """Modules that LoRA adapts: the attention (its two projections) and MLP layers, or the
    attention alone ("in_proj")."""
    return [
        name
        for name, module in tower.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        or (targets == "all" and isinstance(module, nn.Linear) and ".mlp." in f".{name}")
    ]


def footprint(name: str) -> tuple[int, int, int]:
    """Bytes of a tower's weights in float32, of one preprocessed image, of all second moments."""
    shapes = {key: tensor.shape for key, tensor in build_meta(name).items()}
    weights = 4 * sum(shape.numel() for shape in shapes.values())
    height, width = image_size(preprocessing(name))
    layers = [s for key, s in shapes.items() if len(s) == 2 and key.startswith("transformer.")]
    return weights, 3 * height * width, sum(4 * shape[-1] ** 2 for shape in layers)

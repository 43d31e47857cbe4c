"""LoRA files that stand alone, as diffusion trainers publish them: kohya's keys and diffusers'.

    lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha      (kohya)
    unet.down_blocks.0. ... .to_q.lora_A.weight, .lora_B.weight                    (diffusers, peft)
    unet.down_blocks.0. ... .to_q.lora.down.weight, .lora.up.weight                (diffusers, old)

The scale is alpha / r where the file holds alpha, else 1, which is what diffusers takes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from merging.errors import InputError
from merging.experts import Source
from merging.formats.adapter import Adapter, Pair
from merging.formats.names import listed

_KEY = re.compile(
    r"""(?P<module>.+?) (?: \.lora_(?P<half>down|up|A|B)(?:\.default)?\.weight
        | \.lora(?:_linear_layer)?\.(?P<old>down|up)\.weight
        | _lora\.(?P<processor>down|up)\.weight
        | \.(?P<scale>alpha) | \.(?P<magnitude>dora_scale) )""",
    re.VERBOSE,
)
_SIDE = {"down": "A", "A": "A", "up": "B", "B": "B"}
# Adapters whose difference is no product of two factors: LoHa, LoKr, Tucker, GLoRA, IA3, norms.
_OTHER = re.compile(r"\.(hada_|lokr_|lora_mid|oft_|w_norm|b_norm|diff(_b)?$|on_input|set_weight)")


def is_lora(names: Collection[str]) -> bool:
    """Whether a file's tensors are factors of adapters (or of kinds that are refused later)."""
    marks = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", "_lora.down.")
    return any(mark in name for name in names for mark in marks) or any(
        re.search(r"\.(hada_w|lokr_w|oft_)", name) for name in names
    )


def open_lora(path: Path, source: Source) -> Adapter:
    """The adapter in a file of its own.

    Raises InputError for kinds that are not W + s B A and for factors that make no pairs.
    """
    names = source.keys()
    if other := [name for name in names if _OTHER.search(name)]:
        raise InputError(
            f"{path}: {listed(other)} belong to an adapter that is not W + s B A "
            "(LoHa, LoKr, Tucker or a full difference)",
            hint="merge it into its base with the library that made it and give the result",
        )
    parts: dict[str, dict[str, str]] = {}
    for key in names:
        match = _KEY.fullmatch(key)
        if not match:
            raise InputError(f"{path}: {key!r} is no factor of an adapter that is known here")
        half = match["half"] or match["old"] or match["processor"]
        which = _SIDE[half] if half else match["scale"] or match["magnitude"]
        module = match["module"].removeprefix("base_model.model.").replace(".processor.", ".")
        parts.setdefault(module, {})[which] = key
    if bare := [module for module, keys in parts.items() if not {"A", "B"} <= set(keys)]:
        raise InputError(f"{path}: {listed(bare)} should have two factors each")
    _require_scale(path, parts)
    flat = all("." not in module for module in parts)
    pairs = {
        f"{module}.weight": _pair(module, keys, source, path) for module, keys in parts.items()
    }
    return Adapter(str(path), source, pairs, flat=flat)


def _require_scale(path: Path, parts: Mapping[str, Mapping[str, str]]) -> None:
    """peft's factors say nothing of their scale, unless a diffusion model's name stands before."""
    first = next(iter(parts.values()))
    peft = first["A"].startswith("base_model.model.") and "alpha" not in first
    if peft:
        raise InputError(
            f"{path} holds LoRA factors without their scale, which adapter_config.json says",
            hint="give the adapter's folder, with adapter_config.json in it",
        )


def _pair(module: str, keys: Mapping[str, str], source: Source, path: Path) -> Pair:
    a, b = source.shape(keys["A"]), source.shape(keys["B"])
    kernels = len(a) == len(b) and set(b[2:]) <= {1}
    if len(a) < 2 or not kernels or a[0] != b[1] or not a[0]:
        raise InputError(
            f"{path}: the factors of {module!r} have shapes {list(a)} and {list(b)}, "
            "expected (r, d_in) and (d_out, r)"
        )
    scale = 1.0
    if "alpha" in keys:
        scale = float(source.read(keys["alpha"]).reshape(-1)[0]) / a[0]
    return Pair(keys["A"], keys["B"], scale, keys.get("dora_scale"))

"""PEFT LoRA adapters, read in terms of the base model's weight names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from merging.errors import InputError
from merging.experts import Source
from merging.formats.adapter import Adapter, Pair

# Settings under which the weights are not W + s B A: refused when present and not empty.
_UNSUPPORTED = (
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "megatron_config",
    "use_bdlora",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Initialisations that leave the base weights as they are; PiSSA, OLoRA, CorDA and LoftQ do not.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
# Up to 0.21 peft adds the difference of an nn.MultiheadAttention's output projection twice, in
# training as in use (peft pull request 3774), so what such an expert learnt is 2 s B A there.
_ADDED_ONCE_SINCE = (0, 22)
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<which>[AB])|embedding_(?P<table>[AB])|magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>\w+))?(?:\.weight)?"
)
_ATTENTION = re.compile(r"(.+)\.base_layer\.out_proj\.lora_A")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.default)\.")


def open_peft(folder: Path, config: Mapping[str, Any], source: Source) -> Adapter:
    """The adapter that peft saved in a folder.

    Raises InputError for settings under which weights are not W + s B A, and for tensors that do
    not make pairs of factors.
    """
    path = str(folder)
    _refuse_unsupported(config, path)
    factors, dense = _sort_keys(source, path)
    if config.get("use_dora") and (bare := [n for n, keys in factors.items() if "m" not in keys]):
        raise InputError(f"{path}: use_dora is set, but {bare[0]!r} has no magnitudes")
    if not config.get("use_dora") and (dora := [n for n, keys in factors.items() if "m" in keys]):
        raise InputError(
            f"{path}: {dora[0]!r} has DoRA's magnitudes, but its adapter_config.json has not "
            "use_dora: peft would leave them out",
            hint="set use_dora, or take the magnitudes out of the file",
        )
    pairs = {
        name: Pair(
            keys["A"],
            keys["B"],
            _scale(name, keys["A"], source, config, path),
            keys.get("m"),
            "lora_embedding_" in keys["A"],
        )
        for name, keys in factors.items()
    }
    return Adapter(path, source, pairs, dense, config)


def _refuse_unsupported(config: Mapping[str, Any], path: str) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise InputError(f"{path} is a {short(kind)} adapter, only LORA can be merged")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise InputError(
                f"{path}: adapters with {key} are not plain W + s B A",
                hint="merge it into its base with peft (merge_and_unload) and give the result",
            )
    if (start := config.get("init_lora_weights")) not in _INITIALISATIONS:
        raise InputError(
            f"{path}: init_lora_weights={short(start)} changes the base weights, "
            "which the file does not hold",
            hint="peft can convert it when saving: path_initial_model_for_weight_conversion",
        )


def _scale(name: str, key: str, source: Source, config: Mapping[str, Any], path: str) -> float:
    """lora_alpha / r, or / sqrt(r) for rsLoRA, after the per-module patterns."""
    rank = source.shape(key)[0]
    module = re.split(r"\.lora_(?:embedding_)?A", key.removeprefix("base_model.model."))[0]
    owner = module.removesuffix(".base_layer.out_proj")  # its settings are the attention's
    stated = _setting(config, "rank_pattern", owner, config.get("r"), path)
    alpha = _setting(config, "alpha_pattern", owner, config.get("lora_alpha"), path)
    if stated != rank:
        raise InputError(f"{path}: {name!r} has rank {rank}, the config says {short(stated)}")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
        raise InputError(f"{path}: lora_alpha is {short(alpha)}, expected a number")
    twice = owner != module and _peft_version(config) < _ADDED_ONCE_SINCE
    scale: float = (1 + twice) * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scale


def _peft_version(config: Mapping[str, Any]) -> tuple[int, ...]:
    match = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("peft_version")))
    return tuple(map(int, match.groups())) if match else (0, 0)


def _setting(config: Mapping[str, Any], patterns: str, module: str, default: Any, path: str) -> Any:
    """The first pattern that fits the module (peft's rule), else the default."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise InputError(f"{path}: {patterns} should map module names to numbers")
    for pattern, value in table.items():
        if _matches(pattern, module, path):
            return value
    return default


def _matches(pattern: str, module: str, path: str) -> bool:
    """peft's `(.*\\.)?(pattern)$`, for patterns too simple to take exponential time."""
    risky = re.search(r"[?{\[]|\)[*+]|\\[^.d]", pattern) or pattern.count("(") > 1
    if risky or len(re.findall(r"[*+]", pattern)) > 2 or max(len(pattern), len(module)) > 500:
        raise InputError(f"{path}: the pattern {pattern[:80]!r} is no module name or simple regex")
    try:
        return bool(re.match(rf"(.*\.)?({pattern})$", module))
    except re.error as error:
        raise InputError(f"{path}: the pattern {pattern[:80]!r} is invalid: {error}") from None


def _sort_keys(source: Source, path: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({base weight name: {"A", "B" or "m": key}}, {base name: key of a tensor saved in full})."""
    pairs: dict[str, dict[str, str]] = {}
    dense: dict[str, str] = {}
    frozen: set[str] = set()  # weights of the base, which peft saves beside factors of a head
    names = {key: key.removeprefix("base_model.model.") for key in source.keys()}
    attention = {match[1] for n in names.values() if (match := _ATTENTION.match(n))}
    matches = {key: _FACTOR.fullmatch(name) for key, name in names.items()}
    adapters = {match["adapter"] for match in matches.values() if match and match["adapter"]}
    if not any(matches.values()) or len(adapters) > 1:
        raise InputError(f"{path} holds {len(adapters)} LoRA adapters, expected one")
    for key, name in names.items():
        if match := matches[key]:
            # nn.MultiheadAttention is one module with two weights
            leaf = "in_proj_weight" if match["module"] in attention else "weight"
            weight = f"{match['module'].replace('.base_layer.', '.')}.{leaf}"
            which = match["which"] or match["table"] or "m"
            if pairs.setdefault(weight, {}).setdefault(which, key) != key:
                raise InputError(f"{path} holds the factors of {weight!r} twice")
        elif "lora_" in name:
            raise InputError(f"{path}: {key!r} is not a LoRA factor of a linear layer")
        elif dense.setdefault(plain := _WRAPPED.sub(".", name), key) != key:
            raise InputError(f"{path} holds {plain!r} twice")
        elif ".base_layer." in name:
            frozen.add(plain)
    for name, keys in pairs.items():
        if not {"A", "B"} <= set(keys) or (name in dense and name not in frozen):
            raise InputError(f"{path}: {name!r} should have one factor A, one B and nothing else")
        _check_factors(name, keys, source, path)
    return pairs, {name: key for name, key in dense.items() if name not in frozen}


def _check_factors(name: str, keys: Mapping[str, str], source: Source, path: str) -> None:
    a, b = source.shape(keys["A"]), source.shape(keys["B"])
    plain = len(a) == len(b) == 2 or (len(a) == len(b) > 2 and set(b[2:]) == {1})
    if not plain or len(a) > 5 or a[0] != b[1] or not a[0] or (len(a) > 2 and "m" in keys):
        raise InputError(
            f"{path}: the factors of {name!r} have shapes A {list(a)} and B {list(b)}, "
            "expected (r, d_in) and (d_out, r)"
        )
    if not all(source.dtype(key).is_floating_point for key in keys.values()):
        raise InputError(f"{path}: the factors of {name!r} are not floating point")

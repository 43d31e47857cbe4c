"""PEFT LoRA adapters, read in terms of the base model's weight names."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from torch import Tensor

from merging.errors import InputError
from merging.experts import Source, Values, compare_shapes
from merging.factors import Factors

# Settings under which the weights are not W + s B A: refused when present and not empty.
_UNSUPPORTED = (
    "use_dora",
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
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(\.(?P<adapter>\w+))?\.weight")
_ATTENTION = re.compile(r"(.+)\.base_layer\.out_proj\.lora_A")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.default)\.")


class Adapter:
    """LoRA factors by base weight name: the expert's weight is W + scale * B @ A (an `Expert`).

    keys() are names of the base's tensors ("layer.0.query.weight"). `dense` holds the tensors
    saved in full (modules_to_save, trained biases), by base name too. `transposed` (PEFT's
    fan_in_fan_out) says that the base stores its weights (d_in, d_out), as GPT-2's Conv1D does:
    `factors` are those of (d_out, d_in) all the same. `base_name` is the base the file names.
    """

    partial = True

    def __init__(self, folder: Path, config: Mapping[str, Any], source: Source) -> None:
        self.path, self.config, self._source = str(folder), dict(config), source
        self._refuse_unsupported()
        self.transposed = bool(config.get("fan_in_fan_out"))
        name = config.get("base_model_name_or_path")
        self.base_name = name if isinstance(name, str) and name else None
        self._factors, dense = _sort_keys(source, self.path)
        self.dense = {name: source.read(key) for name, key in dense.items()}
        self._scales = {name: self._scale(name) for name in self._factors}

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def hub_base(self) -> bool:
        """Whether `base_name` is an "owner/name" id, comparable between adapters."""
        return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.base_name or ""))

    def stamp(self) -> list[tuple]:
        """Changes whenever the weights or their scales may have."""
        return [*self._source.stamp(), *sorted(self._scales.items())]

    def keys(self) -> list[str]:
        return list(self._factors)

    def __contains__(self, name: str) -> bool:
        return name in self._factors

    def names(self) -> list[str]:
        return [*self._factors, *self.dense]

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base stores the tensor."""
        if name in self.dense:
            return tuple(self.dense[name].shape)
        a, b = self._factors[name]
        shape = self._source.shape(b)[0], self._source.shape(a)[1]
        return shape[::-1] if self.transposed else shape

    def rank(self, name: str) -> int | None:
        if name in self.dense:
            return None
        return self._source.shape(self._factors[name][0])[0] if name in self._factors else 0

    def factors(self, name: str) -> Factors:
        """A (r, d_in) and B (d_out, r) in float32, and the scale."""
        a, b = (self._source.read(key).float() for key in self._factors[name])
        return Factors(a, b, self._scales[name])

    def delta(self, name: str, rows: slice = slice(None)) -> Tensor:
        """scale * B @ A in float32, or those rows of it, laid out as the base stores the weight."""
        a, b, scale = self.factors(name)
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return scale * (left[rows] @ right)

    def values(self, name: str, rows: slice | None = None) -> Values | None:
        if name in self._factors:
            return Values(self.delta(name, rows or slice(None)), moved=True)
        if name not in self.dense:
            return None
        tensor = self.dense[name]
        return Values(tensor[rows] if rows and tensor.ndim else tensor, moved=False)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        factors = ((name, x) for name in self.keys() for x in self.factors(name)[:2])
        return itertools.chain(factors, self.dense.items())

    def problems(self, base: Source, common_rows: bool = False) -> list[str]:
        """What keeps it from being applied to `base`: absent targets and other shapes."""
        found, ours = [], set(base.keys())
        for name in self.names():
            if name in ours:
                found += compare_shapes(name, self.shape(name), base, common_rows)
            else:
                found.append(f"the target {name!r} is not in {base.path}")
        return found

    def close(self) -> None:
        self._source.close()

    def _refuse_unsupported(self) -> None:
        config = self.config
        if (kind := config.get("peft_type")) != "LORA":
            raise InputError(f"{self.path} is a {short(kind)} adapter, only LORA can be merged")
        for key in _UNSUPPORTED:
            if config.get(key):
                raise InputError(f"{self.path}: adapters with {key} are not plain W + s B A")
        if (start := config.get("init_lora_weights")) not in _INITIALISATIONS:
            raise InputError(
                f"{self.path}: init_lora_weights={short(start)} changes the base weights, "
                "which the file does not hold",
                hint="peft can convert it when saving: path_initial_model_for_weight_conversion",
            )

    def _scale(self, name: str) -> float:
        """lora_alpha / r, or / sqrt(r) for rsLoRA, after the per-module patterns."""
        rank, config = self.rank(name), self.config
        module = self._factors[name][0].removeprefix("base_model.model.").partition(".lora_A")[0]
        owner = module.removesuffix(".base_layer.out_proj")  # its settings are the attention's
        stated = self._setting("rank_pattern", owner, config.get("r"))
        alpha = self._setting("alpha_pattern", owner, config.get("lora_alpha"))
        if stated != rank:
            raise InputError(
                f"{self.path}: {name!r} has rank {rank}, the config says {short(stated)}"
            )
        if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
            raise InputError(f"{self.path}: lora_alpha is {short(alpha)}, expected a number")
        twice = owner != module and self._peft_version() < _ADDED_ONCE_SINCE
        return (1 + twice) * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _peft_version(self) -> tuple[int, ...]:
        match = re.match(r"(\d{1,4})\.(\d{1,4})", str(self.config.get("peft_version")))
        return tuple(map(int, match.groups())) if match else (0, 0)

    def _setting(self, patterns: str, module: str, default: Any) -> Any:
        """The first pattern that fits the module (peft's rule), else the default."""
        table = self.config.get(patterns) or {}
        if not isinstance(table, dict):
            raise InputError(f"{self.path}: {patterns} should map module names to numbers")
        for pattern, value in table.items():
            if _matches(pattern, module, self.path):
                return value
        return default


def joint_settings(adapters: Mapping[str, Adapter], base: str) -> dict[str, Any]:
    """What the adapter_config.json of a merge of adapters says, ranks and scales aside.

    base: what the merge belongs to where the adapters do not agree on a name.
    Raises InputError for what one adapter could not hold.
    """
    configs = [adapter.config for adapter in adapters.values()]
    saved = sorted({module for config in configs for module in config.get("modules_to_save") or ()})
    for task, adapter in adapters.items():
        if adapter.transposed != bool(configs[0].get("fan_in_fan_out")):
            raise InputError(f"expert {task!r} ({adapter.path}) has another fan_in_fan_out")
        for name in adapter.keys():
            if not name.endswith(".weight"):
                raise InputError(f"{name!r} of a packed attention cannot be written as an adapter")
        for name in adapter.dense:
            if not any(f".{module}." in f".{name}" for module in saved):
                raise InputError(
                    f"expert {task!r} ({adapter.path}) trained {name!r}, which is no factor and "
                    "in none of its modules_to_save: an adapter of the merge cannot hold it"
                )
    names = {adapter.base_name for adapter in adapters.values()}
    kinds = {config.get("task_type") for config in configs}
    return {
        "base_model_name_or_path": (len(names) == 1 and names.pop()) or base,
        "task_type": kinds.pop() if len(kinds) == 1 else None,
        "fan_in_fan_out": bool(configs[0].get("fan_in_fan_out")),
        "modules_to_save": saved or None,
    }


def _matches(pattern: str, module: str, path: str) -> bool:
    """peft's `(.*\\.)?(pattern)$`, for patterns too simple to take exponential time."""
    risky = re.search(r"[?{\[]|\)[*+]|\\[^.d]", pattern) or pattern.count("(") > 1
    if risky or len(re.findall(r"[*+]", pattern)) > 2 or max(len(pattern), len(module)) > 500:
        raise InputError(f"{path}: the pattern {pattern[:80]!r} is no module name or simple regex")
    try:
        return bool(re.match(rf"(.*\.)?({pattern})$", module))
    except re.error as error:
        raise InputError(f"{path}: the pattern {pattern[:80]!r} is invalid: {error}") from None


def _sort_keys(source: Source, path: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """({base weight name: (key of A, key of B)}, {base name: key of a tensor saved in full})."""
    pairs: dict[str, dict[str, str]] = {}
    dense: dict[str, str] = {}
    names = {key: key.removeprefix("base_model.model.") for key in source.keys()}
    attention = {match[1] for n in names.values() if (match := _ATTENTION.match(n))}
    adapters = {match["adapter"] for n in names.values() if (match := _FACTOR.fullmatch(n))}
    if len(adapters) != 1:
        raise InputError(f"{path} holds {len(adapters)} LoRA adapters, expected one")
    for key, name in names.items():
        if match := _FACTOR.fullmatch(name):
            # nn.MultiheadAttention is one module with two weights
            leaf = "in_proj_weight" if match["module"] in attention else "weight"
            weight = f"{match['module'].replace('.base_layer.', '.')}.{leaf}"
            pairs.setdefault(weight, {})[match["which"]] = key
        elif "lora_" in name:
            raise InputError(f"{path}: {key!r} is not a LoRA factor of a linear layer")
        elif dense.setdefault(_WRAPPED.sub(".", name), key) != key:
            raise InputError(f"{path} holds {_WRAPPED.sub('.', name)!r} twice")
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"} or name in dense:
            raise InputError(f"{path}: {name!r} should have one factor A, one B and nothing else")
        a, b = source.shape(pair["A"]), source.shape(pair["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise InputError(
                f"{path}: the factors of {name!r} have shapes A {list(a)} and B {list(b)}, "
                "expected (r, d_in) and (d_out, r)"
            )
        if not all(source.dtype(key).is_floating_point for key in pair.values()):
            raise InputError(f"{path}: the factors of {name!r} are not floating point")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}, dense

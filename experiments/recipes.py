"""Recipes of merges as YAML files: with the keys of configs/merge.yaml, or mergekit's.

mergekit's file names one method for every tensor, models with weights, and a base. What it says is
written in the keys of configs/merge.yaml; what has no equivalent there is refused.
Source for its keys, defaults and meaning: mergekit's documentation (docs/merge_methods.md, README).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from merging.errors import InputError

log = logging.getLogger(__name__)

# mergekit's method -> ours, and whether its weights are divided by their sum unless it says not to
_METHODS = {
    "linear": ("average", True),
    "task_arithmetic": ("task_arithmetic", False),
    "ties": ("ties", True),
    "dare_linear": ("dare", False),
    "dare_ties": ("dare_ties", False),
    "della": ("della", True),
    "della_linear": ("della_linear", False),
    "breadcrumbs": ("breadcrumbs", False),
    "breadcrumbs_ties": ("breadcrumbs_ties", False),
    "sce": ("sce", False),
    "slerp": ("slerp", False),
    "nuslerp": ("slerp", False),
    "karcher": ("karcher", False),
    "model_stock": ("model_stock", False),
}
_TOP = {
    "merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "name",
    "tokenizer_source", "chat_template",
}  # fmt: skip
# Parameters of the whole merge and of each model, by method; int8_mask is about mergekit's memory.
_ELECTING = {"weight", "density"}
_GLOBAL = {"normalize", "lambda", "int8_mask"}
_PARAMETERS = {
    "linear": {"weight", "normalize", "int8_mask"},
    "task_arithmetic": _GLOBAL | {"weight"},
    "ties": _GLOBAL | _ELECTING,
    "dare_linear": _GLOBAL | _ELECTING | {"rescale"},
    "dare_ties": _GLOBAL | _ELECTING | {"rescale"},
    "della": _GLOBAL | _ELECTING | {"epsilon", "rescale"},
    "della_linear": _GLOBAL | _ELECTING | {"epsilon", "rescale"},
    "breadcrumbs": _GLOBAL | _ELECTING | {"gamma"},
    "breadcrumbs_ties": _GLOBAL | _ELECTING | {"gamma"},
    "sce": {"select_topk", "int8_mask"},
    "slerp": {"t", "int8_mask"},
    "nuslerp": {"weight", "nuslerp_flatten", "nuslerp_row_wise", "int8_mask"},
    "karcher": {"max_iter", "tol", "int8_mask"},
    "model_stock": {"filter_wise", "int8_mask"},
}
_ELECT = {"ties", "dare_ties", "della", "breadcrumbs_ties"}
_UNREAD = {"normalize", "rescale"}  # mergekit passes over parameters that a method does not know
_DEFAULTS = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15}


def overrides(path: Path, given: Sequence[str]) -> list[str]:
    """A recipe as overrides of the merge command; what the command line gives itself wins."""
    known = {text.lstrip("+").partition("=")[0] for text in given}
    return [
        f"method={value}" if key == "method" else f"{'++' * ('.' in key)}{key}={_written(value)}"
        for key, value in _flat(read(path))
        if key not in known
    ]


def read(path: Path) -> dict[str, Any]:
    """A recipe in the keys of configs/merge.yaml."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror or error}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise InputError(f"recipe {path} is no YAML: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"recipe {path} should hold keys such as base, experts and method")
    if "slices" in content or "merge_method" in content:
        return _Mergekit(path, content).recipe()
    if isinstance(content.get("method"), str):
        content["method"] = {"name": content["method"]}
    return _with_parts(path, content)


def _with_parts(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Experts written as {path: ..., into: ...} in the keys of configs/merge.yaml."""
    experts = content.get("experts")
    for name, expert in dict(experts).items() if isinstance(experts, dict) else ():
        if isinstance(expert, dict):
            if set(expert) - {"path", "into"} or not isinstance(expert.get("path"), str):
                raise InputError(f"recipe {path}: expert {name} should be a path, or path and into")
            experts[name] = expert["path"]
            if "into" in expert:
                content["into"] = {**(content.get("into") or {}), name: expert["into"]}
    return content


class _Mergekit:
    """mergekit's file, as ours."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.content = path, content
        self.method = str(content.get("merge_method"))
        if "slices" in content:
            self._refuse("slices, which take blocks from several models, have no equivalent")
        if self.method not in _METHODS:
            self._refuse(
                f"merge_method {self.method!r} has no equivalent; known: {', '.join(_METHODS)}"
            )
        if unknown := sorted(set(content) - _TOP):
            self._refuse(f"the key {unknown[0]!r} has no equivalent")
        if content.get("tokenizer_source", "base") != "base":
            self._refuse("only the base's tokenizer is kept (tokenizer_source: base)")
        self.parameters = self._checked(content.get("parameters"))
        self.models = self._models()
        self.base = content.get("base_model")

    def recipe(self) -> dict[str, Any]:
        """Base, experts, their weights, the method and the output's dtype."""
        models = dict(self.models)
        if self.method in {"slerp", "nuslerp", "karcher"}:
            return self._spherical(models)
        if self.method == "linear":
            base = self.base or next(iter(models))
        elif not self.base:
            self._refuse(f"{self.method} needs a base_model")
        else:
            base = self.base
            models.pop(base, None)  # its difference to itself is 0
        names = _names(models)
        weights = {names[m]: self._of(m, "weight", 1.0) for m in models}
        found = self._recipe(base, names, {"name": _METHODS[self.method][0]})
        if self.method not in {"model_stock", "sce"}:
            found |= self._weighted(found["method"], weights)
        found["method"] |= self._hyperparameters(list(models))
        return found

    def _recipe(self, base: str, names: Mapping[str, str], method: dict) -> dict[str, Any]:
        dtype = self.content.get("out_dtype") or self.content.get("dtype")
        experts = {name: model for model, name in names.items()}
        found = {"base": base, "experts": experts, "method": method, "split_qkv": False}
        return found | ({"dtype": dtype} if dtype else {})

    def _weighted(self, method: dict[str, Any], weights: dict[str, float]) -> dict[str, Any]:
        """Weights as ours, and in the method what their normalisation asks for."""
        total, alike = sum(weights.values()), len(set(weights.values())) == 1
        normalise = self.parameters.get("normalize", _METHODS[self.method][1])
        if normalise and math.isclose(total, 0, abs_tol=1e-12):
            self._refuse("the weights sum to 0 and cannot be normalised")
        if self.method == "linear":
            if not normalise and not math.isclose(total, 1, abs_tol=1e-6):
                self._refuse(f"weights that sum to {total:g} with normalize: false scale the model")
            return {"weights": weights, "weights_on": "task"}
        method["alpha"] = float(self.parameters.get("lambda", 1.0))
        if self.method in _ELECT:
            method["merge"] = "mean" if normalise else "sum"
            if normalise:
                if not alike:
                    self._refuse(
                        f"{self.method} divides by the weights that agree, which has no "
                        "equivalent for unequal ones; use normalize: false or equal weights"
                    )
                return {}
        elif normalise:
            method["alpha"] /= total
        return {"weights": weights, "weights_on": "delta"}

    def _hyperparameters(self, models: Sequence[str]) -> dict[str, Any]:
        same = {key: self._alike(models, key) for key in _DEFAULTS}
        if self.parameters.get("rescale") is False or self.parameters.get("filter_wise"):
            self._refuse("rescale: false and filter_wise: true have no equivalent")
        density = same["density"]
        if self.method == "ties":
            return {"k": density, "scope": "layer"}
        if self.method in {"dare_linear", "dare_ties"}:
            return {"p": _each(density, lambda d: 1 - d)}
        if self.method == "sce":
            return {"k": self.parameters.get("select_topk", 1.0)}
        if self.method in {"della", "della_linear"}:
            return {"density": density, "eps": self._window(density, same["epsilon"])}
        if self.method in {"breadcrumbs", "breadcrumbs_ties"}:
            gamma = same["gamma"]
            if not all(isinstance(x, int | float) for x in (gamma, density)):
                self._refuse(f"a gradient of {self.method}'s density or gamma has no equivalent")
            gamma = min(gamma, 1 - density)  # density is what is kept in any case
            return {"beta": max(0.0, 1 - density - gamma), "gamma": gamma}
        return {}

    def _window(self, density: Any, epsilon: Any) -> Any:
        """della's half window; mergekit drops nothing where the density is 1."""
        if not all(isinstance(x, int | float) for x in (density, epsilon)):
            return epsilon
        if density >= 1:
            return 0.0
        if not epsilon < min(density, 1 - density):
            self._refuse(f"density {density:g} ± epsilon {epsilon:g} should lie between 0 and 1")
        return epsilon

    def _spherical(self, models: dict[str, Any]) -> dict[str, Any]:
        """slerp and karcher, of the weights in mergekit; nuslerp, of differences to a base."""
        order = list(models)
        method: dict[str, Any] = {"name": _METHODS[self.method][0], "of": "weights"}
        parts: list[dict[str, Any]] = []
        if self.method == "karcher":
            method["steps"] = int(self.parameters.get("max_iter", 10))
        elif self.method == "nuslerp":
            order = [model for model in order if model != self.base]
            method |= self._between(order)
        else:
            if self.base not in models and self.base:
                order = [self.base, *order]
            if len(order) != 2 or self.base not in order:
                self._refuse("slerp needs two models, one of them the base_model")
            order.sort(key=lambda model: model != self.base)  # t = 0 is the base
            method["t"], parts = self._filtered("t")
        base = self.base or order[0]
        # experts are stacked in the order of their names
        names = {model: f"m{i}_{name}" for i, (model, name) in enumerate(_names(order).items())}
        found = self._recipe(base, names, method)
        return found | ({"parts": parts} if parts else {})

    def _between(self, order: Sequence[str]) -> dict[str, Any]:
        """nuslerp's point on the arc, and what has an angle of its own, as mergekit's code has it.

        Its `nuslerp_row_wise` runs over the first dimension: a vector is a column of a matrix
        (d_out, d_in), although its documentation calls it a row.
        """
        if len(order) != 2:
            self._refuse(f"nuslerp needs two models beside the base_model, it has {len(order)}")
        first, second = (self._of(model, "weight", None) for model in order)
        total = first + second
        whole = self.parameters.get("nuslerp_flatten", True)
        by = "column" if self.parameters.get("nuslerp_row_wise", False) else "row"
        return {
            "of": "deltas" if self.base else "weights",
            "by": "tensor" if whole else by,
            "t": 0.5 if abs(total) < 1e-6 else second / total,
        }

    def _filtered(self, key: str) -> tuple[Any, list[dict[str, Any]]]:
        """A parameter with a value of its own where a filter is in a tensor's name."""
        value = self.parameters.get(key)
        if value is None:
            self._refuse(f"{self.method} needs the parameter {key}")
        if not (isinstance(value, list) and any(isinstance(x, dict) for x in value)):
            return value, []
        plain, parts = None, []
        for entry in value:
            if not isinstance(entry, dict) or set(entry) - {"filter", "value"}:
                self._refuse(f"{key} should be a list of filter and value")
            if "filter" in entry:
                part = {"match": f"*{entry['filter']}*", "method": self.method, "of": "weights"}
                parts.append(part | {key: entry["value"]})
            elif plain is None:
                plain = entry["value"]
        if plain is None:
            self._refuse(f"{key} has no value for tensors that no filter names")
        return plain, parts

    def _models(self) -> dict[str, dict[str, Any]]:
        models = self.content.get("models")
        if not isinstance(models, list) or not models:
            self._refuse("it names no models")
        found: dict[str, dict[str, Any]] = {}
        for entry in models:
            if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
                self._refuse("each of models should name a model")
            if unknown := sorted(set(entry) - {"model", "parameters"}):
                self._refuse(f"the key {unknown[0]!r} of model {entry['model']} has no equivalent")
            if entry["model"] in found:
                self._refuse(f"model {entry['model']} is named twice")
            found[entry["model"]] = self._checked(entry.get("parameters"))
        return found

    def _checked(self, parameters: Any) -> dict[str, Any]:
        parameters = parameters or {}
        if not isinstance(parameters, dict):
            self._refuse("parameters should be names and values")
        unknown = sorted(set(parameters) - _PARAMETERS[self.method])
        if unread := " and ".join(key for key in unknown if key in _UNREAD):
            log.warning(
                "recipe %s: %s of %s is left aside, as mergekit does",
                self.path,
                unread,
                self.method,
            )
        if unknown := [key for key in unknown if key not in _UNREAD]:
            self._refuse(f"the parameter {unknown[0]!r} of {self.method} has no equivalent")
        return parameters

    def _of(self, model: str, key: str, default: float | None) -> float:
        value = self.models[model].get(key, self.parameters.get(key, default))
        if value is None:
            self._refuse(f"{self.method} needs the {key} of model {model}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._refuse(f"the {key} of model {model} is {value!r}, only numbers are read")
        return float(value)

    def _alike(self, models: Sequence[str], key: str) -> Any:
        values = [self.models[m].get(key, self.parameters.get(key, _DEFAULTS[key])) for m in models]
        if any(value != values[0] for value in values):
            self._refuse(f"models of different {key} have no equivalent")
        return values[0]

    def _refuse(self, reason: str) -> Any:
        raise InputError(f"recipe {self.path}: {reason}")


def _names(models: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """{model: a short name}: the last piece of its path, numbered where two agree."""
    names: dict[str, str] = {}
    for model in models:
        name = re.sub(r"\W+", "_", Path(model).name).strip("_") or "expert"
        name = f"m_{name}" if name[0].isdigit() else name
        taken = sum(other == name or other.startswith(f"{name}_") for other in names.values())
        names[model] = f"{name}_{taken + 1}" if taken else name
    return names


def _each(value: Any, function: Any) -> Any:
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def _flat(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(key, value) of overrides: the method's choice first, mappings by their own keys."""
    pairs: list[tuple[str, Any]] = []
    for key, value in recipe.items():
        if key == "method" and isinstance(value, dict):
            own = {k: v for k, v in value.items() if k != "name"}
            pairs += [("method", value.get("name")), *((f"method.{k}", v) for k, v in own.items())]
        elif isinstance(value, dict):
            pairs += [(f"{key}.{k}", v) for k, v in value.items()]
        else:
            pairs.append((key, value))
    return pairs


def _written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", r"\'") + "'"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)

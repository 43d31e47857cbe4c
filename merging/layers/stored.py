"""A model's layers under the names that its files use, which need not be those of its modules.

transformers renames, stacks, splits and transposes tensors when it loads a checkpoint. Its own
conversion table says for each name on disk which parameter the tensor becomes (a part of).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from merging.layers import modules, names
from merging.layers.layout import Layer

log = logging.getLogger(__name__)

# What wrappers put before a model's own names: torch.compile, DistributedDataParallel, FSDP.
WRAPPERS = re.compile(r"(_orig_mod|module|_fsdp_wrapped_module)\.")
Kinds = dict[str, Layer | str]


def kinds(model: nn.Module, shapes: names.Shapes) -> Kinds:
    """For each tensor of a checkpoint its layer, or the reason why it is none.

    By module type where the model has a parameter for it, else by name and shape.
    """
    table = modules.kinds(model)
    mapped = dict(_mapped(model, table, shapes))
    by_name = names.kinds(shapes, vocabulary_size(model))
    return {name: mapped.get(name, by_name[name]) for name in shapes}


def matched(model: nn.Module, shapes: names.Shapes) -> set[str]:
    """The tensors of a checkpoint that the model has a parameter for."""
    return {name for name, _ in _mapped(model, modules.kinds(model), shapes)}


def loaded_as(model: nn.Module, on_disk: Iterable[str]) -> dict[str, str]:
    """{name on disk: name of the parameter} of the tensors that loading at most renames."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in model.state_dict().items()}
    rename, _ = _transformers_names(model, state)
    prefixes, known = _prefixes(model), {}
    for name in _in_loading_order(dict.fromkeys(on_disk, ())):
        bare = WRAPPERS.sub("", name)
        target, pattern = rename(bare)
        if pattern is None:
            known[name] = next((n for n in _variants(target, bare, prefixes) if n in state), "")
    return {name: parameter for name, parameter in known.items() if parameter}


def vocabulary_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "get_text_config", lambda: None)(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _mapped(
    model: nn.Module, table: Kinds, shapes: names.Shapes
) -> Iterator[tuple[str, Layer | str]]:
    """(name on disk, kind) of what a model's parameters tell."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in model.state_dict().items()}
    known = {WRAPPERS.sub("", name): kind for name, kind in table.items()}
    rename, converters = _transformers_names(model, state)
    prefixes = _prefixes(model)
    for name in _in_loading_order(shapes):
        shape, bare = tuple(shapes[name]), WRAPPERS.sub("", name)
        target, pattern = rename(bare)
        kind: Layer | str | None = None
        if pattern is not None and target in known:
            kind = _converted(known, state, target, converters[pattern], shape)
        else:
            variants = (n for n in _variants(target, bare, prefixes) if n in known)
            kind = known.get(next(variants, ""))
        if isinstance(kind, str) or (isinstance(kind, Layer) and kind.fits(shape)):
            yield name, kind


def _variants(target: str, bare: str, prefixes: tuple[str, ...]) -> Iterator[str]:
    """A name, as it is and with a prefix more or less: a backbone is often saved alone."""
    yield from (target, bare)
    for prefix in prefixes:
        yield prefix + bare
        yield bare.removeprefix(prefix)


def _prefixes(model: nn.Module) -> tuple[str, ...]:
    prefix = getattr(model, "base_model_prefix", "")
    return (*([f"{prefix}."] if prefix else []), "model.", "net.")


def _in_loading_order(shapes: names.Shapes) -> list[str]:
    """By the numbers in the names: some renamings wait for one name before they touch others."""
    return sorted(shapes, key=lambda name: [p.zfill(9) for p in re.split(r"(\d+)", name)])


def _transformers_names(model: Any, state: dict[str, Tensor]) -> tuple[Any, Any]:
    """name on disk -> (name in memory, pattern of the converter), and {pattern: converter}."""

    def unchanged(name: str) -> tuple[str, None]:
        return name, None

    if not hasattr(model, "base_model_prefix"):
        return unchanged, {}
    try:
        from transformers import conversion_mapping, core_model_loading

        transforms = conversion_mapping.get_model_conversion_mapping(model)
        converter, rename = core_model_loading.WeightConverter, core_model_loading.rename_source_key
    except (ImportError, AttributeError) as error:
        log.warning("transformers' table of names on disk is not where it was: %s", error)
        return unchanged, {}
    converters = [x for x in transforms if isinstance(x, converter)]
    renamings: list[Any] = [x for x in transforms if not isinstance(x, converter)]
    prefix: str = model.base_model_prefix

    def renamed(name: str) -> tuple[str, str | None]:
        target, pattern = rename(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            return rename(name, [], [], prefix, state)
        return target, pattern

    return renamed, {pattern: x for x in converters for pattern in x.source_patterns}


def _converted(
    known: Kinds, state: Mapping[str, Tensor], target: str, converter: Any, shape: tuple[int, ...]
) -> Layer | str | None:
    """The kind of a tensor on disk that loading splits into, or stacks with others to, parameters.

    None where the operations say too little.
    """
    patterns = converter.target_patterns
    targets = [target.replace(patterns[0], pattern, 1) for pattern in patterns]
    parts = [known[name] for name in targets if name in known]
    words = [kind for kind in parts if isinstance(kind, str)]
    if len(parts) < len(targets) or len(shape) < 2:
        return words[0] if parts[:1] == words[:1] and words else None
    if words:
        return words[0]
    layer = next(kind for kind in parts if isinstance(kind, Layer))
    operations = [type(op).__name__ for op in converter.operations]
    turned = layer.transposed != (operations.count("Transpose") % 2 == 1)
    if len(shape) > 3 or layer.kernel:
        stem = len(shape) > 2 and shape[1] < names.STEM_CHANNELS
        return names.STEM if stem else Layer(kernel=shape[2:])
    if len(shape) == 3:
        return Layer(experts=shape[0], transposed=turned) if layer.experts else None
    if len(targets) == 1 or layer.experts:
        return Layer(transposed=turned)
    rows = [state[name].shape[1 if layer.transposed else 0] for name in targets]
    if "Interleave" in operations:
        return Layer(len(rows), turned, groups=rows[0])
    return Layer(len(rows) if len(set(rows)) == 1 else tuple(rows), turned)

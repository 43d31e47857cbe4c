"""Which tensors of a checkpoint are layers, however that was told, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from merging.errors import InputError
from merging.layers import modules, names
from merging.layers.layout import Layer

# A paper's matrix with a side of so many is a vocabulary.
MAX_SIDE = 20_000
# What wrappers put before a model's own names: torch.compile, DistributedDataParallel, Lightning.
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.|_fsdp_wrapped_module\.|model\.|net\.)+")

Layers = nn.Module | Mapping[str, Layer] | Iterable[str] | None


class Choice(NamedTuple):
    """layers: {weight name: Layer}; reasons: why each other tensor is no layer, in a few words."""

    layers: dict[str, Layer]
    reasons: dict[str, str]


def split(kinds: Mapping[str, Layer | str]) -> Choice:
    """Layers and reasons apart."""
    return Choice(
        {name: kind for name, kind in kinds.items() if isinstance(kind, Layer)},
        {name: kind for name, kind in kinds.items() if isinstance(kind, str)},
    )


def infer_layers(shapes: names.Shapes) -> dict[str, Layer]:
    """Weight names of linear layers guessed from names and shapes, for bare state dicts.

    Prefer `linear_layers` wherever the model can be built.
    """
    return split(names.kinds(shapes)).layers


def paper_layers(shapes: names.Shapes) -> dict[str, Layer]:
    """The matrices that the papers' own codes merge by the method (`protocol=paper`).

    Every 2-D tensor whose name has no `text_projection` and no side of 20,000 or more: in a ViT
    `proj` and `positional_embedding` too, in T5 the relative position biases. The rest is averaged.
    Source: the published code of ACTMat; TSV-M, Iso-C and ACE leave out the same name.
    """
    return {
        name: Layer(parts=3 if name.endswith("in_proj_weight") else 1)
        for name, shape in shapes.items()
        if len(shape) == 2 and max(shape) < MAX_SIDE and "text_projection" not in name
    }


def choose_layers(layers: Layers, shapes: names.Shapes) -> Choice:
    """The layers of a checkpoint with these shapes, and the reason for each tensor that is none.

    layers: a model, {weight name: Layer}, weight names, or None (guessed from names and shapes).
    Raises InputError for a name that the checkpoint lacks, one that is no matrix it could cut, and
    a model none of whose layers the checkpoint has.
    """
    if layers is None:
        return split(names.kinds(shapes))
    if isinstance(layers, nn.Module):
        return split(_of_model(layers, shapes))
    if not isinstance(layers, Mapping):
        layers = {name: Layer() for name in layers}
    for name, layer in layers.items():
        if name not in shapes:
            raise InputError(f"layer {name!r} is not in the base checkpoint")
        shape = tuple(shapes[name])
        if not layer.fits(shape):
            raise InputError(
                f"layer {name!r} has shape {shape}, expected a matrix whose output rows "
                f"divide into {layer.parts}"
            )
    return Choice(dict(layers), {name: "not named" for name in shapes if name not in layers})


def _of_model(model: nn.Module, shapes: names.Shapes) -> dict[str, Layer | str]:
    """Kinds by a model's modules, whatever wrapper's prefix either side's names carry.

    A module may hold what the checkpoint omits (tied copies); the reverse is averaged.
    """
    told = {WRAPPERS.sub("", name): kind for name, kind in modules.kinds(model).items()}
    found = {name: told.get(WRAPPERS.sub("", name), "no module known") for name in shapes}
    layers = [kind for kind in told.values() if isinstance(kind, Layer)]
    if layers and not any(isinstance(kind, Layer) for kind in found.values()):
        example = next(name for name, kind in told.items() if isinstance(kind, Layer))
        raise InputError(
            f"none of the {len(layers)} layers of {type(model).__name__} is in the checkpoint: "
            f"{example!r} and others; the checkpoint has {next(iter(shapes), 'nothing')!r}",
            hint="pass the model that the checkpoint belongs to, or layers=None to go by names",
        )
    bad = {n for n, k in found.items() if isinstance(k, Layer) and not k.fits(tuple(shapes[n]))}
    return found | {name: "another shape than the module's" for name in bad}


def resolve_layers(layers: Layers, shapes: names.Shapes) -> dict[str, Layer]:
    """The layers alone of `choose_layers`."""
    return choose_layers(layers, shapes).layers

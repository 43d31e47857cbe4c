"""Which tensors of a checkpoint are layers, however that was told, and why the others are not."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from merging.errors import InputError
from merging.layers import names, stored
from merging.layers.architecture import skeleton
from merging.layers.layout import Layer

log = logging.getLogger(__name__)

# A paper's matrix with a side of so many is a vocabulary.
MAX_SIDE = 20_000
Layers = nn.Module | Mapping[str, Layer] | Iterable[str] | Path | None


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


def choose_layers(layers: Layers, shapes: names.Shapes, folder: str | Path | None = None) -> Choice:
    """The layers of a checkpoint with these shapes, and the reason for each tensor that is none.

    layers: a model, the folder of one (its config.json), {weight name: Layer}, weight names, or
        None: told by the configuration in `folder`, or else by names and shapes.
    folder: where the checkpoint lies; a file stands for the folder that holds it.
    Raises InputError for a name that the checkpoint lacks, one that is no matrix it could cut, and
    a model none of whose layers the checkpoint has.
    """
    if isinstance(layers, str):
        raise InputError(f"layers is the string {layers!r}, expected names, a model or a Path")
    if layers is None or isinstance(layers, Path):
        return split(_of_folder(layers or folder, shapes))
    if isinstance(layers, nn.Module):
        _check_related(layers, shapes)
        return split(stored.kinds(layers, shapes))
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
    others = {name: kind for name, kind in names.kinds(shapes).items() if name not in layers}
    return Choice(
        dict(layers),
        {name: kind if isinstance(kind, str) else "not named" for name, kind in others.items()},
    )


def _of_folder(folder: str | Path | None, shapes: names.Shapes) -> stored.Kinds:
    if folder is None:
        return names.kinds(shapes)
    path = Path(folder)
    path = path if path.is_dir() else path.parent
    model = skeleton(path)
    if model is None:
        return names.kinds(shapes)
    if not stored.matched(model, shapes):
        log.warning("%s: no layer of %s is in the checkpoint", path, type(model).__name__)
    return stored.kinds(model, shapes)


def _check_related(model: nn.Module, shapes: names.Shapes) -> None:
    """A model that was given and shares no name with the checkpoint is a mistake."""
    if shapes and not stored.matched(model, shapes):
        first = next(iter(model.state_dict()), "nothing")
        raise InputError(
            f"layers is a {type(model).__name__} none of whose tensors is in the checkpoint: "
            f"it has {first!r}, the checkpoint {next(iter(shapes))!r}",
            hint="pass the model that the checkpoint belongs to, or layers=None to go by names",
        )


def resolve_layers(
    layers: Layers, shapes: names.Shapes, folder: str | Path | None = None
) -> dict[str, Layer]:
    """The layers alone of `choose_layers`."""
    return choose_layers(layers, shapes, folder).layers

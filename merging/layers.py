"""Which tensors are the matrix of a linear layer, and how they are cut before merging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merging.errors import InputError

# ACTMat's protocol: a matrix with a longer side than this is a vocabulary in disguise.
MAX_SIDE = 20_000

# Output heads and CLIP's projections are nn.Linear by type, yet averaged by every paper's protocol.
HEADS = frozenset(
    {
        "lm_head", "head", "classifier", "classification_head", "score", "qa_outputs", "cls",
        "decoder_head", "visual_projection", "text_projection", "proj_out",
    }
)  # fmt: skip
# Only for checkpoints that come without a model: pieces of names that mark no linear layer.
_NOT_LINEAR = ("embed", "wte", "wpe", "shared", "position", "token", "norm", "ln_", "relative")


@dataclass(frozen=True)
class Layer:
    """How one linear layer's matrix is laid out.

    parts: number of equal blocks of output rows that are merged separately (3 for packed q, k, v).
    transposed: stored as (d_in, d_out), as Hugging Face's Conv1D does.
    """

    parts: int = 1
    transposed: bool = False


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Weight names of a model's linear layers, chosen by module type.

    nn.Linear, the packed or separate projections of nn.MultiheadAttention, and Conv1D count;
    embeddings, whatever is tied to one, output heads (`HEADS` and `get_output_embeddings`) and
    matrices with a side over `MAX_SIDE` do not.
    """
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        heads.add(id(output.weight))
    layers: dict[str, Layer] = {}
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        for name, layer in _own_layers(module, last):
            weight: Tensor = getattr(module, name)
            if id(weight) not in heads and last not in HEADS and max(weight.shape) <= MAX_SIDE:
                layers[f"{path}.{name}" if path else name] = layer
    return layers


def _own_layers(module: nn.Module, last: str) -> list[tuple[str, Layer]]:
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            return [("in_proj_weight", Layer(parts=3))]
        return [(f"{x}_proj_weight", Layer()) for x in "qkv"]
    if isinstance(module, nn.Linear):
        packed = last == "qkv" and module.out_features == 3 * module.in_features
        return [("weight", Layer(parts=3 if packed else 1))]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return [("weight", Layer(parts=3 if last == "c_attn" else 1, transposed=True))]
    return []


def infer_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layer]:
    """Weight names of linear layers guessed from names and shapes, for bare state dicts.

    A matrix called `*.weight` or `*in_proj_weight` counts unless a piece of its name marks an
    embedding, a norm or a head. Prefer `linear_layers` wherever the model can be built.
    """
    layers = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        if len(shape) != 2 or max(shape) > MAX_SIDE or min(shape) < 2:
            continue
        packed = leaf == "in_proj_weight"
        if not packed and leaf not in {"weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}:
            continue
        last = path.rpartition(".")[2]
        if last in HEADS or any(piece in path.lower() for piece in _NOT_LINEAR):
            continue
        packed |= last == "qkv" and shape[0] == 3 * shape[1]
        layers[name] = Layer(parts=3 if packed else 1)
    return layers


def resolve_layers(
    layers: nn.Module | Mapping[str, Layer] | Iterable[str] | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Layer]:
    """The layers of a checkpoint with these shapes, from whatever way they were given.

    Raises InputError for a name that the checkpoint lacks or that is no matrix it could cut.
    """
    if layers is None:
        return infer_layers(shapes)
    if isinstance(layers, nn.Module):
        # a module may hold what the checkpoint omits (tied copies); the reverse is averaged
        return {k: v for k, v in linear_layers(layers).items() if k in shapes}
    if not isinstance(layers, Mapping):
        layers = {name: Layer() for name in layers}
    for name, layer in layers.items():
        if name not in shapes:
            raise InputError(f"layer {name!r} is not in the base checkpoint")
        shape = shapes[name]
        if len(shape) != 2 or shape[1 if layer.transposed else 0] % layer.parts:
            raise InputError(
                f"layer {name!r} has shape {tuple(shape)}, expected a matrix whose output rows "
                f"divide into {layer.parts}"
            )
    return dict(layers)


def cut(stack: Tensor, layer: Layer) -> list[Tensor]:
    """(..., *stored shape) -> the (..., d_out / parts, d_in) blocks to merge one by one."""
    return list(
        stack.mT.chunk(layer.parts, -2) if layer.transposed else stack.chunk(layer.parts, -2)
    )


def join(blocks: list[Tensor], layer: Layer) -> Tensor:
    """Undo `cut` on merged blocks (d_out / parts, d_in)."""
    merged = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    return merged.mT if layer.transposed else merged

"""What a tensor is, told by the type of the module that holds it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from merging.layers import names
from merging.layers.layout import Layer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BACK = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATES = {"LSTM": 4, "GRU": 3}
_NORMS = ("Norm",)
# The direction of a weight normalisation, or the matrix under a spectral one: laid out as the
# module's weight.
_REPARAMETRISED = re.compile(
    r"(.+?)\.(?:parametrizations\.weight\.original1?|weight_v|weight_orig)"
)
_TABLES = ("Embed", "Codebook", "Quantizer")
# Modules with one matrix that is applied as nn.Linear applies its own: routers, quantised layers.
_MATRIX_OWNERS = ("Linear", "Router", "Gate", "TopK", "Projection", "Dense")
# Attention classes whose packed rows are one q, k, v (groups of q for grouped k, v) after another.
_BY_HEAD = ("GPTNeoX", "Bloom", "Falcon", "Persimmon", "Fuyu", "GPTBigCode")
_SHARDS = {"CodeGenAttention": 4}  # q, v, k one after another for each of so many devices
_PACKED = frozenset(
    {"qkv", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj", "qkv_layer"}
)


def linear_layers(model: nn.Module, *, convolutions: bool = True) -> dict[str, Layer]:
    """Weight names of a model's linear layers, chosen by module type.

    nn.Linear, the packed or separate projections of nn.MultiheadAttention, Conv1D, recurrent
    layers, fused experts, their routers and convolutions count. Embeddings, whatever is tied to
    one and output heads do not (`names.is_head`, `get_output_embeddings`, `get_classifier`), nor do
    depthwise convolutions and those of the input (fewer than five channels: a stem, patches).

    convolutions: whether k x k convolutions count, as matrices (out, in k k).
    """
    return {
        name: kind
        for name, kind in kinds(model).items()
        if isinstance(kind, Layer) and (convolutions or not kind.kernel)
    }


def kinds(model: nn.Module) -> dict[str, Layer | str]:
    """For each tensor of a model's state dict its layer, or the reason why it is none."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(weight) for weight in _outputs(model)}
    modules = dict(model.named_modules())
    table: dict[str, Layer | str] = {}
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        for leaf, tensor in _own(module):
            name = f"{path}.{leaf}" if path else leaf
            if not tensor.is_floating_point():
                table[name] = names.CODES
            elif tensor.ndim < 2:
                table[name] = names.VECTOR
            elif id(tensor) in tables:
                table[name] = names.EMBEDDING
            elif id(tensor) in heads or (leaf == "weight" and names.is_head(path)):
                table[name] = names.HEAD
            elif reparametrised := _REPARAMETRISED.fullmatch(name):
                owner = modules[reparametrised[1]]
                outer = modules.get(reparametrised[1].rpartition(".")[0])
                table[name] = _kind(owner, reparametrised[1], "weight", tensor, outer)
            else:
                table[name] = _kind(module, path, leaf, tensor, parent)
    return table


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module itself adds to a state dict."""
    yield from ((n, p) for n, p in module._parameters.items() if p is not None)
    volatile = module._non_persistent_buffers_set
    yield from ((n, b) for n, b in module._buffers.items() if b is not None and n not in volatile)


def _outputs(model: nn.Module) -> Iterator[Tensor]:
    """Weights of the layers that a model itself calls its output."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential) and names.is_head(path):
            yield from [x.weight for x in module.modules() if isinstance(x, nn.Linear)][-1:]
    for getter in ("get_output_embeddings", "get_classifier"):
        try:
            head = getattr(model, getter)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        for module in head if isinstance(head, (list, tuple)) else [head]:
            if isinstance(module, nn.Module):
                yield from (p for p in module.parameters() if p.ndim > 1)


def _kind(
    module: nn.Module, path: str, leaf: str, tensor: Tensor, parent: nn.Module | None
) -> Layer | str:
    last, shape = path.rpartition(".")[2], tuple(tensor.shape)
    if isinstance(module, nn.MultiheadAttention):
        if leaf == "in_proj_weight":
            return Layer(parts=3)
        return Layer() if leaf.endswith("_proj_weight") else names.PARAMETER
    if isinstance(module, nn.RNNBase):
        return (
            Layer(parts=_GATES.get(module.mode, 1))
            if leaf.startswith("weight")
            else names.PARAMETER
        )
    if isinstance(module, (*_CONVOLUTIONS, *_BACK)) and leaf == "weight":
        return _convolution(module, shape)
    if isinstance(module, nn.Linear) and leaf == "weight":
        return _packed(module, last, shape, parent)
    kind = type(module).__name__
    if kind == "Conv1D" and hasattr(module, "nf"):
        parts = shape[1] // shape[0] if last == "c_attn" and shape[1] % shape[0] == 0 else 1
        return Layer(parts=parts if parts in (2, 3) else 1, transposed=True)
    if any(word in kind for word in _NORMS):
        return names.NORM
    if tensor.ndim == 3 and _experts(module, leaf):
        return Layer(experts=shape[0], transposed=_stored_back(module, leaf))
    if tensor.ndim == 2 and leaf == "weight" and any(word in kind for word in _MATRIX_OWNERS):
        return Layer()
    if any(word in kind for word in _TABLES):
        return names.EMBEDDING
    return names.PARAMETER


def _convolution(module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> Layer | str:
    """(out, in / groups, *kernel), or (in, out, *kernel) of a transposed convolution."""
    back = isinstance(module, _BACK)
    channels = module.in_channels
    if module.groups > 1 and module.groups in (channels, module.out_channels):
        return names.DEPTHWISE
    if channels < names.STEM_CHANNELS:
        return names.STEM
    if module.groups > 1 and back:
        return names.UNKNOWN
    return Layer(module.groups, transposed=back, kernel=shape[2:])


def _packed(
    module: nn.Linear, last: str, shape: tuple[int, ...], parent: nn.Module | None
) -> Layer:
    """nn.Linear, cut into q, k and v by the attention's own head counts where it packs them."""
    if last not in _PACKED:
        return Layer(parts=names.packed_parts(last, shape))
    rows = shape[0]
    heads, grouped, width = _head_counts(parent, shape[1])
    if rows == 3 * shape[1] and (shards := _SHARDS.get(type(parent).__name__)):
        return Layer(3, groups=shards)
    if heads and grouped and width and rows == (heads + 2 * grouped) * width:
        if any(word in type(parent).__name__ for word in _BY_HEAD):
            share = heads // grouped
            parts = 3 if share == 1 else (share * width, width, width)
            return Layer(parts, groups=grouped)
        return Layer(3 if heads == grouped else (heads * width, grouped * width, grouped * width))
    return Layer(parts=3 if rows == 3 * shape[1] else 1)


def _head_counts(attention: nn.Module | None, d_in: int) -> tuple[int, int, int]:
    """Heads, heads of k and v, and the width of one, as an attention module states them; or 0."""
    sources = [attention, getattr(attention, "config", None)]
    heads = _stated(sources, "num_heads", "num_attention_heads", "n_heads", "n_head")
    grouped = _stated(
        sources, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "kv_heads"
    )
    width = _stated(sources, "head_dim", "head_size")
    return heads, grouped or heads, width or (d_in // heads if heads else 0)


def _stated(sources: list[Any], *attributes: str) -> int:
    for source in sources:
        for attribute in attributes:
            value = getattr(source, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _experts(module: nn.Module, leaf: str) -> bool:
    """Whether a tensor (E, ., .) holds one matrix for each expert."""
    place = f"{type(module).__name__}.{leaf}"
    return any(w in place for w in ("Expert", "Moe", "MoE", "gate_up", "down_proj", "up_proj"))


def _stored_back(module: nn.Module, leaf: str) -> bool:
    """Whether fused experts are (E, d_in, d_out): as the module says, or as its shapes do."""
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    shapes = {
        f"experts.{n}": tuple(p.shape) for n, p in module._parameters.items() if p is not None
    }
    return names._experts_stored_back("experts", leaf, shapes)

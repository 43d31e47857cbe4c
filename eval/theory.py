"""Why D^T D stands in for E[z z^T]: what has to hold, measured while a model is fine-tuned.

Plain gradient descent gives a layer the difference D = -eta sum_i g_i z_i^T, over the tokens i of
all steps, z the layer's input and g the loss' gradient at its output. Hence (arXiv 2604.01329)

    D^T D = eta^2 sum_ij (g_i . g_j) z_i z_j^T,

which is proportional to sum_i z_i z_i^T at the final weights as far as three conditions hold:
cross term    sum_ij (g_i . g_j) z_i z_j^T  is close to  sum_i |g_i|^2 z_i z_i^T,
correlation   sum_i |g_i|^2 z_i z_i^T       is close to  sum_i z_i z_i^T,
drift         E[z z^T] along the training   is close to  E[z z^T] at its end.
"Close" is the cosine of two matrices, or the angular distance arccos(cosine) / pi.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eval.inputs import rows
from merging.errors import InputError
from merging.layers import Layer
from merging.linalg import eigh, gram

Loss = Callable[[nn.Module, Any], Tensor]
Mask = Callable[[Any, str], Tensor | None]
Watch = Callable[[str, Tensor, Tensor], None]  # weight name, input, output
# Coordinates whose products are compared with the gradients' energy: all of them would be a third
# of a recording's cost, and the pairs of 128 have nearly the same mean.
PRODUCTS = 128


def cosine(A: Tensor, B: Tensor) -> float:
    """<A, B> / (|A| |B|) of two matrices of one shape; nan where one of them is 0."""
    A, B = A.double(), B.double()
    return ((A * B).sum() / (A.norm() * B.norm())).item()


def angular_distance(cos: float) -> float:
    """arccos(cos) / pi: 0 the same direction, 0.5 orthogonal, 1 opposite."""
    return math.acos(min(1.0, max(-1.0, cos))) / math.pi


# --- along the training ---------------------------------------------------------------------------


@dataclass
class Sums:
    """Running sums of one linear map over all tokens that passed it; nothing per token is kept."""

    gradient: Tensor  # sum g z^T, (d_out, d_in)
    energy: Tensor  # sum |g|^2 z z^T, (d_in, d_in)
    moment: Tensor  # sum z z^T, (d_in, d_in)
    square: Tensor  # sum (z z^T)^2, entry by entry, of `_some` coordinates
    tokens: int = 0
    g2: float = 0.0  # sum |g|^2
    g4: float = 0.0  # sum |g|^4

    @classmethod
    def zeros(cls, d_out: int, d_in: int) -> Sums:
        k = len(_some(d_in))
        return cls(*(torch.zeros(shape) for shape in ((d_out, d_in), *2 * [(d_in, d_in)], (k, k))))

    def add(self, z: Tensor, g: Tensor) -> None:
        """Inputs z (n, d_in) and gradients at the outputs g (n, d_out) of n tokens."""
        z, g = z.float(), g.float()
        energy = g.square().sum(1)  # (n,)
        self.gradient += (g.mT @ z).cpu()
        self.energy += gram(energy.sqrt().unsqueeze(1) * z).cpu()
        self.moment += gram(z).cpu()
        self.square += gram(z[:, _some(z.shape[1])].square()).cpu()
        self.tokens += len(z)
        self.g2 += energy.double().sum().item()
        self.g4 += energy.double().square().sum().item()


def _some(d_in: int) -> Tensor:
    """Evenly spaced coordinates, at most `PRODUCTS`; their products stand for all of a layer's."""
    return torch.linspace(0, d_in - 1, min(d_in, PRODUCTS)).round().long()


def cross_term(sums: Sums) -> float:
    """Cosine of G^T G, all pairs of tokens, with sum |g|^2 z z^T, each token with itself."""
    return cosine(gram(sums.gradient), sums.energy)


def correlation(sums: Sums) -> float:
    """Cosine of sum |g|^2 z z^T with sum z z^T."""
    return cosine(sums.energy, sums.moment)


def energy_correlation(sums: Sums) -> float:
    """Mean over (a, b) of |rho(|g|^2, z_a z_b)|, Pearson's over tokens: 0 if they have no relation.

    Over `PRODUCTS` squared pairs at most. A product that never varies has no correlation and is
    left out of the mean.
    """
    n, some = sums.tokens, _some(len(sums.moment))
    mean, energy = sums.moment[some][:, some].double() / n, sums.g2 / n
    covariance = sums.energy[some][:, some].double() / n - energy * mean
    spread = (sums.square.double() / n - mean.square()).clamp_min(0)
    rho = covariance / (spread * (sums.g4 / n - energy**2)).sqrt()
    return rho[torch.isfinite(rho)].abs().mean().item()


@contextmanager
def recording(
    model: nn.Module, layers: Mapping[str, Layer], loss: Loss, mask: Mask | None = None
) -> Iterator[tuple[Loss, dict[str, Sums]]]:
    """Record a training: yields the loss to train with, and the sums its backward passes fill.

    layers: weight names, as `merging.linear_layers` gives them; the sums are keyed by
        `part_names`, one entry for each of q, k, v where they are packed.
    mask: `mask(batch, weight name)` -> (batch, tokens) booleans, True for the tokens that
        count, or None for all of them.

    Sums are float32. The model computes what it computes without this.
    """
    sums: dict[str, Sums] = {}
    batch: Any = None

    def watch(name: str, z: Tensor, out: Tensor) -> None:
        if not out.requires_grad:  # somebody evaluates the model between two steps
            return
        keep = mask(batch, name) if mask else None
        select = (lambda x: x[keep]) if keep is not None else (lambda x: x.flatten(0, -2))
        z = z.detach()

        def book(g: Tensor) -> None:
            inputs, whole = select(z), select(by_token(model, name, g))
            gradients = whole.chunk(layers[name].parts, -1)
            for part, own in zip(part_names(name, layers[name]), gradients, strict=True):
                if part not in sums:
                    sums[part] = Sums.zeros(own.shape[-1], inputs.shape[-1])
                sums[part].add(inputs, own)

        out.register_hook(book)

    def recorded(model: nn.Module, current: Any) -> Tensor:
        nonlocal batch
        batch = current
        return loss(model, current)

    with watched(model, layers, watch):
        yield recorded, sums


def part_names(weight: str, layer: Layer) -> list[str]:
    """Names of the blocks that `merging.layers.cut` makes: the weight's, or one each of q, k, v."""
    return [weight] if layer.parts == 1 else [f"{weight}[{x}]" for x in "qkv"[: layer.parts]]


@contextmanager
def watched(model: nn.Module, weights: Iterable[str], watch: Watch) -> Iterator[None]:
    """Call `watch(weight name, input, output)` whenever a layer is applied.

    A convolution's input is given as its patches (B, positions, d_in), its output as it is.
    """
    handles: list[RemovableHandle] = []
    attentions: dict[nn.MultiheadAttention, dict[str, str]] = {}  # own names -> weight names
    for weight in weights:
        path, _, leaf = weight.rpartition(".")
        parent, _, own = path.rpartition(".")
        module, above = model.get_submodule(path), model.get_submodule(parent)
        if isinstance(module, nn.MultiheadAttention):
            attentions.setdefault(module, {})[leaf] = weight
        elif isinstance(above, nn.MultiheadAttention):
            attentions.setdefault(above, {})[f"{own}.{leaf}"] = weight
        else:
            handles.append(module.register_forward_hook(_after(weight, watch)))
    try:
        for module, names in attentions.items():
            module.forward = _explicit_attention(module, names, watch)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in attentions:
            vars(module).pop("forward", None)  # the class' own shows again


def _after(weight: str, watch: Watch) -> Callable[..., None]:
    return lambda module, args, output: watch(weight, rows(module, args[0]), output)


def by_token(model: nn.Module, weight: str, g: Tensor) -> Tensor:
    """A gradient at a layer's output as rows (B, tokens, d_out), one for each of its input's.

    g: (B, tokens, d_out), or (B, d_out, *positions) of a convolution.
    """
    module = model.get_submodule(weight.rpartition(".")[0])
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        raise InputError(
            f"{weight!r}: outputs of a transposed convolution are not its inputs' rows"
        )
    return g.flatten(2).mT if isinstance(module, nn.modules.conv._ConvNd) else g


def _explicit_attention(
    module: nn.MultiheadAttention, names: Mapping[str, str], watch: Watch
) -> Callable[..., tuple[Tensor, None]]:
    """The forward pass of an attention with packed q, k, v, one visible linear map at a time.

    torch's own computes the projections where no hook can see their outputs.
    """
    mine = f"the attention of {min(names.values())!r}"
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise InputError(f"{mine} does not apply packed q, k, v to its input alone")

    def seen(own: str, z: Tensor, out: Tensor) -> Tensor:
        if own in names:
            watch(names[own], z, out)
        return out

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if query is not key or key is not value:
            raise InputError(f"{mine} has more than one input, expected self-attention")
        z = query if module.batch_first else query.transpose(0, 1)  # (B, n, d)
        packed = seen("in_proj_weight", z, F.linear(z, module.in_proj_weight, module.in_proj_bias))
        heads = packed.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        masks = [_added(m, heads) for m in (attn_mask, _by_key(key_padding_mask)) if m is not None]
        mixed = F.scaled_dot_product_attention(
            *heads,  # q, k, v: (B, heads, n, d / heads)
            attn_mask=sum(masks) if masks else None,
            dropout_p=module.dropout if module.training else 0.0,
        )
        z = mixed.transpose(1, 2).flatten(2)
        out = seen("out_proj.weight", z, F.linear(z, module.out_proj.weight, module.out_proj.bias))
        return (out if module.batch_first else out.transpose(0, 1)), None

    return forward


def _by_key(padding: Tensor | None) -> Tensor | None:
    """(B, n) -> (B, 1, 1, n): a key is hidden from every head and query."""
    return None if padding is None else padding[:, None, None]


def _added(mask: Tensor, heads: Tensor) -> Tensor:
    """A mask of booleans (True: hidden) or of summands as summands for (B, heads, n, n) scores."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=heads.dtype).masked_fill(mask, -math.inf)
    return mask.unflatten(0, (heads.shape[1], -1)) if mask.ndim == 3 else mask


# --- after the training ---------------------------------------------------------------------------


def leading_directions(A: Tensor, k: int) -> Tensor:
    """Eigenvectors (d, k) of the k largest eigenvalues of a symmetric matrix (d, d), by Lanczos."""
    if k >= len(A):
        return torch.eye(len(A))
    matrix = (A / A.norm()).float().numpy()
    start = np.ones(len(A), np.float32)  # a fixed start: same matrix, same directions
    return torch.from_numpy(eigsh(matrix, k, which="LA", v0=start, tol=1e-5)[1])


def subspace_overlap(U: Tensor, V: Tensor) -> float:
    """|U^T V|^2 / k for orthonormal U, V (d, k), in [0, 1]; k / d for two random subspaces."""
    return ((U.mT @ V).square().sum() / U.shape[1]).item()


def energy_ratio(D: Tensor, C: Tensor) -> float:
    """|D|^2 / tr C: the factor between D^T D (d_in, d_in) and the second moment C, by trace."""
    return (D.double().square().sum() / C.double().diagonal().sum()).item()


def interference(D: Tensor, deltas: Tensor, covariances: Tensor) -> Tensor:
    """E_z |(D - D_t) z|^2 for each task t, (T,).

    D (d_out, d_in) merged, deltas (T, d_out, d_in), covariances (T, d_in, d_in) = E[z z^T].
    """
    R = D.double() - deltas.double()
    return ((R @ covariances.double()) * R).sum((1, 2))


class Directions(NamedTuple):
    """What a merge does in each eigen-direction v of S = sum_t D_t^T D_t, largest first."""

    eigenvalue: Tensor  # (d_in,), relative to the largest
    experts: Tensor  # (T, d_in), |D_t v|^2
    merged: Tensor  # (d_in,), |D v|^2
    interference: Tensor  # (d_in,), sums over the directions to sum_t E_z |(D - D_t) z|^2


def directions(D: Tensor, deltas: Tensor, covariances: Tensor) -> Directions:
    """Split a merge's gain and interference over the eigen-directions that a method inverts.

    The interference tr(R C R^T), R = D - D_t, is split as sum_v (R v) . (R C v): exact, though
    a single direction's share may be negative.
    """
    D, deltas, covariances = D.double(), deltas.double(), covariances.double()
    l, V = eigh(gram(deltas.flatten(0, 1)))
    R = D - deltas
    share = ((R @ V) * (R @ covariances @ V)).sum((0, 1))
    return Directions(l / l[0], (deltas @ V).square().sum(1), (D @ V).square().sum(0), share)

"""Both factors of K-FAC at every layer: second moments of inputs and of gradients at outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eval.theory import Loss, Mask, by_token, watched
from merging.errors import InputError
from merging.layers import Layer
from merging.linalg import gram
from merging.method.registry import OUTPUTS


def factors(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, Layer] | Iterable[str],
    loss: Loss,
    mask: Mask | None = None,
) -> dict[str, Tensor]:
    """E[z z^T] and E[g g^T] over all tokens, z a layer's input, g the loss' gradient at its output.

    layers: weight names, as `merging.linear_layers` gives them.
    loss: the sum, not the mean, over a batch's examples of -log p(y | x): each token's gradient is
        then that of its own example. With y drawn from the model the two are the factors of the
        Fisher information (Martens and Grosse, arXiv 1503.05671, section 3).
    mask: `mask(batch, weight name)` -> (batch, tokens) booleans, True for the tokens that
        count, or None for all of them.

    Returns {weight name: (d_in, d_in), weight name + OUTPUTS: (d_out, d_out)}, float32, sums over
    batches in float64. The model's outputs are untouched. Raises InputError for a layer that never
    ran.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    batch: Any = None

    def watch(name: str, z: Tensor, out: Tensor) -> None:
        keep = mask(batch, name) if mask else None

        def rows(x: Tensor) -> Tensor:
            return (x.flatten(0, -2) if keep is None else x[keep]).detach().float()

        inputs = rows(z)

        def book(g: Tensor) -> None:
            gradients = rows(by_token(model, name, g))
            for key, own in ((name, inputs), (name + OUTPUTS, gradients)):
                sums[key] = sums.get(key, 0.0) + gram(own).double()
            counts[name] = counts.get(name, 0) + len(inputs)

        out.register_hook(book)

    flags = {p: p.requires_grad for p in model.parameters()}
    names, training = list(layers), model.training
    try:
        model.eval().requires_grad_(False)
        weights = [model.get_parameter(name).requires_grad_(True) for name in names]
        with watched(model, names, watch):
            for batch in batches:
                torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)
    if missing := [name for name in names if not counts.get(name)]:
        raise InputError(f"no gradient ever reached layer {missing[0]!r} of the model")
    return {
        key: (total / counts[key.removesuffix(OUTPUTS)]).float().cpu()
        for key, total in sums.items()
    }


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """-log p of one label for each example, drawn from the model itself, summed: (n, classes)."""
    log_probabilities = logits.log_softmax(-1)
    chosen = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
    return -log_probabilities.gather(1, chosen).sum()

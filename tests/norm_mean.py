"""A method that lives outside the package: what CONTRIBUTING.md shows, registered on import."""

import torch
from torch import Tensor

import merging


@merging.register("norm_mean", source="an example", rest="method", row_space=True)
def norm_mean(deltas: Tensor) -> Tensor:
    """sum_t |D_t| D_t / sum_t |D_t|, (T, *shape) -> (*shape): who moved further counts for more."""
    norms = deltas.reshape(len(deltas), -1).norm(dim=1)  # (T,)
    weights = norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
    return torch.einsum("t,t...->...", weights, deltas)

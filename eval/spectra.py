"""Is a matrix random? Its spectrum beside the Marchenko-Pastur law, whose entries know nothing.

An adapter B A starts from a random A and B = 0. Where training hardly moves A, the rows of B A span
what the initialisation drew, and D^T D = A^T B^T B A says little of a layer's inputs.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

DRAWS = 199  # random matrices that a spectrum is compared with


def marchenko_pastur(x: np.ndarray, ratio: float) -> np.ndarray:
    """Cumulative distribution of the eigenvalues of A A^T / (d s^2), A (r, d) of independent
    entries of variance s^2, in the limit of r / d = ratio <= 1 (Marchenko and Pastur 1967)."""
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    angle = np.linspace(0, np.pi, 2001)  # x = 1 + ratio - 2 sqrt(ratio) cos(angle) has no kinks
    grid = 1 + ratio - 2 * ratio**0.5 * np.cos(angle)
    density = (2 * ratio**0.5 * np.sin(angle)) ** 2 / (4 * np.pi * ratio * np.maximum(grid, 1e-12))
    steps = (density[1:] + density[:-1]) / 2 * np.diff(angle)
    mass = np.concatenate([[0.0], np.cumsum(steps)])
    return np.interp(np.clip(x, low, high), grid, mass / mass[-1])


def distance(A: Tensor) -> float:
    """Kolmogorov-Smirnov distance of A's spectrum, (r, d), to the law, in [0, 1]; scale is out."""
    A = A.double() if A.shape[0] <= A.shape[1] else A.double().mT
    r, d = A.shape
    values = torch.linalg.eigvalsh(A @ A.mT).clamp_min(0).numpy()  # ascending
    expected = marchenko_pastur(values / values.mean(), r / d)
    steps = np.arange(r + 1) / r
    return float(max(np.abs(steps[1:] - expected).max(), np.abs(steps[:-1] - expected).max()))


def randomness(A: Tensor) -> float:
    """Share of Gaussian matrices of A's shape that are as far from the law as A is, or further:
    uniform in (0, 1] if A is random, near 0 if it is not."""
    further = int((_distances(*sorted(A.shape)) >= distance(A)).sum())
    return (1 + further) / (1 + DRAWS)


@functools.lru_cache
def _distances(r: int, d: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(r, d, generator=generator) for _ in range(DRAWS))
    return np.array([distance(draw) for draw in draws])

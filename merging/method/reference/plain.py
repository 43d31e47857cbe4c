"""The table of plain formulas, and the few routines of torch they call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Formula = Callable[..., Tensor]
TEXTBOOK: dict[str, Formula] = {}


def printed(function: Formula) -> Formula:
    """Enter a formula under its function's name."""
    TEXTBOOK[function.__name__] = function
    return function


def pinv(S: Tensor, rtol: float | None = None) -> Tensor:
    """torch.linalg.pinv with the cut it has in float32, whatever S's precision."""
    cut = len(S) * torch.finfo(torch.float32).eps if rtol is None else rtol
    inverted: Tensor = torch.linalg.pinv(S, rtol=cut)
    return inverted


def inverse(S: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
    inverted: Tensor = torch.linalg.inv(S + ridge * torch.eye(len(S), dtype=S.dtype))
    return inverted


def eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    l, V = torch.linalg.eigh(S)
    return l, V


def svd(D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    return U, s, Vh


def procrustes(U: Tensor) -> Tensor:
    P, _, Qh = svd(U)
    return P @ Qh

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
    return torch.linalg.pinv(
        S, rtol=len(S) * torch.finfo(torch.float32).eps if rtol is None else rtol
    )


def inverse(S: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
    return torch.linalg.inv(S + ridge * torch.eye(len(S), dtype=S.dtype))


def svd(D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(D, full_matrices=False)


def procrustes(U: Tensor) -> Tensor:
    P, _, Qh = svd(U)
    return P @ Qh

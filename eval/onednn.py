"""Linear layers in oneDNN, more than twice as fast where MKL has no kernels for the CPU (AMD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneDnnLinear(nn.Linear):
    """nn.Linear whose forward pass without gradients runs in oneDNN; same parameters, float32."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to_mkldnn()
        return F.linear(input.to_mkldnn(), self.weight.to_mkldnn(), bias).to_dense()


def accelerate(model: nn.Module) -> nn.Module:
    """Let every plain nn.Linear of `model` use oneDNN where there is one; returns the model."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model

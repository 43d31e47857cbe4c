"""Linear layers in oneDNN, more than twice as fast where MKL has no kernels for the CPU (AMD)."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Per layer the version and place that its weight had when it was packed, and the packed weight: a
# working model is loaded once and then sees many batches.
_packed: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


class OneDnnLinear(nn.Linear):
    """nn.Linear whose forward pass without gradients runs in oneDNN; same parameters, float32."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self._weight(), self.bias, "none", [], "")

    def _weight(self) -> Tensor:
        """The weight in oneDNN's own layout, packed anew when it was changed."""
        stamp = (self.weight._version, self.weight.data_ptr())
        found = _packed.get(self)
        if found is None or found[0] != stamp:
            found = stamp, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            _packed[self] = found
        return found[1]


def accelerate(model: nn.Module) -> nn.Module:
    """Let every plain nn.Linear of `model` use oneDNN where there is one; returns the model."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model

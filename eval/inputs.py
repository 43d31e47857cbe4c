"""What enters layers that are no plain matrix: a convolution's patches, a fused expert's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, unfold
from torch.overrides import TorchFunctionMode

from merging.errors import InputError

_PRODUCTS = (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


def rows(module: nn.Module, z: Tensor) -> Tensor:
    """The input z of a module as rows of what its matrix multiplies, (batch, rows, d_in).

    A convolution's rows are its patches, in the order of its weights flattened: (in, *kernel).
    Raises InputError for convolutions whose groups, dimensions or padding make them no one matrix.
    """
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return z.flatten(2).mT
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return z
    zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if module.groups > 1 or isinstance(module, nn.Conv3d) or not zeros:
        raise InputError(
            f"{module} has no second moment of one matrix's inputs",
            hint="leave it out: linear_layers(model, convolutions=False)",
        )
    if isinstance(module, nn.Conv1d):  # as a convolution one pixel high
        size, step = (1, *module.kernel_size), (1, *module.stride)
        return unfold(z[:, :, None], size, (1, *module.dilation), (0, *module.padding), step).mT
    own = module.kernel_size, module.dilation, module.padding, module.stride
    return unfold(z, *own).mT


class _Products(TorchFunctionMode):
    """Watches products with the matrices of fused experts, (E, ., .) parameters."""

    def __init__(
        self, fused: Mapping[int, str], observe: Callable[[str, int, Tensor], None]
    ) -> None:
        super().__init__()
        self.fused, self.observe = fused, observe
        self.taken: dict[int, tuple[Tensor, str, int]] = {}  # one expert's matrix by its id

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and id(args[0]) in self.fused:
            self.taken[id(result)] = result, self.fused[id(args[0])], int(args[1])
        elif func in _PRODUCTS and len(args) > 1:
            z, weight = args[:2]
            if id(weight) in self.taken:
                _, name, expert = self.taken.pop(id(weight))
                self.observe(name, expert, z)
            elif id(weight) in self.fused:  # all experts at once: z (E, rows, d_in)
                for expert, own in enumerate(z):
                    self.observe(self.fused[id(weight)], expert, own)
        return result


@contextmanager
def fused_experts(
    model: nn.Module, names: list[str], observe: Callable[[str, int, Tensor], None]
) -> Iterator[None]:
    """Call `observe(weight name, expert, rows)` with what enters each expert's own matrix.

    transformers' experts run one by one meanwhile, whatever implementation was chosen.
    """
    if not names:
        yield
        return
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    configs = {id(c): c for o in owners if (c := getattr(o, "config", None)) is not None}
    chosen = [(c, getattr(c, "_experts_implementation", None)) for c in configs.values()]
    fused = {id(model.get_parameter(name)): name for name in names}
    try:
        for config, _ in chosen:
            config._experts_implementation = "eager"
        with _Products(fused, observe):
            yield
    finally:
        for config, implementation in chosen:
            config._experts_implementation = implementation

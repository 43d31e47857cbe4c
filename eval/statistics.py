"""What a model shows of its inputs: second moments of layer inputs, and the diagonal Fisher."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eval.cache import digest
from eval.inputs import fused_experts, rows
from merging.errors import InputError

if TYPE_CHECKING:
    from eval.backend import Finetuning, Statistic
    from eval.suite import Suite
    from merging.layers import Layer

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any, str], Tensor | None]
_EXPERT = "#"  # between a fused layer's name and the number of an expert


def second_moments(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, Layer] | Iterable[str],
    *,
    forward: Forward | None = None,
    mask: Mask | None = None,
) -> dict[str, Tensor]:
    """Uncentred second moment E[z z^T] of the input z of each layer, over all tokens.

    layers: weight names, as `merging.linear_layers` gives them.
    forward: runs the model on one batch; by default `model(**batch)` or `model(batch)`.
    mask: `mask(batch, weight name)` -> (batch, tokens) booleans, True for the tokens that
        count, or None for all of them.

    Returns {weight name: (d_in, d_in) float32}, (E, d_in, d_in) for E fused experts, all of whose
    tokens count; layers that were given the same tensor share one matrix. Products are float32,
    their sum over batches is float64. The model's outputs are untouched. Raises InputError for
    a layer that never ran.
    """
    moments = _Moments()
    fused = {name: len(model.get_parameter(name)) for name in layers if _is_fused(model, name)}
    plain = [name for name in layers if name not in fused]
    with (
        torch.no_grad(),
        observed(model, plain, moments.add),
        fused_experts(model, list(fused), moments.add_expert),
    ):
        for batch in batches:
            moments.mask = (lambda name, b=batch: mask(b, name)) if mask else lambda name: None
            (forward or _forward)(model, batch)
            moments.close()
    found = _stacked(moments.result(), fused)
    if missing := set(layers) - set(found):
        raise InputError(f"no input ever reached layer {sorted(missing)[0]!r} of the model")
    return found


def _is_fused(model: nn.Module, name: str) -> bool:
    """Whether a weight holds one matrix for each of several experts."""
    path, _, _ = name.rpartition(".")
    module = model.get_submodule(path)
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return not convolution and getattr(module, name[len(path) :].lstrip(".")).ndim == 3


def _stacked(moments: Mapping[str, Tensor], fused: Mapping[str, int]) -> dict[str, Tensor]:
    """Moments with those of fused experts under one name; zeros where no token reached one."""
    found = {name: moment for name, moment in moments.items() if _EXPERT not in name}
    for name, count in fused.items():
        own = [moments.get(f"{name}{_EXPERT}{i}") for i in range(count)]
        seen = next((m for m in own if m is not None), None)
        if seen is not None:
            found[name] = torch.stack([torch.zeros_like(seen) if m is None else m for m in own])
    return found


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


class _Moments:
    """Running sums, one per set of layers that see the same tensor (query, key and value do)."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.counts: dict[tuple[str, ...], int] = {}
        self.mask: Callable[[str], Tensor | None] = lambda name: None
        self._input: tuple[Tensor, int] | None = None  # the latest input and its version
        self._names: list[str] = []

    def add(self, name: str, z: Tensor) -> None:
        """Layer `name` is about to be applied to z, (batch, tokens, d_in) or (..., d_in)."""
        if self._input and self._input[0] is z and self._input[1] == z._version:
            self._names.append(name)
            return
        self.close()
        keep = self.mask(name)
        if keep is not None and keep.ndim == z.ndim and keep.numel() == len(z):
            keep = keep.flatten()  # a router sees all sequences' tokens one after another
        kept = z.flatten(0, -2) if keep is None else z[keep.to(z.device, torch.bool)]
        kept = kept.float()
        self._input, self._names = (z, z._version), [name]
        self._gram, self._rows = kept.mT @ kept, len(kept)

    def add_expert(self, name: str, expert: int, z: Tensor) -> None:
        """Expert number `expert` of a fused layer is about to be applied to z (tokens, d_in)."""
        mask, self.mask = self.mask, lambda name: None
        self.add(f"{name}{_EXPERT}{expert}", z)
        self.close()
        self.mask = mask

    def close(self) -> None:
        """Book the latest input's product under all the layers that shared it."""
        if self._input is None:
            return
        group = tuple(self._names)
        if group in self.sums:
            self.sums[group] += self._gram
        else:
            self.sums[group] = self._gram.double()
        self.counts[group] = self.counts.get(group, 0) + self._rows
        self._input = None

    def reached(self) -> set[str]:
        """Layers for which at least one token counted."""
        return {name for group, count in self.counts.items() if count for name in group}

    def result(self) -> dict[str, Tensor]:
        means: dict[tuple[tuple[str, ...], ...], Tensor] = {}
        moments = {}
        for name in sorted(self.reached()):
            groups = tuple(group for group in self.sums if name in group)
            if groups not in means:
                total = sum(self.sums[group] * group.count(name) for group in groups)
                count = sum(self.counts[group] * group.count(name) for group in groups)
                means[groups] = (total / count).float().cpu()
            moments[name] = means[groups]
        return moments


@contextmanager
def observed(
    model: nn.Module, weights: Iterable[str], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `observe(weight name, input)` whenever a layer is applied, in eval mode."""
    handles, training = [], model.training
    try:
        model.eval()
        for weight in weights:
            path, _, leaf = weight.rpartition(".")
            parent, _, own = path.rpartition(".")
            attention = model.get_submodule(parent)
            if isinstance(attention, nn.MultiheadAttention) and own == "out_proj":
                module, hook = attention, _before_out_proj(weight, observe)
            else:
                module, hook = model.get_submodule(path), _before(weight, leaf, observe)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


def _before(weight: str, leaf: str, observe: Callable[[str, Tensor], None]) -> Callable[..., None]:
    """Hook that reports the input of a linear layer, or of an attention's q/k/v projection."""
    place = {"k_proj_weight": 1, "v_proj_weight": 2}.get(leaf, 0)
    keyword = ("query", "key", "value")[place]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if place < len(args):
            z = args[place]
        else:
            z = kwargs[keyword] if keyword in kwargs else next(iter(kwargs.values()))
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first and z.ndim == 3:
            z = z.transpose(0, 1)
        observe(weight, rows(module, z))

    return hook


def _before_out_proj(weight: str, observe: Callable[[str, Tensor], None]) -> Callable[..., None]:
    """Hook on nn.MultiheadAttention, which never calls its output projection as a module.

    The same attention with an identity in that projection's place returns its input.
    """

    def hook(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        width, given = module.embed_dim, module.out_proj.weight
        identity = nn.Linear(width, width, device=given.device, dtype=given.dtype)
        identity.weight = nn.Parameter(torch.eye(width).to(given))
        nn.init.zeros_(identity.bias)  # the fused kernel insists on one
        twin = copy.copy(module)
        twin._modules = {"out_proj": identity}
        twin._forward_pre_hooks = {}
        z = type(module).forward(twin, *args, **kwargs)[0]
        observe(weight, z if module.batch_first or z.ndim == 2 else z.transpose(0, 1))

    return hook


def diagonal_fisher(
    model: nn.Module,
    examples: Iterable[Any],
    log_prob: Callable[[nn.Module, Any], Tensor],
    names: Iterable[str],
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: the mean squared gradient of one example's log p.

    examples: single examples, one gradient each (squaring a batch's gradient is something else).
    log_prob: scalar log p(y | x) of one example. With y drawn from the model (`sampled`) this
        is the Fisher information, with the true y the "empirical Fisher".
    names: parameters. Returns {name: float32 of the parameter's shape}.

    Source: Matena and Raffel, arXiv 2111.09832, section 3.1.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    flags = {p: p.requires_grad for p in model.parameters()}
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    count, training = 0, model.training
    try:
        model.eval().requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for example in examples:
            value = log_prob(model, example)
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()
            count += 1
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)
    if not count:
        raise InputError("the Fisher information was asked of no examples")
    return {name: (total / count).float().cpu() for name, total in sums.items()}


def sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Log-probability of one label drawn from the model's own distribution; logits (classes,)."""
    log_probabilities = logits.log_softmax(-1)
    label = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
    return log_probabilities[label].squeeze()


def about(
    suite: Suite, task: str, kind: Statistic, *, finetuning: Finetuning, seed: int
) -> dict[str, Any]:
    """What a statistics file must say of itself to be used for this suite, task and expert."""
    identity = digest(suite.identity(finetuning=finetuning, seed=seed))
    return {"suite": suite.name, "task": task, "kind": kind, "experts": identity}


def save(path: Path, statistics: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write statistics {weight name: tensor} with what `about` says of them."""
    # clones, as safetensors refuses the matrices that query, key and value share; and one
    # metadata entry, as it writes several in an arbitrary order
    tensors = {name: tensor.clone().contiguous() for name, tensor in statistics.items()}
    save_file(tensors, path, metadata={"about": json.dumps(about, sort_keys=True)})


def load(path: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read statistics, having checked that they are about what the caller thinks.

    Raises InputError, naming the file and the field, when they belong to another task or model.
    """
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("about", "{}"))
            for field, expected in about.items():
                if found.get(field) != expected:
                    raise InputError(
                        f"statistics {path} are for {field} {found.get(field)!r}, "
                        f"expected {expected!r}",
                        hint="collect them anew with: python -m experiments.statistics",
                    )
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"statistics file {path} cannot be read: {error}") from error

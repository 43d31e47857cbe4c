"""A fine-tuned model as a LoRA adapter of its base: the best low-rank part of every difference.

Of D = W - W_0 = U S V^T the rank-r part nearest to D keeps the r largest singular values (Eckart
and Young 1936); its share of the energy |D|^2 is the sum of their squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from merging.engine.routes import read_deltas as differences
from merging.errors import InputError, several
from merging.experts import Expert, Source
from merging.factors import Factors
from merging.formats.checkpoints import open_base, open_checkpoint
from merging.formats.checks import check_apart, problems
from merging.formats.fit import fit
from merging.formats.writer import write_adapter
from merging.layers import Layer, Layers, resolve_layers
from merging.linalg import eigh, gram, product, solving_dtype
from merging.progress import track


@dataclass
class Extraction:
    """What an adapter holds of a fine-tuned model; energies are sums of squared differences."""

    ranks: dict[str, int] = field(default_factory=dict)  # by weight name
    kept: float = 0.0  # energy in the adapter
    cut: float = 0.0  # energy of the adapted layers that the rank leaves out
    left: dict[str, float] = field(default_factory=dict)  # energy of tensors no adapter holds

    @property
    def share(self) -> float:
        """Of all that fine-tuning changed, what the adapter keeps."""
        total = self.kept + self.cut + sum(self.left.values())
        return self.kept / total if total else 1.0


def extract(
    base: str | Path,
    expert: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    layers: Layers = None,
    overwrite: bool = False,
) -> Extraction:
    """Write a PEFT adapter folder of a fine-tuned model, and say what it keeps.

    rank: of every layer, at most; or energy: the smallest rank that keeps this share of a layer's
        squared difference, in (0, 1]. Exactly one of the two.
    layers: as in `merge_state_dicts`; what is no layer's matrix stays as it is in the base.
    Raises InputError for checkpoints that do not fit, or an adapter of another kind of layer.
    """
    _check_choice(rank, energy)
    if Path(output).suffix == ".safetensors":
        raise InputError(f"an adapter is a folder, the output is to be the file {output}")
    check_apart(output, {"the base": base, "the expert": expert})
    source, tuned = open_base(base), open_checkpoint(expert)
    try:
        if tuned.partial:
            raise InputError(
                f"expert {expert} is an adapter already",
                hint="a merge of it alone, method=average form=adapter rank=R, lowers its rank",
            )
        shapes = {name: source.shape(name) for name in source.keys()}
        resolved = resolve_layers(layers, shapes, base)
        fitted = fit(source, {"expert": tuned}, resolved)
        if faults := problems(source, fitted):
            raise InputError(several(faults), hint="nothing was extracted")
        adapted = _adaptable(resolved)
        extraction, factors = _factor(source, fitted["expert"], adapted, rank, energy)
        if not factors:
            raise InputError(f"no layer of {expert} differs from {base}: there is nothing to adapt")
        transposed = {adapted[name].transposed for name in factors}
        if len(transposed) > 1:
            raise InputError(f"{base} mixes (d_in, d_out) and (d_out, d_in) layers in one adapter")
        settings = {"base_model_name_or_path": str(base), "fan_in_fan_out": transposed.pop()}
        write_adapter(output, factors, settings, overwrite=overwrite)
    finally:
        source.close()
        tuned.close()
    return extraction


def _check_choice(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise InputError("give either rank= or energy=", hint="for example rank=16 or energy=0.95")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is {energy}, expected a share in (0, 1]")


def _adaptable(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers that peft adapts by two factors: plain matrices of modules with a weight."""
    return {
        name: layer
        for name, layer in layers.items()
        if name.endswith(".weight") and not layer.kernel and not layer.experts
    }


def _factor(
    base: Source, expert: Expert, layers: Mapping[str, Layer], rank: int | None,
    energy: float | None,
) -> tuple[Extraction, dict[str, tuple[Tensor, Tensor]]]:  # fmt: skip
    """Stream both checkpoints: what is kept and left, and {weight name: (A, B)}."""
    extraction, factors = Extraction(), {}
    for name in track([n for n in base.keys() if n not in base.tied], "extracting"):
        (delta,) = _difference(base, expert, name)
        if not delta.any():
            continue
        if name in layers:
            part = best_factors(_as_matrix(delta, layers[name]), rank, energy)
            _account(extraction, name, delta, part)
            factors[name] = (part.A, part.B)
        else:
            extraction.left[name] = delta.double().square().sum().item()
    return extraction, factors


def _difference(base: Source, expert: Expert, name: str) -> Tensor:
    """(1, *shape) in float32, or float64 where the base is."""
    W0 = base.read(name)
    if not W0.is_floating_point():
        return torch.zeros(1, *W0.shape)
    return differences(W0, {"expert": expert}, name)


def _as_matrix(delta: Tensor, layer: Layer) -> Tensor:
    """(d_out, d_in), whichever way it is stored."""
    return delta.mT if layer.transposed else delta


def best_factors(delta: Tensor, rank: int | None = None, energy: float | None = None) -> Factors:
    """The nearest matrix of a rank to a delta (d_out, d_in), as factors A (r, d_in), B (d_out, r).

    rank: as many directions at most; energy: as few as keep this share of |D|^2.
    """
    wide = delta.shape[1] > delta.shape[0]
    small = gram(delta.mT if wide else delta)  # D D^T or D^T D, the smaller one
    values, vectors = eigh(small.to(solving_dtype(small)))
    r = int((values > 0).sum()) if rank is None else min(rank, len(values))
    if energy is not None:
        reached = values.cumsum(0) / values.sum()
        r = min(r, int((reached < energy - 1e-7).sum()) + 1)
    top = vectors[:, :r].to(delta)
    if wide:
        return Factors(product(top.mT, delta), top.contiguous(), 1.0)
    return Factors(top.mT.contiguous(), product(delta, top), 1.0)


def _account(extraction: Extraction, name: str, delta: Tensor, part: Factors) -> None:
    total = delta.double().square().sum().item()
    A, B = part.A.double(), part.B.double()
    kept = min(total, (gram(B) * gram(A.mT)).sum().item())  # |B A|^2
    extraction.ranks[name] = len(part.A)
    extraction.kept += kept
    extraction.cut += total - kept

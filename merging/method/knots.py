"""KnOTS: adapters merged in a basis that all of them share (arXiv 2410.19735)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.method.masks import drop
from merging.method.order import kth_largest, share
from merging.method.ranges import Seed, Share
from merging.method.registry import Stream, register
from merging.method.sparse import elect, ties
from merging.method.spectral import iso_c, layer_rank, singular_triplets, tsv_m

MERGES = ("ties", "dare_ties", "tsv_m", "iso_c")


def _row_space(arguments: Mapping[str, Any]) -> bool:
    for name, known in (("merge", MERGES), ("values", ("inside", "after")), ("scope", _SCOPES)):
        if arguments[name] not in known:
            raise InputError(
                f"unknown {name} {arguments[name]!r} of knots", f"known: {', '.join(known)}"
            )
    return arguments["merge"] in ("tsv_m", "iso_c")


_SCOPES = ("layer", "model")


def _thresholds(stream: Stream, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of TIES' trim over the blocks of all layers: each pass takes their bases anew."""
    if arguments["scope"] != "model" or arguments["merge"] != "ties":
        return {}

    def magnitudes() -> Iterator[Tensor]:
        for _, deltas in stream():
            blocks = left_basis(deltas, arguments["values"])[1] if deltas.ndim == 3 else deltas
            yield blocks.abs()

    return {"thresholds": kth_largest(magnitudes, arguments["k"])}


@register(
    "knots",
    source="arXiv 2410.19735",
    formula="U merge_t(diag(s) V_t^T) with [D_1 .. D_T] = U diag(s) [V_1^T .. V_T^T]",
    alpha=0.6,
    row_space=_row_space,
    prepare=_thresholds,
    breaks=("inputs",),
)
def knots(
    deltas: Tensor,
    *,
    merge: str = "ties",
    values: str = "inside",
    scope: str = "layer",
    k: Share = 0.2,
    p: float = 0.9,
    seed: Seed = 0,
    d_in: int | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """KnOTS: merge in the shared left basis of all deltas (arXiv 2410.19735).

    (T, d_out, d_in) -> (d_out, d_in). [D_1 .. D_T] = U diag(s) [V_1^T .. V_T^T] side by side, and
    D = U merge_t(diag(s) V_t^T), directions of value 0 left out.
    merge: "ties" with the top share k of each task's block, "dare_ties" (drop rate p, seed),
        "tsv_m", or "iso_c".
    values: "inside" merges diag(s) V_t^T, as KnOTS' own code does; tsv_m and iso_c commute with U,
        so that they then give what they give without KnOTS. "after" merges the V_t^T and
        multiplies U diag(s) on afterwards: the KnOTS-TSV and KnOTS-Iso-C of the ACTMat paper.
    scope: what "ties" trims over, a "layer" or, as KnOTS' own code does, the "model".
    thresholds: (T,) smallest magnitude kept, from the whole model.
    """
    basis, blocks = left_basis(deltas, values)  # (d_out, r), (T, r, d_in)
    if not basis.shape[1]:
        return torch.zeros_like(deltas[0])
    if merge == "ties":
        merged = ties(blocks, k=k, thresholds=thresholds)
    elif merge == "dare_ties":
        merged = elect(drop(blocks, share("1 - p", 1 - p), seed), "mean")
    elif merge == "tsv_m":
        width = d_in or deltas.shape[2]
        rank = layer_rank(deltas, d_in) if values == "inside" else min(len(blocks[0]), width)
        merged = tsv_m(blocks, k=rank // len(deltas))
    else:
        merged = iso_c(blocks)
    return (basis @ merged).to(deltas)


def left_basis(deltas: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """What is multiplied on afterwards (d_out, r), and the tasks' blocks (T, r, d_in), float64."""
    U, s, _ = singular_triplets(torch.cat(list(deltas), dim=1))
    blocks = U.mT @ deltas.double()  # diag(s) V_t^T
    return (U, blocks) if values == "inside" else (U * s, blocks / s[:, None])

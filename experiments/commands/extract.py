"""`python -m experiments.extract base=... expert=... output=... rank=16`: an adapter of a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import merging
from experiments.commands.merge import quote_paths
from experiments.hydra_run import Command
from experiments.report.plan_words import percent


@dataclass
class ExtractAdapter:
    """The keys of configs/extract.yaml."""

    base: str
    expert: str
    output: str
    rank: int | None = None
    energy: float | None = None
    architecture: str | None = None
    overwrite: bool = False


def extract(settings: ExtractAdapter) -> None:
    """Write a LoRA adapter of a fine-tuned model, and print what it keeps."""
    extraction = merging.extract(
        settings.base,
        settings.expert,
        settings.output,
        rank=settings.rank,
        energy=settings.energy,
        layers=Path(settings.architecture) if settings.architecture else None,
        overwrite=settings.overwrite,
    )
    print("\n".join(sentences(extraction)))
    print(f"written to {settings.output}: PeftModel.from_pretrained(base, {settings.output!r})")


def sentences(extraction: merging.Extraction) -> list[str]:
    """What the adapter keeps, and what it leaves behind."""
    ranks = Counter(extraction.ranks.values())
    told = ", ".join(f"rank {rank} in {count}" for rank, count in sorted(ranks.items())[-5:])
    lines = [
        f"The adapter keeps {percent(extraction.share)} of what fine-tuning changed (squared "
        f"norm), in {len(extraction.ranks)} layers: {told}."
    ]
    if extraction.left:
        largest = max(extraction.left, key=lambda name: extraction.left[name])
        total = extraction.kept + extraction.cut + sum(extraction.left.values())
        lines.append(
            f"{len(extraction.left)} tensors that no such adapter holds stay the base's, "
            f"{percent(sum(extraction.left.values()) / total)} of the change; the largest is "
            f"{largest}."
        )
    return lines


COMMAND = Command("extract", ExtractAdapter, task=extract, prepare=quote_paths)

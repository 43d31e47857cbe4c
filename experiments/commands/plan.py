"""`python -m experiments.plan base=... experts.NAME=...`: will it merge, and how?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import merging
from experiments.commands.merge import plain_names, quote_paths
from experiments.hydra_run import Command
from experiments.report import picture
from experiments.report.plan_page import page
from experiments.report.plan_words import sentences
from merging.errors import InputError
from merging.formats.disk import write_synced


@dataclass
class PlanMerge:
    """The keys of configs/plan.yaml."""

    base: str
    experts: dict[str, str]
    into: dict[str, str] = field(default_factory=dict)
    methods: list[str] = field(default_factory=lambda: list(merging.PLANNED))
    subsets: bool = True
    architecture: str | None = None
    output: str | None = None
    picture: str | None = None


def plan(settings: PlanMerge) -> None:
    """Print what a merge of these checkpoints would meet, and write it as a page."""
    if not settings.experts:
        raise InputError("no experts were given", hint="add experts.NAME=PATH for each of them")
    output = Path(settings.output) if settings.output else None
    if output and (output.suffix != ".html" or output.is_dir()):
        raise InputError(f"output is {output}, expected the name of an .html file")
    if settings.picture:
        if not output or not settings.picture.endswith(".png"):
            raise InputError("picture is a .png file of the page, which output=NAME.html writes")
        picture.browser()
    base = Path(settings.base)
    planned = merging.plan(
        base,
        plain_names(settings.experts),
        methods=settings.methods,
        into=plain_names(settings.into),
        layers=Path(settings.architecture) if settings.architecture else None,
        subsets=settings.subsets,
    )
    print("\n".join(sentences(planned)))
    if output:
        title = f"Merging {', '.join(planned.tasks)} into {base.name}"
        write_synced(output, page(planned, title))
        print(f"written to {output}: open it in any browser")
        if settings.picture:
            picture.take(output, Path(settings.picture))
            print(f"its picture: {settings.picture}")
    if planned.problems:
        raise InputError(f"{len(planned.problems)} things keep these checkpoints from being merged")


COMMAND = Command("plan", PlanMerge, task=plan, prepare=quote_paths)

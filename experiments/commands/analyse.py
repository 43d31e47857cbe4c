"""`python -m experiments.analyse suite=...`: the conditions behind ACTMat on real fine-tuning.

Writes to <output>: conditions.csv (along the training, per task and layer), estimates.csv (how
near each estimate comes to the true second moment), scale.csv (and effective ranks),
interference.csv, sides.csv (how near D^T D and D D^T come to the moments of inputs and of output
gradients), of adapters adapters.csv (are their factors random?), about.json, and from these
(`theory_report`) summary.md with the published means beside ours, and the figures.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.markdown import Markdown
from safetensors.torch import load_file
from torch import Tensor

import merging
from eval import theory
from eval.backend import Unsupported
from eval.cache import cached
from eval.statistics import second_moments
from eval.suite import Suite
from eval.training import Loss, train
from experiments import sides
from experiments.differences import blocks
from experiments.hydra_run import Command
from experiments.report import records
from experiments.report.theory import OPTIONAL, RHO, read_published, render
from experiments.settings import Experiment, Statistics, check_choices, resolve_device
from experiments.suite_merge import prepare
from experiments.suites import load_expert, load_suite, pick_tasks
from merging.errors import InputError
from merging.formats.checkpoints import StateDict
from merging.formats.disk import write_synced
from merging.layers import Layer, cut
from merging.method.rank_rule import effective_rank, singular_values
from merging.progress import track

log = logging.getLogger(__name__)
VERSION = 1  # of recordings: raise it when the code below would give others


@dataclass
class Analyse:
    """The keys of configs/analyse.yaml."""

    suite: dict[str, Any]
    finetuning: str = "full"
    seed: int = 0
    tasks: Any = 4
    layers: str = ""
    record: int | None = 1
    snapshots: int = 6
    probe: int = 4
    truth: int = 1000
    samples: list[int] = field(default_factory=lambda: [1, 10, 100, 500])
    overlap: float = 0.05
    gradients: int = 320
    methods: list[str] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    published: str = "results/published/actmat_theory.csv"
    output: str = "results/theory"
    device: str = "auto"


def analyse(settings: Analyse) -> None:
    """Measure, tabulate, draw."""
    check_choices(settings)
    suite = load_suite(settings.suite, settings.device)
    few = isinstance(settings.tasks, int)
    tasks = _spread(suite.tasks, settings.tasks) if few else pick_tasks(suite, settings.tasks)
    measured = (k for k in suite.layers() if k not in suite.unmeasured)
    layers = {k: suite.layers()[k] for k in measured if settings.layers in k}
    if not layers:
        raise InputError(f"no layer of suite {suite.name} has {settings.layers!r} in its name")
    for name in settings.methods:
        merging.create(name)
    published = read_published(Path(settings.published))  # before the work, if it is not there
    recorded = _spread(tasks, len(tasks) if settings.record is None else settings.record)
    if recorded and (settings.finetuning != "full" or suite.trainable is None):
        raise InputError(
            f"the {settings.finetuning} fine-tuning of suite {suite.name} cannot be recorded",
            hint="set record=0 to measure the estimates alone",
        )
    frames = {
        "conditions": along_training(settings, suite, recorded, layers),
        **after_training(settings, suite, tasks, layers),
    }
    about = {
        "suite": suite.name,
        "family": suite.family,
        "experts": suite.identity(finetuning=settings.finetuning, seed=settings.seed),
        "settings": {k: v for k, v in asdict(settings).items() if k not in {"suite", "output"}},
        "versions": records.versions(),
        "machine": records.machine(resolve_device(settings.device)),
    }
    folder = Path(settings.output)
    for name in OPTIONAL:  # of an earlier call with other settings
        (folder / f"{name}.csv").unlink(missing_ok=True)
    write_synced(folder / "about.json", json.dumps(about, indent=1, sort_keys=True) + "\n")
    for name, frame in frames.items():
        write_synced(
            folder / f"{name}.csv",
            frame.to_csv(index=False, float_format="%.5g", lineterminator="\n"),
        )
    console = Console()
    console.print(Markdown(render(folder, published).read_text()))
    console.print(f"written to {folder}")


def _spread(tasks: Sequence[str], count: int) -> list[str]:
    """`count` of the tasks, evenly spaced."""
    count = min(count, len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]


# --- along the training ---------------------------------------------------------------------------


def along_training(
    settings: Analyse, suite: Suite, tasks: list[str], layers: Mapping[str, Layer]
) -> pd.DataFrame:
    """Columns task, layer, type, block, step, quantity, cosine, angular; recordings are cached."""
    frames = []
    for task in track(tasks, "recording"):
        key = {
            "version": VERSION,
            "experts": suite.identity(finetuning="full", seed=settings.seed),
            "task": task,
            "layers": sorted(layers),
            "snapshots": settings.snapshots,
            "probe": settings.probe,
        }
        folder = cached("recordings", key, partial(_record, settings, suite, task, layers))
        frames.append(pd.read_csv(folder / "conditions.csv"))
    columns = ["task", "layer", "step", "quantity", "cosine"]
    frame = pd.concat(frames) if frames else pd.DataFrame(columns=columns)
    return _described(frame)


def _record(
    settings: Analyse, suite: Suite, task: str, layers: Mapping[str, Layer], folder: Path
) -> None:
    """Fine-tune one task again; write the cosines at every snapshot, and |rho| at the last."""
    training = suite.training([task], finetuning="full", seed=settings.seed)
    model, steps = training.model, training.settings["steps"]
    device = torch.device(training.settings["device"]).type
    at = {round(i * steps / settings.snapshots) for i in range(settings.snapshots + 1)}
    probe = list(islice(training.batches(0), settings.probe))
    start = {name: model.get_parameter(name).detach().cpu().clone() for name in layers}
    moments: dict[int, dict[str, Tensor]] = {}
    rows: list[tuple[str, int, str, float]] = []  # (layer, step, quantity, cosine)

    with theory.recording(model, layers, training.loss, training.mask) as (recorded, sums):

        def snapshot(step: int) -> None:
            with torch.autocast(device, enabled=False):  # moments of float32 inputs, in float32
                moments[step] = second_moments(
                    model, probe, layers, forward=training.loss, mask=training.mask
                )
            for name, layer in layers.items() if step else ():
                D = cut(model.get_parameter(name).detach().cpu() - start[name], layer)
                for part, block in zip(theory.part_names(name, layer), D, strict=True):
                    found = _links(block, sums[part], moments[step][name])
                    rows.extend((part, step, quantity, value) for quantity, value in found.items())

        loss = _at_steps(recorded, at, snapshot, training.settings.get("accumulate", 1))
        train(model, training.batches, loss, output=folder, **training.settings)
        snapshot(steps)

    for name, layer in layers.items():
        for part in theory.part_names(name, layer):
            rows += [
                (part, step, "drift", theory.cosine(C[name], moments[steps][name]))
                for step, C in moments.items()
                if step < steps
            ]
            rows.append((part, steps, RHO, theory.energy_correlation(sums[part])))
    frame = pd.DataFrame(rows, columns=["layer", "step", "quantity", "cosine"])
    frame.insert(0, "task", task)
    write_synced(folder / "conditions.csv", frame.to_csv(index=False))


def _at_steps(loss: Loss, steps: set[int], act: Callable[[int], None], accumulate: int) -> Loss:
    """The same loss, with `act(n)` called when n optimiser steps have been made."""
    batches = 0

    def counted(model: torch.nn.Module, batch: Any) -> Tensor:
        nonlocal batches
        step, first = divmod(batches, accumulate)
        if not first and step in steps:
            act(step)
        batches += 1
        return loss(model, batch)

    return counted


def _links(D: Tensor, sums: theory.Sums, C: Tensor) -> dict[str, float]:
    """The chain from D^T D to C up to this step: each link, and the whole."""
    own = D.mT @ D
    return {
        "optimiser": theory.cosine(own, sums.gradient.mT @ sums.gradient),
        "cross_term": theory.cross_term(sums),
        "correlation": theory.correlation(sums),
        "alignment": theory.cosine(own, C),
    }


# --- after the training ---------------------------------------------------------------------------


def after_training(
    settings: Analyse, suite: Suite, tasks: list[str], layers: Mapping[str, Layer]
) -> dict[str, pd.DataFrame]:
    """Frames estimates, scale and interference from finished experts and measured moments."""
    own = {"finetuning": settings.finetuning, "seed": settings.seed}

    def moments(task: str, count: int) -> dict[str, Tensor]:
        size = max(b for b in range(1, 33) if count % b == 0)
        path = suite.statistics(task, "covariance", batches=count // size, batch_size=size, **own)
        return load_file(path)

    truth = {t: moments(t, settings.truth) for t in track(tasks, "second moments")}
    experts = {task: load_expert(suite.expert(task, **own)) for task in tasks}
    weights = {
        part: block
        for name, layer in layers.items()
        for part, block in zip(
            theory.part_names(name, layer), cut(suite.base()[name].float(), layer), strict=True
        )
    }
    estimates, scale = [], []
    for task in track(tasks, "estimates"):
        fewer = {n: moments(task, n) for n in settings.samples}
        for name, part, (D,) in blocks(suite.base(), {task: experts[task]}, layers):
            C = truth[task][name]
            sampled = {n: found[name] for n, found in fewer.items()}
            estimates += [
                {"task": task, "layer": part, **row}
                for row in _estimates(D, C, sampled, settings.overlap)
            ]
            scale.append(
                {"task": task, "layer": part, "ratio": theory.energy_ratio(D, C)}
                | _ranks(weights[part], D)
            )
    found = {
        "estimates": pd.DataFrame(estimates),
        "scale": pd.DataFrame(scale),
        "interference": _interference(settings, suite, experts, truth, layers),
        "sides": _sides(settings, suite, experts, truth, layers),
        "adapters": sides.adapters(experts, layers),
    }
    return {
        name: _described(frame)
        for name, frame in found.items()
        if name not in OPTIONAL or not frame.empty
    }


def _ranks(W0: Tensor, D: Tensor) -> dict[str, float]:
    """Effective rank of a difference (d_out, d_in), of the layer's min(d_out, d_in), and what is
    left of that where base and expert are stored in bfloat16."""
    rounded = (W0 + D).bfloat16().float() - W0.bfloat16().float()
    found = {"effective_rank": D, "effective_rank_bfloat16": rounded}
    return {
        key: effective_rank(singular_values(delta)) / min(D.shape) for key, delta in found.items()
    }


def _sides(
    settings: Analyse,
    suite: Suite,
    experts: Mapping[str, Any],
    truth: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, Layer],
) -> pd.DataFrame:
    """`sides.compare` for every task; empty where no gradients are asked for, or the suite does
    not measure them."""
    size = max(b for b in range(1, 33) if settings.gradients % b == 0)
    frames = []
    for task in track(experts, "output gradients") if settings.gradients else ():
        own = {"finetuning": settings.finetuning, "seed": settings.seed}
        own |= {"batches": settings.gradients // size, "batch_size": size}
        try:
            both = load_file(suite.statistics(task, "kfac", **own))
        except Unsupported as error:
            log.info("%s: left out", error.message)
            break
        stream = blocks(suite.base(), {task: experts[task]}, layers)
        rows = sides.compare(stream, truth[task], both, layers, settings.overlap)
        frames.append(pd.DataFrame([{"task": task} | row for row in rows]))
    return pd.concat(frames) if frames else pd.DataFrame()


def _interference(
    settings: Analyse,
    suite: Suite,
    experts: Mapping[str, Any],
    truth: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, Layer],
) -> pd.DataFrame:
    """Columns task, layer, method, before (of the base model), after."""
    base, tasks = suite.base(), list(experts)
    merges = {}
    for name in track(settings.methods, "merging"):
        with prepare(_experiment(settings), suite, tasks, merging.create(name)) as prepared:
            merges[name] = prepared.finish(prepared.call()).state
    merged = {n: blocks(base, {n: StateDict(state)}, layers) for n, state in merges.items()}
    rows = []
    for name, part, deltas in blocks(base, experts, layers):
        C = torch.stack([truth[task][name] for task in tasks])
        before = theory.interference(torch.zeros_like(deltas[0]), deltas, C).tolist()
        for method, stream in merged.items():
            _, _, (D,) = next(stream)
            after = theory.interference(D, deltas, C).tolist()
            rows += [
                (task, part, method, b, a) for task, b, a in zip(tasks, before, after, strict=True)
            ]
    return pd.DataFrame(rows, columns=["task", "layer", "method", "before", "after"])


def _experiment(settings: Analyse) -> Experiment:
    return Experiment(
        suite=settings.suite,
        method={},
        tracker={},
        finetuning=settings.finetuning,
        seed=settings.seed,
        statistics=settings.statistics,
        device=settings.device,
    )


def _estimates(
    D: Tensor, C: Tensor, sampled: Mapping[int, Tensor], share: float
) -> Iterator[dict[str, Any]]:
    """How near each estimate of C comes: from D, from nothing, from n samples."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(D.shape, generator=generator)
    found = {
        "delta": D.mT @ D,
        "identity": torch.eye(len(C)),
        "random": random.mT @ random,
        **{f"regmean_{n}": estimate for n, estimate in sampled.items()},
    }
    yield from sides.near(C, share, **found)


def _described(frame: pd.DataFrame) -> pd.DataFrame:
    """With the layer's type and the number of its block, and angles beside cosines."""
    names = frame.layer.map(lambda name: re.split(r"\.(\d+)\.", f".{name}"))
    named = names.map(lambda pieces: [x for x in pieces[::2] if x != "weight"][-1])
    kinds = named.map(lambda kind: kind.replace(".weight", "").removeprefix("."))
    numbers = names.map(lambda pieces: int(pieces[1]) if len(pieces) > 1 else 0)
    frame.insert(2, "type", kinds)
    frame.insert(3, "block", numbers.astype(int))
    if "cosine" in frame:
        at = frame.columns.get_loc("cosine") + 1
        angles = frame.cosine.map(theory.angular_distance)
        if "quantity" in frame:
            angles = angles.mask(frame.quantity == RHO)  # a correlation, not a cosine
        frame.insert(at, "angular", angles)
    return frame


COMMAND = Command("analyse", Analyse, task=analyse)

"""A merge of a suite's experts: prepared with the statistics that its method needs, then made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

import merging
from eval.backend import OnDisk, Unsupported
from eval.cache import cache_root
from eval.language.checkpoints import require_disk
from eval.regmean_pp import merge_blocks
from eval.suite import Suite
from eval.training import expert_state
from experiments.settings import Experiment, resolve_device
from experiments.suites import collect, load_expert
from merging.engine.job import LazyStatistics
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.progress import track


@dataclass(frozen=True)
class Merge:
    """What a merge of all tasks gave and cost."""

    state: Mapping[str, Tensor] | Path  # a path: of a model too large to hold several of
    rules: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    statistics_seconds: float = 0.0
    peak_bytes: int = 0
    scratch: TemporaryDirectory[str] | None = None

    def discard(self) -> None:
        """Remove what was written for judging."""
        if self.scratch is not None:
            self.scratch.cleanup()


@dataclass(frozen=True)
class Prepared:
    """A merge with all that it takes: `finish(call())` makes it, inside a `with`, which closes what
    is read. Apart from each other, so that the engine's own call stands right below its caller in
    a traceback."""

    call: Callable[[], Any]
    finish: Callable[[Any], Merge]
    files: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *error: object) -> None:
        self.files.close()


def prepare(
    settings: Experiment, suite: Suite, tasks: list[str], method: merging.Method
) -> Prepared:
    """Experts of some tasks, with the statistics that the method needs."""
    method = replace(method, rest=suite.backend.rest or method.rest)
    own = {"finetuning": settings.finetuning, "seed": settings.seed}
    paths = {task: suite.expert(task, **own) for task in tasks}
    if method.sequential:
        return _block_by_block(settings, suite, paths, method)
    collected, seconds = {}, 0.0
    if method.needs:
        for task in track(tasks, f"{method.needs} statistics"):
            collected[task], spent = collect(settings, suite, task, method.needs)
            seconds += spent
    layers = suite.layers()
    if method.needs == "covariance":  # of what no module reads: averaged, the report says
        layers = {k: layer for k, layer in layers.items() if k not in suite.unmeasured}
    options = {
        "layers": layers,
        "device": resolve_device(settings.device),
        "split_qkv": settings.split_qkv,
        "weights": settings.weights or None,
        "weights_on": settings.weights_on,
    }
    if suite.on_disk is not None:
        return _on_disk(suite.on_disk, paths, method, collected, seconds, options)
    # experts and statistics are read where they lie, layer by layer
    files = ExitStack()
    read = {t: files.enter_context(closing(open_checkpoint(p))) for t, p in collected.items()}
    call = partial(
        merging.merge_state_dicts,
        suite.base(),
        {task: load_expert(path) for task, path in paths.items()},
        method,
        statistics={task: LazyStatistics(source) for task, source in read.items()} or None,
        **options,
    )
    return Prepared(call, lambda state: _made(state, state.report, seconds), files)


def _made(
    state: Mapping[str, Tensor] | Path,
    report: merging.Report,
    seconds: float,
    scratch: TemporaryDirectory[str] | None = None,
) -> Merge:
    return Merge(state, report.summary(), report.seconds, seconds, report.peak_bytes, scratch)


def _on_disk(
    backend: OnDisk,
    paths: Mapping[str, Path],
    method: merging.Method,
    statistics: Mapping[str, Path],
    seconds: float,
    options: Mapping[str, Any],
) -> Prepared:
    """Stream the experts into a model folder, from which the suite judges them."""
    base = backend.checkpoint()
    require_disk(base)
    scratch = TemporaryDirectory(dir=cache_root(), prefix="judged-")
    output = Path(scratch.name) / "model"
    call = partial(
        merging.merge_checkpoints,
        base,
        paths,
        method,
        output,
        statistics=statistics or None,
        vocabulary=backend.vocabulary,
        extra=backend.companions(),
        **options,
    )
    return Prepared(call, lambda report: _made(output, report, seconds, scratch))


def _block_by_block(
    settings: Experiment, suite: Suite, paths: Mapping[str, Path], method: merging.Method
) -> Prepared:
    if settings.weights:
        raise InputError(f"method {method.name!r} merges block after block, without weights")
    if suite.trainable is None:
        raise Unsupported(
            f"suite {suite.name} cannot measure through a half-merged model, "
            f"which method {method.name!r} needs"
        )
    base, report = suite.base(), merging.Report()
    call = partial(
        merge_blocks,
        suite,
        base,
        {task: expert_state(base, path) for task, path in paths.items()},
        method,
        **asdict(settings.statistics),
        device=resolve_device(settings.device),
        report=report,
    )
    return Prepared(call, lambda merged: _made(merged[0], report, merged[1]))

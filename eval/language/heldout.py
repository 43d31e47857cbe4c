"""Tasks of lm-eval beside those of a suite of language models, judged on the suite's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from eval.language.benchmarks import Benchmark, task_manager
from eval.language.causal import CausalBackend
from eval.language.embedded_lm import EmbeddedBackend
from eval.suite import Score, Suite
from merging.errors import InputError

LanguageModel = CausalBackend | EmbeddedBackend


def check(suite: Suite, names: Sequence[str]) -> None:
    """InputError for what is neither a task of the suite nor one that lm-eval can ask of it."""
    backend = _model(suite, names)
    try:
        _known(tuple(names), getattr(backend, "allow_code_execution", False))
    except InputError as error:
        own = f"tasks of suite {suite.name}: {', '.join(suite.tasks)}"
        raise InputError(error.message, f"{error.hint}; {own}" if error.hint else own) from None


@lru_cache
def _known(names: tuple[str, ...], allow_code_execution: bool) -> None:
    """Once a process: lm-eval takes seconds to read the names of all its tasks."""
    task_manager(map(Benchmark, names), allow_code_execution=allow_code_execution)


def evaluate(
    suite: Suite, state: Mapping[str, Tensor] | Path, names: Sequence[str], limit: int | None
) -> dict[str, Score]:
    """Scores of a state, or of a checkpoint where it lies, on lm-eval's own split of each task."""
    backend = _model(suite, names)
    if isinstance(backend, EmbeddedBackend):
        judge = replace(backend, lm_tasks={name: name for name in names})
        return judge.score(state, names, None, limit)
    expert = next(iter(backend.experts))
    plain = {
        protocol: {key: value for key, value in own.items() if key != "benchmarks"}
        for protocol, own in backend.protocols.items()
    }
    columns = {name: {"expert": expert} for name in names}
    other = replace(backend, benchmarks=columns, protocols=plain)
    if isinstance(state, Path):
        return other.score_checkpoint(state, [expert], "test", limit)
    return other.score(state, [expert], "test", limit)


def _model(suite: Suite, names: Sequence[str]) -> LanguageModel:
    if not isinstance(suite.backend, LanguageModel):
        raise InputError(
            f"suite {suite.name} has no task {names[0]!r}",
            hint=f"known: {', '.join(suite.tasks)}; lm-eval's are for language models",
        )
    return suite.backend

"""Benchmarks of lm-eval: a task with the protocol around it, checked before any work."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import InputError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's
ANSWER = 256  # tokens that lm-eval lets a model write where nobody says how many
LOCAL_TASKS = Path(__file__).parents[2] / "configs" / "lm_tasks"


@dataclass(frozen=True)
class Benchmark:
    """One column of a table: an lm-eval task and how it is run.

    task: lm-eval's name of a task or group, its own or one of configs/lm_tasks.
    metric: as lm-eval names it, "exact_match" or "exact_match,flexible-extract" where a task
        has several filters; null: the task's first.
    attempts: answers per example; k: report pass@k for each of these, pass@1 as the score.
    fewshot: number of examples in the prompt; null: the task's own.
    chat_template: wrap the prompt in the tokenizer's chat template, or in that of a named model.
    generation: overrides of the task's generation arguments (temperature, max_gen_toks, ...).
    """

    task: str
    metric: str | None = None
    attempts: int = 1
    k: tuple[int, ...] = (1,)
    fewshot: int | None = None
    chat_template: bool | str = False
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.attempts < max(self.k, default=1) or 1 not in self.k:
            raise InputError(
                f"benchmark {self.task!r} asks for pass@{[*self.k]} of {self.attempts} attempts, "
                "expected 1 among them and none larger than the attempts"
            )
        if self.attempts > 1 and not self.generation.get("do_sample"):
            raise InputError(
                f"benchmark {self.task!r} makes {self.attempts} attempts without sampling, which "
                "are all the same",
                hint="set generation.do_sample, temperature and top_p, or attempts to 1",
            )

    @property
    def answer(self) -> int | None:
        """Tokens that an answer may have, where the generation arguments say so."""
        return next((self.generation[k] for k in LENGTHS if k in self.generation), None)


def task_manager(
    benchmarks: Iterable[Benchmark],
    *,
    local: Path = LOCAL_TASKS,
    allow_code_execution: bool = False,
) -> TaskManager:
    """lm-eval's index of tasks, having checked that it can run these benchmarks.

    Reads task files only, no data. Raises InputError for a task that lm-eval does not know,
    and for one that executes the model's code unless `allow_code_execution`.
    """
    from lm_eval.tasks import TaskManager

    wanted = [benchmark.task for benchmark in benchmarks]
    # lm-eval has 14,000 tasks, ten seconds to read: not for those that are ours
    manager = TaskManager(include_path=str(local), include_defaults=False)
    if not set(wanted) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(local))
    for name in wanted:
        if name not in manager.task_index:
            close = get_close_matches(name, manager.all_tasks, n=3)
            raise InputError(
                f"lm-eval knows no task {name!r}",
                hint=f"did you mean {', '.join(close)}?" if close else "see: lm-eval ls tasks",
            )
        if (entry := manager.task_index[name]).kind.name == "TAG":
            raise InputError(
                f"{name!r} is a tag of lm-eval, expected a task or a group",
                hint=f"name one of its tasks: {', '.join(sorted(entry.tags))}",
            )
        if not allow_code_execution and (unsafe := _unsafe(name, manager)):
            raise InputError(
                f"task {unsafe!r} executes code that the model wrote",
                hint="run it in a sandbox, with suite.allow_code_execution=true",
            )
    return manager


def require_room(
    benchmarks: Mapping[str, Benchmark], manager: TaskManager, context: int, said: str
) -> None:
    """InputError for a benchmark whose answers leave no room for a prompt in the model's context.

    context: tokens. said: where it comes from, for the message. Reads task files only.
    """
    for column, benchmark in benchmarks.items():
        answer = benchmark.answer or _written(benchmark.task, manager)
        if answer >= context:
            raise InputError(
                f"benchmark {column!r} may write {answer} tokens, which leaves no room for a "
                f"prompt in a context of {context} ({said})",
                hint=f"set generation.max_gen_toks of {column} below it, or a larger "
                "suite.backend_options.max_length",
            )


def require_backend(name: str) -> None:
    """InputError for a backend whose package is not installed: it is loaded after a merge only."""
    if name == "vllm" and importlib.util.find_spec(name) is None:
        raise InputError(
            f"backend {name!r} needs the package {name!r}, which is not installed",
            hint="pip install 'model-merging[vllm]', or use suite.backend=hf",
        )


def require_resources(benchmarks: Iterable[Benchmark]) -> None:
    """InputError where a benchmark needs what no package brings: IFEval counts sentences."""
    if not any("ifeval" in benchmark.task for benchmark in benchmarks):
        return
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True):
            raise InputError(
                "IFEval counts sentences with NLTK's punkt_tab, which is not on this machine and "
                "could not be downloaded",
                hint="where there is a network: python -m nltk.downloader punkt_tab",
            ) from None


def data_sets(name: str, manager: TaskManager) -> list[tuple[str, str | None]]:
    """(hub name, configuration) of what a task, or the tasks of a group, are asked from."""
    configs = (entry.cfg or {} for entry in _entries(name, manager))
    named = [(c.get("dataset_path"), c.get("dataset_name")) for c in configs]
    return [
        (path, name) for path, name in named if path and "/" in path and not Path(path).exists()
    ]


def _written(name: str, manager: TaskManager) -> int:
    """The most tokens that a task or a task of a group writes, by its own file; 0 for choices."""
    found = 0
    for entry in _entries(name, manager):
        config = entry.cfg or {}
        if config.get("output_type") == "generate_until":
            own = config.get("generation_kwargs") or {}
            found = max(found, next((own[k] for k in LENGTHS if k in own), ANSWER))
    return found


def _unsafe(name: str, manager: TaskManager) -> str | None:
    """The first task under a name (a task, group or tag) that executes generated code."""
    unsafe = (e.name for e in _entries(name, manager) if (e.cfg or {}).get("unsafe_code"))
    return next(unsafe, None)


def _entries(name: str, manager: TaskManager) -> Iterator[Any]:
    """Everything that lm-eval's index has under the name of a task, group or tag."""
    pending, seen = [name], set()
    while pending:
        entry = manager.task_index.get(pending.pop())
        if entry is None or entry.name in seen:
            continue
        seen.add(entry.name)
        yield entry
        config = entry.cfg or {}
        if isinstance(config.get("task"), list):
            pending += [t["task"] if isinstance(t, dict) else t for t in config["task"]]
        if entry.kind.name == "TAG":
            pending += entry.tags

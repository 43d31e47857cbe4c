"""lm-eval as the judge of language models: tasks checked before any work, pass@k, one Score each.

A benchmark is an lm-eval task with the protocol around it. Of a sampled benchmark all attempts are
asked of the model in one call, n answers a prompt, and lm-eval's own evaluation is then run on the
first answers, the second ones, ...: any task can be given k attempts, and an attempt's score is
lm-eval's own.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import collect_env

from eval.backend import Score
from eval.language.benchmarks import ANSWER, LENGTHS, Benchmark
from merging.errors import InputError

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Judgement(NamedTuple):
    """What lm-eval found. `scores`: the benchmark's name, and "name@k" for each k beyond 1;
    `about`: task versions, hash of the prompts and targets, lm-eval's version; `samples`: every
    prompt and answer, as lm-eval logs them; `sources`: the data sets' commits on the hub."""

    scores: dict[str, Score]
    about: dict[str, Any]
    samples: list[dict[str, Any]]
    sources: dict[str, str]


def load_lm(
    backend: str, arguments: Mapping[str, Any], *, batch_size: int | str, device: str
) -> LM:
    """A model for lm-eval from its own registry of backends: hf, vllm, ...

    arguments: as on lm-eval's command line, e.g. {"pretrained": folder, "parallelize": True}
    for hf or {"pretrained": folder, "tensor_parallel_size": 4} for vllm.
    Raises InputError for a backend that lm-eval lacks or that is not installed.
    """
    import lm_eval.models  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import get_model, model_registry

    if backend not in model_registry.keys():
        raise InputError(
            f"lm-eval knows no backend {backend!r}",
            hint=f"known: {', '.join(sorted(model_registry.keys()))}",
        )
    try:
        with _tied_as_loaded():
            return get_model(backend).create_from_arg_obj(
                dict(arguments), {"batch_size": batch_size, "device": device}
            )
    except ModuleNotFoundError as error:
        raise InputError(
            f"backend {backend!r} needs the package {error.name!r}, which is not installed",
            hint=f"pip install {error.name}, or use backend hf",
        ) from error


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, **options: Any
) -> LM:
    """A model in memory as lm-eval's backend hf, which takes further `options`."""
    from lm_eval.models.huggingface import HFLM

    kind = "seq2seq" if model.config.is_encoder_decoder else "causal"
    with _tied_as_loaded():
        return HFLM(model, backend=kind, tokenizer=tokenizer, batch_size=batch_size, **options)


@contextmanager
def _tied_as_loaded() -> Iterator[None]:
    """Keep lm-eval from tying weights that a checkpoint has apart.

    It calls `model.tie_weights()` on whatever it is given. Of T5 1.1, whose output head is its
    own although its configuration cannot say so, that would judge a model with another head.
    """
    from transformers import PreTrainedModel

    tie = PreTrainedModel.tie_weights

    def unless_called_bare(model: PreTrainedModel, *args: Any, **given: Any) -> None:
        if args or given:  # as transformers does while it loads
            tie(model, *args, **given)

    PreTrainedModel.tie_weights = unless_called_bare
    try:
        yield
    finally:
        PreTrainedModel.tie_weights = tie


def judge(
    lm: LM,
    name: str,
    benchmark: Benchmark,
    manager: TaskManager,
    *,
    split: str | None = None,
    limit: int | None = None,
    template: str | None = None,
    allow_code_execution: bool = False,
) -> Judgement:
    """Run one benchmark on one model.

    name: the column of the table. split: evaluate on this split of the task's data instead of
    the task's own. limit: at most so many examples. template: text of the chat template, where
    it is not the tokenizer's own.
    """
    runs, sources = [], {}
    once = _asked_once(lm, name, benchmark.attempts)
    with _templated(lm, template), noted(sources), once as answers:
        for attempt in range(benchmark.attempts):
            answers.attempt = attempt
            runs.append(_run(lm, benchmark, manager, split, limit, allow_code_execution, attempt))
    metric = _metric(benchmark, runs[0])
    return Judgement(
        scores=dict(_scores(name, benchmark, runs, metric)),
        about=_about(benchmark, runs[0], metric),
        samples=[sample | {"attempt": i} for i, run in enumerate(runs) for sample in _samples(run)],
        sources=sources,
    )


@contextmanager
def noted(sources: dict[str, str]) -> Iterator[None]:
    """Note {datasets/<repository>: commit} of what lm-eval loads from the hub."""
    import datasets

    load = datasets.load_dataset

    def noting(path: str, *args: Any, **given: Any) -> Any:
        found = load(path, *args, **given)
        for part in found.values() if isinstance(found, dict) else [found]:
            for file in getattr(part, "cache_files", ()):  # .../<version>/<commit>/<split>.arrow
                if re.fullmatch("[0-9a-f]{40}", commit := Path(file["filename"]).parent.name):
                    sources[f"datasets/{path}"] = commit
        return found

    datasets.load_dataset = noting
    try:
        yield
    finally:
        datasets.load_dataset = load


@contextmanager
def _templated(lm: LM, template: str | None) -> Iterator[None]:
    """Give a model's tokenizer another chat template."""
    if template is None:
        yield
        return
    tokenizer = lm.tokenizer
    before = tokenizer.chat_template, getattr(lm, "hf_chat_template", None)
    tokenizer.chat_template = template
    if hasattr(lm, "hf_chat_template"):  # what lm-eval's vllm backend passes on
        lm.hf_chat_template = template
    try:
        yield
    finally:
        tokenizer.chat_template = before[0]
        if hasattr(lm, "hf_chat_template"):
            lm.hf_chat_template = before[1]


class _Answers:
    """Stands where a model's `generate_until` is: asks for every attempt in the first call, and
    hands out those of one attempt at a time."""

    def __init__(self, lm: LM, name: str, attempts: int) -> None:
        self.lm, self.name, self.attempts, self.attempt = lm, name, attempts, 0
        self.ask = lm.generate_until
        self.given: list[list[str]] = []

    def __call__(self, requests: Sequence[Any], **options: Any) -> list[str]:
        if self.attempt == 0:
            self._require_room(requests)
            n = self.attempts
            answers = self.ask([request for request in requests for _ in range(n)], **options)
            self.given = [answers[i * n : (i + 1) * n] for i in range(len(requests))]
        return [own[self.attempt] for own in self.given]

    def _require_room(self, requests: Sequence[Any]) -> None:
        """lm-eval cuts prompts that are too long, without a word."""
        context, tokenizer = (
            getattr(self.lm, "max_length", None),
            getattr(self.lm, "tokenizer", None),
        )
        if context is None or tokenizer is None:
            return
        cut = 0
        for prompt, generation in (request.args for request in requests):
            answer = next((generation[k] for k in LENGTHS if k in generation), ANSWER)
            cut += len(tokenizer(prompt)["input_ids"]) > context - answer
        if cut:
            raise InputError(
                f"{cut} prompts of benchmark {self.name!r} do not fit into a context of {context} "
                "tokens beside the longest answer: they would be cut",
                hint="set a larger suite.backend_options.max_length, or a smaller max_gen_toks",
            )


@contextmanager
def _asked_once(lm: LM, name: str, attempts: int) -> Iterator[_Answers]:
    answers = _Answers(lm, name, attempts)
    lm.generate_until = answers
    try:
        yield answers
    finally:
        del lm.generate_until


def rows_that_fit(
    config: Mapping[str, Any], *, context: int, weights: int, free: int, width: int = 2
) -> int:
    """How many sequences a batch may have, 1 to 64, by memory instead of by trial.

    config: a decoder's, as `config.json` has it. context: tokens of a sequence. weights, free:
    bytes of the model, and of memory before it is loaded. width: bytes of a number.
    A sequence takes keys and values for every token and layer, and logits, float32 and twice,
    for at most 1,024 of them; a fifth of what is left stays free.
    """
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    kept = 2 * (config.get("num_key_value_heads") or heads) * head * width
    row = context * config["num_hidden_layers"] * kept
    row += 2 * 4 * min(context, 1024) * config["vocab_size"]
    return max(1, min(64, int(0.8 * (free - weights)) // row))


def _run(
    lm: LM,
    benchmark: Benchmark,
    manager: TaskManager,
    split: str | None,
    limit: int | None,
    allow_code_execution: bool,
    seed: int,
) -> dict[str, Any]:
    """One pass of lm-eval over the benchmark."""
    from lm_eval import simple_evaluate

    tasks: list[Any] = [benchmark.task]
    with _code_execution(allow_code_execution):
        if split is not None:
            tasks = list(manager.load(tasks)["tasks"].values())
            for task in tasks:
                task.config.test_split = split
        return simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=benchmark.fewshot,
            limit=limit,
            apply_chat_template=bool(benchmark.chat_template),
            gen_kwargs=dict(benchmark.generation) or None,
            bootstrap_iters=0,  # standard errors come from seeds, not from a bootstrap
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            confirm_run_unsafe_code=allow_code_execution,
        )


@contextmanager
def _code_execution(allowed: bool) -> Iterator[None]:
    """Let the `code_eval` metric run what a model wrote, inside this block only."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    os.environ["HF_ALLOW_CODE_EVAL"] = "1" if allowed else "0"
    try:
        yield
    finally:
        del os.environ["HF_ALLOW_CODE_EVAL"]
        if before is not None:
            os.environ["HF_ALLOW_CODE_EVAL"] = before


def _metric(benchmark: Benchmark, run: Mapping[str, Any]) -> tuple[str, str]:
    """(metric, filter) to read off the results."""
    found = [
        tuple(key.split(",", 1))
        for key in run["results"][benchmark.task]
        if "," in key and "_stderr," not in key
    ]
    asked = benchmark.metric
    for metric, filtered in found:
        if asked in (None, metric, f"{metric},{filtered}"):
            return metric, filtered
    raise InputError(
        f"task {benchmark.task!r} has no metric {asked!r}",
        hint=f"it has: {'; '.join(','.join(pair) for pair in found)}",
    )


def _samples(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [sample | {"task": task} for task, own in run["samples"].items() for sample in own]


def _scores(
    name: str, benchmark: Benchmark, runs: Sequence[Mapping[str, Any]], metric: tuple[str, str]
) -> Iterator[tuple[str, Score]]:
    kept = [[s for s in _samples(run) if s["filter"] == metric[1]] for run in runs]
    count, constant = len(kept[0]), _constant(kept[0])
    figures = [run["results"][benchmark.task][",".join(metric)] for run in runs]
    yield name, Score(float(fmean(figures)), count, constant)
    for k in benchmark.k:
        if k > 1:  # attempts of one example, side by side
            correct = [
                sum(float(s[metric[0]]) > 0 for s in tries) for tries in zip(*kept, strict=True)
            ]
            mean = fmean(pass_at_k(benchmark.attempts, c, k) for c in correct)
            yield f"{name}@{k}", Score(mean, count, constant)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k attempts drawn from n, of which c are right, is right.

    Source: Chen et al., arXiv 2107.03374, equation 1.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _constant(samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every example got the same answer."""
    return len(samples) > 1 and len({_answer(sample) for sample in samples}) == 1


def _answer(sample: Mapping[str, Any]) -> str:
    given = sample["filtered_resps"]
    if all(isinstance(choice, list | tuple) and len(choice) == 2 for choice in given):
        # (log-likelihood, greedy) of each choice: the answer is the place of the likeliest
        return str(max(range(len(given)), key=lambda i: float(given[i][0])))
    return json.dumps(given, default=str)


def _about(benchmark: Benchmark, run: Mapping[str, Any], metric: tuple[str, str]) -> dict[str, Any]:
    """What pins the figure: versions, and a hash over every example's prompt and target."""
    import lm_eval

    hashes = sorted(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in _samples(run))
    return {
        "task": benchmark.task,
        "metric": ",".join(metric),
        "versions": dict(run["versions"]),
        "task_hash": hashlib.sha256("".join(hashes).encode()).hexdigest()[:16],
        "attempts": benchmark.attempts,
        "chat_template": benchmark.chat_template,
        "generation": dict(benchmark.generation),
        "lm_eval": lm_eval.__version__,
    }


def keep(judgements: Mapping[str, Judgement], folder: Path) -> None:
    """Write `<name>.json` (scores and what they rest on) and `<name>.jsonl.gz` (every sample)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, judgement in judgements.items():
        scores = {column: score._asdict() for column, score in judgement.scores.items()}
        summary = json.dumps({"scores": scores, "about": judgement.about}, indent=1, sort_keys=True)
        (folder / f"{name}.json").write_text(summary + "\n")
        lines = [json.dumps(s, default=str, sort_keys=True) + "\n" for s in judgement.samples]
        packed = gzip.compress("".join(lines).encode(), mtime=0)  # a tenth; the same bytes always
        (folder / f"{name}.jsonl.gz").write_bytes(packed)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """16 hex digits of a state dict's names and bytes: a folder name for its samples."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about what is done on purpose
# lm-eval describes the machine at every evaluation, for which it runs pip: once is enough
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)

"""Suites of published decoders.

Nothing is trained in such a suite: base and experts are checkpoints on this machine or the hub,
their tasks are the experts' names, and what is scored are benchmarks of lm-eval, each of which
belongs to one expert.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor

from eval.backend import Finetuning, OnDisk, Score, Split, require_protocol
from eval.companions import companions, with_config
from eval.language import benchmarks, checkpoints, judge, moments
from eval.requirements import Requirement, of_checkpoints, of_rows
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.layers import Layer, choose_layers

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class CausalBackend(OnDisk):
    """One score per benchmark instead of one per task; the fields are the keys of the suite's YAML.

    model, experts: folders, files or names on the hub (OWNER/NAME[@REVISION]). Adapters are given
        as they are.
    benchmarks: per column the expert it belongs to and the fields of `benchmarks.Benchmark`; `task`
        defaults to the column's name, `chat_template` to the suite's.
    tokenizer: folder or hub name of the tokenizer that every model is judged with; null: its own,
        which is the base's for a merge.
    chat_template: wrap prompts in the tokenizer's chat template, or in that of a named model.
    protocol, protocols: the chosen one of several, {name: what it sets of benchmarks, tokenizer,
        chat_template and texts}; what is set beside `protocols` counts in each of them.
    backend, backend_options: of lm-eval's registry, e.g. vllm with {tensor_parallel_size: 4}.
    batch_size: of the hf backend; "memory": as many sequences as the free memory holds.
    allow_code_execution: HumanEval and its like run what the model wrote. Use a sandbox.
    vocabulary: "refuse" embeddings of different sizes, or merge the rows all have and keep the
        base's others ("common_rows").
    texts: per expert the arguments of `datasets.load_dataset`, the `field` to read, text or
        messages, and whether to wrap it in the chat template of the model named `chat_template`:
        inputs for methods that need second moments, at most `max_tokens` of each.
    measured_through: second moments are those in each task's "expert", or all in the "base".
    moment_memory: bytes that running sums of second moments may take.
    samples: folder for every prompt and answer of an evaluation; null keeps none.
    """

    name: str
    family: str
    model: str
    experts: Mapping[str, str]
    benchmarks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_template: bool | str = False
    protocol: str | None = None
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backend: str = "hf"
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | str = "auto"
    allow_code_execution: bool = False
    vocabulary: Literal["refuse", "common_rows"] = "refuse"
    texts: Mapping[str, Mapping[str, Any]] | None = None
    measured_through: Literal["expert", "base"] = "expert"
    max_tokens: int = 2048
    moment_memory: int = 8 << 30
    samples: str | None = None
    device: str = "cpu"
    metric: str = "pass@1 or accuracy (lm-eval)"

    def __post_init__(self) -> None:
        if self.protocol is not None:
            require_protocol(self.protocol, self.protocols)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.experts)

    def base(self) -> dict[str, Tensor]:
        source = open_checkpoint(self._checked["base"])
        return {name: source.read(name) for name in source.keys()}

    def layers(self) -> dict[str, Layer]:
        folder = self._checked["base"]
        source = open_checkpoint(folder)
        shapes = {name: source.shape(name) for name in source.keys()}
        source.close()
        return choose_layers(folder, shapes).layers

    def digests(self) -> dict[str, Any]:
        """Names and SHA-256 of the checkpoints."""
        return {"model": self.model, "experts": self._digests}

    def protocol_key(self, *, statistics: bool = False) -> dict[str, Any]:
        """Benchmarks with all their settings, tokenizer, backend, and the rule for vocabularies."""
        own = {
            "name": self.protocol,
            "benchmarks": {column: asdict(b) for column, b in self._benchmarks.items()},
            "tokenizer": self._set("tokenizer"),
            "backend": self.backend,
            "backend_options": dict(self.backend_options),
            "vocabulary": self.vocabulary,
            "metric": self.metric,
        }
        measured = {"texts": self._texts, "tokens": self.max_tokens, "in": self.measured_through}
        return own | ({"statistics": measured} if statistics else {})

    def sources(self) -> dict[str, str]:
        """{repository: commit} of all that was taken from the hub so far."""
        return dict(sorted(self._commits.items()))

    def requirements(
        self, tasks: Sequence[str], *, finetuning: Finetuning, inputs: bool, validation: bool
    ) -> list[Requirement]:
        """Checkpoints, tokenizers, the benchmarks' data and, for `inputs`, the texts."""
        found = of_checkpoints(self._named, checkpoints.FILES)
        templates = {b.chat_template for b in self._benchmarks.values()}
        words = {w for w in (self._set("tokenizer"), *templates) if isinstance(w, str)}
        others = {f"tokenizer {w}": w for w in sorted(words - set(self._named.values()))}
        found += of_checkpoints(others, checkpoints.TOKENIZER)
        asked: dict[tuple[str, str | None], list[str]] = {}
        for column, benchmark in self._benchmarks.items():
            if self._columns[column]["expert"] in tasks:
                for place in benchmarks.data_sets(benchmark.task, self._manager):
                    asked.setdefault(place, []).append(column)
        if inputs:
            for task, own in self._texts.items():
                if task in tasks and "/" in own["path"] and not Path(own["path"]).exists():
                    asked.setdefault((own["path"], own.get("name")), []).append(f"inputs {task}")
        return found + [
            of_rows(f"data {', '.join(columns)}", path, name, None)
            for (path, name), columns in asked.items()
        ]

    def footprint(self, tasks: Sequence[str], images: int, inputs: bool) -> dict[str, int]:
        """Bytes of `disk`: a merge while it is judged."""
        return {"disk": checkpoints.size(self.model)}

    def check(self, tasks: Sequence[str]) -> None:
        """Benchmarks, room for their answers, chat templates and code, without any weight."""
        benchmarks.require_backend(self.backend)
        said, context = self._context
        benchmarks.require_room(self._benchmarks, self._manager, context, said)
        for column in self._benchmarks:
            self._template(column)
        benchmarks.require_resources(self._benchmarks.values())

    def given_expert(self, task: str, finetuning: Finetuning) -> Path:
        path = self._checked[task]
        stored = "lora" if (path / "adapter_config.json").exists() else "full"
        if stored != finetuning:
            raise InputError(
                f"expert {task!r} of suite {self.name!r} is published as {stored}",
                hint=f"use finetuning={stored}",
            )
        return path

    def score(
        self, state: Mapping[str, Tensor], tasks: Sequence[str], split: Split, limit: int | None
    ) -> dict[str, Score]:
        """Scores of the benchmarks that belong to the tasks, and "name@k" of those with k."""
        self._require_test(split)
        with checkpoints.scratch() as folder:
            checkpoints.write(state, folder / "model", like=self._checked["base"])
            return self.score_checkpoint(folder / "model", tasks, split, limit)

    # --- checkpoints, judged where they lie ---------------------------------------------------

    def checkpoint(self) -> Path:
        """The base's folder."""
        return self._checked["base"]

    def companions(self) -> dict[str, bytes | Path]:
        """What a merge needs beside its weights to be a model folder: the base's."""
        return with_config(companions(self._checked["base"]), self._changes)

    def score_checkpoint(
        self, path: Path, tasks: Sequence[str], split: Split, limit: int | None
    ) -> dict[str, Score]:
        """It is loaded by lm-eval and by nobody else. An adapter, or a file without a
        configuration, is first written out as a whole model."""
        self._require_test(split)
        if not (path / "config.json").is_file():
            with checkpoints.scratch() as folder:
                checkpoints.dense(path, folder / "model", base=self._checked["base"])
                return self.score_checkpoint(folder / "model", tasks, split, limit)
        chosen = {
            column: benchmark
            for column, benchmark in self._benchmarks.items()
            if self._columns[column]["expert"] in tasks
        }
        lm = self._lm(path)
        found = {
            column: judge.judge(
                lm,
                column,
                benchmark,
                self._manager,
                limit=limit,
                template=self._template(column),
                allow_code_execution=self.allow_code_execution,
            )
            for column, benchmark in chosen.items()
        }
        for judgement in found.values():
            self._commits.update(judgement.sources)
        if self.samples:
            judge.keep(found, Path(self.samples) / self.name / checkpoints.stamp(path))
        return {column: s for judgement in found.values() for column, s in judgement.scores.items()}

    # --- checks -------------------------------------------------------------------------------

    def _require_test(self, split: Split) -> None:
        if split != "test":
            raise InputError(f"the benchmarks of suite {self.name!r} have no {split} split")

    def _set(self, name: str) -> Any:
        """What the suite sets, or its protocol where the suite itself does not."""
        return getattr(self, name) or self.protocols.get(self.protocol or "", {}).get(name)

    def _both(self, name: str) -> dict[str, dict[str, Any]]:
        """Settings per key: the protocol's, overridden by the suite's own."""
        chosen = dict(self.protocols.get(self.protocol or "", {}).get(name) or {})
        own = dict(getattr(self, name) or {})
        return {k: dict(chosen.get(k) or {}) | dict(own.get(k) or {}) for k in {**chosen, **own}}

    @property
    def _texts(self) -> dict[str, dict[str, Any]]:
        return self._both("texts")

    @cached_property
    def _columns(self) -> dict[str, dict[str, Any]]:
        return self._both("benchmarks")

    @cached_property
    def _benchmarks(self) -> dict[str, benchmarks.Benchmark]:
        found = {}
        for column, given in self._columns.items():
            own = {"task": column, "chat_template": self._set("chat_template") or False} | given
            if (expert := own.pop("expert", None)) not in self.experts:
                raise InputError(
                    f"benchmark {column!r} belongs to expert {expert!r}, which suite "
                    f"{self.name!r} does not have",
                    hint=f"known: {', '.join(self.tasks)}",
                )
            known = {f.name for f in fields(benchmarks.Benchmark)}
            if unknown := sorted(set(own) - known):
                raise InputError(
                    f"benchmark {column!r} has no setting {unknown[0]!r}",
                    hint=f"known: expert, {', '.join(sorted(known))}",
                )
            found[column] = benchmarks.Benchmark(**own)
        return found

    @cached_property
    def _manager(self) -> TaskManager:
        return benchmarks.task_manager(
            self._benchmarks.values(), allow_code_execution=self.allow_code_execution
        )

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The base's `config.json`, which alone is fetched for it."""
        folder = checkpoints.part(self.model, ("config.json",))
        return json.loads((folder / "config.json").read_text())

    @property
    def _context(self) -> tuple[str, int]:
        """Where the length of the context is set, and that length in tokens."""
        for name in ("max_length", "max_model_len"):
            if name in self.backend_options:
                return f"suite.backend_options.{name}", int(self.backend_options[name])
        return "the model's own", int(self._config.get("max_position_embeddings", 2048))

    @cached_property
    def _changes(self) -> dict[str, Any]:
        """What the base's config.json must say otherwise for a merge."""
        return {}

    @cached_property
    def _commits(self) -> dict[str, str]:
        return {}

    @property
    def _named(self) -> dict[str, str]:
        """What the suite's checkpoints are called, for people."""
        return {"base": self.model} | {f"expert {t}": name for t, name in self.experts.items()}

    @cached_property
    def _digests(self) -> dict[str, dict[str, str]]:
        named = {"base": self.model, **self.experts}
        return {role: checkpoints.digests(name) for role, name in named.items()}

    @cached_property
    def _checked(self) -> dict[str, Path]:
        """Where base and experts are, everything having been checked that can be before a merge:
        benchmarks, shards and indices, tokenizers, what adapters belong to."""
        self.check(self.tasks)
        base = checkpoints.fetched(self.model, self._commits)
        experts = {
            task: checkpoints.fetched(name, self._commits) for task, name in self.experts.items()
        }
        told = checkpoints.require_mergeable(
            base, experts, vocabulary=self.vocabulary, name=self.model
        )
        self._changes.update(told)
        return {"base": base} | experts

    def _template(self, column: str) -> str | None:
        """The chat template of a benchmark; None where it has none, or the judged model's own.

        Raises InputError where there is no template to be had.
        """
        asked = self._benchmarks[column].chat_template
        if not asked:
            return None
        named = asked if isinstance(asked, str) else self._set("tokenizer")
        found = checkpoints.chat_template(named or self.model)
        return found if named else None

    # --- model --------------------------------------------------------------------------------

    def _lm(self, folder: Path) -> LM:
        """lm-eval's model of a checkpoint folder."""
        arguments = {"pretrained": str(folder)} | dict(self.backend_options)
        if named := self._set("tokenizer"):
            arguments |= {"tokenizer": str(checkpoints.part(named, checkpoints.TOKENIZER))}
        size = self.batch_size
        if size == "memory":
            size = self._rows(folder) if self.backend == "hf" else "auto"
        return judge.load_lm(self.backend, arguments, batch_size=size, device=self.device)

    def _rows(self, folder: Path) -> int:
        """Sequences of a batch, by the memory that is free now."""
        if self.device.startswith("cuda"):
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        config = json.loads((folder / "config.json").read_text())
        return judge.rows_that_fit(config, context=self._context[1], weights=weights, free=free)

    def moments_key(self, task: str, batches: int, batch_size: int) -> dict[str, Any]:
        key = {"texts": self._own_texts(task), "size": [batches, batch_size, self.max_tokens]}
        return key | ({} if self.measured_through == "expert" else {"in": self.measured_through})

    def write_moments(
        self, task: str, batches: int, batch_size: int, path: Path, about: Mapping[str, Any]
    ) -> None:
        """Over all tokens of the task's texts, and beside them `cost.json` with the bytes, seconds
        and passes they took."""
        base, named = self._checked["base"], self._set("tokenizer")
        cost = moments.write(
            base,
            self._checked[task] if self.measured_through == "expert" else None,
            checkpoints.part(named, checkpoints.TOKENIZER) if named else base,
            moments.read_texts(self._own_texts(task), batches * batch_size, self._commits),
            path,
            about=about,
            batch_size=batch_size,
            max_tokens=self.max_tokens,
            memory=self.moment_memory,
            device=self.device,
        )
        (path.parent / "cost.json").write_text(json.dumps(cost._asdict()))

    def _own_texts(self, task: str) -> dict[str, Any]:
        if own := dict(self._texts.get(task) or {}):
            return own
        raise InputError(
            f"suite {self.name!r} has no texts for the second moments of {task!r}",
            hint=f"give suite.texts.{task}={{path: json, data_files: FILE, split: train, "
            "field: text}",
        )

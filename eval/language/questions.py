"""From rows to tokenised questions: where a task's data is, how it is split, asked and kept.

Tokenising the seven T5 tasks takes minutes; it is done once for each data, wording and tokenizer.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.cache import cached, digest, file_sha256
from eval.data import hub
from eval.language import prompts, promptsource
from eval.requirements import Requirement, of_rows
from merging.errors import InputError

Protocol = Literal["ours", "paper"]
HELD_OUT = 32  # validation examples that the paper cuts off a labelled split, shuffled with
SHUFFLED = 42  # this seed of Python's generator
SPLITS = ("train", "validation", "test")
DATA = (".csv", ".json", ".jsonl", ".parquet", ".arrow")  # what folders of data sets hold
Asked = tuple[str, list[str], int]  # a prompt, the answers to choose from, the right one's number
# Story Cloze's files as its authors name them, and as the ACTMat authors' code does.
CLOZE = {
    "validation": ("cloze_validation_2016.csv", "cloze_test_val__spring2016*.csv"),
    "test": ("cloze_test_2016.csv", "cloze_test_test__spring2016*.csv"),
}
CLOZE_COLUMNS = {
    **{f"InputSentence{i}": f"input_sentence_{i}" for i in range(1, 5)},
    "RandomFifthSentenceQuiz1": "sentence_quiz1",
    "RandomFifthSentenceQuiz2": "sentence_quiz2",
    "AnswerRightEnding": "answer_right_ending",
}


class Example(NamedTuple):
    """Tokens of a prompt, tokens of each answer to choose from, and the right one's number."""

    prompt: list[int]
    choices: list[list[int]]
    answer: int


Splits = dict[str, list[Example]]


class Absent(InputError):
    """The data of a task is nowhere that one could look."""


# --- where the rows are -----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The data of one task: a folder on this machine, or a data set of the hub.

    place: the folder, or the hub's OWNER/NAME. revision: of the hub; None: its newest.
    """

    task: str
    place: str
    configuration: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        path = Path(self.place).expanduser()
        return path if path.is_dir() else None

    def key(self) -> dict[str, Any]:
        """What determines the rows: a folder's bytes, or where they are on the hub."""
        if self.folder is None:
            return {"path": self.place, "name": self.configuration, "revision": self.revision}
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): file_sha256(path) for path in sorted(files)}

    def requirement(self, what: str, splits: Sequence[str]) -> Requirement:
        """Whether these splits are here, or can be had."""
        if self.folder is None:
            return of_rows(what, self.place, self.configuration, self.revision, splits)
        if any(file.suffix in DATA for file in self.folder.rglob("*")):
            return Requirement(what, self.place)
        problem = f"the folder {self.place} has no data of task {self.task!r}"
        hint = f"it should hold files of {', '.join(DATA)}, one or more a split"
        return Requirement(what, self.place, problem=problem, hint=hint)

    def rows(self, split: str) -> tuple[list[dict[str, Any]], str | None]:
        """The rows of a split, and the commit that they came from."""
        try:
            if self.folder is not None:
                return list(_local(self.folder, split)), None
            found = hub.rows(self.place, self.configuration, self.revision, split)
            return list(hub.load(self.place, found, split)), found.commit
        except Exception as error:  # datasets has a dozen kinds for "not there"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"the data of task {self.task!r} cannot be loaded from {self.place}: {reason}",
                hint=getattr(error, "hint", None)
                or f"give suite.data.{self.task}=FOLDER, or leave the task out with tasks=[...]",
            ) from error


def source(task: str, data: str | Mapping[str, str | None] | None) -> Source:
    """Where a task's data is; the folder $MODEL_MERGING_DATA/OWNER/NAME goes before the hub.

    data: a folder with a data set folder per task, {task: folder, or OWNER/NAME[@REVISION] of the
        hub}, or None. What it does not have comes from the hub.
    Raises Absent for Story Cloze without a folder: the hub has no file of it.
    """
    published = prompts.TASKS[task]
    if isinstance(data, str):
        if not Path(data).expanduser().is_dir():
            raise InputError(f"suite.data is {data}, which is no folder")
        inside = Path(data).expanduser() / task
        data = {task: str(inside)} if inside.is_dir() else None
    if given := (data or {}).get(task):
        name, _, revision = given.partition("@")
        if Path(given).expanduser().is_dir():
            return Source(task, given)
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise InputError(f"suite.data.{task} is {given}, which is no folder")
        return Source(task, name, None, revision or None)
    kept = Path(os.environ.get("MODEL_MERGING_DATA", "/nonexistent"), published.path)
    if kept.is_dir():
        return Source(task, str(kept))
    if task == "story_cloze":
        raise Absent(
            "Story Cloze has to be asked for from its authors: the hub has only a script for it",
            hint="give suite.data.story_cloze=FOLDER with cloze_validation_2016.csv and "
            "cloze_test_2016.csv, put these into $MODEL_MERGING_DATA/LSDSem/story_cloze, or leave "
            "the task out with "
            f"'tasks=[{','.join(t for t in prompts.TASKS if t != task)}]'",
        )
    return Source(task, published.path, published.configuration)


def _local(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    csv = [path for pattern in CLOZE.get(split, ()) for path in sorted(folder.glob(pattern))]
    if csv:
        for row in load_dataset("csv", data_files=str(csv[0]), split="train"):
            yield {CLOZE_COLUMNS.get(name, name): value for name, value in row.items()}
    else:
        yield from load_dataset(str(folder), split=split)


# --- how they are asked -----------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """All that determines the questions of a task, before any is read.

    protocol: "paper" asks by one template everywhere and tests on the paper's subsets; "ours"
        trains on all of our templates in turn, tests by the one numbered `template` on all that
        is published, and cuts `validation` examples off the training data.
    templates: promptsource's folder of templates; None where there is none.
    train, test: at most so many examples.
    """

    task: str
    source: Source | None
    protocol: Protocol
    templates: Path | None
    template: int
    validation: int
    train: int | None
    test: int | None
    split_seed: int

    @property
    def public(self) -> promptsource.Template | None:
        """The paper's own template, where the protocol wants it and its file is there."""
        if self.protocol != "paper" or self.templates is None:
            return None
        return promptsource.load(self.templates, *prompts.TASKS[self.task].first)

    @property
    def wording(self) -> dict[str, str]:
        """Whose words ask the questions, for records."""
        if template := self.public:
            return {"of": "promptsource", "name": template.name, "sha256": template.sha256}
        number = 0 if self.protocol == "paper" else self.template
        own = prompts.TASKS[self.task].templates
        words = digest({"prompts": [list(template) for template in own]})
        return {"of": "this repository", "name": str(number), "sha256": words}

    @property
    def splits(self) -> list[str]:
        """The published splits that the questions are made of."""
        own = prompts.TASKS[self.task]
        if self.protocol == "ours":
            return [own.train, own.test]
        return [own.train, *(["validation", "test"] if own.held_out is None else [own.held_out])]

    def key(self) -> dict[str, Any]:
        """JSON that determines the questions."""
        return {
            "task": self.task,
            "data": None if self.source is None else self.source.key(),
            "protocol": self.protocol,
            "wording": self.wording,
            "sizes": [self.validation, self.train, self.test, self.split_seed],
        }

    def asked(self) -> tuple[dict[str, list[Asked]], str | None]:
        """{split: questions}, and the commit of their data."""
        if self.protocol == "paper":
            return self._paper()
        own = prompts.TASKS[self.task]
        learn, commit = self.source.rows(own.train)
        test, _ = self.source.rows(own.test)
        return self._ours(
            [_own_words(own, r) for r in learn], [_own_words(own, r) for r in test]
        ), commit

    def _ours(self, learn: list[list[Asked]], test: list[list[Asked]]) -> dict[str, list[Asked]]:
        """Each question comes in the words of every template."""
        random.Random(f"{self.split_seed}/{self.task}").shuffle(learn)
        kept, rest = learn[: self.validation], learn[self.validation :][: self.train]
        return {
            "train": [question[i % len(question)] for i, question in enumerate(rest)],
            "validation": [question[self.template] for question in kept],
            "test": [question[self.template] for question in test[: self.test]],
        }

    def _paper(self) -> tuple[dict[str, list[Asked]], str | None]:
        own = prompts.TASKS[self.task]
        learn, commit = self.source.rows(own.train)
        if own.held_out is None:
            validation, test = (self.source.rows(split)[0] for split in ("validation", "test"))
        else:
            labelled = self.source.rows(own.held_out)[0]
            random.Random(SHUFFLED).shuffle(labelled)
            first = HELD_OUT if len(labelled) > HELD_OUT else len(labelled) // 2
            validation, test = labelled[:first], labelled[first:]
        parts = {"train": learn[: self.train], "validation": validation, "test": test[: self.test]}
        return {
            split: [self._first(own, row) for row in rows] for split, rows in parts.items()
        }, commit

    def _first(self, own: prompts.Task, row: prompts.Row) -> Asked:
        """A question by the paper's template, or by our first with the paper's "No" and "Yes"."""
        question = own.read(row)
        if template := self.public:
            return (*template.ask(row), question.answer)
        return prompts.ask(question, own.templates[0]._replace(words=("No", "Yes")))


def _own_words(own: prompts.Task, row: prompts.Row) -> list[Asked]:
    return [prompts.ask(own.read(row), template) for template in own.templates]


# --- how they are kept ------------------------------------------------------------------------


def tokenised(
    questions: Questions, tokenizer_key: Mapping[str, Any], encode: Callable[[Asked], Example]
) -> tuple[Splits, str | None]:
    """The examples of every split, tokenised once, and the commit of their data.

    tokenizer_key: what `encode` depends on beside the question.
    """

    def build(folder: Path) -> None:
        asked, commit = questions.asked()
        for split, own in asked.items():
            save_file(_packed([encode(q) for q in own]), folder / f"{split}.safetensors")
        (folder / "commit.json").write_text(json.dumps(commit))

    key = {"version": 1, "questions": questions.key(), "tokenizer": dict(tokenizer_key)}
    folder = cached("questions", key, build)
    splits = {split: _unpacked(load_file(folder / f"{split}.safetensors")) for split in SPLITS}
    return splits, json.loads((folder / "commit.json").read_text())


def _packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """All tokens behind one another, int32, with the lengths that part them."""
    choices = [choice for example in examples for choice in example.choices]
    lists = {
        "prompts": [token for example in examples for token in example.prompt],
        "prompt_lengths": [len(example.prompt) for example in examples],
        "choices": [token for choice in choices for token in choice],
        "choice_lengths": [len(choice) for choice in choices],
        "choice_counts": [len(example.choices) for example in examples],
        "answers": [example.answer for example in examples],
    }
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in lists.items()}


def _unpacked(tensors: Mapping[str, Tensor]) -> list[Example]:
    lists = {name: tensor.tolist() for name, tensor in tensors.items()}
    prompts_ = list(_parted(lists["prompts"], lists["prompt_lengths"]))
    choices = list(_parted(lists["choices"], lists["choice_lengths"]))
    groups = _parted(choices, lists["choice_counts"])
    return [Example(*own) for own in zip(prompts_, groups, lists["answers"], strict=True)]


def _parted(values: list[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
    yield from (values[a:b] for a, b in pairwise(accumulate(lengths, initial=0)))

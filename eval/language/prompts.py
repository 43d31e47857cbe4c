"""The seven T5 tasks: where their data is, what a question is, and how it is asked.

The prompts here are in the style of P3 (arXiv 2202.01279) and were written for this repository.
The ACTMat paper asked by promptsource's first template of each task, which is read from its files
where they are (`eval.language.promptsource`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Row = Mapping[str, Any]


class Question(NamedTuple):
    """One example before it is put into words: what templates may mention, the possible answers
    (None: the template's own words for "no" and "yes") and the number of the right one."""

    fields: dict[str, str]
    choices: list[str] | None
    answer: int


class Template(NamedTuple):
    """A prompt with places for a question's fields, and its words for "no" and "yes"."""

    prompt: str
    words: tuple[str, str] = ("no", "yes")


class Task(NamedTuple):
    """Data set on the hub (path, configuration), its splits, and how its rows become prompts.

    held_out: the labelled split that the paper cuts into 32 validation examples and the test;
        None where validation and test are published apart.
    first: promptsource's template that the paper asks by: (place of its file, name).
    """

    path: str
    configuration: str | None
    train: str
    test: str
    read: Callable[[Row], Question]
    templates: tuple[Template, ...]
    held_out: Literal["validation", "test"] | None
    first: tuple[str, str]


def ask(question: Question, template: Template) -> tuple[str, list[str], int]:
    """(prompt, answers to choose from, number of the right one)."""
    options = "\n".join(f"- {choice}" for choice in question.choices or ())
    prompt = template.prompt.format(**question.fields, options=options)
    return prompt, question.choices or list(template.words), question.answer


def _labelled(choices: Mapping[str, Sequence[str]], key: str) -> tuple[list[str], int]:
    return list(choices["text"]), list(choices["label"]).index(key)


def _qasc(row: Row) -> Question:
    choices, answer = _labelled(row["choices"], row["answerKey"])
    facts = f"{row['fact1'].rstrip('.')}. {row['fact2'].rstrip('.')}."
    return Question({"question": row["question"], "facts": facts}, choices, answer)


def _wiki_qa(row: Row) -> Question:
    return Question({"question": row["question"], "text": row["answer"]}, None, row["label"])


def _quartz(row: Row) -> Question:
    choices, answer = _labelled(row["choices"], row["answerKey"])
    return Question({"question": row["question"], "text": row["para"]}, choices, answer)


def _paws(row: Row) -> Question:
    return Question({"a": row["sentence1"], "b": row["sentence2"]}, None, row["label"])


def _story_cloze(row: Row) -> Question:
    story = " ".join(row[f"input_sentence_{i}"] for i in range(1, 5))
    endings = [row["sentence_quiz1"], row["sentence_quiz2"]]
    return Question({"story": story}, endings, int(row["answer_right_ending"]) - 1)


def _winogrande(row: Row) -> Question:
    options = [row["option1"], row["option2"]]
    return Question({"sentence": row["sentence"]}, options, int(row["answer"]) - 1)


def _wsc(row: Row) -> Question:
    fields = {"text": row["text"], "name": row["span1_text"], "pronoun": row["span2_text"]}
    return Question(fields, None, row["label"])


TASKS: dict[str, Task] = {
    "qasc": Task(
        "allenai/qasc", None, "train", "validation", _qasc,
        (
            Template("{facts}\nWith this in mind, {question}\n{options}"),
            Template("Pick the answer that fits.\nQuestion: {question}\nChoices:\n{options}"),
        ),
        "validation", ("qasc", "qa_with_separated_facts_1"),
    ),
    "wiki_qa": Task(
        "microsoft/wiki_qa", None, "train", "test", _wiki_qa,
        (
            Template("Question: {question}?\nPassage: {text}\nDoes the passage answer it?"),
            Template("Somebody asked: {question}?\nThe reply was: {text}\nIs this a good reply?"),
        ),
        None, ("wiki_qa", "Is This True?"),
    ),
    "quartz": Task(
        "allenai/quartz", None, "train", "test", _quartz,
        (
            Template("{text}\nGiven that, {question}\n{options}"),
            Template("Background: {text}\nQuestion: {question}\nChoose one:\n{options}"),
        ),
        None, ("quartz", "use_info_from_question_paragraph"),
    ),
    "paws": Task(
        "google-research-datasets/paws", "labeled_final", "train", "test", _paws,
        (
            Template("First: {a}\nSecond: {b}\nDo the two sentences mean the same?"),
            Template("{a}\nIs that a paraphrase of the following?\n{b}"),
        ),
        None, ("paws/labeled_final", "task_description-no-label"),
    ),
    "story_cloze": Task(
        "LSDSem/story_cloze", "2016", "validation", "test", _story_cloze,
        (
            Template("{story}\nWhich ending follows?\n{options}"),
            Template("Finish the story with the more sensible sentence.\n{story}\n{options}"),
        ),
        "test", ("story_cloze/2016", "Answer Given options"),
    ),
    "winogrande": Task(
        "allenai/winogrande", "winogrande_xl", "train", "validation", _winogrande,
        (
            Template("{sentence}\nWhat belongs in the place of the _?\n{options}"),
            Template("Fill in the blank: {sentence}\n{options}"),
        ),
        "validation", ("winogrande/winogrande_xl", "does underscore refer to"),
    ),
    "wsc": Task(
        "aps/super_glue", "wsc.fixed", "train", "validation", _wsc,
        (
            Template('{text}\nIn this text, does "{pronoun}" stand for {name}?'),
            Template('{text}\nThe word "{pronoun}" refers to {name}. Is that right?'),
        ),
        "validation", ("super_glue/wsc.fixed", "does the pronoun refer to"),
    ),
}  # fmt: skip

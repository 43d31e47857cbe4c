"""What the tasks in configs/lm_tasks/olmo need beside their files: which rows, what is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

FENCE = "```"


def programs(
    answers: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Per example, its answers as programs: the given beginning, then what was written up to the
    closing fence. An answer begins inside the fence and mostly repeats the beginning."""
    return [
        [f"{doc['prompt']}\n{answer.partition(FENCE)[0]}" for answer in own]
        for own, doc in zip(answers, docs, strict=True)
    ]


def of_2024(docs: Dataset) -> Dataset:
    """The problems of AIME 2024."""
    return docs.filter(lambda doc: year(doc) == "2024")


def of_2025(docs: Dataset) -> Dataset:
    """The problems of AIME 2025."""
    return docs.filter(lambda doc: year(doc) == "2025")


def year(doc: Mapping[str, Any]) -> str:
    """From its column, or from the address of the problem, .../2024_AIME_I_Problems/..."""
    if doc.get("year"):
        return str(doc["year"])
    found = re.search(r"(20\d\d)_AIME", str(doc.get("url")))
    return found[1] if found else ""


def matched(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Flexible match: any of the ways to read an answer gives the right integer."""
    right = _integer(str(doc["answer"]))
    return {"exact_match_flex": int(right in set(map(_integer, readings(results[0]))))}


def readings(answer: str) -> list[str]:
    """What an answer may mean: its last box, what follows its last "answer is" or "Answer:", its
    last number."""
    boxes = re.findall(r"\\boxed\s*\{([^{}]*)\}", answer)
    said = re.findall(r"(?i)answer(?:\s+is|:)\s*\$?\\?\(?\s*([0-9,]+)", answer)
    numbers = re.findall(r"\d[\d,]*", answer)
    return [found[-1] for found in (boxes, said, numbers) if found]


def _integer(text: str) -> int | None:
    """AIME's answers are integers from 0 to 999, some written with leading zeros."""
    digits = re.sub(r"[\s,$]|\\[!,;:() ]", "", text)
    return int(digits) if digits.isdecimal() else None

"""BIG-bench's tasks that the embedded suites take texts and images from, in one package.

One list of members for all suites, so that its 358 MB are fetched once. What the suites measure
on them are no BIG-bench scores: the splits and the prompts are others.
"""

from __future__ import annotations

import json
from typing import Any

from eval.data.packages import Package

TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"
IMAGES = "cifar10_classification/base64"
INTENTS = "intent_recognition"
QUESTIONS = "natural_instructions/subtask046_miscellaenous_question_typing"
REVIEWS = (  # MultiEmo: English in four domains, one domain in eight languages
    *(f"multiemo/{domain}_sentence_en" for domain in ("hotels", "medicine", "reviews")),
    *(f"multiemo/products_sentence_{x}" for x in "de en es fr it nl pl pt".split()),  # noqa: SIM905
)
BIGBENCH = Package(
    "bigbench==1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    members=tuple(f"{TASKS}/{x}/task.json" for x in (IMAGES, INTENTS, QUESTIONS, *REVIEWS)),
    sdist=True,
)


def examples(folder: str) -> list[dict[str, Any]]:
    """All examples of one task, in the file's order."""
    return json.loads((BIGBENCH.folder() / TASKS / folder / "task.json").read_text())["examples"]

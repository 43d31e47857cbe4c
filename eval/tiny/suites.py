"""The kinds of the suites tiny_*: real ones over made-up models and sentences."""

from __future__ import annotations

import functools
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from eval import tiny
from eval.language import embedded_lm
from eval.language.embedded_lm import EmbeddedBackend
from eval.language.questions import Asked, Questions
from eval.language.seq2seq import Seq2SeqBackend
from eval.language.text import TextBackend
from eval.requirements import Requirement
from eval.tiny import models


class TinyText(TextBackend):
    encoders: ClassVar = {"tiny": tiny.encoder}
    readers: ClassVar = {"tiny": tiny.sentences}


class TinyLM(EmbeddedBackend):
    decoders: ClassVar = {"tiny": partial(models.model, "llama")}


@functools.cache
def documents(source: str, test: int, validation: int, train: int, **_: Any) -> dict[str, Any]:
    """As `eval.language.embedded_lm.documents`, of a topic of `eval.tiny.TOPICS`."""
    return embedded_lm.parted(tiny.sentences(source), test, validation, train)


class MadeUp(Questions):
    """What a sentence is about, in words of this repository."""

    @property
    def wording(self) -> dict[str, str]:
        return {"of": "this repository", "name": "0"}

    def asked(self) -> tuple[dict[str, list[Asked]], str | None]:
        labels = sorted(tiny.TOPICS[self.task])
        asked = [
            [(f"{text} Label:", labels, labels.index(own))]
            for text, own in tiny.sentences(self.task)
        ]
        return self._ours(asked[100:], asked[:100]), None


class TinySeq2Seq(Seq2SeqBackend):
    """model: "tiny_" and one of `eval.tiny.models.Kind`. Published tasks may be asked, too."""

    @cached_property
    def folder(self) -> Path:
        if not self.model.startswith("tiny_"):
            return super().folder
        return models.model(self.model.removeprefix("tiny_"))

    @property
    def base_key(self) -> dict[str, str]:
        return self._digests(str(self.folder))

    def _questions(self, task: str) -> Questions:
        if task not in tiny.TOPICS:
            return super()._questions(task)
        return self._asking(MadeUp, task, None)

    def requirements(self, *_: Any, **__: Any) -> list[Requirement]:
        return []

    def footprint(self, *_: Any, **__: Any) -> dict[str, int]:
        return {}

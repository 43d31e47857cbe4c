"""The kinds of suites there are: a configuration names one, and its other keys are its fields."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from eval.backend import Backend


class Place(NamedTuple):
    """The class of a kind, in a module that is imported when a suite of it is built."""

    module: str
    name: str

    def load(self) -> type[Backend]:
        return getattr(importlib.import_module(self.module), self.name)


KINDS = {
    "text": Place("eval.language.text", "TextBackend"),
    "vision": Place("eval.vision.suite", "VisionBackend"),
    "seq2seq": Place("eval.language.seq2seq", "Seq2SeqBackend"),
    "causal": Place("eval.language.causal", "CausalBackend"),
    "embedded_lm": Place("eval.language.embedded_lm", "EmbeddedBackend"),
    "tiny_text": Place("eval.tiny.suites", "TinyText"),
    "tiny_seq2seq": Place("eval.tiny.suites", "TinySeq2Seq"),
    "tiny_lm": Place("eval.tiny.suites", "TinyLM"),
}

"""Parts of a model by name: what kind of tensor one is, which block it belongs to, what a pattern
matches."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

from merging.errors import InputError
from merging.layers import names

KINDS = ("attention", "mlp", "embedding", "norm", "head")
_ATTENTION = re.compile(r"attn|attention|[qkv]_proj|o_proj|out_proj|in_proj|qkv|query|key|value")
_MLP = re.compile(r"mlp|ffn|fc\d?|feed_forward|intermediate|dense|gate|up_proj|down_proj|wi|wo")
_NORM = re.compile(r"(.*_)?(norm|ln|layernorm|batchnorm|bn)_?\w?\d*", re.IGNORECASE)
_BLOCKS = re.compile(r"blocks? (\d+)(?: ?- ?(\d+))?")


def block(name: str) -> int | None:
    """The number of a tensor's block, the first in its name; None outside all blocks."""
    number = re.search(r"\.(\d+)\.", f".{name}")
    return int(number[1]) if number else None


def kind(name: str) -> str:
    """One of `KINDS`, or "other", judged by the name of the module that holds a tensor."""
    path = name.rpartition(".")[0] or name
    if names.is_table(path) or names.is_table(name.rpartition(".")[2]):
        return "embedding"
    if _NORM.fullmatch(path.rpartition(".")[2]):
        return "norm"
    if names.is_head(path):
        return "head"
    number = re.search(r"\.\d+\.", f".{name}")
    tail = name[number.end() - 1 :] if number else name
    return "attention" if _ATTENTION.search(tail) else "mlp" if _MLP.search(tail) else "other"


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a tensor's name is matched by a pattern.

    pattern: a kind (attention, mlp, embedding, norm, head), "blocks 0-5" or "block 3", or a glob of
        the whole name in which * stands for anything, dots too ("*.mlp.*").
    """
    if pattern in KINDS:
        return lambda name: kind(name) == pattern
    if numbers := _BLOCKS.fullmatch(pattern):
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last < first:
            raise InputError(f"match={pattern!r}: the last block comes before the first")
        return lambda name: (number := block(name)) is not None and first <= number <= last
    return lambda name: fnmatchcase(name, pattern)

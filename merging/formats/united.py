"""Checkpoints whose rows are told by tokens: the tables of base and experts in one numbering."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.errors import InputError
from merging.experts import Dense, Expert, Scaled, Source, Values, lift
from merging.formats.hashes import Hashes
from merging.formats.names import listed, table_of
from merging.formats.vocabulary import Tokenizer, read_tokenizer, shown, unite

_OUTPUT_BIAS = re.compile(r"\b(predictions|lm_head|embed_out|decoder|vocab_projector)\.bias$")
_INPUT = ("embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings", "embed_in")


class Rows:
    """Which row of whom each row of the merge's tables is.

    tables: of the base, by name. before, after: how many rows they have, and will have.
    """

    def __init__(self, base: Source, experts: Mapping[str, Expert]) -> None:
        own = _tokenizer(base.path)
        if own is None:
            raise InputError(
                f"vocabulary=union merges tokenizers, {base.path} has no tokenizer.json",
                hint="AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one",
            )
        self.tables, self.before = _tables(base)
        found = {task: _tokenizer(expert.path) for task, expert in experts.items()}
        self.union = unite(own, {t: x for t, x in found.items() if x is not None})
        tokens = own.tokens | dict(self.union.new)
        self.first = max(own.tokens.values(), default=-1) + 1  # the first new row
        self.last = self.first + len(self.union.new)
        self.after = max(self.before, self.last)
        if self.first > self.before:
            raise InputError(
                f"the tokenizer of {base.path} has tokens up to {self.first - 1}, its embedding "
                f"{self.before} rows"
            )
        if self.after > self.before and any("final_logits_bias" in n for n in base.keys()):
            raise InputError(f"the output biases of {base.path} cannot grow with its vocabulary")
        # {task: (rows,) the expert's own row of each row up to `last`, -1 where it has none}
        self.numbers = {
            task: _numbers(tokenizer or own, tokens, self.last) for task, tokenizer in found.items()
        }
        for task, expert in experts.items():
            self._check(task, expert, found[task], base)

    def _check(self, task: str, expert: Expert, tokenizer: Tokenizer | None, base: Source) -> None:
        """InputError for an expert whose tables lack rows of its own tokens."""
        held = set(expert.names())
        for name in self.tables:
            rows = expert.shape(name)[0] if name in held else self.before
            told = f"expert {task!r} ({expert.path})"
            if tokenizer is None and rows != self.before:
                raise InputError(
                    f"{told} has {rows} rows in {name!r}, the base {self.before}, and no "
                    "tokenizer.json that says what they are"
                )
            if (highest := int(self.numbers[task].max())) >= rows:
                raise InputError(
                    f"{told}: its tokenizer has a token {highest}, {name!r} has {rows} rows",
                    hint="resize its embedding to its tokenizer, or give the tokenizer it had",
                )
            if name in held and expert.rank(name) is not None and rows != self.before:
                raise InputError(f"{told} adapts {name!r} of another vocabulary by factors")

    def check_output(self, output: Path) -> None:
        """InputError for an output with no place for a tokenizer."""
        if output.suffix == ".safetensors":
            raise InputError(
                f"vocabulary=union writes a tokenizer beside the weights, {output} is a file",
                hint="let output be a folder",
            )

    def files(self, given: Mapping[str, bytes | Path]) -> dict[str, bytes | Path]:
        """An output folder's files: those given, with the tokenizer and its number of rows."""
        return self.union.files(given, (self.before, self.after))

    def note(self) -> str:
        """What the union is, a sentence."""
        new, tokens = self.union.new, self.first + len(self.union.new)
        if not new:
            return f"vocabulary=union: the experts have no token that the base's {tokens} lack"
        tasks = sorted(set(self.union.of.values()))
        told = "; ".join(
            f"{shown([t for t, task in self.union.of.items() if task == one])} of {one}"
            for one in tasks
        )
        return (
            f"vocabulary=union: {tokens} tokens in {self.after} rows, new are {len(new)}: {told}; "
            f"their rows in {listed(self.tables)} are the mean of the experts that have them"
        )


class UnitedBase(Dense):
    """The base with a row for each new token: the mean of what the experts say of it."""

    def __init__(self, base: Source, experts: Mapping[str, Expert], rows: Rows) -> None:
        self.source, self.experts, self.by_token = base, experts, rows
        self.path, self.tied, self.quantised = base.path, base.tied, base.quantised

    @property
    def bytes_read(self) -> int:
        return self.source.bytes_read

    def keys(self) -> list[str]:
        return self.source.keys()

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.source.shape(name)
        return (self.by_token.after, *shape[1:]) if name in self.by_token.tables else shape

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def file(self, name: str) -> Path | None:
        return self.source.file(name)

    def stamp(self) -> object:
        return self.source.stamp(), sorted(self.by_token.union.new.items())

    def hash_files(self, path: str | Path, hashes: Hashes) -> None:
        self.source.hash_files(path, hashes)

    def close(self) -> None:
        self.source.close()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self.by_token.tables:
            return self.source.read(name, rows)
        start, stop, _ = (rows or slice(None)).indices(self.by_token.after)
        first, last = self.by_token.first, self.by_token.last
        parts = [
            self.source.read(name, slice(start, min(stop, first))) if start < first else None,
            self._new(name, max(start, first), min(stop, last)),
            self.source.read(name, slice(max(start, last), stop)) if stop > last else None,
        ]
        return torch.cat([part for part in parts if part is not None])

    def _new(self, name: str, start: int, stop: int) -> Tensor | None:
        """The rows of new tokens: the means of those that have them."""
        if start >= stop:
            return None
        numbers = [self.by_token.numbers[task][start:stop] for task in self.experts]
        pairs = zip(self.experts.values(), numbers, strict=True)
        rows = [gathered(self.source, expert, name, own) for expert, own in pairs]
        total, count = torch.stack(rows).sum(0), (torch.stack(numbers) >= 0).sum(0)
        return (total / count.view(-1, *[1] * (total.ndim - 1))).to(self.dtype(name))


class UnitedExpert:
    """An expert in the numbering of the union; what it has no row for is as in the base."""

    def __init__(self, expert: Expert, base: UnitedBase, numbers: Tensor) -> None:
        self.expert, self.base, self.numbers = expert, base, numbers

    def __getattr__(self, name: str) -> Any:  # all else is the expert's own
        return getattr(self.expert, name)

    def _united(self, name: str) -> bool:
        return name in self.base.by_token.tables

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name) if self._united(name) else self.expert.shape(name)

    def rank(self, name: str) -> int | None:
        rank = self.expert.rank(name)
        return None if rank and self._united(name) else rank

    def values(self, name: str, rows: slice | None = None) -> Values | None:
        if not self._united(name):
            return self.expert.values(name, rows)
        if name not in self.expert.names():
            return None
        start, stop, _ = (rows or slice(None)).indices(self.base.by_token.after)
        found = lift(self.base.read(name, slice(start, stop))).clone()
        numbers = self.numbers[start : min(stop, self.base.by_token.first)]
        own = gathered(self.base.source, self.expert, name, numbers)
        known = numbers >= 0
        found[: len(numbers)][known] = own[known].to(found.dtype)
        return Values(found, moved=False)


def united(base: Source, experts: Mapping[str, Expert]) -> tuple[Source, dict[str, Expert], Rows]:
    """Base and experts in the numbering of all their tokens.

    experts: as `fit` tells them in the base's names, weighted ones too.
    """
    plain = {t: e.expert if isinstance(e, Scaled) else e for t, e in experts.items()}
    rows = Rows(base, plain)
    grown = UnitedBase(base, plain, rows)
    found: dict[str, Expert] = {}
    for task, expert in experts.items():
        own: Expert = UnitedExpert(plain[task], grown, rows.numbers[task])
        found[task] = Scaled(own, expert.scale) if isinstance(expert, Scaled) else own
    return grown, found, rows


def gathered(base: Source, expert: Expert, name: str, numbers: Tensor) -> Tensor:
    """An expert's rows of a table by number, float64; 0 where the number is -1.

    numbers: (n,). What an expert does not hold is the base's.
    """
    known = numbers >= 0
    out = torch.zeros(len(numbers), *base.shape(name)[1:], dtype=torch.float64)
    if not known.any():
        return out
    wanted = numbers[known]
    window = slice(int(wanted.min()), int(wanted.max()) + 1)
    values = expert.values(name, window)
    if values is None or values.moved:
        rows = base.read(name, window)
        rows = rows if values is None else values.weight(lift(rows))
    else:
        rows = values.tensor
    out[known] = rows[wanted - window.start].double()
    return out


def _tokenizer(path: str) -> Tokenizer | None:
    return read_tokenizer(Path(path))


def _tables(base: Source) -> tuple[list[str], int]:
    """The tensors with a row a token, and how many rows they have."""
    matrices = [n for n in base.keys() if len(base.shape(n)) == 2 and table_of(n) == "vocabulary"]
    inputs = [n for n in matrices if any(name in n for name in _INPUT)]
    if not inputs:
        raise InputError(f"{base.path} has no embedding of tokens to merge vocabularies in")
    rows = base.shape(inputs[0])[0]
    biases = [n for n in base.keys() if _OUTPUT_BIAS.search(n) and base.shape(n) == (rows,)]
    tables = [n for n in matrices if base.shape(n)[0] == rows and "transform" not in n]
    return [n for n in base.keys() if n in {*tables, *biases}], rows


def _numbers(tokenizer: Tokenizer, tokens: Mapping[str, int], rows: int) -> Tensor:
    """(rows,) a tokenizer's own number of each token, -1 where it has none."""
    numbers = torch.full((rows,), -1, dtype=torch.long)
    for token, number in tokenizer.tokens.items():
        numbers[tokens[token]] = number
    return numbers

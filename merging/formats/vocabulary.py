"""One tokenizer of several: tokens told by what they are, in the form of the tokenizers library.

The base's tokens keep their numbers; those that only experts have follow, in the order of the
experts' names and of their own numbers. The base's normalisation, templates and special tokens are
kept. Format: tokenizer.json of https://github.com/huggingface/tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from merging.errors import InputError
from merging.formats.json_files import parse_json, read_json

# What decides how a text is cut besides vocabulary and merges.
_CUTS = ("normalizer", "pre_tokenizer")
# What is otherwise drawn when training or cutting, not part of what a model was trained with.
_FREE = {"vocab", "merges", "dropout"}
# Files that say the same as tokenizer.json of a vocabulary without the added tokens.
_OLDER = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
Merge = tuple[str, str]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json."""

    path: Path  # of the folder
    content: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.content["model"]
        return model

    @property
    def vocabulary(self) -> dict[str, int]:
        """{token: number} of the model."""
        vocab = self.model["vocab"]
        if isinstance(vocab, dict):
            return dict(vocab)
        return {entry[0]: number for number, entry in enumerate(vocab)}

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """{token: its entry} of those beside the model's, by number."""
        entries = sorted(self.content.get("added_tokens") or (), key=lambda entry: entry["id"])
        return {entry["content"]: entry for entry in entries}

    @property
    def tokens(self) -> dict[str, int]:
        """{token: number} of all."""
        return self.vocabulary | {token: entry["id"] for token, entry in self.added.items()}

    @property
    def merges(self) -> list[Merge]:
        """Of a BPE model, the first first."""
        pairs = (p.split(" ") if isinstance(p, str) else p for p in self.model.get("merges") or ())
        return [(left, right) for left, right in pairs]


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint's weights; None where there is no tokenizer.json."""
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not (folder / "tokenizer.json").is_file():
        return None
    content = read_json(folder / "tokenizer.json")
    tokenizer = Tokenizer(folder, content)
    try:
        numbers = list(tokenizer.tokens.values())
        sound = all(type(n) is int and n >= 0 for n in numbers)
        sound = sound and all(isinstance(piece, str) for m in tokenizer.merges for piece in m)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{folder / 'tokenizer.json'} is no tokenizer of the tokenizers library")
    return tokenizer


@dataclass(frozen=True)
class Union:
    """The tokenizer of a merge."""

    base: Tokenizer
    content: Mapping[str, Any]
    new: Mapping[str, int]  # {token that the base lacks: its number}
    of: Mapping[str, str]  # {the same: the first expert that has it}
    grown: bool  # the model has more tokens than the base's, not only added ones

    def files(
        self, given: Mapping[str, bytes | Path], rows: tuple[int, int]
    ) -> dict[str, bytes | Path]:
        """An output folder's files: those given, with this tokenizer and its number of rows.

        rows: of the base's embedding, and of the merge's.
        """
        files = {n: f for n, f in given.items() if not (self.grown and n in _OLDER)}
        files["tokenizer.json"] = _written(self.content)
        config = self._json("config.json", given)
        if config is not None and rows[0] != rows[1]:
            resized = _resized(config, *rows)
            config = resized if resized != config else config | {"vocab_size": rows[1]}
        if config is not None:
            files["config.json"] = _written(config)
        settings = self._json("tokenizer_config.json", given)
        if settings is not None:
            decoder = settings.get("added_tokens_decoder")
            added = {e["content"]: e for e in self.content.get("added_tokens") or ()}
            if isinstance(decoder, dict):
                entries = {
                    str(number): {"content": token} | {k: bool(added[token].get(k)) for k in _FLAGS}
                    for token, number in self.new.items()
                    if token in added
                }
                settings = settings | {"added_tokens_decoder": decoder | entries}
            files["tokenizer_config.json"] = _written(settings)
        table = self._json("added_tokens.json", given)
        if table is not None:
            tokens = self.content.get("added_tokens") or ()
            numbers = {t["content"]: t["id"] for t in tokens if t["content"] in self.new}
            files["added_tokens.json"] = _written(table | numbers)
        return files

    def _json(self, name: str, given: Mapping[str, bytes | Path]) -> dict[str, Any] | None:
        """What a file says: the one given, or else the base's own."""
        file = given.get(name, self.base.path / name)
        if isinstance(file, bytes):
            return parse_json(file, Path(name))
        return read_json(file) if file.is_file() else None


def unite(base: Tokenizer, experts: Mapping[str, Tokenizer]) -> Union:
    """The tokenizer that has every token.

    Raises InputError where texts are cut by other rules, where BPE merges contradict each other,
    and for other models than the base's that cannot grow (Unigram).
    """
    tokens, added, merges = base.tokens, dict(base.added), _Merges(base)
    of: dict[str, str] = {}
    grown = False
    for task, expert in experts.items():
        told = f"the tokenizers of expert {task!r} ({expert.path}) and of {base.path}"
        _check_alike(base, expert, told)
        merges.add(task, expert, told)
        known = {*tokens, *expert.added}
        if own := [t for t in _by_number(expert.vocabulary) if t not in known]:
            _check_growing(base, told)
            grown = True
        for token in [*own, *(t for t in expert.added if t not in tokens)]:
            tokens[token] = max(tokens.values(), default=-1) + 1
            of[token] = task
            if token in expert.added:
                added[token] = {**expert.added[token], "id": tokens[token]}
    new = {token: tokens[token] for token in of}
    content = dict(base.content)
    content["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    if grown or merges.own:  # the library numbers added tokens after the model's, unless in it
        content["model"] = {**base.model, "vocab": tokens}
        if "merges" in base.model:
            content["model"]["merges"] = [list(merge) for merge in (*base.merges, *merges.own)]
    union = Union(base, content, new, of, grown)
    _check_numbers(union, tokens)
    return union


class _Merges:
    """What experts' BPE models merge beyond the base's, {merge: expert}, in order."""

    def __init__(self, base: Tokenizer) -> None:
        self.base, self.own = base.merges, dict[Merge, str]()

    def add(self, task: str, expert: Tokenizer, told: str) -> None:
        """Take up an expert's. Which merge comes first decides how a text is cut.

        Raises InputError unless it has all of the base's first, and none of what it has more
        takes a piece that another expert's merge would take.
        """
        for i, (ours, theirs) in enumerate(zip_longest(self.base, expert.merges)):
            if ours is not None and ours != theirs:
                instead = "nothing" if theirs is None else _told(theirs)
                raise InputError(
                    f"{told} have conflicting BPE merges: number {i + 1} is {_told(ours)} in the "
                    f"base and {instead} in the expert",
                    hint="an expert's may follow the base's, not replace them; "
                    "vocabulary=common_rows merges the rows that both have",
                )
        own = list(dict.fromkeys(expert.merges[len(self.base) :]))
        others = {merge: of for merge, of in self.own.items() if merge not in own}
        starts = {left: merge for merge in others for left in merge[:1]}
        ends = {right: merge for merge in others for right in merge[1:]}
        for left, right in own:
            if (left, right) not in self.own and (other := starts.get(right) or ends.get(left)):
                raise InputError(
                    f"the tokenizers of experts {task!r} and {others[other]!r} have conflicting "
                    f"BPE merges: {_told((left, right))} and {_told(other)} take the same piece"
                )
        if [m for m in self.own if m in own] != [m for m in own if m in self.own]:
            raise InputError(f"{told} and other experts' have the same BPE merges in another order")
        self.own |= {merge: task for merge in own if merge not in self.own}


def _told(merge: Merge) -> str:
    return " + ".join(map(repr, merge))


def _by_number(vocabulary: Mapping[str, int]) -> list[str]:
    return sorted(vocabulary, key=lambda token: vocabulary[token])


def _check_alike(base: Tokenizer, expert: Tokenizer, told: str) -> None:
    """InputError where the two cut texts by other rules."""
    for key in _CUTS:
        if base.content.get(key) != expert.content.get(key):
            raise InputError(f"{told} have another {key}: one cannot stand for both")
    for key in sorted(set(base.model) | set(expert.model)):
        if key not in _FREE and _set(base.model.get(key)) != _set(expert.model.get(key)):
            raise InputError(
                f"{told} differ in their models' {key}: {base.model.get(key)!r:.60} and "
                f"{expert.model.get(key)!r:.60}"
            )


def _set(value: Any) -> Any:
    """A setting; versions of the library leave out or write what is not set."""
    return value or None


def _check_growing(base: Tokenizer, told: str) -> None:
    kind = base.model.get("type") or ("BPE" if "merges" in base.model else "WordPiece")
    if kind == "Unigram" or not isinstance(base.model["vocab"], dict):
        raise InputError(
            f"{told} are Unigram models with other pieces: their scores come from two trainings "
            "and have no common scale",
            hint="vocabulary=common_rows merges the rows that both have",
        )


def _check_numbers(union: Union, tokens: Mapping[str, int]) -> None:
    """InputError unless the library, where it is installed, reads the union as it was meant."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        return
    try:
        read = Library.from_str(json.dumps(union.content))
    except Exception as error:  # of the library, about what it was given
        raise InputError(f"the union of the tokenizers cannot be read: {error}") from None
    for token, number in tokens.items():
        if read.token_to_id(token) != number:
            raise InputError(
                f"the union of the tokenizers numbers {token!r} {read.token_to_id(token)}, "
                f"expected {number}",
                hint="the base's added tokens should follow its vocabulary without a gap",
            )


def _resized(config: Any, before: int, after: int) -> Any:
    """A configuration with another vocab_size wherever it says the base's."""
    if not isinstance(config, dict):
        return config
    return {
        key: after if key == "vocab_size" and value == before else _resized(value, before, after)
        for key, value in config.items()
    }


def _written(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def shown(tokens: Iterable[str], limit: int = 3) -> str:
    """A few tokens for a sentence."""
    names = list(tokens)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more

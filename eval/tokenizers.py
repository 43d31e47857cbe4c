"""The tokens of a model folder's tokenizer, read from its files: no code of the folder is run."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval.companions import home
from merging.errors import InputError

log = logging.getLogger(__name__)


def require_same_tokenizers(base: Path, experts: Mapping[str, Path]) -> None:
    """InputError for an expert whose tokenizer gives one of the base's numbers another token.

    Tokens that an expert adds beyond the base's are admitted: they are rows of the embedding
    that the merge's rule for vocabularies decides about.
    """
    kind, ours = vocabulary(base)
    for task, folder in experts.items():
        other, theirs = vocabulary(folder)
        if ours and theirs and kind != other:
            log.warning(
                "the tokenizers of %s and %s are not compared: %s, %s", base, folder, kind, other
            )
            continue
        for number, token in theirs.items():
            if ours.get(number, token) != token:
                raise InputError(
                    f"the tokenizer of expert {task!r} ({folder}) differs from the base's: "
                    f"token {number} is {token!r}, expected {ours[number]!r}",
                    hint="merge models that share a tokenizer",
                )


def vocabulary(path: Path) -> tuple[str, dict[int, str]]:
    """What {number: token} numbers, and the table itself: of a checkpoint's tokenizer.

    The table is empty where it comes without a tokenizer that can be read. "numbers" are rows of
    the embedding; "pieces" those of a sentencepiece model, which some tokenizers number anew.
    """
    folder = home(path)
    files = [(file, read) for pattern, read in _READERS for file in _files(folder, pattern)]
    for file, read in files:
        try:
            kind = "pieces" if read is _sentencepiece else "numbers"
            if found := read(file):
                return kind, found | _added(folder)
        except Exception as error:  # a parser of another library, given anything at all
            log.warning("%s is not compared: %s", file, type(error).__name__)
    return "numbers", {}


def _files(folder: Path | None, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) if folder else []


def _fast(file: Path) -> dict[int, str]:
    """tokenizer.json: a model's vocabulary, as a table or as a list with scores."""
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        found = {number: token for token, number in vocabulary.items()}
    else:
        found = {number: entry[0] for number, entry in enumerate(vocabulary)}
    return found | {entry["id"]: entry["content"] for entry in content.get("added_tokens") or ()}


def _table(file: Path) -> dict[int, str]:
    """vocab.json: {token: number}."""
    content = json.loads(file.read_text("utf-8"))
    return {number: token for token, number in content.items() if type(number) is int}


def _lines(file: Path) -> dict[int, str]:
    """vocab.txt: a token a line."""
    return dict(enumerate(file.read_text("utf-8").splitlines()))


def _sentencepiece(file: Path) -> dict[int, str]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    return {number: model.id_to_piece(number) for number in range(model.get_piece_size())}


def _ranks(file: Path) -> dict[int, str]:
    """tiktoken's: base64 of the bytes, and the number."""
    pairs = (line.split() for line in file.read_text().splitlines() if line)
    return {int(number): base64.b64decode(token).decode("latin1") for token, number in pairs}


# In this order: the fast tokenizer says all, vocabularies that map tokens to numbers come before
# sentencepiece models whose pieces are numbered otherwise (Marian, XLM-R).
_READERS: tuple[tuple[str, Callable[[Path], dict[int, str]]], ...] = (
    ("tokenizer.json", _fast),
    ("vocab.json", _table),
    ("vocab.txt", _lines),
    ("tokenizer.model", _sentencepiece),
    ("spiece.model", _sentencepiece),
    ("sentencepiece*.model", _sentencepiece),
    ("*.spm", _sentencepiece),
    ("*.tiktoken", _ranks),
)


def _added(folder: Path) -> dict[int, str]:
    """Tokens that were added to a vocabulary: added_tokens.json and tokenizer_config.json."""
    table = _json(folder / "added_tokens.json")
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    found = {number: token for token, number in table.items() if type(number) is int}
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if str(number).isdecimal() and isinstance(entry, dict) and "content" in entry:
            found[int(number)] = entry["content"]
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}

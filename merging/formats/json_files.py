"""JSON files that others wrote: bounded in size, without repeated keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merging.errors import InputError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if path.stat().st_size > HEADER_LIMIT:
        raise InputError(f"{path} is larger than {HEADER_LIMIT} bytes, expected a small JSON file")
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object; a repeated key, of which parsers take one or the other, is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for text in (text for pair in pairs for text in pair if isinstance(text, str)):
            text.encode()  # a lone surrogate can be neither printed nor looked up
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return table

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value

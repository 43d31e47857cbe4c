"""Shapes of the same tensor on two sides: equal, of other vocabularies, or of other models."""

from __future__ import annotations

from merging.experts import Source
from merging.formats.names import is_buffer, table_of

_NAMED = {
    "positions": "{0} positions, the base's {1}: models of other lengths or image sizes differ in "
    "more than their fine-tuning",
    "labels": "{0} outputs, the base's {1}: heads of other labels have no rows in common (a base "
    "without its head merges the rest)",
    "vocabulary": "a vocabulary of {0}, the base's has {1} (vocabulary=common_rows merges the rows "
    "that both have, vocabulary=union those of every token)",
}


def compare_shapes(
    name: str, shape: tuple[int, ...], base: Source, common_rows: bool = False
) -> list[str]:
    """What is wrong with an expert's shape of one of the base's tensors.

    common_rows: tables of a vocabulary may have more or fewer rows.
    """
    expected = base.shape(name)
    if shape == expected or is_buffer(name, expected):
        return []
    table = table_of(name)
    if 0 < len(shape) == len(expected) and shape[1:] == expected[1:] and table:
        if table == "vocabulary" and common_rows:
            return []
        return [f"tensor {name!r} has {_NAMED[table].format(shape[0], expected[0])}"]
    return [f"tensor {name!r} has shape {list(shape)}, the base's has {list(expected)}"]

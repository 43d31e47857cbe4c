"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input, told in one sentence.

    `message` names the file, tensor or key at fault and what was expected; `hint` says what to do.
    The command lines print both and exit with code 2, without a traceback.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def several(problems: Sequence[str], limit: int = 6) -> str:
    """A list of problems for a message: the first few, and how many more there are."""
    more = [f"and {len(problems) - limit} more of them"] if len(problems) > limit else []
    return "; ".join([*problems[:limit], *more])


HOW_TO_MEASURE = (
    "measure them with `python -m experiments.statistics`, of a suite or of a checkpoint of your "
    "own, and give them to a merge as statistics.NAME=FILE"
)

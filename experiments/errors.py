"""Exceptions as what a person at a terminal can act on: a sentence, a hint, an exit code."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Collection
from difflib import get_close_matches
from typing import NamedTuple

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.cli import TRACEBACK
from merging.errors import InputError

FAULT, BAD_INPUT = 1, 2


class Explained(NamedTuple):
    """An error in one sentence, what to do about it, and the exit code it stands for."""

    sentence: str
    hint: str
    code: int

    def print(self) -> None:
        sys.stderr.write(f"error: {self.sentence}\n")
        sys.stderr.write(f"hint: {self.hint}\n" if self.hint else "")


def report(error: BaseException) -> Explained:
    """Print an error, its traceback too where that was asked for."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    explained = explain(error)
    explained.print()
    return explained


def explain(error: BaseException) -> Explained:
    """What to say about an error, which Hydra may have wrapped on its way up."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    if cause is not None:
        return Explained(one_line(cause.message), one_line(cause.hint), BAD_INPUT)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _of_hydra(error)
    if isinstance(error, OSError) and error.strerror:  # no space, no permission, no such file
        return Explained(f"{error.strerror}: {error.filename or 'while writing'}", "", BAD_INPUT)
    return Explained(
        f"{type(error).__name__}: {one_line(str(error))}",
        f"this is not a message for bad input; run again with --traceback or {TRACEBACK}=1",
        FAULT,
    )


def _of_hydra(error: Exception) -> Explained:
    text = str(error).split("Config search path:")[0]
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__}"
    if option := re.search(
        r"Could not find '(.+)/(.+)'\s+Available options in [^:]*:([^:]*)", text
    ):
        group, name, known = option.groups()
        return Explained(
            f"there is no {group} {name!r}", did_you_mean(name, known.split()), BAD_INPUT
        )
    if several := re.match(r"Ambiguous value for argument '(.+)=(.+)'", text):
        key, values = several.groups()
        return Explained(
            f"{key}={values} names several values, and this is not a sweep",
            f"add -m to run each of them; a list is written {key}=[{values}]",
            BAD_INPUT,
        )
    if sweep := re.match(r"Sweep parameters '(.+)' requires --multirun", text):
        return Explained(
            f"{sweep[1]} describes several values, and this is not a sweep",
            "add -m to run each of them, or sweep=optuna to search",
            BAD_INPUT,
        )
    sentence, _, rest = text.strip().partition("\n")
    if kind := re.search(r"full_key: (\S+)", rest):  # of a value of another type
        return Explained(f"{kind[1]}: {one_line(sentence)}", "", BAD_INPUT)
    return Explained(one_line(sentence), one_line(rest), BAD_INPUT)


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A hint: the nearest of the known names, if one is near, and all of them."""
    close = get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}known: {', '.join(sorted(known))}"

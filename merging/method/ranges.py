"""What values a hyperparameter takes, told where it is declared: `k: Share = 0.2`."""

from __future__ import annotations

import math
import re
from numbers import Integral
from typing import Any

Share = float  # from 0 to 1
NonNegative = float  # 0 or more
Count = int  # 1 or more
Seed = int  # of 64 bits

RANGES = {
    "Share": (0, 1, "a share between 0 and 1"),
    "NonNegative": (0, math.inf, "0 or more"),
    "Count": (1, math.inf, "a whole number, 1 or more"),
    "Seed": (0, 2**64 - 1, "a whole number from 0 to 2**64 - 1"),
    "int": (-math.inf, math.inf, "a whole number"),
}


def outside(annotation: str, value: Any) -> str:
    """What the value should have been, "" where it is: annotation as it stands in a signature."""
    for word in re.findall(r"\w+", annotation):
        low, high, told = RANGES.get(word, (-math.inf, math.inf, ""))
        fraction = is_whole(annotation) and not isinstance(value, Integral)
        if told and (fraction or not low <= value <= high):
            return told
    return ""


def is_whole(annotation: str) -> bool:
    """Whether it is of whole numbers alone."""
    words = set(re.findall(r"\w+", annotation))
    return bool(words & {"Count", "Seed", "int"}) and "float" not in words

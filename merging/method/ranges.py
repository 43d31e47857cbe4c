"""What values a hyperparameter takes, told where it is declared: `k: Share = 0.2`."""

from __future__ import annotations

import math
import re

Share = float  # from 0 to 1
NonNegative = float  # 0 or more
Count = int  # 1 or more

RANGES = {
    "Share": (0, 1, "a share between 0 and 1"),
    "NonNegative": (0, math.inf, "0 or more"),
    "Count": (1, math.inf, "1 or more"),
}


def outside(annotation: str, value: float) -> str:
    """What the value should have been, "" where it is: annotation as it stands in a signature."""
    for word in re.findall(r"\w+", annotation):
        low, high, told = RANGES.get(word, (-math.inf, math.inf, ""))
        if not low <= value <= high:
            return told
    return ""

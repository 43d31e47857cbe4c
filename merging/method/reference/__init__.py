"""Every method as its paper prints it, in torch, with no thought of cost or conditioning.

The oracle of the tests, in float64, and what `experiments.bench` measures the library against, in
time, memory and rounding error. Each function takes deltas (T, d_out, d_in) and, where the method
needs them, covariances (T, d_in, d_in) or fishers (T, d_out, d_in), and hyperparameters by the
library's names and defaults (random masks apart). Nothing here shares code with the library's own.
"""

from merging.method.reference import (  # noqa: F401  (fill the table)
    both_sides,
    entries,
    interference,
    shared,
    spectral,
)
from merging.method.reference.plain import TEXTBOOK

RANDOM = frozenset({"dare", "dare_ties", "della", "della_linear"})  # the same only in distribution

__all__ = ["RANDOM", "TEXTBOOK"]

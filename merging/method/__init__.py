"""The methods: pure functions on a stack of differences. Importing this fills the registry."""

from merging.method import (  # noqa: F401
    ace,
    averages,
    both_sides,
    core_space,
    descent,
    frames,
    interference,
    kfac,
    knots,
    layered,
    masks,
    movers,
    pcb,
    posthoc,
    rank_rule,
    sided,
    sparse,
    spectral,
    sphere,
)

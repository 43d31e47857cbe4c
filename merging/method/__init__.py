"""The methods: pure functions on a stack of differences. Importing this fills the registry."""

from merging.method import ace, averages, descent, interference, sparse, spectral  # noqa: F401

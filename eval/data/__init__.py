"""Data sets from package registries."""

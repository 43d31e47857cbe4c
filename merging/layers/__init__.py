"""Which tensors are the matrix of a linear layer, and how they are cut before merging."""

from merging.layers.choice import (
    MAX_SIDE,
    Choice,
    Layers,
    choose_layers,
    infer_layers,
    paper_layers,
    resolve_layers,
)
from merging.layers.layout import Layer, cut, join, of_outputs, whole
from merging.layers.modules import linear_layers
from merging.layers.names import HEADS

__all__ = [
    "HEADS",
    "MAX_SIDE",
    "Choice",
    "Layer",
    "Layers",
    "choose_layers",
    "cut",
    "infer_layers",
    "join",
    "linear_layers",
    "of_outputs",
    "paper_layers",
    "resolve_layers",
    "whole",
]

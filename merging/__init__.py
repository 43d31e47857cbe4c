"""Model merging: several models fine-tuned from one base become one model, layer by layer."""

from merging.loading import loading_torch

with loading_torch():
    import torch  # noqa: F401

from merging import method as _method  # noqa: F401  (it fills the registry)
from merging.engine import Report, merge_checkpoints, merge_state_dicts
from merging.errors import InputError
from merging.extraction import Extraction, extract
from merging.layers import Layer, linear_layers
from merging.method.registry import Method, create, methods, register
from merging.planning import PLANNED, Plan, plan

__all__ = [
    "PLANNED",
    "Extraction",
    "InputError",
    "Layer",
    "Method",
    "Plan",
    "Report",
    "create",
    "extract",
    "linear_layers",
    "merge_checkpoints",
    "merge_state_dicts",
    "methods",
    "plan",
    "register",
]

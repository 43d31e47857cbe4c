"""Model merging: several models fine-tuned from one base become one model, layer by layer."""

from merging.loading import loading_torch

with loading_torch():
    import torch  # noqa: F401

from merging import method as _method  # noqa: F401  (it fills the registry)
from merging.engine import MergedState, Report, merge_checkpoints, merge_state_dicts
from merging.errors import InputError
from merging.experts import Expert, apply
from merging.extraction import Extraction, extract
from merging.formats.checkpoints import open_checkpoint
from merging.layers import Layer, linear_layers
from merging.method.registry import Method, create, methods, register
from merging.planning import PLANNED, Plan, plan

__all__ = [
    "PLANNED",
    "Expert",
    "Extraction",
    "InputError",
    "Layer",
    "MergedState",
    "Method",
    "Plan",
    "Report",
    "apply",
    "create",
    "extract",
    "linear_layers",
    "merge_checkpoints",
    "merge_state_dicts",
    "methods",
    "open_checkpoint",
    "plan",
    "register",
]

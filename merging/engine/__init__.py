"""Streams a merge tensor by tensor: plan, read, apply the method, write. Knows no formula."""

from merging.engine.api import MergedState, merge_checkpoints, merge_state_dicts
from merging.engine.report import Report

__all__ = ["MergedState", "Report", "merge_checkpoints", "merge_state_dicts"]

"""Streams a merge tensor by tensor: read, apply the method, write. Knows files, no formula."""

from merging.engine.merge import Report, merge_checkpoints, merge_state_dicts

__all__ = ["Report", "merge_checkpoints", "merge_state_dicts"]

"""CLIP-like vision towers behind frozen heads."""

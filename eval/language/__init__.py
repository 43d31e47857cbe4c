"""Text encoders, T5, and causal language models."""

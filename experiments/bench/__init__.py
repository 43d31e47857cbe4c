"""Time, memory and accuracy of every method beside textbook code: `python -m experiments.bench`."""

"""The command lines. Nothing is imported here: they must answer at once (`experiments.cli`)."""

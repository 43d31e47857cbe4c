"""What each command does: its settings, its task, what it prints. `experiments.cli` starts them."""

"""CONTRIBUTING.md shows what is true: its example is the one that is tested, its paths exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_example_is_the_method_that_the_tests_register_from_outside():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    module = (ROOT / "tests/norm_mean.py").read_text()
    assert code == module.partition("\n\n")[2]


def test_what_it_names_is_there():
    for path in re.findall(r"`((?:merging|eval|experiments|configs|tests)/[\w/.]*)`", TEXT):
        assert (ROOT / path).exists(), path
    from eval.backend import Backend, OnDisk, Trainable
    from eval.registry import KINDS
    from eval.suite import Suite
    from experiments.bench.command import PARTS
    from experiments.cli import COMMANDS
    from merging.formats.readers import READERS

    assert Suite and Backend and Trainable and OnDisk and KINDS and PARTS and COMMANDS and READERS

"""The README says what the repository does and what results/ holds."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import merging
from experiments.readme import ROOT, inserted, table

README = (ROOT / "README.md").read_text()


def test_the_table_is_the_one_of_the_results():
    assert inserted(README, table(ROOT / "results")) == README


@pytest.mark.parametrize("line", re.findall(r"^python -m experiments\.run (.*)$", README, re.M))
def test_commands_compose(line):
    overrides = [x for x in line.partition("#")[0].split() if x != "-m"]
    overrides = [re.sub(r"^method=.*,", "method=", x) for x in overrides]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("experiment", overrides)
    assert config.method.name in {*merging.methods(), "zero_shot", "experts"}


def test_links_and_folders_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)|^\| `(\w+/)` ", README, re.M)
    assert len(linked) >= 7
    for path in ("".join(pair) for pair in linked):
        assert Path(ROOT, path).exists(), path

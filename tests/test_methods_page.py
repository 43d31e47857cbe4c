"""merging/README.md is what the registry and the table of comparisons say."""

import re

import pytest
from omegaconf import OmegaConf

import merging
from experiments.report import methods

PARITY = OmegaConf.to_container(OmegaConf.load(methods.PARITY))
KNOWN = sorted(set(PARITY) & set(merging.methods()))  # one that is new is on the page when compared


def without_lines(page):
    """The page without line numbers, which every edit of a method's file moves."""
    return re.sub(r":\d+\]\((\S+)#L\d+\)", r"](\1)", page)


def test_the_committed_page_is_the_generated_one():
    committed = (methods.ROOT / "merging" / "README.md").read_text()
    hint = "run: python -m experiments.methods"
    assert without_lines(committed) == without_lines(methods.page(KNOWN)), hint


def test_links_lead_to_the_methods():
    links = re.findall(r"\| `(\w+)` .*\[(\w+\.py):(\d+)\]", methods.page(KNOWN))
    assert {name for name, _, _ in links} == set(KNOWN)
    for name, file, line in links:
        text = (methods.ROOT / "merging" / "method" / file).read_text().splitlines()
        function = merging.create(name).function.__name__
        around = " ".join(text[int(line) - 1 : int(line) + 20])
        assert f'"{name}"' in around or f"def {function}(" in around, name


@pytest.mark.parametrize("name", sorted(PARITY))
def test_every_method_is_compared_and_the_options_named_exist(name):
    row = PARITY[name]
    assert set(row) <= {"agrees", "differs", "packed", "cost"} and row["cost"]
    for option in re.findall(r"\b([a-z_]+)=", row.get("differs", "")):
        assert option in merging.create(name).hyperparameters, option


def test_a_method_that_is_not_compared_yet_is_shown_without_a_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "PARITY", tmp_path / "parity.yaml")
    methods.PARITY.write_text("average: {agrees: exact, cost: entries}\n")
    (row,) = [
        line for line in methods.page(["ties"]).splitlines() if line.startswith("| `ties` | k")
    ]
    assert row.split(" | ")[3] == "–"
    assert "| `ties` |" not in methods.page(["ties"]).partition("authors' code")[2]

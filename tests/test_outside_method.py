"""A method from outside the package is a method: its function and its file are all it takes."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import merging
from merging.method import registry
from tests import test_configs

ROOT = Path(__file__).parents[1]
YAML = "# The mean, weighted by how far each moved. Ours.\nname: norm_mean\nalpha: 1.0\n"


@pytest.fixture
def registered(monkeypatch):
    """The example's module, imported with a copy of the table that goes with this test."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    sys.modules.pop("tests.norm_mean", None)
    import tests.norm_mean

    yield tests.norm_mean
    del sys.modules["tests.norm_mean"]


def test_every_law_is_tested_by_its_name_and_no_table_asks_for_a_row():
    """All tests of all methods, but the oracle's and those of its YAML, which follow."""
    files = [
        f"tests/test_{name}.py" for name in ("method_properties", "merged_bytes", "methods_page")
    ]
    line = [sys.executable, "-m", "pytest", "-rA", "-p", "tests.norm_mean", *files]
    laws = subprocess.run(
        [*line, "-k", "norm_mean or methods_page"], cwd=ROOT, capture_output=True, text=True
    )
    assert laws.returncode == 0, laws.stdout
    passed = re.findall(r"PASSED tests/test_(\w+)\.py::\S*", laws.stdout)
    assert passed.count("method_properties") >= 20 and "methods_page" in passed, laws.stdout


def test_its_file_is_all_that_configs_need(registered, tmp_path, monkeypatch):
    shutil.copytree(test_configs.CONFIGS, tmp_path / "configs")
    (tmp_path / "configs" / "method" / "norm_mean.yaml").write_text(YAML)
    monkeypatch.setattr(test_configs, "CONFIGS", tmp_path / "configs")
    test_configs.test_every_method_has_a_file_and_every_file_a_method()
    test_configs.test_a_methods_file_holds_the_defaults_of_the_code("norm_mean")
    test_configs.test_a_methods_file_opens_with_its_source_or_a_command("norm_mean")


def test_it_merges_like_any_other(registered):
    base = {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}
    near = {"fc.weight": torch.eye(2), "fc.bias": torch.ones(2)}
    far = {"fc.weight": 3 * torch.eye(2).flip(0), "fc.bias": 3 * torch.ones(2)}
    method = merging.create("norm_mean")
    merged = merging.merge_state_dicts(base, {"near": near, "far": far}, method)
    # norms 1 : 3, so a quarter of one and three quarters of the other
    torch.testing.assert_close(merged["fc.weight"], torch.tensor([[0.25, 2.25], [2.25, 0.25]]))
    torch.testing.assert_close(merged["fc.bias"], torch.full((2,), 2.5))
    assert "norm_mean" in merging.methods() and "an example" in method.__doc__


def test_the_example_of_the_documentation_is_this_one(registered):
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    shown = "".join(page.read_text() for page in pages if page.exists())
    assert inspect.getsource(registered.norm_mean) in shown

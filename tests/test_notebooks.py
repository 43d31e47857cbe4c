"""Notebooks are committed without outputs and run from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from linear_suite import LinearSuite
from nbclient import NotebookClient

from experiments import measurement
from experiments.measurement import measure
from experiments.report import records
from experiments.settings import Experiment

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMITTED = "../results/embedded_text"


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder of records like the committed ones: methods, and an alpha of several values."""
    suite = LinearSuite(tmp_path)
    monkeypatch.setattr(measurement, "load_suite", lambda config, device: suite)
    found = [
        measure(
            Experiment(
                {}, {"name": name} | alpha, {}, finetuning=finetuning, seed=seed,
                records=str(tmp_path), device="cpu",
            )
        )
        for name, alpha in [
            *((name, {}) for name in ("zero_shot", "experts", "average", "tsv_m", "actmat")),
            ("average", {"alpha": 0.5}),
            ("average", {"alpha": 2.0}),
        ]
        for finetuning in ("full", "lora")
        for seed in (0, 1)
    ]  # fmt: skip
    records.save_lines(tmp_path / "records.jsonl", found)
    return tmp_path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    notebook = read(path)
    if not (ROOT / "notebooks" / COMMITTED / "records.jsonl").exists():
        for cell in notebook.cells:
            cell.source = cell.source.replace(COMMITTED, str(stand_in))
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = [o for o in cell.outputs if o.get("name") == "stderr"]
            assert not any("Error" in o.text for o in printed)
    assert any(
        "text/html" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ())
    )


def test_there_are_those_that_the_readme_names():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {
        "merge_your_own", "merge_adapters", "compare_methods", "theory", "reproduce_table",
    }  # fmt: skip

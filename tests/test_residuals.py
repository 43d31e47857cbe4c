"""The residual beside measured accuracy: a suite by hand, correlations, what is refused."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments import measurement
from experiments.commands import residuals
from experiments.measurement import measure, references
from experiments.report import records
from experiments.settings import Experiment
from merging.errors import InputError
from tests.linear_suite import LinearSuite


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Records of two methods on a suite whose scores are known by hand."""
    suite = LinearSuite(tmp_path)
    for module in (measurement, residuals):
        monkeypatch.setattr(module, "load_suite", lambda config, device: suite)
    run = Experiment(
        suite={"name": "linear"}, method={"name": "average"}, tracker={"name": "none"},
        device="cpu", records=str(tmp_path / "runs"),
    )  # fmt: skip
    found = [measure(replace(run, method={"name": name})) for name in ("average", "actmat")]
    found += references(run).values()
    (tmp_path / "results" / "linear").mkdir(parents=True)
    records.save_lines(tmp_path / "results" / "linear" / "records.jsonl", found)
    return residuals.Residuals(
        suite={"name": "linear"}, methods=["average", "actmat"], device="cpu",
        records=str(tmp_path / "results"), output=str(tmp_path / "results"),
    )  # fmt: skip


def test_residuals_and_what_is_kept_by_hand(settings, tmp_path):
    residuals.measure(settings)
    table = pd.read_csv(tmp_path / "results" / "linear" / "residuals_full.csv")
    average, actmat = (table[table.method == name] for name in ("average", "actmat"))
    # D_t has one entry 1, the average half of it: |(1 - 1/2) 1|^2 / |1|^2, on either side
    assert average[["inputs", "outputs", "mean"]].to_numpy().ravel() == pytest.approx(0.25)
    assert average.kept.tolist() == [0.5, 0.5]
    # the experts share no direction, so ACTMat leaves nothing undone and keeps all
    assert actmat[["inputs", "outputs"]].to_numpy().ravel() == pytest.approx(0, abs=1e-6)
    assert actmat.kept.tolist() == pytest.approx([1, 1])
    found = residuals.correlations(table)
    assert found.loc["mean"].tolist() == pytest.approx([-1, -1, -1])
    page = (tmp_path / "results" / "linear" / "residuals_full.md").read_text()
    assert "| first | -1.00 | -1.00 | -1.00 |" in page
    assert (tmp_path / "results" / "linear" / "residuals_full.png").exists()


def test_what_has_no_record_is_refused_by_name(settings):
    with pytest.raises(InputError, match="no full record of tsv_m with seed 0"):
        residuals.measure(replace(settings, methods=["tsv_m"]))
    with pytest.raises(InputError, match="no records at"):
        residuals.measure(replace(settings, records="nowhere"))


def test_merges_of_fewer_tasks_are_set_beside_their_own_records(settings, tmp_path):
    """Two experts and three, one seed; a task that its merge has alone is kept whole."""
    with pytest.raises(InputError, match="no merge of fewer tasks has a record"):
        residuals.measure(replace(settings, subsets=True))
    path = tmp_path / "results" / "linear" / "records.jsonl"
    found = records.load_lines(path)
    run = Experiment(
        suite={"name": "linear"}, method={"name": "average"}, tracker={"name": "none"},
        device="cpu", records=str(tmp_path / "runs"), tasks=["second"],
    )  # fmt: skip
    found += [measure(replace(run, method={"name": name})) for name in ("average", "actmat")]
    records.save_lines(path, found)
    residuals.measure(replace(settings, subsets=True))
    table = pd.read_csv(path.with_name("residuals_full_subsets.csv"))
    assert table.groupby(["method", "tasks"]).size().to_dict() == {
        ("actmat", 1): 1, ("actmat", 2): 2, ("average", 1): 1, ("average", 2): 2,
    }  # fmt: skip
    alone = table[table.tasks == 1]
    assert alone.task.tolist() == ["second"] * 2
    assert alone.kept.tolist() == pytest.approx([1, 1])
    assert alone["mean"].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert table[(table.method == "average") & (table.tasks == 2)]["mean"].tolist() == [0.25, 0.25]
    page = path.with_name("residuals_full_subsets.md").read_text()
    assert "2 methods, merges of 1 to 2 tasks, seeds 0." in page
    assert "| 2 | 0.12 | 0.12 | 0.12 | 0.75 |" in page


RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("stem", sorted(RESULTS.glob("*/residuals_*.csv")), ids=lambda p: p.stem)
def test_committed_pages_are_what_their_tables_give(stem, tmp_path):
    (tmp_path / stem.name).write_bytes(stem.read_bytes())
    residuals.render((tmp_path / stem.name).with_suffix(""))
    committed = stem.with_suffix(".md").read_text()
    assert (tmp_path / stem.name).with_suffix(".md").read_text() == committed

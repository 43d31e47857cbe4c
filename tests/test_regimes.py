"""Regimes side by side: the runs, the paired statistics by hand, the page and its verdict."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from linear_suite import LinearSuite

from eval.suite import unpacked
from experiments import hydra_run, measurement
from experiments.commands import regimes
from experiments.commands.regimes import Regime, Regimes
from experiments.report import both_sides, figures, records
from merging.errors import InputError

ROOT = Path(__file__).parents[1]


def composed():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra_run.read_settings(Regimes, compose("regimes"))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    suite = LinearSuite(tmp_path)
    monkeypatch.setattr(measurement, "load_suite", lambda config, device: suite)
    monkeypatch.setattr(regimes, "save", lambda figure, stem: None)  # a second each
    return Regimes(
        suites={"linear": {"name": "linear", "tasks": ["first", "second"]}},
        regimes={"all": Regime("linear"), "one": Regime("linear", tasks=["first"])},
        methods={
            "average": {"name": "average"},
            "symmetric": {"name": "symmetric"},
            "a = 0.9": {"name": "both_sides", "a": 0.9},
        },
        rivals=["average"], seeds=[0, 1], output=str(tmp_path / "out"),
        records=str(tmp_path / "records"), device="cpu",
    )  # fmt: skip


def test_the_published_settings_compose_and_name_what_exists():
    settings = composed()
    regimes.check(settings)
    assert {"actmat", "tsv_m", "aswudi", "iso_c", "task_arithmetic", "pico"} == {*settings.rivals}
    assert settings.split == "validation"


def test_it_runs_tabulates_and_starts_again_from_records(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(regimes, "save", figures.save)
    regimes.regimes(settings)
    page = (tmp_path / "out" / "both_sides.md").read_text()
    # the experts' sum, diag(1, 1), is .6 / 2 off on either task; the average .1 / 2
    assert "95.0 (best rival)" in page and "70.0 (-25.0 ± 0.0)" in page
    assert "- all: 2 tasks, seeds 0, 1, at most 100 validation examples a task" in page
    assert "No record yet" not in page
    assert (tmp_path / "out" / "both_sides" / "differences.png").exists()
    folder = tmp_path / "out" / "both_sides"
    found = records.load_lines(folder / "regimes.jsonl")
    keys = [(r["key"]["method"], len(r["key"]["tasks"])) for r in found]
    record = found[keys.index(("average", 2))]
    assert "correct" not in record["scores"]["first"]
    assert unpacked(record["correct"]["first"], 100).tolist() == [1] * 95 + [0] * 5
    table = pd.read_csv(folder / "table.csv")
    assert len(table) == 6 and set(table.split) == {"validation"}
    settings.run = False
    regimes.regimes(settings)
    assert (tmp_path / "out" / "both_sides.md").read_text() == page


def test_records_of_other_tables_are_taken_over(settings, tmp_path, monkeypatch):
    regimes.regimes(settings)
    table = tmp_path / "out" / "both_sides" / "regimes.jsonl"
    kept = table.rename(tmp_path / "other.jsonl")
    settings.records, settings.known = str(tmp_path / "elsewhere"), [str(kept)]
    monkeypatch.setattr(measurement, "merge_suite", None)  # nothing is merged again
    regimes.regimes(settings)
    assert table.read_text() == kept.read_text()


def test_each_regime_has_its_own_seeds_and_limit_and_may_run_alone(settings, tmp_path):
    settings.regimes["one"].seeds, settings.regimes["one"].limit = [2], 7
    settings.only = ["one"]
    regimes.regimes(settings)
    found = records.load_lines(tmp_path / "out" / "both_sides" / "regimes.jsonl")
    assert {(r["key"]["seed"], r["key"]["limit"]) for r in found} == {(2, 7)} and len(found) == 3
    page = (tmp_path / "out" / "both_sides.md").read_text()
    assert "- one: 1 tasks, seed 2, at most 7 validation examples a task" in page
    assert "- all, seed 0, 1: `average`, `symmetric`, `a = 0.9`" in page  # told, not fatal


def test_an_interrupted_run_keeps_what_it_finished_and_tells_what_is_missing(
    settings, tmp_path, monkeypatch
):
    merged = []

    def interrupted(*arguments):
        if len(merged) == 4:  # seed 0 of "all" is whole, of seed 1 the average alone
            raise KeyboardInterrupt
        merged.append(arguments)
        return merge_suite(*arguments)

    merge_suite = measurement.merge_suite
    monkeypatch.setattr(measurement, "merge_suite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        regimes.regimes(settings)
    monkeypatch.setattr(measurement, "merge_suite", None)
    settings.run, settings.only = False, ["all"]
    regimes.regimes(settings)
    page = (tmp_path / "out" / "both_sides.md").read_text()
    assert "- all: 2 tasks, seeds 0, 1" in page and "70.0" not in page  # the others lack seed 1
    assert "- all, seed 1: `symmetric`, `a = 0.9`" in page
    settings.regimes["all"].seeds = [0]
    regimes.regimes(settings)
    assert "70.0 (-25.0" in (tmp_path / "out" / "both_sides.md").read_text()


def test_a_row_is_found_under_any_name_of_what_it_computes(settings, tmp_path, monkeypatch):
    """`symmetric` is both_sides with a = 1/2: a record of one is a record of the other."""
    regimes.regimes(settings)
    table = tmp_path / "out" / "both_sides" / "regimes.jsonl"
    kept = table.read_text()
    settings.methods["symmetric"] = {"name": "both_sides", "a": 0.5}
    monkeypatch.setattr(measurement, "merge_suite", None)
    regimes.regimes(settings)
    assert table.read_text() == kept
    settings.methods["symmetric"] = {"name": "both_sides", "a": 0.5, "p": 0.5}
    with pytest.raises(TypeError):  # another computation is another run
        regimes.regimes(settings)


def frame(**rows):
    """{row: accuracies of two tasks by seed, in two regimes}"""
    lines = [
        (regime, row, seed, task, accuracy, 50, "validation")
        for row, by_regime in rows.items()
        for regime, seeds in zip("xy", by_regime, strict=True)
        for seed, pair in enumerate(seeds)
        for task, accuracy in zip("ab", pair, strict=True)
    ]
    columns = ["regime", "row", "seed", "task", "accuracy", "count", "split"]
    return pd.DataFrame(lines, columns=columns)


ROWS = {
    "tsv_m": ([(60, 70)], [(50, 52)]),
    "actmat": ([(50, 60)], [(55, 65)]),
    "new": ([(61, 73)], [(55, 67)]),
    "safe": ([(60, 71)], [(54, 64)]),
}


def test_differences_are_paired_with_each_regimes_best_rival():
    table = both_sides.compare(frame(**ROWS), ["actmat", "tsv_m"])
    cells = table.set_index(["regime", "row"])
    assert (
        cells.loc[("x", "new"), "best"] == "tsv_m" and cells.loc[("y", "new"), "best"] == "actmat"
    )
    assert cells.loc[("x", "new"), "difference"] == 2  # (1 + 3) / 2
    assert cells.loc[("x", "new"), "difference_se"] == 1  # of 1 and 3: sqrt(2) / sqrt(2)
    outcome = both_sides.outcomes(table).set_index("row")
    assert outcome.loc["tsv_m", ["win", "tie", "loss"]].tolist() == [0, 1, 1]
    assert outcome.loc["tsv_m", "worst"] == -9


def test_the_verdict_says_what_the_numbers_say():
    table = both_sides.compare(frame(**ROWS), ["actmat", "tsv_m"])
    assert "of the methods that lose nowhere, `new` has" in both_sides.page(table, []).lower()
    worse = {k: v for k, v in ROWS.items() if k in ("tsv_m", "actmat")}
    page = both_sides.page(both_sides.compare(frame(**worse), ["actmat", "tsv_m"]), [])
    assert "**No method is at least as good as the best rival in every regime.**" in page


def test_the_committed_page_is_what_the_committed_records_give(tmp_path):
    (tmp_path / "both_sides").mkdir()
    for name in ("both_sides/regimes.jsonl", "both_sides/table.csv", "both_sides.md"):
        shutil.copy(ROOT / "results" / name, tmp_path / name)
    written = regimes.render(composed(), tmp_path / "both_sides")
    for name in (written.name, "both_sides/table.csv"):
        assert (tmp_path / name).read_text() == (ROOT / "results" / name).read_text()


def test_missing_records_are_told(settings, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        regimes.render(settings, tmp_path)
    with pytest.raises(InputError, match="no regime has a rival"):
        both_sides.compare(frame(**ROWS), ["average"])


def test_rows_and_seeds_with_holes_are_left_out():
    two = {row: (2 * x, 2 * y) for row, (x, y) in ROWS.items()}  # seeds 0 and 1
    lacking = frame(**two)

    def without(row, regime, seed):
        return ~((lacking.row == row) & (lacking.regime == regime) & (lacking.seed == seed))

    lacking = lacking[without("new", "x", 1) & without("actmat", "y", 0)]
    table = both_sides.compare(lacking, ["actmat", "tsv_m"]).set_index(["regime", "row"])
    assert table.loc["x"].index.tolist() == ["actmat", "safe", "tsv_m"]
    assert set(table.loc["x"].seeds) == {"0, 1"} and set(table.loc["y"].seeds) == {"1"}
    assert "new" in table.loc["y"].index


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rivals": ["tsv"]}, "rival 'tsv'"),
        ({"only": ["none"]}, "unknown regime 'none'"),
        ({"regimes": {"x": Regime("text")}}, "unknown suite 'text'"),
        ({"methods": {"x": {"name": "tsvm"}}}, "unknown method 'tsvm'"),
        ({"regimes": {"x": Regime("linear", "half")}}, "finetuning is 'half'"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(settings, change, told):
    for key, value in change.items():
        setattr(settings, key, value)
    with pytest.raises(InputError, match=told):
        regimes.regimes(settings)

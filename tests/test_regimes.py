"""Regimes side by side: the runs, the paired statistics by hand, the page and its verdict."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from linear_suite import LinearSuite

import merging
from eval.backend import bits, unpacked
from experiments import hydra_run, measurement
from experiments.commands import regimes
from experiments.commands.regimes import Regime, Regimes
from experiments.report import both_sides, figures, records
from experiments.report.bootstrap import interval, replicates
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
    assert "95.0 (best rival)" in page and "70.0 (-25.0 ± 3.0) ↓" in page  # sqrt(3 / 16 / 200)
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
    monkeypatch.setattr(measurement, "prepare", None)  # nothing is merged again
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
    assert "- all, seeds 0, 1: every method" in page  # told, not fatal


def test_an_interrupted_run_keeps_what_it_finished_and_tells_what_is_missing(
    settings, tmp_path, monkeypatch
):
    merged = []

    def interrupted(*arguments):
        if len(merged) == 4:  # seed 0 of "all" is whole, of seed 1 the average alone
            raise KeyboardInterrupt
        merged.append(arguments)
        return prepare(*arguments)

    prepare = measurement.prepare
    monkeypatch.setattr(measurement, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        regimes.regimes(settings)
    monkeypatch.setattr(measurement, "prepare", None)
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
    monkeypatch.setattr(measurement, "prepare", None)
    regimes.regimes(settings)
    assert table.read_text() == kept
    settings.methods["symmetric"] = {"name": "both_sides", "a": 0.5, "p": 0.5}
    with pytest.raises(TypeError):  # another computation is another run
        regimes.regimes(settings)


def test_of_two_records_of_a_cell_the_one_that_pairs_examples_counts(settings, tmp_path):
    regimes.regimes(settings)
    found = records.load_lines(tmp_path / "out" / "both_sides" / "regimes.jsonl")
    own = next(r for r in found if r["key"]["method"] == "symmetric" and r["key"]["seed"] == 0)
    choices = dict(merging.create("both_sides").hyperparameters)
    family = {"method": "both_sides", "hyperparameters": choices}
    silent = {k: v for k, v in own.items() if k != "correct"} | {"key": own["key"] | family}
    for both in ([own, silent], [silent, own]):
        cells = regimes.to_frame(both, settings)
        assert len(cells) == len(own["scores"]) and (cells.correct != "").all()


def frame(**rows):
    """{row: accuracies of two tasks by seed, in two regimes}"""
    lines = [
        (regime, row, seed, "validation", task, accuracy, 50, "")
        for row, by_regime in rows.items()
        for regime, seeds in zip("xy", by_regime, strict=True)
        for seed, pair in enumerate(seeds)
        for task, accuracy in zip("ab", pair, strict=True)
    ]
    return pd.DataFrame(lines, columns=regimes.COLUMNS)


def answers(*cells):
    """One regime of {row, seed, task, right: which examples}."""
    lines = [
        ("x", row, seed, "test", task, 100 * sum(right) / len(right), len(right),
         bits(torch.tensor(right)))
        for row, seed, task, right in cells
    ]  # fmt: skip
    return pd.DataFrame(lines, columns=regimes.COLUMNS)


def difference(found, draws=20_000):
    """Of the first two rows in every replicate, in points."""
    means = replicates(found, list(found.row.unique()), draws)
    return means[:, 0] - means[:, 1]


def test_a_replicate_draws_examples_once_for_all_methods():
    """Two examples, one of which only the first method has right: the second's share of a replicate
    is k / 2 for k ~ B(2, 1/2). Unpaired, both accuracies would vary by themselves."""
    drawn = difference(answers(("a", 0, "t", [1, 1]), ("b", 0, "t", [0, 1])))
    assert [(drawn == x).mean() for x in (0, 50, 100)] == pytest.approx(
        [1 / 4, 1 / 2, 1 / 4], abs=0.02
    )
    assert interval(drawn) == (0, 100)
    same = answers(("a", 0, "t", [1, 0, 1]), ("b", 0, "t", [1, 0, 1]))
    assert not difference(same).any()


def test_a_replicate_draws_seeds_and_each_tasks_examples():
    """Differences of 1 and 0 by seed, on every example: k / 2 again. And of two tasks of 4 and 1
    examples, the first with differences 1, 0, 0, 0: variance 3 / 16 / 4 of a half of the mean."""
    right, wrong = [1, 1, 1], [0, 0, 0]
    cells = ("a", 0, "t", right), ("a", 1, "t", right), ("b", 0, "t", wrong), ("b", 1, "t", right)
    drawn = difference(answers(*cells))
    assert [(drawn == x).mean() for x in (0, 50, 100)] == pytest.approx(
        [1 / 4, 1 / 2, 1 / 4], abs=0.02
    )
    four, none = [1, 0, 0, 0], [0, 0, 0, 0]
    cells = ("a", 0, "t", four), ("b", 0, "t", none), ("a", 0, "u", [1]), ("b", 0, "u", [1])
    drawn = difference(answers(*cells))
    assert drawn.mean() == pytest.approx(100 / 8, rel=0.03)
    assert drawn.std() == pytest.approx(50 * (3 / 16 / 4) ** 0.5, rel=0.03)


def test_without_answers_accuracies_are_binomial():
    """Variance .6 x .4 / 50 + .5 x .5 / 50, whatever the two have in common."""
    two = answers(("a", 0, "t", [1] * 30 + [0] * 20), ("b", 0, "t", [1] * 25 + [0] * 25))
    two = two.assign(correct="")
    assert difference(two).std() == pytest.approx(100 * (0.49 / 50) ** 0.5, rel=0.03)


def test_pairs_win_tie_and_lose_by_their_intervals():
    cells = [("tsv_m", 0, "t", [1, 0] * 20), ("close", 0, "t", [1, 0] * 19 + [0, 1])]
    cells += [("better", 0, "t", [1, 1] * 20), ("worse", 0, "t", [0, 0] * 20)]
    found = both_sides.pairs(answers(*cells), ["tsv_m"])
    order = ["better", "tsv_m", "close", "worse"]
    assert both_sides.duels(found, order) == [
        ["better", "", "1/0/0", "1/0/0", "1/0/0"],
        ["tsv_m", "0/0/1", "", "0/1/0", "1/0/0"],
        ["close", "0/0/1", "0/1/0", "", "1/0/0"],
        ["worse", "0/0/1", "0/0/1", "0/0/1", ""],
    ]
    page = both_sides.page(found, ["tsv_m"])
    assert "100.0 (+50.0 ± 7.9) ↑ |" in page  # sqrt(.25 / 40)
    assert "| close | 50.0 (+0.0 ±" in page and "drawn unpaired" not in page


ROWS = {
    "tsv_m": ([(60, 70)], [(50, 52)]),
    "actmat": ([(50, 60)], [(55, 65)]),
    "new": ([(61, 73)], [(55, 67)]),
    "safe": ([(60, 71)], [(54, 64)]),
}


def compared(lines, rivals):
    return both_sides.compare(both_sides.pairs(lines, rivals), rivals)


def test_differences_are_paired_with_each_regimes_best_rival():
    table = compared(frame(**ROWS), ["actmat", "tsv_m"])
    cells = table.set_index(["regime", "row"])
    assert (
        cells.loc[("x", "new"), "best"] == "tsv_m" and cells.loc[("y", "new"), "best"] == "actmat"
    )
    assert cells.loc[("x", "new"), "difference"] == 2  # (1 + 3) / 2
    outcome = both_sides.outcomes(table).set_index("row")
    assert outcome.loc["tsv_m", ["win", "tie", "loss"]].tolist() == [0, 2, 0]  # 9 of 50 each: no
    assert outcome.loc["tsv_m", "worst"] == -9


def test_the_verdict_says_what_the_numbers_say():
    rivals = ["actmat", "tsv_m"]
    found = both_sides.pairs(frame(**ROWS), rivals)
    assert "Of the methods that lose nowhere, `new` has" in both_sides.page(found, rivals)
    far = {"tsv_m": ([(60, 90)], [(20, 22)]), "actmat": ([(10, 20)], [(55, 65)])}
    page = both_sides.page(both_sides.pairs(frame(**far), rivals), rivals)
    assert "**No method is at least as good as the best rival in every regime.**" in page


def test_the_committed_page_is_what_the_committed_records_give(tmp_path, monkeypatch):
    monkeypatch.setattr(regimes, "save", lambda figure, stem: None)
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
        compared(frame(**ROWS), ["average"])


def test_rows_and_seeds_with_holes_are_left_out():
    two = {row: (2 * x, 2 * y) for row, (x, y) in ROWS.items()}  # seeds 0 and 1
    lacking = frame(**two)

    def without(row, regime, seed):
        return ~((lacking.row == row) & (lacking.regime == regime) & (lacking.seed == seed))

    lacking = lacking[without("new", "x", 1) & without("actmat", "y", 0)]
    table = compared(lacking, ["actmat", "tsv_m"]).set_index(["regime", "row"])
    assert table.loc["x"].index.tolist() == ["actmat", "safe", "tsv_m"]
    assert set(table.loc["x"].seeds) == {"seeds 0, 1"}
    assert set(table.loc["y"].seeds) == {"seed 1"}
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

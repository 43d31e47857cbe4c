"""The factorial: its grid, its paired statistics by hand, and where merges overshoot."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from linear_suite import DELTAS, LinearSuite

import merging
from eval import theory
from experiments import hydra_run, measurement
from experiments.commands import factorial
from merging.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = Path(__file__).parents[1] / "results"


def composed():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_run.read_settings(factorial.Factorial, compose("factorial"))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    suite = LinearSuite(tmp_path)
    for module in (measurement, factorial):
        monkeypatch.setattr(module, "load_suite", lambda config, device: suite)
    cells = [{"estimator": ["delta", "oas"], "task_weight": ["uniform", "inverse_norm"],
              "filter": ["none"], "anchor": ["zero"]}]  # fmt: skip
    return factorial.Factorial(
        {"name": "linear"}, seeds=[0, 1], cells=cells, beside=["actmat", "average"],
        directions=["average", "actmat"], output=str(tmp_path / "out"),
        records=str(tmp_path / "records"), device="cpu",
    )  # fmt: skip


def frame(**rows):
    """Records as lines: {row: (estimator, task_weight, filter, anchor, accuracies by seed)}."""
    columns = ["row", *factorial.FACTORS, "seed", "mean"]
    lines = [
        (row, *factors, seed, mean)
        for row, (*factors, means) in rows.items()
        for seed, mean in enumerate(means)
    ]
    return pd.DataFrame(lines, columns=columns)


def test_the_published_grid_has_20_cells_and_no_hyperparameter():
    settings = composed()
    methods = factorial.grid(settings.cells)
    assert len(methods) == 20
    assert len({tuple(sorted(m.items())) for m in methods}) == 20
    named = [m["name"] for m in methods if m["name"] != "interference"]
    assert {"actmat", "actmat_centred", "aswudi", "wudi_closed", "oas", "ledoit_wolf"} <= {*named}
    free = {"ridge", "exponential", "trimmed"}
    assert not any(free & set(map(str, m.values())) for m in methods)
    assert settings.baseline in named
    assert not set(settings.beside) & set(named)


def test_a_named_cell_is_the_cell():
    deltas = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    for name, factors in factorial.members().items():
        open_choice = merging.create("interference", **factors)
        torch.testing.assert_close(merging.create(name)(deltas), open_choice(deltas))


def test_a_cell_without_a_factor_is_refused():
    with pytest.raises(InputError, match="an entry of cells has"):
        factorial.grid([{"estimator": ["delta"]}])


def test_differences_are_paired_by_seed():
    found = frame(
        actmat=("delta", "uniform", "cut", "zero", [70.0, 80.0, 90.0]),
        oas=("oas", "uniform", "none", "zero", [72.0, 82.0, 95.0]),
        tsv_m=("", "", "", "", [60.0, 80.0, 70.0]),
    )
    table = factorial.compare(found, "actmat").set_index("row")
    assert table.index.tolist() == ["oas", "actmat", "tsv_m"]
    assert table.difference["oas"] == pytest.approx(3)
    # differences 2, 2, 5: deviations -1, -1, 2, variance 6 / 2, error sqrt(3 / 3)
    assert table.difference_se["oas"] == pytest.approx(1)
    assert table.mean_se["actmat"] == pytest.approx(10 / 3**0.5)
    assert (table.difference["actmat"], table.difference_se["actmat"]) == (0, 0)


def test_one_factor_at_a_time():
    """The weight is compared where estimator, filter and anchor are equal, and nowhere else."""
    found = frame(
        a=("delta", "uniform", "cut", "zero", [70.0, 80.0]),
        b=("delta", "inverse_norm", "cut", "zero", [71.0, 83.0]),
        c=("oas", "uniform", "none", "zero", [10.0, 20.0]),
        d=("oas", "inverse_norm", "none", "zero", [14.0, 24.0]),
        e=("oas", "uniform", "cut", "sum", [99.0, 99.0]),
    )
    effects = factorial.main_effects(found)
    assert effects.factor.tolist() == ["task_weight"]
    effect = effects.iloc[0]
    assert (effect.level, effect.to, effect.cells) == ("uniform", "inverse_norm", 2)
    assert effect.difference == pytest.approx(3)  # seeds: (1 + 4) / 2 and (3 + 4) / 2
    assert effect.difference_se == pytest.approx(0.5)


def test_a_missing_record_is_named():
    found = frame(actmat=("delta", "uniform", "cut", "zero", [70.0, 80.0]))
    with pytest.raises(InputError, match="no record of tsv_m, the baseline"):
        factorial.compare(found, "tsv_m")
    partial = pd.concat([found, frame(oas=("oas", "uniform", "none", "zero", [70.0]))])
    with pytest.raises(InputError, match="no record of oas, seed 1"):
        factorial.compare(partial, "actmat")


def test_every_cell_is_judged_on_validation_and_once(settings, monkeypatch):
    factorial.factorial(settings)
    folder = Path(settings.output) / "linear" / "factorial_full"
    found = factorial.records.load_lines(folder / "records.jsonl")
    assert len(found) == 2 * (4 + 2)
    assert {(r["key"]["split"], r["key"]["limit"]) for r in found} == {("validation", 100)}
    table = pd.read_csv(folder / "cells.csv", keep_default_na=False).set_index("row")
    # orthogonal experts: delta + none is their sum, entries 1, 1 with the peak at 0.4
    assert table["mean"]["delta + uniform + none + zero"] == pytest.approx(70)
    assert table["mean"]["average"] == pytest.approx(95)
    assert table.difference["average"] == pytest.approx(25)
    assert table.estimator["average"] == ""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"table.md", "effects.csv", "directions.csv", "factorial.png", "directions.pdf"} <= {
        *before
    }
    monkeypatch.setattr(factorial, "measure", lambda run: pytest.fail("run again"))
    factorial.factorial(replace(settings, run=False))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_records_there_is_no_table(settings):
    with pytest.raises(InputError, match=r"records\.jsonl does not exist"):
        factorial.factorial(replace(settings, run=False))


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("*/factorial_*")), ids=str)
def test_committed_tables_follow_from_the_committed_records(folder, tmp_path):
    for name in ("records.jsonl", "directions.csv"):
        shutil.copy(folder / name, tmp_path)
    factorial.render(tmp_path, "actmat")
    for name in ("cells.csv", "effects.csv", "table.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_directions_add_up_to_gain_and_interference(settings):
    suite = factorial.load_suite(settings.suite, "cpu")
    split = factorial.directions(settings, suite)
    deltas = torch.tensor([DELTAS[task] for task in suite.tasks])
    C = torch.eye(2).expand(2, 2, 2)
    before = theory.interference(torch.zeros(2, 2), deltas, C).sum()
    for method, part in split.groupby("method"):
        D = merging.create(method)(deltas)
        after = theory.interference(D, deltas, C).sum()
        assert part.interference.sum() == pytest.approx((after / before).item())
        assert part["share"].sum() == pytest.approx(1)
        assert part.energy.sum() == pytest.approx(1)
        gain = D.square().sum() / deltas.square().sum((1, 2)).mean()
        assert (part.gain * part.energy).sum() == pytest.approx(gain.item())


def test_actmat_overshoots_where_eigenvalues_are_small():
    """D_1 = [v + e w; 0], D_2 = [0; v - e w]: S = diag(2, 2 e^2), D v = (1, 1) / 2 and
    D w = (1, -1) / (2 e), while |D_t w| = e only: a gain of 1 / (2 e^4)."""
    v, w, e = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1e-2
    deltas = torch.stack([torch.stack([v + e * w, 0 * v]), torch.stack([0 * v, v - e * w])])
    D = merging.create("actmat")(deltas)
    split = theory.directions(D, deltas, torch.eye(2).expand(2, 2, 2))
    assert split.eigenvalue[1] == pytest.approx(e**2)
    gain = (split.merged / split.experts.mean(0)).tolist()
    assert gain == pytest.approx([1 / 2, 1 / (2 * e**4)], rel=1e-2)


def test_suites_side_by_side_by_the_worst_case(settings, tmp_path, monkeypatch):
    cells = ("delta", "uniform", "cut", "zero")
    tables = {
        "one": frame(actmat=(*cells, [60.0, 62.0]), oas=(*cells, [64.0, 64.0]),
                     average=("", "", "", "", [70.0, 70.0])),
        "two": frame(actmat=(*cells, [50.0, 51.0]), oas=(*cells, [49.0, 52.0]),
                     average=("", "", "", "", [41.0, 41.0])),
    }  # fmt: skip
    monkeypatch.setattr(factorial, "_frame", lambda folder: tables[folder.name])
    path = factorial.side_by_side(tmp_path, ["one", "two"], "actmat")
    assert path.read_text().splitlines()[4:] == [
        "| row | one | two | mean | behind the best, at most |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| oas | +3.00 ± 1.00 | +0.00 ± 1.00 | +1.50 ± 0.00 | 6.00 |",
        "| actmat | +0.00 ± 0.00 | +0.00 ± 0.00 | +0.00 ± 0.00 | 9.00 |",
        "| average | +9.00 ± 1.00 | -9.50 ± 0.50 | -0.25 ± 0.75 | 9.50 |",
    ]


def test_without_one_of_the_tables_there_is_no_comparison(settings):
    with pytest.raises(InputError, match=r"none/records\.jsonl does not exist"):
        factorial.factorial(replace(settings, together=["none"]))


def test_the_committed_comparison_follows_from_the_committed_records(tmp_path):
    folders = ["embedded_text/factorial_full", "embedded_text/factorial_lora",
               "embedded_vision/factorial_full"]  # fmt: skip
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(RESULTS / folder / "records.jsonl", tmp_path / folder)
    written = factorial.side_by_side(tmp_path, folders, "bounded").read_text()
    assert written == (RESULTS / "factorial.md").read_text()


def test_the_config_names_methods_that_exist():
    settings = composed()
    for name in (*settings.beside, *settings.directions, settings.baseline):
        assert name in merging.methods()

"""Tables are what the records say: means and errors by hand, refusals, and the committed ones."""

import json
from pathlib import Path

import pandas as pd
import pytest

from experiments.commands import tables
from experiments.report import frames, records
from experiments.report.markup import latex, markdown
from merging.errors import InputError

RESULTS = Path(__file__).parents[1] / "results"


def record(method, seed=0, accuracy=(0.5, 0.7), **changes):
    """A record of two tasks, as a run writes it."""
    tasks = ["first", "second"][: len(accuracy)]
    reference = method in ("zero_shot", "experts")
    key = {
        "suite": "s",
        "experts": {"recipe": {"lr": 0.1}, "seed": seed},
        "method": method,
        "hyperparameters": {} if reference else changes.pop("hyperparameters", {"alpha": 1.0}),
        "finetuning": "full",
        "seed": seed,
        "split": "test",
        "tasks": tasks,
        "limit": None,
        "statistics": None,
        "selection": None,
    }
    key |= changes.pop("key", {})
    blank = {
        "schema": records.SCHEMA,
        "key": key,
        "family": "f",
        "metric": "accuracy",
        "data": "none",
        "selection": None,
        "scores": {
            task: {"accuracy": a, "count": 10, "constant": False}
            for task, a in zip(tasks, accuracy, strict=True)
        },
        "mean": sum(accuracy) / len(accuracy),
        "normalised": sum(accuracy) / len(accuracy),
        "rules": {},
        "seconds": {"merge": 1.0, "statistics": 0.0, "evaluation": 0.0},
        "peak_bytes": 2**30,
        "versions": {},
        "machine": {},
    }
    return blank | changes


ACTMAT = {"rtol": None, "alpha": 1.0}


@pytest.fixture
def runs():
    """Two seeds of two references and two methods."""
    return [
        record("zero_shot", 0, (0.2, 0.4)),
        record("zero_shot", 1, (0.2, 0.4)),
        record("experts", 0, (0.9, 1.0)),
        record("experts", 1, (0.9, 0.9)),
        record("average", 0, (0.5, 0.6)),
        record("average", 1, (0.6, 0.7)),
        record("actmat", 0, (0.7, 0.8), hyperparameters=ACTMAT),
        record("actmat", 1, (0.7, 0.9), hyperparameters=ACTMAT),
    ]


def test_means_errors_and_paired_differences(runs):
    rows = frames.summarise(frames.to_frame(runs), "actmat").set_index("row")
    assert list(rows.index) == ["experts", "actmat", "average", "zero_shot"]  # best first
    average = rows.loc["average"]
    # means 55 and 65: 60, with standard error |65 - 55| / 2
    assert average["mean"] == pytest.approx(60)
    assert average.mean_se == pytest.approx(5)
    assert average["first"] == pytest.approx(55)
    # differences to ACTMat 55 - 75 and 65 - 80: -17.5 with error |20 - 15| / 2
    assert average.difference == pytest.approx(-17.5)
    assert average.difference_se == pytest.approx(2.5)
    assert average.seeds == 2
    assert rows.loc["actmat"].difference == 0


def test_one_seed_has_no_error(runs):
    rows = frames.summarise(frames.to_frame([r for r in runs if r["key"]["seed"] == 0]), "actmat")
    assert rows.mean_se.isna().all()
    _, lines = tables.cells(rows, "actmat")
    assert "±" not in "".join(map("".join, lines))


def test_departures_from_the_defaults_are_named(runs):
    odd = [
        record("actmat", hyperparameters={"rtol": 0.01, "alpha": 1.0}),
        record("regmean", hyperparameters={"rtol": None, "gram_scale": 1.0, "alpha": 1.0},
               key={"statistics": {"batches": 1, "batch_size": 32}}),
        record("actmat", accuracy=(0.5,), hyperparameters=ACTMAT),
        record("actmat", hyperparameters={"rtol": None}, data="validation",
               selection={"parameter": "alpha", "split": "validation", "chosen": 1.5}),
    ]  # fmt: skip
    frame = frames.to_frame([*runs, *odd])
    assert list(frame.row[-4:]) == [
        "actmat (rtol=0.01)",
        "regmean (batches=1)",
        "actmat (tasks=1)",
        "actmat (alpha selected)",
    ]
    assert [len(d) for d in frame.departs[-4:]] == [1, 1, 1, 0]


def test_what_was_held_out_has_its_column_and_weights_are_told_apart():
    """Runs that differ in what they score beside are one row; a weighted run is another."""
    beside = {"arc_easy": {"accuracy": 0.25, "count": 4, "constant": False}}
    found = [
        record("actmat", hyperparameters=ACTMAT),
        record("actmat", hyperparameters=ACTMAT, key={"heldout": ["arc_easy"]}, heldout=beside),
        record("experts", key={"heldout": ["arc_easy"]}, heldout=beside),
        record("actmat", accuracy=(0.9, 0.9), hyperparameters=ACTMAT, key={
            "weights": {"first": 2.0}, "weights_on": "task",
        }),
    ]  # fmt: skip
    rows = frames.summarise(frames.to_frame(found), "actmat").set_index("row")
    assert rows.loc["actmat", "mean"] == pytest.approx(60)
    assert rows.loc["actmat", ["seeds", "held out: arc_easy"]].tolist() == [1, 25]
    assert rows.loc["actmat (weights.first=2.0, weights_on=task)", "mean"] == pytest.approx(90)
    header, lines = tables.cells(rows.reset_index(), "actmat")
    assert header[-1] == "held out: arc_easy" and "**25.0**" in lines[1]


def test_render_writes_the_same_bytes_from_the_committed_records_alone(runs, tmp_path):
    tables.render(runs, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"records.jsonl", "table.md", "table.csv", "table.tex"} <= set(first)
    assert {"accuracy_full.png", "accuracy_full.pdf", "tasks_full.png"} <= set(first)
    tables.render(records.load_lines(tmp_path / "records.jsonl"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    tables.render(runs[::-1], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_the_markdown_table_reads_as_expected(runs, tmp_path):
    tables.render(runs, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert (
        "| average | none | 2 | 60.0 ± 5.0 | 60.0 ± 5.0 | -17.5 ± 2.5 | 1.0 | 55.0 | 65.0 |"
    ) in text
    assert "| actmat | none | 2 | **77.5 ± 2.5** | **77.5 ± 2.5** | – | 1.0 | **70.0** |" in text
    assert "| experts | – | 2 | 92.5 ± 2.5 |" in text
    assert "Checkpoints: f. 2 tasks" in text


def test_constant_predictions_are_marked(runs, tmp_path):
    runs[4]["scores"]["first"]["constant"] = True
    tables.render(runs, tmp_path)
    assert "| 55.0 † | 65.0 |" in (tmp_path / "table.md").read_text()


def test_sweeps_get_a_file_and_a_figure(runs, tmp_path):
    for seed in (0, 1):
        runs += [
            record("actmat", seed, (0.6, 0.6), hyperparameters={"rtol": None, "alpha": alpha})
            for alpha in (0.5, 1.5)
        ]
    runs.append(record("actmat", 0, (0.7, 0.7), hyperparameters={"rtol": 1e-3, "alpha": 1.0}))
    tables.render(runs, tmp_path)
    sweeps = pd.read_csv(tmp_path / "sweeps.csv")
    found = {"actmat (alpha=0.5)": 60.0, "actmat (alpha=1.5)": 60.0, "actmat (rtol=0.001)": 70.0}
    assert sweeps.set_index("row")["mean"].to_dict() == found
    assert (tmp_path / "sweep_alpha_full.png").exists()
    points = frames.curves(frames.to_frame(runs))
    # the defaults stand in the curve too
    values = points.groupby("parameter").value.unique().map(sorted).to_dict()
    # unless they are no numbers: rtol's is None
    assert values == {"alpha": [0.5, 1.0, 1.5], "rtol": [0.001]}
    assert "actmat (alpha=0.5)" not in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"family": "g"}, "different family cannot share a table: f, g"),
        ({"metric": "F1"}, "different metric"),
        (
            {"selection": {"parameter": "alpha", "split": "test", "chosen": 1.0}},
            "average, full, seed 0 chose its alpha on the test split",
        ),
        ({"key": {"experts": {"recipe": {"lr": 0.2}, "seed": 0}}}, "made with other experts"),
        ({"key": {"experts": {"recipe": {"lr": 0.1}, "seed": 0, "data": 1}}}, "other experts"),
    ],
)
def test_what_must_not_share_a_table_is_refused(runs, tmp_path, change, told):
    runs[4] = record("average", 0, (0.5, 0.6), **change)
    with pytest.raises(InputError, match=told):
        tables.render(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", range(8))
def test_what_is_incomplete_is_left_out_with_the_command_that_completes_it(runs, missing):
    """Without a reference or the baseline a seed goes, without another run its row."""
    gone = runs.pop(missing)["key"]
    kept, (note,) = tables.complete(runs, "actmat")
    seed, method = gone["seed"], gone["method"]
    if method == "average":
        assert [r["key"]["method"] for r in kept].count("average") == 0 and len(kept) == 6
    else:
        assert {r["key"]["seed"] for r in kept} == {1 - seed} and len(kept) == 4
    command = f"python -m experiments.run suite=s method={method} finetuning=full seed={seed}"
    assert f"there is no record of {method}, full, seed {seed}; " in note
    assert note.endswith(f"make it with: {command}")


def test_a_lone_run_of_another_finetuning_does_not_keep_a_suite_from_its_table(runs, tmp_path):
    lone = record("average", key={"finetuning": "lora"})
    kept, notes = tables.complete([*runs, lone], "actmat")
    assert kept == runs and len(notes) == 3  # zero_shot, experts and actmat are missing
    assert notes[0].startswith("left out of lora: seed 0, as there is no record of zero_shot")
    tables.render(kept, tmp_path)
    with pytest.raises(InputError, match="no table can be made: left out of lora: seed 0"):
        tables.complete([lone], "actmat")


def settings(tmp_path, **changes):
    defaults = {
        "suite": {"name": "s"},
        "records": str(tmp_path / "records"),
        "output": str(tmp_path / "elsewhere"),
        "committed": str(tmp_path / "results"),
    }
    return tables.Tables(**defaults | changes)


def test_runs_renew_the_committed_records_and_trials_stay_out(runs, tmp_path):
    (tmp_path / "results" / "s").mkdir(parents=True)
    records.save_lines(tmp_path / "results" / "s" / "records.jsonl", runs)
    newer = runs[4] | {"mean": 0.99}
    trial = record("average", key={"split": "validation"})
    part = record("average", key={"limit": 5})
    for run in (newer, trial, part):
        records.save(records.record_path(tmp_path / "records", run["key"]), run)
    found = tables.gather(settings(tmp_path))
    assert len(found) == 8
    assert [r["mean"] for r in found if r["key"] == newer["key"]] == [0.99]
    committed = tables.gather(settings(tmp_path, records=None))
    assert [r["mean"] for r in committed if r["key"] == newer["key"]] == [0.55]
    assert len(tables.gather(settings(tmp_path, seeds=[1]))) == 4
    assert len(tables.gather(settings(tmp_path, finetuning="full"))) == 8


def test_agreement_with_records_from_elsewhere(runs):
    elsewhere = [runs[0], runs[4] | {"mean": 0.5}]  # it was 0.55
    assert tables.agreement(runs, elsewhere, "there") == (
        "2 of these runs are in there: 1 agree exactly, "
        "the largest difference in the mean is 5.00 points"
    )
    assert tables.agreement(runs, [], "there") == "none of these runs is in there"


def test_no_records_at_all_is_one_sentence(tmp_path):
    told = f"suite 's' in {tmp_path}/results/s/records.jsonl and {tmp_path}/records/s"
    with pytest.raises(InputError, match=told):
        tables.gather(settings(tmp_path))


def test_records_of_another_version_are_refused(runs, tmp_path):
    old = runs[0] | {"schema": 0}
    path = records.record_path(tmp_path / "records", old["key"])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(old))
    with pytest.raises(InputError, match="has schema 0"):
        tables.gather(settings(tmp_path))


COMMITTED = sorted(RESULTS.glob("*/records.jsonl"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_committed_tables_are_what_the_committed_records_give(path, tmp_path):
    tables.render(records.load_lines(path), tmp_path)
    written = {p.name for p in tmp_path.iterdir()}
    assert written <= {p.name for p in path.parent.iterdir()}
    for name in written:
        if Path(name).suffix in {".md", ".csv", ".tex", ".jsonl"}:
            assert (tmp_path / name).read_bytes() == (path.parent / name).read_bytes(), name


def test_markdown_and_latex():
    header, rows = ["a_b", "c"], [["x", "**1.0 ± 0.1**"], ["50 % †", "–"]]
    assert markdown(header, rows) == (
        "| a_b | c |\n| --- | ---: |\n| x | **1.0 ± 0.1** |\n| 50 % † | – |\n"
    )
    text = latex(header, rows)
    assert r"a\_b & c \\" in text
    assert r"x & \textbf{1.0 $\pm$ 0.1} \\" in text
    assert r"50 \% $\dagger$ & -- \\" in text
    assert text.startswith("\\begin{tabular}{lr}\n\\toprule\n")


def test_records_of_two_protocols_are_told_apart(tmp_path, caplog):
    def settings(**changes):
        suite = {"kind": "x", "name": "s", "protocol": "paper"}
        return tables.Tables(suite=suite, records=str(tmp_path), output=str(tmp_path), **changes)

    class Chosen:
        def __init__(self, name):
            self.name = name

        def protocol_key(self):
            return {"name": self.name, "backend": "hf"}

        @property
        def backend(self):
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "load_suite", lambda config, device: Chosen(config["protocol"]))
        inputs = {"statistics": {"texts": 3}}
        for protocol in ("paper", "later"):
            own = {"name": protocol, "backend": "hf"}
            for i, run in enumerate((record("average"), record("regmean"))):
                run["key"]["protocol"] = own | (inputs if i else {})
                records.save(records.record_path(tmp_path, run["key"]), run)
        for protocol in ("paper", "later"):
            found = tables.gather(settings(protocol=protocol))
            assert [r["key"]["protocol"]["name"] for r in found] == [protocol] * 2
        with pytest.raises(InputError, match=r"only 4 records of another protocol \(other name\)"):
            tables.gather(settings(protocol="ours"))
    everything = [run for run in records.load_all(tmp_path / "s")]
    with pytest.raises(InputError, match="judged by another protocol"):
        tables.check_comparable(everything)

"""One run end to end: what is scored, selected, recorded, found again, refused."""

from dataclasses import replace
from pathlib import Path

import pytest

import merging
from experiments import measurement
from experiments.commands import run
from experiments.measurement import measure, references
from experiments.settings import Experiment, Selection
from merging.engine.job import LazyStatistics
from merging.errors import InputError
from merging.formats.checkpoints import Checkpoint
from tests.linear_suite import BenchmarkSuite, LinearSuite


@pytest.fixture
def suite(tmp_path, monkeypatch):
    made = LinearSuite(tmp_path)
    monkeypatch.setattr(measurement, "load_suite", lambda config, device: made)
    return made


@pytest.fixture
def settings(tmp_path):
    return Experiment(
        suite={"name": "linear"},
        method={"name": "average"},
        tracker={"name": "none"},
        device="cpu",
        records=str(tmp_path / "records"),
    )


def test_the_record_holds_scores_worked_out_by_hand(suite, settings):
    record = measure(settings)
    # both entries are 0.5, half a unit from the best on test: accuracy 1 - 0.5 / 2
    assert {t: s["accuracy"] for t, s in record["scores"].items()} == {
        "first": 0.75,
        "second": 0.75,
    }
    assert record["mean"] == 0.75
    assert record["normalised"] == 0.75  # each expert is perfect on its own task
    assert record["rules"] == {"average": 2}
    assert record["data"] == "none"
    assert record["selection"] is None
    assert record["key"]["hyperparameters"]["alpha"] == 1.0
    assert record["machine"]["device"] == "cpu"


def test_what_merges_nothing_has_no_data_to_tell_of(suite, settings):
    record = measure(settings)
    found = references(settings)
    assert "data: none" in run.accuracy_table(record, found).caption
    for reference in found.values():  # as the suites' tables put it
        assert "data: –" in run.accuracy_table(reference, found).caption


def test_references_are_runs_with_records(suite, settings):
    found = references(settings)
    assert found["zero_shot"]["mean"] == 0.5  # both entries 0, a whole unit away
    assert found["experts"]["mean"] == 1.0
    assert found["zero_shot"]["normalised"] == 0.5
    assert len(list(Path(settings.records, "linear").glob("*.json"))) == 2


def test_a_finished_run_is_found_and_not_done_again(suite, settings):
    first = measure(settings)
    suite.evaluated.clear()
    assert measure(settings) == first
    assert not suite.evaluated
    measure(replace(settings, force=True))
    assert suite.evaluated == [("test", ("first", "second"))]  # the references are still found


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"finetuning": "lora"},
        {"split": "validation"},
        {"limit": 7},
        {"tasks": ["second"]},
        {"method": {"name": "average", "alpha": 0.5}},
    ],
)
def test_whatever_changes_the_scores_makes_another_record(suite, settings, change):
    measure(settings)
    before = set(Path(settings.records, "linear").glob("average-*.json"))
    measure(replace(settings, **change))
    assert len(set(Path(settings.records, "linear").glob("average-*.json")) - before) == 1


def test_a_hyperparameter_younger_than_records_changes_no_key_at_its_default(suite, settings):
    method = {"name": "both_sides", "a": 0.75}
    record = measurement.measure(replace(settings, method=method))
    assert "estimator" not in record["key"]["hyperparameters"]
    again = replace(settings, method=method | {"estimator": "delta"}, force=False)
    assert measurement.is_done(again)
    other = measurement.measure(replace(settings, method=method | {"estimator": "oas"}))
    assert other["key"]["hyperparameters"]["estimator"] == "oas"


def test_a_method_with_needs_gets_statistics_and_says_so(suite, settings):
    record = measure(replace(settings, method={"name": "regmean"}))
    assert suite.collected == ["first", "second"]
    assert record["data"] == "training inputs"
    assert record["key"]["statistics"] == {"batches": 10, "batch_size": 32}
    assert record["seconds"]["statistics"] >= 0
    # with equal second moments RegMean is the average
    assert record["mean"] == pytest.approx(0.75, abs=1e-6)


def test_experts_and_statistics_are_read_where_they_lie(suite, settings, monkeypatch):
    """A merge for a suite holds the base, the result and one layer, however many experts."""
    handed, merge = {}, merging.merge_state_dicts

    def seen(base, experts, method, **options):
        handed.update(experts=experts, statistics=options["statistics"])
        return merge(base, experts, method, **options)

    monkeypatch.setattr(merging, "merge_state_dicts", seen)
    measure(replace(settings, method={"name": "regmean"}))
    assert all(isinstance(expert, Checkpoint) for expert in handed["experts"].values())
    assert all(isinstance(found, LazyStatistics) for found in handed["statistics"].values())


def test_selection_uses_validation_and_reports_test(suite, settings):
    # alpha / 2 is the entry: validation is best at 0.4, so 0.8 wins, though test prefers 2
    chosen = Selection("alpha", [0.2, 0.8, 2.0])
    record = measure(replace(settings, selection=chosen))
    assert record["selection"]["chosen"] == 0.8
    assert record["selection"]["accuracy"] == pytest.approx([0.85, 1.0, 0.7])
    assert record["mean"] == pytest.approx(1 - 0.6 / 2)  # entry 0.4 on the test split
    assert record["data"] == "validation"
    assert "alpha" not in record["key"]["hyperparameters"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"selection": Selection("alpha", [1.0], split="test")}, "chosen on validation only"),
        ({"selection": Selection("alpha", [1.0]), "split": "validation"}, "the selection has used"),
        ({"selection": Selection("alpha", [])}, "selection.values is empty"),
        ({"selection": Selection("beta", [1.0])}, "no hyperparameter 'beta'"),
        ({"finetuning": "half"}, "finetuning is 'half'"),
        ({"split": "train"}, "split is 'train'"),
        ({"tasks": ["third"]}, "no task 'third'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"method": {"name": "avrage"}}, "unknown method 'avrage'"),
        ({"method": {"name": "experts", "alpha": 1}}, "no hyperparameter 'alpha'"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(suite, settings, change, told):
    with pytest.raises(InputError, match=told):
        measure(replace(settings, **change))
    assert not suite.evaluated
    assert not list(Path(settings.records).rglob("*.json"))


def test_a_failed_run_leaves_no_record_and_earlier_ones_untouched(suite, settings, monkeypatch):
    measure(settings)
    before = {p: p.read_bytes() for p in Path(settings.records).rglob("*.json")}

    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(LinearSuite, "evaluate", broken)
    with pytest.raises(RuntimeError):
        measure(replace(settings, method={"name": "task_arithmetic"}))
    assert {p: p.read_bytes() for p in Path(settings.records).rglob("*.json")} == before


def test_a_damaged_record_is_one_clear_sentence(suite, settings):
    measure(settings)
    (path,) = Path(settings.records, "linear").glob("average-*.json")
    path.write_text(path.read_text()[:40])
    with pytest.raises(InputError, match=f"record {path} is damaged"):
        measure(settings)
    assert measure(replace(settings, force=True))["mean"] == 0.75


def test_an_expert_that_is_never_right_has_no_ratio(suite, settings):
    suite.best["test"] = -1.0  # a whole unit below the base, two below the experts
    assert measure(settings)["normalised"] is None


def test_the_printed_table_shows_references_and_ratio(suite, settings, capsys):
    record, reference = measure(settings), references(settings)
    run.Console(width=120).print(run.accuracy_table(record, reference))
    told = capsys.readouterr().out
    assert "zero shot" in told
    mean = next(line for line in told.splitlines() if "mean" in line)
    assert [float(x) for x in mean.replace("│", " ").split()[1:]] == [50.0, 100.0, 75.0, 75.0]


def test_constant_predictions_are_marked(suite, settings):
    record, reference = measure(settings), references(settings)
    record["scores"]["second"]["constant"] = True
    table = run.accuracy_table(record, reference)
    assert list(table.columns[0].cells) == ["first", "second †", "mean"]
    assert "every prediction equal" in table.caption


def test_a_broken_expert_is_said(suite, settings):
    record, reference = measure(settings), references(settings)
    reference["experts"]["scores"]["second"]["constant"] = True
    table = run.accuracy_table(record, reference)
    assert list(table.columns[0].cells) == ["first", "second ‡", "mean"]
    assert "a broken expert, which answers every example alike" in table.caption


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Runs of a suite that is judged by benchmarks, under a protocol."""

    def under(protocol):
        made = BenchmarkSuite(tmp_path, protocol=protocol)
        monkeypatch.setattr(measurement, "load_suite", lambda config, device: made)
        return made

    return under


def test_benchmarks_get_rows_and_the_record_says_what_was_downloaded(judged, settings, capsys):
    judged("paper")
    record = measure(settings)
    assert record["sources"] == {"owner/model": "0" * 40}
    run.Console(width=120).print(run.accuracy_table(record, references(settings)))
    told = capsys.readouterr().out
    assert all(name in told for name in ("sums", "sums@10", "proofs", "code", "mean"))


def test_another_protocol_is_another_record(judged, settings):
    suite = judged("paper")
    first = measure(settings)
    done = len(suite.evaluated)
    assert measure(settings) == first
    assert len(suite.evaluated) == done
    other = judged("later")
    assert measure(settings)["key"]["protocol"] == {"name": "later"}
    assert other.evaluated
    regmean = measure(replace(settings, method={"name": "regmean"}))
    assert regmean["key"]["protocol"] == {"name": "later", "statistics": "inputs"}


def test_a_suite_without_protocols_keeps_its_key_and_refuses_one(suite, settings):
    assert "protocol" not in measure(settings)["key"]
    with pytest.raises(InputError, match="suite 'linear' has no choice of protocols"):
        measure(replace(settings, protocol="paper"))


def test_a_task_that_no_merged_expert_has_learnt_is_scored_beside(suite, settings, capsys):
    kept = replace(settings, tasks=["first"], heldout=["second"])
    record = measure(kept)
    # the one expert is the average: its first entry is 1, its second still 0
    assert record["scores"]["first"]["accuracy"] == 1.0
    assert record["heldout"]["second"]["accuracy"] == 0.5
    assert record["mean"] == 1.0  # of what was merged
    assert record["key"] != measure(replace(kept, heldout=None))["key"]
    assert "heldout" not in measure(replace(kept, heldout=None))
    run.show(kept, record)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "held out: second" in x]
    assert line.count("50.0") == 3  # of the base, of the expert, and of the merge


def test_what_is_held_out_may_not_be_merged(suite, settings):
    with pytest.raises(InputError, match="held out and merged too") as told:
        measure(replace(settings, heldout=["second"]))
    assert "tasks=[first]" in told.value.hint


def test_experts_are_weighted_by_name(suite, settings):
    plain = measure(settings)
    weighted = replace(settings, weights={"first": 3.0, "second": 1.0})
    record = measure(weighted)
    # the entries are 0.75 and 0.25, a quarter and three quarters of a unit from the best
    accuracy = {task: score["accuracy"] for task, score in record["scores"].items()}
    assert accuracy == {"first": 0.875, "second": 0.625}
    assert record["key"]["weights"] == {"first": 3.0, "second": 1.0}
    assert "weights" not in plain["key"] and record["key"] != plain["key"]
    on_delta = measure(replace(settings, weights={"first": 2.0}, weights_on="delta"))
    assert on_delta["scores"]["first"]["accuracy"] == 1.0
    with pytest.raises(InputError, match="weights names 'third', which is no task"):
        measure(replace(settings, weights={"third": 1.0}))
    with pytest.raises(InputError, match="experts merges nothing"):
        measure(replace(settings, method={"name": "experts"}, weights={"first": 1.0}))
    assert run.name_weights(["seed=1", "weights.first=0.7"]) == ["seed=1", "++weights.first=0.7"]

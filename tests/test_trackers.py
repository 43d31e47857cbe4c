"""A finished run reaches its tracker: a W&B file that can be read back, a CSV line, nothing."""

import csv
import json
import os
import struct
import time
from types import SimpleNamespace

import pytest

from experiments import measurement, trackers
from experiments.measurement import measure, references
from experiments.settings import Experiment
from merging.errors import InputError
from tests.linear_suite import BenchmarkSuite, LinearSuite


@pytest.fixture(params=[LinearSuite])
def finished(request, tmp_path, monkeypatch):
    """A record worked out by hand, with its references."""
    monkeypatch.setattr(measurement, "load_suite", lambda config, device: request.param(tmp_path))
    settings = Experiment(
        suite={"name": "linear"},
        method={"name": "average"},
        tracker={},
        device="cpu",
        records=str(tmp_path / "records"),
    )
    return SimpleNamespace(record=measure(settings), references=references(settings))


EXPECTED = [
    ["first", 50.0, 100.0, 75.0],
    ["second", 50.0, 100.0, 75.0],
    ["mean", 50.0, 100.0, 75.0],
]


def test_rows_of_the_accuracy_table(finished):
    rows = trackers.accuracy_rows(finished.record, finished.references)
    assert list(rows[0]) == ["task", "zero_shot", "experts", "average"]
    assert [list(row.values()) for row in rows] == EXPECTED


def test_an_offline_wandb_run_holds_table_figure_config_and_summary(finished, tmp_path):
    settings = {
        "name": "wandb", "mode": "offline", "project": "p", "entity": None, "group": None,
        "tags": ["trial"], "folder": str(tmp_path),
    }  # fmt: skip
    trackers.track_run(finished.record, finished.references, settings)
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wait_for_exit(log)
    history, summary, config = read_wandb(log)

    table = history["accuracy"]
    assert table["_type"] == "table-file"
    stored = json.loads((log.parent / "files" / table["path"]).read_text())
    assert stored["columns"] == ["task", "zero_shot", "experts", "average"]
    assert stored["data"] == EXPECTED

    assert history["figure"]["_type"] == "image-file"
    assert (log.parent / "files" / history["figure"]["path"]).read_bytes()[:4] == b"\x89PNG"
    assert config["method"] == "average"
    assert config["hyperparameters"] == {"alpha": 1.0}
    assert config["versions"]["torch"]
    assert summary["mean"] == 0.75
    assert summary["accuracy/first"] == 0.75
    assert summary["normalised"] == 0.75


by_benchmark = pytest.mark.parametrize("finished", [BenchmarkSuite], indirect=True)
BENCHMARKS = ["code", "proofs", "sums", "sums@10"]


@by_benchmark
def test_rows_are_what_was_scored_where_that_is_no_expert(finished):
    rows = trackers.accuracy_rows(finished.record, finished.references)
    assert [row["task"] for row in rows] == [*BENCHMARKS, "mean"]
    assert {tuple(row.values())[1:] for row in rows} == {(50.0, 100.0, 75.0)}


@by_benchmark
def test_wandb_holds_a_table_of_benchmarks(finished, tmp_path):
    settings = {
        "name": "wandb", "mode": "offline", "project": "p", "entity": None, "group": None,
        "tags": [], "folder": str(tmp_path),
    }  # fmt: skip
    trackers.track_run(finished.record, finished.references, settings)
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wait_for_exit(log)
    history, summary, config = read_wandb(log)
    stored = json.loads((log.parent / "files" / history["accuracy"]["path"]).read_text())
    assert [row[0] for row in stored["data"]] == [*BENCHMARKS, "mean"]
    assert summary["accuracy/sums@10"] == 0.75
    assert config["protocol"] == {"name": "paper"}


def wait_for_exit(path, seconds=120):
    """W&B's service writes from a process of its own, on a busy machine after the run's end."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(seconds * 10):
        for data in log_entries(path.read_bytes()):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(data)
            if message.WhichOneof("record_type") == "exit":
                return
        time.sleep(0.1)
    raise AssertionError(f"{path} was never finished")


def read_wandb(path):
    """(history, summary, config) of a .wandb file, its messages decoded by W&B's own classes."""
    from wandb.proto import wandb_internal_pb2

    history, summary, config = {}, {}, {}
    for data in log_entries(path.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        for target, items in (
            (history, message.history.item),
            (summary, message.summary.update),
            (config, message.run.config.update),
            (config, message.config.update),
        ):
            for item in items:
                place = target
                for key in item.nested_key[:-1]:
                    place = place.setdefault(key, {})
                place[item.key or item.nested_key[-1]] = json.loads(item.value_json)
    return history, summary, config


def log_entries(data):
    """Entries of a LevelDB log, which is what a .wandb file is after 7 bytes of W&B's own.

    Blocks of 32 KiB; a piece of an entry is a CRC-32 (4 bytes), a length (2), and a kind (1):
    whole, first, middle or last.
    """
    assert data[:4] == b":W&B"
    at, entry = 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        entry = (b"" if kind in (1, 2) else entry) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield entry


def test_csv_has_one_line_per_run_however_often_it_is_reported(finished, tmp_path):
    settings = {"name": "csv", "path": str(tmp_path / "sub" / "runs.csv")}
    for record in (finished.record, finished.references["experts"], finished.record):
        trackers.track_run(record, finished.references, settings)
    with open(settings["path"], newline="") as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert set(lines) == {"average", "experts"}
    assert float(lines["average"]["first"]) == 0.75
    assert float(lines["average"]["alpha"]) == 1.0
    assert lines["experts"]["alpha"] == ""
    assert float(lines["experts"]["mean"]) == 1.0


def test_a_write_that_dies_leaves_the_old_csv_whole(finished, tmp_path, monkeypatch):
    path = tmp_path / "runs.csv"
    settings = {"name": "csv", "path": str(path)}
    trackers.track_run(finished.record, finished.references, settings)
    before = path.read_bytes()

    def die(*_):
        raise OSError("no space left")

    monkeypatch.setattr(csv.DictWriter, "writerows", die)
    with pytest.raises(OSError, match="no space left"):
        trackers.track_run(finished.references["experts"], finished.references, settings)
    assert path.read_bytes() == before

    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="no space left"):
        trackers.track_run(finished.references["experts"], finished.references, settings)
    assert path.read_bytes() == before

    monkeypatch.undo()  # what the dead write left beside is no obstacle
    trackers.track_run(finished.references["experts"], finished.references, settings)
    assert len(path.read_text().splitlines()) == 3
    assert {p.name for p in tmp_path.glob("*runs.csv*")} <= {"runs.csv", ".runs.csv.lock"}


def test_none_does_nothing(finished, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    trackers.track_run(finished.record, finished.references, {"name": "none"})
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_tracker_is_refused_before_the_run():
    with pytest.raises(InputError, match="unknown tracker 'mlflow'"):
        trackers.check_tracker({"name": "mlflow"})

"""Records appear whole, keyed by all they depend on, and are read back or refused."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from experiments.report import records
from merging.errors import InputError
from merging.formats.disk import write_synced

KEY = {"suite": "s", "method": "m", "seed": 0, "hyperparameters": {"alpha": 1.0}}


def record(**changes):
    """A record with every field, as small as it gets."""
    blank = dict.fromkeys(records.FIELDS) | {"schema": records.SCHEMA, "key": KEY}
    return blank | changes


def test_a_record_comes_back_as_it_was(tmp_path):
    path = records.record_path(tmp_path, KEY)
    records.save(path, record(mean=0.1 + 0.2))
    assert records.load(path) == record(mean=0.1 + 0.2)
    assert path.parent == tmp_path / "s"
    assert path.name.startswith("m-")
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_path_depends_on_every_part_of_the_key_and_not_on_its_order(tmp_path):
    path = records.record_path(tmp_path, KEY)
    assert records.record_path(tmp_path, dict(reversed(KEY.items()))) == path
    changes = [{"seed": 1}, {"method": "n"}, {"hyperparameters": {"alpha": 2.0}}]
    others = {records.record_path(tmp_path, KEY | change) for change in changes}
    assert len(others | {path}) == 4


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        records.save(tmp_path / "r.json", record(mean=float("nan")))
    assert not list(tmp_path.iterdir())


def test_a_write_that_dies_leaves_the_old_record_and_nothing_else(tmp_path):
    path = tmp_path / "r.json"
    records.save(path, record(mean=0.5))
    script = (
        "import os, sys; from pathlib import Path; from experiments.report import records;"
        "os.replace = lambda *a: os.kill(os.getpid(), 9);"  # the last instant before it counts
        f"records.save(Path(sys.argv[1]), {record(mean=0.9)!r})"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=os.getcwd())
    assert killed.returncode == -9
    assert records.load(path)["mean"] == 0.5
    assert records.load_all(tmp_path) == [record(mean=0.5)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is damaged"),
        ('{"schema": 1', "is damaged"),
        ("[1, 2]", "has schema None"),
        ('{"schema": 0}', f"has schema 0, expected {records.SCHEMA}"),
        (json.dumps({"schema": records.SCHEMA}), "is damaged: field 'data'"),
        (json.dumps(record(extra=1)), "is damaged: field 'extra'"),
        ("\x00\xff", "is damaged"),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path, text, told):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        records.load(path)
    assert told in caught.value.message
    assert str(path) in caught.value.message
    assert "remove it" in caught.value.hint


def test_lines_are_sorted_and_stable(tmp_path):
    one, two = record(mean=1.0), record(mean=0.5, key=KEY | {"seed": 1})
    records.save_lines(tmp_path / "a.jsonl", [one, two])
    records.save_lines(tmp_path / "b.jsonl", [two, dict(reversed(one.items()))])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    found = records.load_lines(tmp_path / "a.jsonl")
    assert sorted(found, key=lambda r: r["mean"]) == [two, one]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    records.save_lines(path, [record()])
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(InputError, match="line 2, is damaged"):
        records.load_lines(path)


def test_later_records_renew_earlier_ones_of_the_same_key():
    old, new = record(mean=0.1), record(mean=0.2)
    other = record(mean=0.3, key=KEY | {"seed": 1})
    assert records.merged([old, other], [new]) == [new, other]


def test_the_machine_is_described_and_not_named():
    described = records.machine("cpu")
    assert described["cores"] >= 1
    assert described["ram_gb"] >= 1
    assert os.uname().nodename not in json.dumps(described)
    assert set(records.versions()) == {"python", "torch", "transformers", "merging"}


def test_whoever_writes_one_file_at_once_writes_it_whole(tmp_path):
    """And leave nothing beside it."""
    path = tmp_path / "new" / "file"
    contents = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(write_synced, path), contents))
    assert path.read_text() in contents
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("full")

    path = tmp_path / "file"
    write_synced(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_synced(path, "new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]

"""Sweeps in real processes: killed and resumed, spread by joblib, queued by submitit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Start `python -m experiments.run -m` on the tiny suite; its records are in sweep.records."""
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))

    def start(*overrides):
        line = [
            sys.executable, "-m", "experiments.run", "-m",
            "suite=tiny_text", "tasks=[animals,meals]",
            f"records={tmp_path}/records", f"hydra.sweep.dir={tmp_path}/sweep", *overrides,
        ]  # fmt: skip
        return subprocess.Popen(
            line,
            cwd=ROOT,
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.records = tmp_path / "records" / "tiny_text"
    return start


def finished(sweep):
    return {json.loads(p.read_text())["key"]["method"]: p for p in sweep.records.glob("*.json")}


def test_a_killed_sweep_reruns_only_what_is_missing(sweep):
    methods = "method=average,ties,tsv_m,actmat,ridge,oas"
    process = sweep(methods)
    deadline = time.monotonic() + 300
    while not list(sweep.records.glob("ties-*.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in finished(sweep).values()}
    assert "oas" not in finished(sweep)

    process = sweep(methods)
    out, err = process.communicate()
    assert process.returncode == 0, err
    expected = {"zero_shot", "experts", "average", "ties", "tsv_m", "actmat", "ridge", "oas"}
    assert set(finished(sweep)) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert err.count("already done") == len(before) - 2  # the references are found in silence
    assert out.count("normalised") == 6  # found or not, each run shows its table


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
    ],
    ids=["joblib", "submitit"],
)
def test_other_launchers_run_the_same_jobs(sweep, launcher):
    process = sweep("method=average,actmat", *launcher)
    _, err = process.communicate()
    assert process.returncode == 0, err
    # the jobs shared the reference runs between them, whichever came first
    assert set(finished(sweep)) == {"zero_shot", "experts", "average", "actmat"}
    assert len(list(sweep.records.glob("*.json"))) == 4

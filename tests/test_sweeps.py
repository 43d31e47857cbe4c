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


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_commands_that_train_and_measure_run_in_other_processes(tmp_path, launcher):
    """Their settings are found there: each job reads, trains or measures, and says where."""
    environment = os.environ | {"MODEL_MERGING_CACHE": str(tmp_path / "cache")}

    def start(command, *overrides):
        line = [sys.executable, "-m", f"experiments.{command}", "-m", "suite=tiny_text"]
        line += ["task=animals,meals", *LAUNCHERS[launcher], *overrides]
        line += [f"hydra.sweep.dir={tmp_path}/{command}"]
        return subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    few = ["statistics.batches=2", "statistics.batch_size=4"]
    processes = [start("finetune"), start("statistics", *few)]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert len(list((tmp_path / "cache/experts").glob("[0-9a-f]*/model.safetensors"))) == 2
    assert len(list((tmp_path / "cache/statistics").glob("*/covariance.safetensors"))) == 2
    assert not list((tmp_path / "finetune").glob("[0-9]*"))  # folders of runs do not pile up

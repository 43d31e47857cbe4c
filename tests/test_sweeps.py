"""Sweeps over real processes, members killed and the sweep started again.

The sweep's own process is this one; jobs run in joblib's pool, which the tests share, or in
submitit's processes.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from experiments import cli, hydra_run, sweeps
from experiments.commands.run import COMMAND
from experiments.measurement import _key, check
from experiments.report import frames, records
from tests.fixtures.commands import called

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
}
SUITE = ["suite=tiny_text", "tasks=[animals,meals]"]
PATIENCE = 300  # seconds


@pytest.fixture
def call(monkeypatch, capfd, own_cache, tmp_path):
    """A command with its records and runs below tmp_path: (exit code, stdout, stderr)."""

    def call(name, *overrides):
        own = [f"hydra.sweep.dir={tmp_path}/sweep"] if "-m" in overrides else []
        return called(monkeypatch, capfd, cli.entry(name), name, *overrides, *own)

    return call


def path_of(folder, *overrides):
    """Where the record of one run will be."""
    settings = hydra_run.composed(COMMAND, [*SUITE, f"records={folder}", *overrides])
    return records.record_path(folder, _key(settings, check(settings)))


def killed_at(path, ready, kill):
    """A thread that kills the job which is to write `path`, once `ready` says that it waits.

    Until then the job waits for the record's lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.stem}.lock"), thread_local=False)
    lock.acquire()

    def watch():
        deadline = time.monotonic() + PATIENCE
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # the others of the pool return
        kill()
        lock.release()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def kill_children(word):
    for child in psutil.Process().children(recursive=True):
        if any(word in part for part in child.cmdline()):
            child.send_signal(signal.SIGKILL)


def content(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("tiny_text/*.json")}


def test_a_killed_member_of_a_joblib_sweep_alone_runs_again(call, tmp_path):
    """Two methods, two seeds, two values of a hyperparameter: records, table, best value."""
    folder = tmp_path / "records"
    line = ["-m", *SUITE, "method=task_arithmetic,ties", "seed=0,1", "method.alpha=0.3,1.0"]
    line += [f"records={folder}", *LAUNCHERS["joblib"]]
    last = path_of(folder, "method=ties", "seed=1", "method.alpha=0.3")
    thread = killed_at(
        last, lambda: len(content(folder)) == 4 + 7, lambda: kill_children("popen_loky_posix")
    )
    code, _, err = call("run", *line)
    thread.join()
    assert code == 2
    assert (
        "a process of the sweep ended without an answer" in err and "start the sweep again" in err
    )
    before = content(folder)
    assert len(before) == 11 and last not in before

    code, out, err = call("run", *line)
    assert code == 0, err
    after = content(folder)
    assert set(after) - set(before) == {last}
    assert all(after[path] == before[path] for path in before)
    assert "7 of 8 runs are done already" in err
    frame = frames.load(folder / "tiny_text")
    means = frame.pivot_table("mean", ["method", "seed"], "alpha")
    assert means.shape == (4, 2) and means.notna().all(axis=None)
    for (method, seed), row in means.iterrows():
        for alpha, mean in row.items():
            printed = f"method={method} seed={seed} method.alpha={alpha}"
            assert f"{mean:.2f}" in next(line for line in out.splitlines() if printed in line)

    code, out, err = call(
        "tables", "suite=tiny_text", f"records={folder}", "committed=null", "baseline=ties",
        f"output={tmp_path}/results",
    )  # fmt: skip
    assert code == 0, err


def test_a_killed_job_of_submitit_fails_alone_and_alone_runs_again(call, tmp_path):
    folder = tmp_path / "records"
    line = ["-m", *SUITE, "method=task_arithmetic,ties", f"records={folder}"]
    line += LAUNCHERS["submitit"]
    missing = path_of(folder, "method=task_arithmetic")
    thread = killed_at(
        missing, lambda: len(content(folder)) == 3, lambda: kill_children("submitit.core._submit")
    )
    code, out, err = call("run", *line)
    thread.join()
    assert code == 1
    assert err.splitlines()[-2] == "1 of 2 failed:"
    assert "method=task_arithmetic: its process ended without an answer" in err.splitlines()[-1]
    assert "method=ties" in out
    before = content(folder)
    assert len(before) == 3

    code, out, err = call("run", *line)
    assert code == 0, err
    assert "1 of 2 runs are done already\n1 jobs" in err
    after = content(folder)
    assert set(after) - set(before) == {missing}
    assert all(after[path] == before[path] for path in before)
    assert "method=task_arithmetic" in out and "method=ties" in out


def test_a_search_with_a_killed_trial_ends_at_the_same_best_value(call, tmp_path, monkeypatch):
    line = ["-m", *SUITE, "sweep=optuna", "method=task_arithmetic", "hydra.sweeper.n_trials=4"]
    line += ["method.alpha=choice(0.1,0.3,0.6,1.0)", "seed=choice(0,1)", *LAUNCHERS["joblib"]]
    code, out, err = call("run", *line, f"records={tmp_path}/whole")
    assert code == 0, err
    best = next(line for line in out.splitlines() if line.startswith("best of 4 trials"))
    found = records.load_all(tmp_path / "whole/tiny_text")
    tried = [r for r in found if r["key"]["method"] == "task_arithmetic"]
    top = max(tried, key=lambda record: record["mean"])
    assert f", {100 * top['mean']:.2f}" in best
    assert {r["key"]["split"] for r in tried} == {"validation"}

    folder = tmp_path / "parts"
    held = max(
        (tmp_path / "whole/tiny_text").glob("task*.json"), key=lambda p: p.stat().st_mtime_ns
    )
    missing = folder / "tiny_text" / held.name
    launched, launch = [], sweeps.Recorder._launched

    def counted(self, overrides, initial_job_idx):
        launched.append(overrides)
        return launch(self, overrides, initial_job_idx)

    monkeypatch.setattr(sweeps.Recorder, "_launched", counted)
    thread = killed_at(
        missing, lambda: len(launched) == len(tried), lambda: kill_children("popen_loky_posix")
    )
    code, _, err = call("run", *line, f"records={folder}")
    thread.join()
    assert code == 2 and "ended without an answer" in err
    before = content(folder)
    code, out, err = call("run", *line, f"records={folder}")
    assert code == 0, err
    assert best in out.splitlines()
    after = content(folder)
    assert set(after) - set(before) == {missing}
    assert all(after[path] == before[path] for path in before)


def test_a_sweep_killed_whole_goes_on_where_it_stopped(call, tmp_path):
    """The first job that writes the record of ties dies as it does, and the sweep with it."""
    folder = tmp_path / "records"
    kill = (
        "import os; os.replace = lambda a, b, own=os.replace: ("
        "own(a, b) if 'ties' not in str(b) else os.kill(os.getpid(), 9)); "
    )
    start = "from experiments.cli import entry; entry('run')()"
    line = ["-m", *SUITE, "method=average,ties,actmat", f"records={folder}"]
    line += [f"hydra.sweep.dir={tmp_path}/sweep"]
    process = subprocess.run(
        [sys.executable, "-c", kill + start, *line], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    assert process.returncode == -signal.SIGKILL
    assert {json.loads(p.read_text())["key"]["method"] for p in content(folder)} == {
        "zero_shot", "experts", "average",
    }  # fmt: skip
    before = content(folder)
    code, out, err = call("run", *line[:-1])
    assert code == 0, err
    after = content(folder)
    assert len(after) == 5 and all(after[path] == before[path] for path in before)
    assert out.count("normalised") == 3  # found or not, each run shows its table


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_commands_that_train_and_measure_run_in_other_processes(
    call, tmp_path, own_cache, launcher
):
    """Their settings are found there: each job reads, trains or measures, and says where."""

    def measured():
        return set((own_cache / "statistics").glob("*/covariance.safetensors"))

    before = measured()  # by the other launcher, where the same process tests both
    line = ["-m", "suite=tiny_text", "task=weather", *LAUNCHERS[launcher]]
    seed = f"seed={5 + list(LAUNCHERS).index(launcher)}"
    code, _, err = call("finetune", *line, seed)
    assert code == 0, err
    code, _, err = call(
        "statistics", *line, seed, "statistics.batches=2", "statistics.batch_size=4"
    )
    assert code == 0, err
    assert len(measured() - before) == 1
    assert not list((tmp_path / "sweep").glob("[0-9]*"))  # folders of runs do not pile up

"""What a person at a terminal sees: one sentence, a hint, an exit code; never a surprise object."""

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException

from experiments import (
    analyse,
    cli,
    errors,
    factorial,
    finetune,
    hydra_run,
    measurement,
    merge,
    regimes,
    run,
    statistics,
    suites,
    tables,
)
from experiments.bench import __main__ as bench
from experiments.report import records
from merging.errors import InputError
from tests.fixtures.commands import called
from tests.linear_suite import LinearSuite

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run `python -m experiments.run` in this process: (exit code, stdout, stderr)."""
    suite = LinearSuite(tmp_path)
    monkeypatch.setattr(measurement, "load_suite", lambda config, device: suite)

    def invoke(*overrides, main=run.main):
        own = [f"records={tmp_path}/records", f"hydra.sweep.dir={tmp_path}/sweep"]
        return called(monkeypatch, capsys, main, "run", "suite=tiny_text", *own, *overrides)

    invoke.suite = suite
    invoke.records = tmp_path / "records"
    return invoke


def test_a_run_prints_its_table(call):
    code, out, err = call("method=actmat", "device=cpu")
    assert code == 0, err
    assert "experts" in out
    assert "mean" in out


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method=actmta"], "there is no method 'actmta'"),
        (["method.rtoll=1"], "there is no key 'method.rtoll'\nhint: did you mean 'rtol'? known: "),
        (["sed=1"], "there is no key 'sed'\nhint: did you mean 'seed'? known: "),
        (["method=actmta"], "hint: did you mean 'actmat'? known: "),
        (["seed=0,1"], "seed=0,1 names several values, and this is not a sweep\nhint: add -m "),
        (["-m", "method=ties,dare", "method.rtoll=1"], "there is no key 'method.rtoll'"),
        (["-m", "method=actmat", "tasks=[first],[thrid]"], "no task 'thrid'"),
        (["-m", "method=actmat,actmta"], "did you mean 'actmat'?"),
        (["+method.rtoll=1"], "method 'actmat' has no hyperparameter 'rtoll'"),
        (["+colour=red"], "unknown config key 'colour'"),
        (["+statistics.samples=3"], "samples"),
        (["seed=first"], "first"),
        (["suite=imagenet"], "there is no suite 'imagenet'"),
        (["+suite._target_=os.system"], "suite has no setting '_target_'"),
        (["+suite.zoom=2"], "suite has no setting 'zoom'"),
        (["hydra.sweeper._target_=os.system"], "outside this project"),
        (["+hydra.callbacks.x._target_=os.system"], "hydra.callbacks.x._target_ is 'os.system'"),
        (["--experimental-rerun=job.pickle"], "would unpickle a file"),
        (["--config-name=other"], "each command has its own configuration"),
        (["--config-path", "/tmp"], "each command has its own configuration"),
        (["method=actmat", "seed==1"], "Error parsing override"),
        (["device=cuda:99"], "device 'cuda:99' was asked for"),
        (["tracker.name=tensorboard"], "unknown tracker 'tensorboard'"),
        (["split=tests"], "split is 'tests'"),
        (["selection=alpha", "selection.split=test"], "validation only"),
        (["-m", "hydra/sweeper=optuna", "method.alpha=interval(0,1)"], "by test accuracy"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(call, overrides, told):
    code, _, err = call(*overrides)
    assert code == errors.BAD_INPUT, err
    assert told in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert "Traceback" not in err
    assert not list(call.records.rglob("*.json"))


def test_a_single_run_says_nothing_else_on_error(call):
    _, out, err = call("+colour=red")
    assert out == ""
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]


def test_an_unknown_method_or_key_is_met_with_a_guess(call):
    assert "did you mean 'statistics'?" in call("+statistic=1")[2]


def test_a_fault_of_the_program_is_exit_code_1_and_traceback_on_request(call, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("so much for that")

    monkeypatch.setattr(LinearSuite, "evaluate", broken)
    code, _, err = call("method=actmat")
    assert code == errors.FAULT
    assert "ZeroDivisionError: so much for that" in err
    assert "--traceback" in err
    assert "Traceback (most recent call last)" not in err
    code, _, err = call("method=actmat", "--traceback")
    assert code == errors.FAULT
    assert "Traceback (most recent call last)" in err


def test_a_full_disk_is_one_sentence_and_leaves_no_record(call, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(records, "write_synced", full)
    code, _, err = call("method=actmat")
    assert code == errors.BAD_INPUT
    assert err.startswith("error: No space left on device: ")
    assert not list(call.records.rglob("*.json"))


def test_an_interrupt_is_exit_code_130(call, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LinearSuite, "evaluate", interrupted)
    code, _, err = call("method=actmat")
    assert code == cli.INTERRUPTED
    assert "run again to continue" in err


def test_a_sweep_goes_on_after_a_failure_and_reports_it(call, monkeypatch):
    evaluate = LinearSuite.evaluate

    def broken(self, state, split, tasks=None, limit=None):
        if tasks == ["second"]:
            raise InputError("file b of task 'second' is damaged")
        return evaluate(self, state, split, tasks, limit)

    monkeypatch.setattr(LinearSuite, "evaluate", broken)
    code, out, err = call("-m", "method=actmat,ridge", "tasks=[second],[first]")
    assert code == errors.BAD_INPUT
    assert err.count("error: file b of task 'second' is damaged") == 2
    assert err.splitlines()[-3:] == [
        "2 of 4 failed:",
        "  method=actmat tasks=[second]: file b of task 'second' is damaged",
        "  method=ridge tasks=[second]: file b of task 'second' is damaged",
    ]
    assert "method=actmat tasks=[first]" in out and "method=ridge tasks=[first]" in out
    assert not [p for p in (call.records.with_name("sweep")).iterdir() if p.is_dir()]
    made = {json.loads(p.read_text())["key"]["method"] for p in call.records.rglob("*.json")}
    assert {"actmat", "ridge"} <= made


def test_a_sweep_skips_what_its_suite_cannot_do(call, caplog):
    """LinearSuite trains no model on all tasks at once, and measures through no merged one."""
    caplog.set_level("INFO")
    code, _, err = call("-m", "method=multi_task,regmean_pp,actmat")
    assert code == 0, err
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("skipped: ")]
    assert told == [
        "skipped: suite linear has no model trained on all tasks at once",
        "skipped: suite linear cannot measure through a half-merged model, which method "
        "'regmean_pp' needs",
    ]
    made = {json.loads(p.read_text())["key"]["method"] for p in call.records.rglob("*.json")}
    assert made == {"actmat", "zero_shot", "experts"}
    assert call("method=multi_task")[0] == errors.BAD_INPUT  # alone it is what was asked for


def test_a_sweep_shares_one_suite(monkeypatch):
    built = []
    monkeypatch.setattr(suites, "build", lambda config: built.append(config) or object())
    suites._suite.cache_clear()
    config = {"kind": "text", "name": "x", "device": "auto"}
    first = suites.load_suite(config, "cpu")
    assert suites.load_suite(dict(config), "cpu") is first
    assert built == [config | {"device": "cpu"}]
    suites._suite.cache_clear()


OPTUNA = ["sweep=optuna", "method=ridge", "method.lam=tag(log,interval(1e-6,1))"]  # its header's


def test_optuna_searches_on_validation_and_goes_on_where_it_stopped(call, monkeypatch):
    score, stopped = LinearSuite.evaluate, []

    def stopping(self, *own, **settings):
        if len(self.evaluated) == 4 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return score(self, *own, **settings)

    monkeypatch.setattr(LinearSuite, "evaluate", stopping)
    own = [*OPTUNA, "hydra.sweeper.n_trials=4"]
    assert call(*own)[0] == cli.INTERRUPTED
    before = {p: p.stat().st_mtime_ns for p in call.records.rglob("ridge-*.json")}
    assert before
    code, out, err = call(*own)
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    tried = [json.loads(p.read_text()) for p in call.records.rglob("ridge-*.json")]
    assert {r["key"]["split"] for r in tried} == {"validation"} and len(tried) == 4
    best = max(tried, key=lambda r: r["mean"])
    lam = best["key"]["hyperparameters"]["lam"]
    (line,) = [line for line in out.splitlines() if line.startswith("best of 4 trials: ")]
    assert line == f"best of 4 trials: method.lam={lam}, {100 * best['mean']:.2f}"
    results = call.records.with_name("sweep") / "optimization_results.yaml"
    assert f"method.lam: {lam}" in results.read_text()


def test_a_search_in_which_all_fails_says_why(call, monkeypatch):
    def broken(*_, **__):
        raise InputError("no example is left")

    monkeypatch.setattr(LinearSuite, "evaluate", broken)
    code, _, err = call(*OPTUNA, "hydra.sweeper.n_trials=2")
    assert code == errors.BAD_INPUT
    assert err.splitlines()[-3] == "2 of 2 failed:"
    assert err.splitlines()[-1].endswith(": no example is left")


def test_an_interrupt_while_modules_load_is_one_line_and_130(tmp_path):
    """An import that takes a minute stands in for torch on a busy machine."""
    (tmp_path / "merging.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['run'];"
        "from experiments.run import main; main()"
    )
    line = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()  # the import has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert err.decode().splitlines() == [
        "loading torch ...",
        "",
        "interrupted while modules were loading; nothing was done",
    ]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_says_what_a_command_does_with_examples_and_keys(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    cli.entry(name)()
    told = capsys.readouterr().out
    about, _, keys = told.partition("Keys, as key=value")
    assert about.splitlines()[0].endswith((".", "?", "*", ":"))
    examples = [line for line in about.splitlines() if line.startswith("  python -m experiments.")]
    assert len(examples) >= 3 or name in {"bench.gpu", "bench.scale"}
    settings = importlib.import_module(cli.COMMANDS[name].module).COMMAND.settings
    for field_ in fields(settings):
        assert re.search(rf"^  {field_.name}[:.]", keys, re.MULTILINE), field_.name
    assert "--traceback" in keys


def test_completion_answers_without_torch(tmp_path):
    environment = os.environ | {"COMP_LINE": "model-merging-run method=act"}
    code = (
        "import sys; sys.argv = ['model-merging-run', '-sc', 'query=bash'];"
        "from experiments.run import main; main(); print('torch' in sys.modules)"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["method=actmat", "method=actmat_centred", "False"], done.stderr


# --- what configs may construct -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["os.system", "eval.language.text.TextBackend", 17, None])
def test_only_the_kinds_of_the_table_are_suites(kind):
    for refuse in (suites.check_suite, suites.build):
        with pytest.raises(InputError, match=f"suite.kind is {kind!r}") as error:
            refuse({"kind": kind, "name": "x"})
        assert "embedded_lm" in error.value.hint
    with pytest.raises(InputError, match="a suite of kind 'text' needs 'family'"):
        suites.check_suite({"kind": "text", "name": "x"})


@pytest.mark.parametrize("suite", sorted(p.stem for p in (ROOT / "configs/suite").glob("*.yaml")))
def test_every_suite_of_the_project_may_be_constructed(suite):
    with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
        composed = compose("experiment", [f"suite={suite}", "+suite.zoom=2"])
    config = hydra_run.OmegaConf.to_container(composed, resolve=True)["suite"]
    with pytest.raises(InputError, match="suite has no setting 'zoom'"):
        suites.check_suite(config)
    del config["zoom"]
    assert suites.build(config).name == config["name"]


CODE = {
    "launcher": "launcher: {_target_: os.mkdir}",
    "sweeper": "sweeper: {_target_: os.mkdir}",
    "hidden": "callbacks: {x: '${evil}'}",
    "inside": "callbacks: {x: [{y: {_target_: os.mkdir, path: CANARY}}]}",
    "callback": "callbacks: {x: {_target_: os.mkdir, path: CANARY}}",
    "handler": "job_logging: {handlers: {x: {class: os.mkdir, path: CANARY}}}",
    "formatter": "hydra_logging: {formatters: {x: {(): os.mkdir, path: CANARY}}}",
    "stream": "job_logging: {handlers: {x: {class: logging.StreamHandler, stream: ext://this.s}}}",
}


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("multirun", [False, True])
def test_a_file_of_ones_own_cannot_name_code_for_hydra_to_run(call, tmp_path, kind, multirun):
    canary = tmp_path / "canary"
    (tmp_path / "own/attack").mkdir(parents=True)
    text = "# @package _global_\nevil: {_target_: os.mkdir, path: CANARY}\nhydra:\n  " + CODE[kind]
    (tmp_path / "own/attack/it.yaml").write_text(text.replace("CANARY", str(canary)))
    sweep = ["-m"] if multirun else []
    code, _, err = call(*sweep, f"--config-dir={tmp_path}/own", "+attack=it")
    assert code == errors.BAD_INPUT, err
    assert "which would run code outside this project" in err
    assert not canary.exists()


@pytest.mark.parametrize("group", ["launcher", "sweeper"])
def test_an_option_of_ones_own_cannot_replace_hydras(call, tmp_path, group):
    (tmp_path / f"own/hydra/{group}").mkdir(parents=True)
    text = f"_target_: os.mkdir\npath: {tmp_path}/canary\n"
    (tmp_path / f"own/hydra/{group}/it.yaml").write_text(text)
    code, _, err = call("-m", f"hydra/{group}=it", f"--config-dir={tmp_path}/own")
    assert code == errors.BAD_INPUT
    assert f"hydra.{group}._target_ is 'os.mkdir'" in err
    assert not (tmp_path / "canary").exists()


def test_optuna_cannot_be_told_to_run_code(call):
    code, _, err = call("hydra/sweeper=optuna", "hydra.sweeper.custom_search_space=os.system")
    assert code == errors.BAD_INPUT
    assert "hydra.sweeper.custom_search_space is 'os.system'" in err
    code, _, err = call("hydra/sweeper=optuna", "hydra.sweeper.sampler._target_=os.system")
    assert code == errors.BAD_INPUT
    assert "hydra.sweeper.sampler._target_ is 'os.system'" in err


@pytest.mark.parametrize(
    "choice",
    [
        "hydra/launcher=joblib",
        "hydra/launcher=submitit_local",
        "hydra/launcher=submitit_slurm",
        "hydra/sweeper=optuna",
        "hydra/sweeper=optuna hydra/sweeper/sampler=cmaes",
        "hydra/job_logging=default hydra/hydra_logging=hydra_debug",
    ],
)
def test_hydras_own_choices_stay(choice):
    with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
        composed = compose("experiment", choice.split(), return_hydra_config=True)
    hydra_run.check_hydra(composed.hydra)


# --- errors and settings ------------------------------------------------------------------------


def test_an_input_error_survives_being_wrapped(capsys):
    try:
        try:
            raise InputError("file a lacks tensor b", hint="look there")
        except InputError as error:
            raise RuntimeError("Error in call to target") from error
    except RuntimeError as wrapped:
        assert errors.report(wrapped).code == errors.BAD_INPUT
    assert capsys.readouterr().err == "error: file a lacks tensor b\nhint: look there\n"


def test_hydras_messages_lose_their_search_path(capsys):
    error = MissingConfigException("No x\n\nAvailable:\n\ty\nConfig search path:\n\tz", "x", [])
    assert errors.report(error).code == errors.BAD_INPUT
    assert capsys.readouterr().err == "error: No x\nhint: Available: y\n"


@dataclass
class Inner:
    size: int = 1


@dataclass
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)


def test_settings_are_typed():
    composed = hydra_run.OmegaConf.create({"name": "x", "inner": {"size": "3"}})
    assert hydra_run.read_settings(Outer, composed) == Outer("x", Inner(3))


COMMANDS = [run, merge, finetune, statistics, tables, analyse, factorial, regimes, bench]


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_every_command_keeps_to_the_exit_codes(monkeypatch, capsys, module):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as stop:
            module.main()
        return stop.value.code, capsys.readouterr().err

    def raising(error):
        def read(*_):
            raise error

        monkeypatch.setattr(hydra_run, "read_settings", read)

    monkeypatch.setenv(cli.TRACEBACK, "0")
    code, err = call("+colour=red")
    assert code == 2 and err.startswith("error: unknown config key 'colour'\nhint: ")
    raising(ZeroDivisionError("oh"))
    code, err = call()
    assert code == 1 and err.startswith("error: ZeroDivisionError: oh\nhint: ")
    assert "--traceback" in err and "Traceback" not in err
    raising(KeyboardInterrupt())
    assert call()[0] == 130
    raising(InputError("a is b", "make it c"))
    assert call() == (2, "error: a is b\nhint: make it c\n")
    code, err = call("--traceback")
    assert code == 2 and err.startswith("Traceback (most recent call last)")


def test_no_traceback_reaches_the_terminal_of_a_real_process(tmp_path):
    environment = os.environ | {"MODEL_MERGING_CACHE": str(tmp_path)}
    line = [sys.executable, "-m", "experiments.run", "suite=tiny_text", "finetuning=half"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "loading torch ...",
        "error: finetuning is 'half', expected one of: full, lora",
    ]
    assert done.stdout == ""

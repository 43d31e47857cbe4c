"""Every command line that is documented: composed with all members of its sweep, or run.

Collected from the README, other Markdown, headers of configs, docstrings and hints, notebooks.
All are composed and checked as the command itself does, on the very words; those in EXECUTED run
to their last line on small inputs. What a line's placeholders stand for is said in one table.
"""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from safetensors.torch import load_file, save_file

from eval import tiny
from experiments import cli, hydra_run
from merging.formats.writer import write_adapter
from tests import test_hub_paper, test_olmo
from tests.fixtures.commands import called

ROOT = Path(__file__).parents[1]
SOURCES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("configs/**/*.yaml"),
    *ROOT.glob("configs/README.md"),
    *ROOT.glob("notebooks/*.ipynb"),
    *(p for room in ("experiments", "eval", "merging") for p in (ROOT / room).rglob("*.py")),
]
COMMAND = re.compile(r"python -m experiments\.([a-z]+(?:\.[a-z]+)?)\b([^`\n]*)")
SCRIPTS = {"cli", "configs", "methods", "readme"}  # they have no settings, and tests of their own
PLACEHOLDERS = {  # in documented lines -> what stands there when a line is composed
    r"\{[a-z_]+\}": "tiny_text",
    r"suite=\.\.\.": "suite=tiny_text",
    r"method=\.\.\.": "method=average",
    r"paper=\.\.\.": "paper=tall_vision8",
    r"\bSUITE\b": "tiny_text",
    r"\bkind=\.\.\.": "kind=covariance",
    r"^NAME\b": "tall_vision8",
    r"seed=0,1,2": "seed=0",  # a sweep's axes are checked each by itself
    r"finetuning=full,lora": "finetuning=lora",
}
RECIPE = """
merge_method: linear
base_model: {base}
models:
  - model: {math}
    parameters: {{weight: 0.5}}
  - model: {code}
    parameters: {{weight: 0.5}}
"""
GIVEN = {  # what a command cannot do without, where a line leaves it out or says "..."
    "merge": "base=PATH experts.math=PATH experts.code=PATH output=PATH",
    "plan": "base=PATH experts.math=PATH experts.code=PATH",
    "extract": "base=PATH expert=PATH output=PATH",
}


def documented():
    """(file, command, arguments) of every documented line, each once."""
    found = {}
    for path in sorted(SOURCES):
        text = path.read_text()
        if path.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells)
        text = re.sub(r"\\\n[# ]*", "", text)
        for name, rest in COMMAND.findall(text):
            words = re.split(r"(?:^|\s)#| && |: run | and give |, a file of ", rest)[0]
            if path.suffix == ".py":
                words = re.split(r'"|\\n', words)[0]
            words = words.strip(" ,;:")
            if name in SCRIPTS or "found[0]" in words:
                continue
            found.setdefault((name, words), path.relative_to(ROOT).as_posix())
    return [(where, name, words) for (name, words), where in found.items()]


LINES = documented()


def arguments(name, words):
    """The words of a line as a shell gives them to a command, placeholders replaced."""
    for pattern, value in PLACEHOLDERS.items():
        words = re.sub(pattern, value, words)
    given = shlex.split(words)
    rest = [word for word in given if word != "..." and not word.endswith("=...")]
    keys = {word.partition("=")[0] for word in rest}
    missing = [w for w in GIVEN.get(name, "").split() if w.partition("=")[0] not in keys]
    if any(key.startswith("recipe") for key in keys):
        missing = [word for word in missing if word.startswith("output")]
    return [*rest, *missing]


@pytest.fixture
def invoke(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(name, *own):
        return called(monkeypatch, capsys, cli.entry(name), name, *own)

    return call


def test_lines_are_found_where_they_stand():
    assert len(LINES) >= 50
    assert {name for _, name, _ in LINES} == set(cli.COMMANDS)


@pytest.fixture(scope="module")
def composed_once():
    """Members of sweeps that several lines share are composed and checked once."""
    members = {}
    load = hydra_run._CheckedLoader.load_sweep_config

    def once(self, master_config, sweep_overrides):
        key = (self.command.config, *sorted(sweep_overrides))
        if key not in members:
            members[key] = load(self, master_config, sweep_overrides)
        return members[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydra_run._CheckedLoader, "load_sweep_config", once)
        yield


@pytest.mark.parametrize(("where", "name", "words"), LINES, ids=lambda value: str(value)[:60])
def test_a_documented_line_is_one_that_its_command_accepts(
    invoke, composed_once, monkeypatch, tmp_path, where, name, words
):
    """Each member of a sweep is composed, typed and checked; none is computed."""
    seen = []
    (tmp_path / "FILE.yaml").write_text(
        RECIPE.format(base="PATH", math="MATH_PATH", code="CODE_PATH")
    )

    def launched(launcher, members, initial_job_idx):
        seen.extend(members)  # its sweeper asked the command to check them before
        return [JobReturn(_return_value=0.5, status=JobStatus.COMPLETED) for _ in members]

    def checked(command, composed):
        settings = hydra_run.read_settings(command.settings, composed)
        if not re.search("PATH|FILE|FOLDER|ADAPTER|ENV", str(settings)):
            command.check(settings, HydraConfig.get())
        seen.append(composed)
        return 0.5

    monkeypatch.setattr(hydra_run, "job", checked)
    if "sweep=optuna" not in words:  # whose sweeper leaves the check to the job
        monkeypatch.setattr(BasicLauncher, "launch", launched)
    # other launchers start processes, which test_sweeps.py does
    own = [w for w in arguments(name, words) if not re.match(r"hydra[/.]launcher", w)]
    code, _, err = invoke(name, *own, f"hydra.sweep.dir={tmp_path}")
    assert code == 0, (where, err)
    assert seen


# --- the paper's tables: where each is made -------------------------------------------------------

MADE_BY = (
    dict.fromkeys(test_hub_paper.TABLES, "test_every_vision_table_from_the_hub_to_the_printed_row")
    | dict.fromkeys(test_hub_paper.T5_TABLES, "test_every_t5_table_whole")
    | {"olmo3_7b": "test_the_papers_table_is_one_command"}
)


def test_every_documented_table_is_made_by_a_test():
    """Of every file of configs/paper, and of every NAME on a documented line or in the README."""
    readme = (ROOT / "README.md").read_text()
    cells = re.findall(r"^\| ((?:`[a-z0-9_{},]+`(?:, )?)+) \|", readme, re.MULTILINE)
    asked = {name for cell in cells for name in expanded(cell)}
    asked |= {
        words.split()[0] for _, name, words in LINES if name == "paper" and words[:1].islower()
    }
    files = {path.stem for path in (ROOT / "configs/paper").glob("*.yaml")}
    assert {"olmo3_7b", "tall_vision14", "language7_t5_large_lora"} <= asked <= files
    assert files == set(MADE_BY)
    for name, test in MADE_BY.items():
        module = test_olmo if name == "olmo3_7b" else test_hub_paper
        assert callable(getattr(module, test))


def expanded(cell):
    """`a_{b,c}` -> a_b, a_c, as a shell expands it."""
    for name in re.findall(r"`([^`]+)`", cell):
        pieces = [part.split(",") for part in re.split(r"[{}]", name)]
        yield from map("".join, itertools.product(*pieces))


# --- run to the last line -------------------------------------------------------------------------

# a vision-language base is merged from the command line in test_into.py
EXECUTED = [
    line
    for line in LINES
    if line[1] in {"merge", "plan", "extract"} and "into=language_model" not in line[2]
]
# of images: test_own_inputs.py
EXECUTED += [line for line in LINES if line[1] == "statistics" and "texts=" in line[2]]
ENCODER = {"*.mlp.*": "*.intermediate.*", "blocks 0-5": "blocks 0-1"}  # decoders' names in ours
LAST = {
    "merge": "GiB read",
    "plan": "",
    "extract": "written to",
    "statistics": "give it to a merge as statistics.NAME=",
}


@pytest.fixture(scope="module")
def inputs(own_cache, tmp_path_factory):
    """Files for every placeholder: a tiny BERT, experts, adapters, moments, texts."""
    folder = tmp_path_factory.mktemp("inputs")
    base = tiny.encoder()
    state = load_file(base / "model.safetensors")
    layer = "encoder.layer.0.attention.self.query"
    generator = torch.Generator().manual_seed(0)
    for name in ("math", "code"):
        moved = state[f"{layer}.weight"] + torch.randn(32, 32, generator=generator) / 10
        save_file(state | {f"{layer}.weight": moved}, folder / f"{name}.safetensors")
        factors = (torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator))
        write_adapter(folder / f"{name}-adapter", {f"{layer}.weight": factors}, {})
    weights = [n for n, W in state.items() if W.ndim == 2]
    save_file({n: torch.eye(state[n].shape[1]) for n in weights}, folder / "moments.safetensors")
    (folder / "texts.txt").write_text("\n".join(t for t, _ in tiny.sentences("meals")[:20]))
    return folder, base


def stand_in(word, folder, base, output):
    """A word of a documented line with a real file in its placeholder."""
    key, _, value = word.partition("=")
    task = key.rpartition(".")[2] if key.startswith("experts.") else "math"
    files = {
        "base": base, "checkpoint": base, "texts": folder / "texts.txt",
        "output": f"{output}.safetensors" if value == "FILE" else output,
    }  # fmt: skip
    if key == "parts":
        return re.sub("|".join(map(re.escape, ENCODER)), lambda m: ENCODER[m[0]], word)
    if value == "ADAPTER":
        return f"{key}={folder}/{task}-adapter"
    if value not in {"PATH", "FILE", "plan.html"}:
        return word
    if value == "plan.html":
        return f"{key}={output}.html"
    if key.startswith("statistics."):
        return f"{key}={folder}/moments.safetensors"
    return f"{key}={files.get(key, folder / f'{task}.safetensors')}"


@pytest.mark.parametrize(("where", "name", "words"), EXECUTED, ids=lambda value: str(value)[:60])
def test_a_documented_line_runs_to_its_last_line(invoke, inputs, tmp_path, where, name, words):
    folder, base = inputs
    experts = {task: folder / f"{task}.safetensors" for task in ("math", "code")}
    (tmp_path / "FILE.yaml").write_text(RECIPE.format(base=base, **experts))
    own = [stand_in(w, folder, base, tmp_path / "out") for w in arguments(name, words)]
    if name == "statistics":
        own += ["statistics.batches=2", "statistics.batch_size=4"]
    if "form=adapter" in own and not any("adapter" in w for w in own if w.startswith("experts")):
        own = [w.replace(".safetensors", "-adapter") if w.startswith("experts") else w for w in own]
    own += ["device=cpu"] * (name in {"merge", "statistics"})
    code, out, err = invoke(name, *own)
    assert code == 0, (where, own, err)
    assert LAST[name] in out

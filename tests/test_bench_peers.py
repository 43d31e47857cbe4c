"""The comparison of whole commands, with a program in mergekit's place that is our own."""

import csv
import functools
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from experiments.bench import command_peers as peers
from experiments.bench import formulas
from merging.errors import InputError

SMALL = peers.Peers(hidden=64, intermediate=96, blocks=1, vocabulary=50, repeats=1)


def test_both_programs_run_on_one_recipe_and_are_compared(tmp_path):
    program = tmp_path / "mergekit-yaml"  # takes mergekit's arguments, merges as we do
    program.write_text(
        f"#!{sys.executable}\nimport sys\nrecipe, output = sys.argv[1:3]\n"
        "sys.argv = ['merge', f'recipe={recipe}', f'output={output}', 'overwrite=true']\n"
        "from experiments.merge import main\nmain()\n"
    )
    program.chmod(0o755)
    peers.bench_peers(
        replace(
            SMALL, mergekit=str(program), methods=["task_arithmetic"], output=str(tmp_path / "out"),
            folder=str(tmp_path),
        )
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "peers.csv").open()))
    assert [row["program"] for row in rows] == ["mergekit", "ours"]
    assert [float(row["largest_difference"]) for row in rows] == [0.0, 0.0]
    assert all(float(row["seconds"]) > 0 and int(row["peak_bytes"]) > 1e8 for row in rows)
    assert [float(row["to_formula"]) for row in rows] == pytest.approx([0.0, 0.0], abs=1e-3)
    assert all(float(row["to_steps"]) > 5 * float(row["to_formula"]) for row in rows)
    page = (tmp_path / "out" / "peers.md").read_text()
    assert "Alone, they take TIES from the formula by" in page
    assert "| task_arithmetic |" in page
    assert page.count(f"torch {torch.__version__.partition('+')[0]}") == 2  # theirs and ours


def test_a_commands_peak_is_its_own():
    held = torch.ones(60_000_000)  # 240 MB here
    seconds, cpu, peak = peers.timed([sys.executable, "-S", "-c", "sum(range(10**6))"])
    assert peak < held.nbytes / 4
    assert 0 < cpu < 5 * seconds + 1
    with pytest.raises(InputError, match="ended with 3: .*told"):
        peers.timed([sys.executable, "-S", "-c", "import sys; print('told'); sys.exit(3)"])


def test_the_model_is_that_of_the_settings_and_differences_are_of_the_movement(tmp_path):
    paths = peers.models(tmp_path, SMALL)
    state = {}
    for file in sorted(paths["base"].glob("*.safetensors")):
        state |= load_file(file)
    assert state["model.layers.0.mlp.down_proj.weight"].shape == (64, 96)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    # of code's movement, what lies between it and math's
    far = peers.largest_difference(paths["code"], paths["math"], paths["base"])
    assert 1.2 < far < 1.6  # two independent moves of one length: the root of 2
    assert peers.largest_difference(paths["code"], paths["code"], paths["base"]) == 0


def test_the_formulas_and_each_choice_of_mergekits_by_hand():
    zero = torch.zeros(5)  # a share of 0.2 keeps one entry of five, and what is as large
    experts = torch.tensor([[5.0, -4, 1, 0, 0], [-5.0, 3, 1, 0, 0], [2.0, 8, 1, 8, 0]])
    merge = functools.partial(formulas.merged, "ties", zero, experts)
    assert merge().tolist() == [0, 8, 0, 8, 0]
    assert merge(formulas.Choices(exactly=True)).tolist() == [0, 8, 0, 0, 0]
    assert merge(formulas.Choices(plus=True)).tolist() == [5, 8, 0, 8, 0]
    W0, expert = torch.tensor([0.0039]).bfloat16(), torch.tensor([[1.0078]]).bfloat16()
    assert torch.equal(formulas.merged("linear", W0, expert), expert[0])
    exact = W0.double() + 0.3 * (expert[0].double() - W0.double())
    assert torch.equal(formulas.merged("task_arithmetic", W0, expert), exact.bfloat16())
    delta = (expert[0] - W0) * torch.tensor(0.3).bfloat16()
    steps = formulas.merged("task_arithmetic", W0, expert, formulas.THEIRS)
    assert torch.equal(steps, W0 + delta)


def test_a_missing_program_and_an_unknown_method_are_told():
    with pytest.raises(InputError, match="is not there") as told:
        peers.bench_peers(replace(SMALL, mergekit="/nowhere/mergekit-yaml"))
    assert "pip install mergekit" in told.value.hint
    with pytest.raises(InputError, match="unknown method 'passthrough'"):
        peers.bench_peers(replace(SMALL, mergekit=sys.executable, methods=["passthrough"]))

"""The GPU benchmark, proved on the CPU: what it writes, refuses, and names as missing."""

import csv
import sys

import pytest
import torch

import merging
from experiments.bench import command_gpu as gpu
from experiments.bench.gpu import main
from tests.fixtures.commands import called


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    def invoke(*overrides):
        line = ["gpu", "device=cpu", f"output={tmp_path}/out", *overrides]
        return called(monkeypatch, capsys, main, *line)

    invoke.output = tmp_path / "out"
    return invoke


def test_every_layer_counts_and_results_agree_with_the_cpu(call, monkeypatch):
    monkeypatch.setattr(gpu, "median", lambda function, *_: function() is not None)  # a second each
    code, _, err = call("scale=64", "methods=[average,actmat,regmean,dare]")
    assert code == 0, err
    rows = list(csv.DictReader((call.output / "gpu.csv").open()))
    assert len(rows) == 4 * len(gpu.MODELS)
    for row in rows:
        assert float(row["seconds"]) == sum(count for count, *_ in gpu.MODELS[row["model"]][1])
        assert row["distance"] == ("" if row["method"] == "dare" else "0.0")
        assert (float(row["statistics"]) > 0) == (row["method"] == "regmean")
    told = (call.output / "gpu.md").read_text()
    assert "a proof of the script, no figure" in told
    assert "| 140.6 |" in told  # the paper's seconds stand beside ours


def test_what_did_not_fit_the_time_is_named(call):
    code, _, err = call("scale=64", "methods=[average]", "models=[vit_b_32]", "minutes=0")
    assert code == 2
    assert "no method was measured" in err
    page = gpu.page([], torch.device("cpu"), 1, ["tsv_m on t5_large"], None)
    assert "Not measured, the time was up: tsv_m on t5_large." in page


def test_a_result_that_differs_from_the_cpus_is_marked():
    row = gpu.Row("vit_b_32", "actmat", 1.0, 2.0, 0.0, 0, 0.5)
    assert "**differs**" in gpu.page([row], torch.device("cpu"), 1, [], None)
    deltas = gpu.deltas(3, 16, 24, torch.device("cpu"))
    assert gpu._distance(merging.create("actmat"), deltas, {}) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_to_prove_it_is_told(call):
    code, _, err = call("device=cuda")
    assert code == 2
    assert "no usable GPU" in err and "device=cpu scale=16" in err


def test_it_needs_nothing_that_a_bare_gpu_machine_lacks():
    """The packages named in the script's docstring, whatever else is installed."""
    import subprocess

    absent = ["transformers", "datasets", "pandas", "matplotlib", "wandb", "lm_eval"]
    absent += [
        "open_clip",
        "peft",
        "sklearn",
        "psutil",
        "huggingface_hub",
    ]  # filelock is torch's own
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}));"  # importing one would fail
        "import experiments.bench.command_gpu"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]

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
    monkeypatch.setattr(gpu, "_expected", lambda *_: 0)
    models = ["vit_b_32", "t5_large"]
    own = ["scale=64", f"models=[{','.join(models)}]"]
    code, _, err = call(*own, "methods=[average,actmat,regmean,dare]")
    assert code == 0, err
    rows = list(csv.DictReader((call.output / "gpu.csv").open()))
    assert len(rows) == 4 * len(models)
    assert [row["method"] for row in rows[-2:]] == ["dare"] * 2  # what matters less comes last
    for row in rows:
        layers = sum(count for count, *_ in gpu.MODELS[row["model"]][1])
        assert float(row["seconds"]) == float(row["textbook"]) == layers
        assert row["distance"] == ("" if row["method"] == "dare" else "0.0")
        assert (float(row["statistics"]) > 0) == (row["method"] == "regmean")
        assert bool(row["batched"]) == (row["method"] == "actmat")
    told = (call.output / "gpu.md").read_text()
    assert "a proof of the script, no figure" in told
    assert "| 140.6 |" in told  # the paper's seconds stand beside ours
    engine = list(csv.DictReader((call.output / "gpu_engine.csv").open()))
    ways = ["in batches", "by two workers", "layer by layer"]
    assert [row["how"] for row in engine] == ways  # T5-large's shapes are ViT-L/14's
    assert all(row["same_bytes"] == "True" for row in engine if row["how"] == "by two workers")


def test_what_would_not_end_in_time_is_not_begun_and_named(call, monkeypatch):
    """Textbook code that takes minutes; a method at all; and whatever comes after the deadline."""
    dear = {"tsv_m": 1000, gpu.TEXTBOOK["actmat"]: 30}

    def expected(function, D, method):
        return dear.get(method.name, 0) or dear.get(getattr(function, "func", None), 0)

    monkeypatch.setattr(gpu, "_expected", expected)
    monkeypatch.setattr(gpu, "ENGINE", ())
    own = ["scale=64", "models=[vit_b_32]"]
    code, _, err = call(*own, "methods=[actmat,tsv_m,average]", "minutes=0.5")
    assert code == 0, err
    rows = {row["method"]: row for row in csv.DictReader((call.output / "gpu.csv").open())}
    assert set(rows) == {"average", "actmat"} and not rows["actmat"]["textbook"]
    told = (call.output / "gpu.md").read_text()
    assert "textbook actmat on vit_b_32, tsv_m on vit_b_32" in told
    code, _, err = call(*own, "methods=[average]", "minutes=0")
    assert code == 2
    assert "no method was measured" in err


def test_seconds_are_judged_from_sides_of_a_quarter(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "median", lambda function, *_: asked.append(function.args) or 0.5)
    method = merging.create("regmean")
    assert gpu._expected(method, torch.ones(3, 40, 80), method) == 64 * 0.5
    assert asked[0][0].shape == (3, 10, 20)


def test_a_result_that_differs_from_the_cpus_is_marked():
    settings = gpu.BenchGpu(device="cpu")
    found = gpu.Found(settings, torch.device("cpu"), 0.0, late=["tsv_m on t5_large"])
    found.rows.append(gpu.Row("vit_b_32", 8, "actmat", 1.0, 2.0, None, 0.0, 0, 0.5))
    assert "**differs**" in gpu.page(found)
    assert "Not measured, there was no time: tsv_m on t5_large." in gpu.page(found)
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

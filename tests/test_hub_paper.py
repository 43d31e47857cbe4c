"""`python -m experiments.paper NAME` against the hub's stand-in: preflight, rows, printed table."""

import math
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from eval import tiny_lm
from eval.language import prompts
from experiments import preflight, suites
from experiments.commands import paper
from experiments.report import records
from tests.fixtures import hub_vision, language
from tests.fixtures.hub_vision import EIGHT
from tests.images import image_folder
from tests.test_configs import CONFIGS, names

# The paper's six tables, and one of every other family's; whole, or on two of their tasks.
TABLES = {
    "vision8_vit_b_32_full": [],
    "vision8_vit_b_32_lora": ["tasks=[mnist,dtd]"],
    "vision8_vit_b_16_full": ["tasks=[mnist,dtd]"],
    "vision8_vit_b_16_lora": ["tasks=[mnist,dtd]"],
    "vision8_vit_l_14_full": ["tasks=[mnist,dtd]"],
    "vision8_vit_l_14_lora": ["tasks=[mnist,dtd]"],
    "fusionbench_vision8": ["tasks=[mnist,dtd]"],
    "ilharco_vision8": ["tasks=[mnist,dtd]"],
    "tall_vision20": ["tasks=[kmnist,fer2013]"],
}


@pytest.fixture
def make(vision, tmp_path):
    """`experiments.paper` with some arguments: what it printed, or its error (exit code 2)."""

    def call(*arguments, code=0):
        own = [f"records={tmp_path}/records", f"output={tmp_path}/results"]
        own += ["device=cpu"] + ["suite.workers=0"] * any("vision" in a for a in arguments)
        suites._suite.cache_clear()  # as in a new process
        found, out, err = vision.run("experiments.paper", *arguments, *own)
        assert found == code, out + err
        return out if code == 0 else err

    call.results = tmp_path / "results/paper"
    call.records = tmp_path / "records"
    return call


def downloaded(folder):
    """What people fetch by hand for a table: Drive folders, EMNIST's digits."""
    checkpoints = folder / "home/checkpoints"
    for model in hub_vision.BLOCKS:
        hub_vision.download("actmat", checkpoints, model, EIGHT)
    hub_vision.download("ilharco", checkpoints, "ViT-B-32", EIGHT)
    digits = [str(i) for i in range(10)]
    image_folder(folder / "home/data/emnist_digits", digits, counts=(20, 10), size=(32, 32))


def test_every_vision_table_from_the_hub_to_the_printed_row(make, vision, tmp_path):
    downloaded(tmp_path)
    for name, few in TABLES.items():
        out = make(name, "selection.values=[0.3]", *few)
        settings = OmegaConf.load(CONFIGS / f"paper/{name}.yaml")
        (written,) = [p for p in make.results.glob("*.md") if p.stem.startswith(name)]
        frame = pd.read_csv(written.with_suffix(".csv"))
        task = "mnist" if few and "mnist" in set(frame.task) else "mean"
        ours = frame[frame.task == task].set_index("method").ours
        for line in settings.runs:  # every row that was run stands in the table by its name
            methods = line.partition("method=")[2].partition(" ")[0].split(",")
            for method in methods:
                assert ours[ours.index.str.startswith(method)].notna().any(), (name, method)
        assert "difference" in out
        assert written.with_suffix(".tex").exists()
    twice = {asked: n for asked, n in vision.downloads.items() if n > 1}
    assert not twice
    surplus = [f for _, f in vision.downloads if "extra" in f or "noise" in f or "full/" in f]
    assert not surplus
    vision.requests.clear()
    again = make(name, "selection.values=[0.3]", *few)
    assert "to do" not in again
    assert not vision.requests  # a second call does nothing but print


ONE = ["fusionbench_vision8", "paper.runs=['method=average']", "tasks=[mnist,dtd]"]


def test_the_printed_row_is_the_record_beside_the_published_figure(make):
    err = make("vision8_vit_b_32_full", "suite/checkpoints=fusionbench", *ONE[1:], code=2)
    assert "is about suite vision8_ViT-B-32_ACTMat" in err
    text = make(*ONE)
    (record,) = [
        r
        for r in records.load_all(make.records / "vision8_ViT-B-32_FusionBench")
        if r["key"]["method"] == "average"
    ]
    frame = pd.read_csv(make.results / "fusionbench_vision8_ViT-B-32.csv").set_index("method")
    row = frame.loc["average"]
    assert row.ours == pytest.approx(100 * record["mean"])
    assert row.difference == pytest.approx(row.ours - 66.5, abs=0.05)
    shares = [score["accuracy"] for score in record["scores"].values()]
    error = math.sqrt(sum(p * (1 - p) / hub_vision.TEST for p in shares)) / 2
    assert row.standard_error == pytest.approx(100 * error, abs=1e-3)
    assert f"{row.difference:+.1f} ± {100 * error:.1f}" in text


def test_a_dry_run_reads_headers_and_starts_nothing(make, vision):
    out = make(*ONE, "--dry-run")
    assert "to do" in out
    assert "tanganke/clip-vit-base-patch32_mnist" in out
    assert "estimated time" in out
    assert {file for _, file in vision.downloads} == {"README.md"}
    assert not make.records.exists()


def test_whatever_does_not_hold_is_said_before_anything_heavy(make, vision, monkeypatch):
    """Each in a sentence of its own, with nothing downloaded but data cards."""
    expert = vision.repositories["models", "tanganke/clip-vit-base-patch32_mnist"]
    images = vision.repositories["datasets", "tanganke/dtd"]
    said = {}

    def refused(name, *more):
        said[name] = make(*ONE, *more, code=2)
        assert len(said[name].strip().splitlines()) == 2, said[name]  # a sentence, what to do

    with vision.offline():
        refused("network")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("token")
    monkeypatch.delenv("HF_TOKEN")
    expert.gated = True
    refused("licence")
    expert.gated = False
    with vision.without(images, "data/test-00000-of-00001.parquet"):
        refused("shard")
    refused("revision", "suite.experts.revision=v9")
    usage = SimpleNamespace(free=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
        refused("disk")
    with monkeypatch.context() as patch:
        patch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e6))
        refused("memory")
    refused("gpu", "+paper.cost.gpu_gb=24")
    for name, told in {
        "network": "cannot be reached: no network",
        "token": "does not accept the token",
        "licence": "is gated",
        "shard": "tanganke/dtd has no file data/test-00000-of-00001.parquet",
        "revision": "has no revision 'v9'",
        "disk": "GB are needed and 0.0 GB are free",
        "memory": "error: fusionbench_vision8_ViT-B-32 cannot start: memory",
        "gpu": "memory of a GPU: 24.0 GB are needed and 0.0 GB are free",
    }.items():
        assert told in said[name], said[name]
    assert {file for _, file in vision.downloads} == {"README.md"}


def test_what_the_authors_folder_lacks_is_named(make):
    err = make("vision8_vit_l_14_lora", "--dry-run", code=2)
    assert "SUN397Val/lora_finetuned.pt is not there" in err
    assert "1Vc-cGalI9bE5M099x6t4XqGTN-YkQ0Lf" in err
    assert "more" in err  # of seven other experts


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no table is named"),
        (["name=nothing"], "nothing"),
        (["fusionbench_vision8", "methd=actmat"], "methd"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_sentence(make, arguments, told):
    err = make(*arguments, code=2)
    assert told in err
    assert len(err.strip().splitlines()) <= 10


def test_experts_trained_here_are_refused_before_they_are_trained(make):
    err = make("language7_t5_base_full", code=2)
    assert "about checkpoints of 'ACTMat T5-base'" in err


def test_rows_with_several_values_are_taken_apart():
    rows = paper.expand(["method=knots", "method.merge=tsv_m,iso_c", "tasks=[a,b]"])
    assert rows == [
        ["method=knots", "method.merge=tsv_m", "tasks=[a,b]"],
        ["method=knots", "method.merge=iso_c", "tasks=[a,b]"],
    ]


@pytest.mark.parametrize("name", names("paper"))
def test_every_table_says_time_and_disk(name):
    text = (CONFIGS / f"paper/{name}.yaml").read_text()
    settings = OmegaConf.load(CONFIGS / f"paper/{name}.yaml")
    if "runs" in settings:
        cost = text.partition("# Cost:")[2].partition("#\n")[0]
        assert re.search(r"\d GB", cost)
        assert "hour" in cost


@pytest.mark.parametrize("name", ["language7_t5_base_full", "language7_t5_large_lora"])
def test_a_t5_table_with_the_authors_experts(make, hub, tmp_path, name):
    """Whole models under the names that their wrapper gives them, in full and LoRA tables."""
    language.add_language7(hub, tmp_path / "sets")
    cloze = language.cloze_folder(tmp_path / "cloze")
    size = "large" if "large" in name else "base"
    base = load_file(tiny_lm.model("t5_relu_tied") / "model.safetensors")
    files = {}
    for seed, task in enumerate(prompts.TASKS):
        generator = torch.Generator().manual_seed(seed)
        state = {
            f"transformer.{k}": v + 0.02 * torch.randn(v.shape, generator=generator)
            for k, v in base.items()
        }
        files[task] = tmp_path / f"{task}.pt"
        torch.save(state, files[task])
    arguments = [name, f"suite.family=ACTMat T5-{size}", f"suite.data.story_cloze={cloze}"]
    arguments += [f"suite.experts.{task}={file}" for task, file in files.items()]
    arguments += ["statistics.batches=1", "statistics.batch_size=8", "selection.values=[0.3]"]
    arguments += ["tasks=[qasc,wsc]"] if size == "large" else []
    out = make(*arguments)
    assert "difference" in out
    frame = pd.read_csv(make.results / f"{name}.csv")
    ours = frame[frame.task == "qasc"].set_index("method").ours
    tsv_m = "tsv_m (rank=full)" if "lora" in name else "tsv_m"
    assert ours[["actmat", tsv_m, "task_arithmetic (alpha selected)"]].notna().all()
    assert set(hub.downloads.values()) == {1}
    hub.requests.clear()
    assert "to do" not in make(*arguments)

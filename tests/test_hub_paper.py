"""`python -m experiments.paper NAME` against the hub's stand-in: preflight, rows, printed table."""

import math
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from omegaconf import OmegaConf

from eval import requirements
from eval.language import prompts
from experiments import preflight, suites
from experiments.commands import paper
from experiments.report import records
from tests.fixtures import hub_vision, language
from tests.fixtures.hub_vision import EIGHT
from tests.images import image_folder
from tests.test_configs import CONFIGS, names

# Every vision table; whole, or on two of their tasks.
TABLES = {
    "vision8_vit_b_32_full": [],
    "vision8_vit_b_32_lora": [],
    "vision8_vit_b_16_full": [],
    "vision8_vit_b_16_lora": ["tasks=[mnist,dtd]"],
    "vision8_vit_l_14_full": [],
    "vision8_vit_l_14_lora": ["tasks=[mnist,dtd]"],
    "actmat_later_vision8": ["tasks=[mnist,dtd]"],
    "fusionbench_vision8": ["tasks=[mnist,dtd]"],
    "ilharco_vision8": ["tasks=[mnist,dtd]"],
    "tall_vision8": [],
    "tall_vision14": [],
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
    own = ["suite.published=null", "suite.family='T5-base, fine-tuned here'"]
    err = make("language7_t5_base_full", *own, code=2)
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


T5_TABLES = {
    "language7_t5_base_full": ["average", "tsv_m", "task_arithmetic (alpha selected)"],
    "language7_t5_base_lora": ["regmean", "tsv_m (rank=full)", "knots (alpha=1.0, merge=iso_c,"],
    "actmat_later_language7": ["tact (k=0.7)", "fisher", "iso_c (alpha=3.0)", "ties (scope=layer)"],
    "language7_t5_large_full": ["average", "iso_c", "task_arithmetic (alpha=1.0)"],
    "language7_t5_large_lora": ["actmat", "iso_c (rank=full)", "knots (alpha=1.0, merge=tsv_m,"],
    "actmat_later_language7_large": ["tact", "data_free_fisher", "task_arithmetic (alpha=0.4)"],
    "latency": ["average", "regmean", "actmat"],
}
FEW = ["statistics.batches=1", "statistics.batch_size=8", "selection.values=[0.3]"]


def test_every_t5_table_whole(make, hub, tmp_path):
    """All seven tasks, from the authors' folders and an empty cache, one command a table."""
    language.add_language7(hub, tmp_path / "sets")
    language.download_t5(tmp_path / "home/checkpoints")
    language.cloze_folder(tmp_path / "home/data/LSDSem/story_cloze")
    for name, rows in T5_TABLES.items():
        out = make(name, *FEW)
        assert "difference" in out
        (written,) = [p for p in make.results.glob("*.csv") if _is(name, p.stem)]
        frame = pd.read_csv(written)
        ours = frame[frame.task == "mean"].set_index("method").ours
        for row in rows:
            assert ours[[row in own for own in ours.index]].notna().any(), (name, row)
        if name != "latency":
            assert set(frame.task) == {*prompts.TASKS, "mean"}
    assert "to do" not in out  # the rows of language7_t5_large_full are those of latency
    assert set(hub.downloads.values()) == {1}
    assert not any("script" in file or file.endswith(".py") for _, file in hub.downloads)
    for name in ("language7_t5_base_full", "language7_t5_large_lora"):
        hub.requests.clear()
        assert "to do" not in make(name, *FEW)
        assert not hub.downloads


def test_a_shard_that_was_never_uploaded_is_told_from_the_names_alone(hub):
    files = {f"model-0000{i}-of-00003.safetensors": b"0" for i in (1, 3)}
    hub.model("some/model", files | {"model.safetensors.index.json": "{}"})
    found = requirements.of_folder("base", "some/model")
    assert "some/model has no file model-00002-of-00003.safetensors" in found.problem
    hub.model("some/model", files | {"model-00002-of-00003.safetensors": b"0"})
    assert requirements.of_folder("base", "some/model").problem == ""


def _is(name, stem):
    """Whether a file is of a table, whose name may go on after that of its configuration."""
    longer = {"actmat_later_language7": "_t5-base_full", "actmat_later_language7_large": "_full"}
    return stem == name + longer.get(name, "")


def test_what_a_t5_table_lacks_is_told_with_its_data(make, hub, tmp_path, monkeypatch):
    """Missing experts, Story Cloze, a gated data set and a shard that is not there, in one go."""
    language.add_language7(hub, tmp_path / "sets")
    line = ["language7_t5_base_full", "--dry-run", "paper.runs=['method=average']"]
    line += ["tasks=[paws,story_cloze,wsc]"]
    err = make(*line, code=2)
    assert "t5-base/**/paws/finetuned.pt is not there" in err
    assert "1Vc-cGalI9bE5M099x6t4XqGTN-YkQ0Lf" in err
    assert len(err.partition("error:")[2].strip().splitlines()) == 2  # what is wrong, what to do
    language.download_t5(tmp_path / "home/checkpoints", ["base"])
    err = make(*line, code=2)
    assert "Story Cloze has to be asked for" in err
    folder = tmp_path / "home/data/LSDSem/story_cloze"
    folder.mkdir(parents=True)
    assert "story_cloze has no data of task 'story_cloze'" in make(*line, code=2)
    language.cloze_folder(folder)
    paws = hub.repositories["datasets", "google-research-datasets/paws"]
    paws.gated = True
    assert "google-research-datasets/paws is gated" in make(*line, code=2)
    paws.gated = False
    with hub.without(paws, "labeled_final/test-00000-of-00001.parquet"):
        assert "paws has no file labeled_final/test-00000" in make(*line, code=2)
    with hub.offline():
        assert "cannot be reached: no network" in make(*line, code=2)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token" in make(*line, code=2)
    monkeypatch.delenv("HF_TOKEN")
    assert "has no revision 'v9'" in make(*line, "suite.data.wsc=aps/super_glue@v9", code=2)
    out = make(*line)
    assert re.search(r"data paws +│ google-research-datasets/paws +│ 3 ", out)
    assert "disk of" in out
    assert {file for _, file in hub.downloads} <= {"README.md", "config.json"}

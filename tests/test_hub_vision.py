"""Vision suites from the hub's stand-in, by the commands that people type, to the printed table."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.data import hub as hub_files
from eval.vision import models
from experiments import hydra_run, settings, suites
from experiments.settings import Experiment
from merging.errors import InputError
from tests.fixtures import hub_vision
from tests.fixtures.hub_vision import EIGHT
from tests.test_configs import composed

SMALL = ["suite.workers=0", "device=cpu"]


@pytest.fixture
def run(vision, tmp_path):
    """`experiments.run` with some overrides: its output, or its error where it must exit with 2.

    `run.records()` are the records that it made.
    """

    def call(*arguments, code=0):
        own = [f"records={tmp_path}/records", f"hydra.sweep.dir={tmp_path}/sweep", *SMALL]
        suites._suite.cache_clear()  # as in a new process
        found, out, err = vision.run("experiments.run", *own, *arguments)
        assert found == code, out + err
        return out if code == 0 else err

    def records():
        return [json.loads(p.read_text()) for p in (tmp_path / "records").glob("*/*.json")]

    call.records = records
    return call


def merged(record):
    """How many tensors went through the record's method."""
    return sum(n for rule, n in record["rules"].items() if rule.startswith(record["key"]["method"]))


def plain_accuracy(tower, task, head, name):
    """Share of the test images whose class is nearest: no cache, no batches, no suite."""
    fields = hub_vision.data_sets()[task]
    count = hub_vision.TEST
    pictures = hub_vision.pictures(100 * len(task) + 1)  # the seed of the second split, test
    labels = torch.tensor(hub_vision.labels(count, len(head)))
    assert fields.get("test", "test") == "test"
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    images = []
    for i in range(count):
        import io

        picture = Image.open(io.BytesIO(pictures[i % len(pictures)])).convert("RGB")
        pixels = torch.tensor(list(picture.getdata())).reshape(32, 32, 3).permute(2, 0, 1)
        images.append((pixels / 255 - mean) / std)
    model = models.build(f"{name}-quickgelu").visual.eval()
    model.load_state_dict(tower)
    with torch.no_grad():
        found = F.normalize(model(torch.stack(images)), dim=-1) @ head.T
    return (found.argmax(1) == labels).double().mean().item()


def test_fusionbench_from_an_empty_cache_to_the_table(run, vision):
    arguments = ["suite=vision8", "suite.model=ViT-B-32", "suite/checkpoints=fusionbench"]
    out = run(*arguments, "method=average")
    assert all(task in out for task in EIGHT)
    assert "mean" in out
    # every file once; of the data sets the test split alone, of nine in some repositories
    assert set(vision.downloads.values()) == {1}
    splits = {file for _, file in vision.downloads if file.endswith(".parquet")}
    assert splits == {
        f"{folder}/test-00000-of-00001.parquet" for folder in ("data", "cropped_digits")
    }
    scores = {r["key"]["method"]: r for r in run.records()}
    classes = tuple(n.replace("_", " ") for n in hub_vision.OWN_NAMES["dtd"])
    head = hub_vision.text_head("ViT-B-32", "dtd", classes)
    for method, tower in (
        ("zero_shot", hub_vision.whole("ViT-B-32").visual.state_dict()),
        ("experts", hub_vision.expert("ViT-B-32", "dtd")),
    ):
        expected = plain_accuracy(tower, "dtd", head, "ViT-B-32")
        assert scores[method]["scores"]["dtd"]["accuracy"] == pytest.approx(expected)
    assert (
        scores["zero_shot"]["scores"]["dtd"]["accuracy"]
        != scores["experts"]["scores"]["dtd"]["accuracy"]
    )
    # what was downloaded, by commit
    repository = vision.repositories["datasets", "tanganke/dtd"]
    assert scores["average"]["sources"]["datasets/tanganke/dtd"] == repository.commit
    assert len(scores["average"]["sources"]) == 8 + 8 + 1
    # a second call prints and asks for nothing
    vision.requests.clear()
    assert sorted(run(*arguments, "method=average").split("\n")) == sorted(out.split("\n"))
    assert not vision.requests
    # without a network what is here is enough for another method
    with vision.offline():
        run(*arguments, "method=task_arithmetic")


def test_another_data_set_template_or_class_name_is_another_run(run):
    arguments = ["suite=vision8", "suite.model=ViT-B-32", "suite/checkpoints=fusionbench"]
    arguments += ["tasks=[mnist]", "method=zero_shot"]
    run(*arguments)
    for change in (
        "suite.datasets.mnist.path=tanganke/kmnist",
        "suite.datasets.mnist.templates=['{}']",
        "+suite.class_names.mnist=stored",
        "protocol=paper",
    ):
        before = {json.dumps(r["key"], sort_keys=True) for r in run.records()}
        run(*arguments, change)
        after = {json.dumps(r["key"], sort_keys=True) for r in run.records()}
        assert len(after - before) == 2, change  # zero_shot, and experts behind it


def test_tall_with_its_own_heads(run, vision):
    """The heads' rows come in another order than our classes and are put right."""
    arguments = ["suite=vision20", "suite.model=ViT-L-14", "suite/checkpoints=tall"]
    arguments += ["suite/dataset@suite.datasets.emnist=emnist_digits", "method=zero_shot"]
    tasks = "tasks=[kmnist,fer2013,pets,cifar100,food101,flowers102,fashion_mnist,pcam]"
    run(*arguments, tasks)
    run(*arguments, tasks, "suite.heads=null")  # heads from TALL's class names
    made = [r for r in run.records() if r["key"]["method"] == "zero_shot"]
    assert len(made) == 2
    assert made[0]["scores"] == made[1]["scores"]
    assert {r["key"]["protocol"]["heads"][:12] for r in made} == {"class names", "nik-dim/tall"}
    heads = [file for _, file in vision.downloads if "head_" in file]
    assert len(heads) == 8
    assert "single_task/ViT-L-14/head_KMNISTVal.pt" in heads


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "fusionbench",
            {"fashion_mnist": "T - shirt / top", "cifar100": "aquarium_fish"}
            | {"pets": "american_bulldog"},
        ),
        ("finetuned", {"pets": "american bulldog", "fashion_mnist": "T-shirt/top"}),
        (
            "tall",
            {"pets": "American Bulldog", "cifar100": "aquarium_fish", "food101": "apple_pie"}
            | {"kmnist": "tsu", "fer2013": "['happy', 'smiling']", "flowers102": "air plant"},
        ),
        ("actmat", {"flowers102": "pink and yellow dahlia", "fashion_mnist": "T-shirt/top"}),
    ],
)
def test_class_names_belong_to_the_family(vision, family, expected):
    config = composed("experiment", "suite=vision20", f"suite/checkpoints={family}")
    suite = suites.load_suite(hydra_run.read_settings(Experiment, config).suite, "cpu")
    for task, name in expected.items():
        assert name in suite.backend._images(task).names


@pytest.mark.parametrize("new", [False, True])
def test_the_papers_own_experts_in_both_layouts(run, tmp_path, new):
    checkpoints = tmp_path / "home/checkpoints"
    hub_vision.download("actmat", checkpoints, "ViT-B-16", ["mnist", "dtd"], new=new)
    arguments = ["suite=vision8", "suite/checkpoints=actmat", "tasks=[mnist,dtd]"]
    for finetuning in ("full", "lora"):
        run(*arguments, "method=actmat", f"finetuning={finetuning}", "protocol=paper")
    made = {
        (r["key"]["method"], r["key"]["finetuning"]): r
        for r in run.records()
        if r["key"]["method"] != "zero_shot"
    }
    names = tuple(str(i) for i in range(10))
    for lora in (False, True):
        expected = plain_accuracy(
            hub_vision.expert("ViT-B-16", "mnist", lora),
            "mnist",
            hub_vision.text_head("ViT-B-16", "mnist", names),
            "ViT-B-16",
        )
        record = made["experts", "lora" if lora else "full"]
        assert record["scores"]["mnist"]["accuracy"] == pytest.approx(expected)
    # four matrices a block, proj and the positional embedding go through the method
    assert merged(made["actmat", "full"]) == 4 * 2 + 2


def test_ilharcos_experts(run, tmp_path):
    checkpoints = tmp_path / "home/checkpoints"
    hub_vision.download("ilharco", checkpoints, "ViT-B-32", ["mnist", "dtd"])
    arguments = ["suite=vision8", "suite.model=ViT-B-32", "suite/checkpoints=ilharco"]
    assert "tsv m" in run(*arguments, "tasks=[mnist,dtd]", "method=tsv_m", "split_qkv=false")
    (record,) = [r for r in run.records() if r["key"]["method"] == "tsv_m"]
    assert record["key"]["split_qkv"] is False


def test_checkpoints_that_are_not_there_name_what_is_downloaded(run):
    err = run("suite=vision8", "suite/checkpoints=actmat", "method=actmat", code=2)
    assert "1Vc-cGalI9bE5M099x6t4XqGTN-YkQ0Lf" in err
    assert "/SUN397Val/finetuned.pt" in err
    assert len(err.strip().splitlines()) == 2


# --- protocol=paper -------------------------------------------------------------------------------


def test_what_the_paper_averages_is_averaged_for_task_arithmetic_too(run, vision):
    arguments = ["suite=vision8", "suite.model=ViT-B-32", "suite/checkpoints=fusionbench"]
    arguments += ["tasks=[mnist,dtd]", "method=task_arithmetic"]
    run(*arguments)
    run(*arguments, "protocol=paper")
    made = {
        r["key"]["protocol"]["name"]: r
        for r in run.records()
        if r["key"]["method"] == "task_arithmetic"
    }
    assert "average" not in made["ours"]["rules"]
    assert merged(made["paper"]) == 4 * 2 + 2
    assert made["paper"]["rules"]["average"] > 0


def test_regmean_averages_what_no_module_reads(run):
    arguments = ["suite=vision8", "suite.model=ViT-B-32", "suite/checkpoints=fusionbench"]
    run(*arguments, "tasks=[mnist,dtd]", "method=regmean", "protocol=paper")
    (record,) = [r for r in run.records() if r["key"]["method"] == "regmean"]
    assert merged(record) == 4 * 2
    assert record["key"]["statistics"] == {"batches": 10, "batch_size": 32}


def test_the_papers_lora_moves_in_proj_alone(run, vision):
    arguments = ["suite=vision8", "suite.model=ViT-B-32", "suite/checkpoints=finetuned"]
    arguments += ["tasks=[mnist]", "method=experts", "finetuning=lora", "protocol=paper"]
    recipe = "suite.recipes.paper_lora"
    run(*arguments, f"{recipe}.epochs=null", f"+{recipe}.steps=2", f"{recipe}.batch_size=4")
    from eval.cache import cache_root
    from merging.formats.checkpoints import open_checkpoint

    (folder,) = (cache_root() / "experts").glob("[!.]*")
    adapter = open_checkpoint(folder)
    moved = {name for name in adapter.keys() if adapter.delta(name).abs().max() > 0}
    assert moved == {f"transformer.resblocks.{i}.attn.in_proj_weight" for i in range(2)}


def test_the_papers_lora_has_as_many_parameters_as_its_log_says():
    from eval import training

    with torch.device("meta"):
        tower = models.build("ViT-B-16").visual
        model = training.add_lora(tower, models.lora_targets(tower, "in_proj"), 16, 16)
    models.freeze_all_but_packed(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 589_824


# --- refusals -------------------------------------------------------------------------------------

ASK = ["suite=vision8", "suite.model=ViT-B-32", "suite/checkpoints=fusionbench", "tasks=[mnist]"]


def test_every_refusal_of_the_hub_is_one_sentence_of_its_own(run, vision, monkeypatch):
    expert = vision.repositories["models", "tanganke/clip-vit-base-patch32_mnist"]
    said = {}

    def refused(name, *more):
        said[name] = run(*ASK, "method=average", *more, code=2)
        assert len(said[name].strip().splitlines()) <= 2, said[name]
        assert "Traceback" not in said[name]

    with vision.offline():
        refused("no network")
    expert.gated = True
    refused("gated")
    expert.gated = False
    with vision.without(expert, "model.safetensors"):
        refused("missing file")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("wrong token")
    monkeypatch.delenv("HF_TOKEN")
    refused("revision", "suite.experts.revision=v9")
    refused("data revision", "suite.datasets.mnist.revision=v9")
    refused("repository", "suite.experts.hub=tanganke/nothing")
    assert "no network" in said["no network"]
    assert "licence" in said["gated"]
    assert "has no file model.safetensors" in said["missing file"]
    assert "does not accept the token" in said["wrong token"]
    assert "has no revision 'v9'" in said["revision"]
    assert "ylecun/mnist has no revision 'v9'" in said["data revision"]
    assert "no repository tanganke/nothing" in said["repository"]
    assert len(set(said.values())) == len(said)


def test_a_split_or_configuration_that_is_not_there(vision):
    with pytest.raises(InputError, match="has no split 'tests'") as caught:
        hub_files.rows("ylecun/mnist", None, "main", "tests")
    assert "train, test" in caught.value.hint
    with pytest.raises(InputError, match="BuilderConfig 'big' not found"):
        hub_files.rows("ylecun/mnist", "big", "main", "test")


# --- work shared between processes ----------------------------------------------------------------


def test_workers_decode_the_same_pixels(vision, monkeypatch):
    import numpy as np

    from eval.vision import data

    monkeypatch.setattr(data, "CHUNK", 4)
    images = data.ImageSet(**hub_vision.data_sets()["mnist"])
    preprocess = models.preprocessing("ViT-B-32")
    alone = np.array(data.pixels(images, "train", preprocess).images)
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(vision) and str(data.cache_root()) + "-2")
    shared = data.pixels(images, "train", preprocess, workers=2).images
    assert np.array_equal(alone, shared)


@pytest.mark.parametrize(
    ("launcher", "number", "expected"),
    [
        ("BasicLauncher", 3, "cuda"),
        ("JoblibLauncher", 3, "cuda:1"),
        ("JoblibLauncher", 4, "cuda:0"),
    ],
)
def test_launchers_jobs_take_the_gpus_in_turn(monkeypatch, launcher, number, expected):
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    config = OmegaConf.create({"launcher": {"_target_": f"x.{launcher}"}, "job": {"num": number}})
    config.mode = RunMode.MULTIRUN
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(settings.HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(settings.HydraConfig, "get", staticmethod(lambda: config))
    assert settings.resolve_device("auto") == expected


def test_the_first_lines_of_a_refusal_name_no_python(run):
    err = run(*ASK, "method=average", "suite.experts.hub=tanganke/nothing", code=2)
    assert not re.search(r"Error\b|Exception", err.replace("error:", ""))

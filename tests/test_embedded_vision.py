"""The embedded vision suite's sources and pre-training; its figures are in results/."""

import csv
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

import merging
from eval.data import images
from eval.data.images import FONTS, PARTS
from eval.suite import Suite
from eval.vision import pretrain
from eval.vision.data import ImageSet, pixels
from eval.vision.suite import VisionBackend
from merging.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"


def configuration(name="embedded_vision"):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("experiment", [f"suite={name}"]).suite
    config = OmegaConf.to_container(config, resolve=True)
    return {k: v for k, v in config.items() if k != "kind"}


@pytest.fixture(scope="module")
def digits():
    """The suite with its smallest task alone, three steps of each kind of training."""
    config = configuration()
    config["datasets"] = {"digits": config["datasets"]["digits"]}
    config["shots"] = None
    config["pretraining"]["steps"] = config["recipes"]["full"]["steps"] = 3
    return Suite(VisionBackend(**config))


def test_at_least_six_tasks_of_real_images():
    suite = VisionBackend(**configuration())
    drawn = {"letters"}
    assert len(set(suite.tasks) - drawn) >= 6
    assert all(f["path"].split(":")[1] in images.TASKS for f in suite.datasets.values())


def test_committed_experts_are_far_above_zero_shot_and_merge():
    with (CONFIGS.parent / "results/embedded_vision/table.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file) if row["finetuning"] == "full"}
    real = set(configuration()["datasets"]) - {"letters"}
    means = {row: sum(float(found[task]) for task in real) / 6 for row, found in rows.items()}
    assert int(rows["experts"]["seeds"]) >= 3
    assert means["experts"] > means["zero_shot"] + 15
    assert means["actmat"] > means["average"] > means["zero_shot"] + 2


def test_unknown_package_is_refused():
    with pytest.raises(InputError, match="unknown data set package:fashion"):
        ImageSet("package:fashion").rows("test")


def test_pickle_of_arrays_admits_arrays_only():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(images._numpy_pickle(pickle.dumps(array)), array)
    for hostile in (Path("x"), print, np.load):
        with pytest.raises(InputError, match="a pickle of arrays asks for"):
            images._numpy_pickle(pickle.dumps([array, hostile]))


def test_no_font_family_is_in_two_parts():
    families = [{name[:5].lower() for name in FONTS[part]} for part in PARTS]
    # Computer Modern's roman is in one part, its sans serif and typewriter in another
    assert families == [{"dejav", "cmr10", "cmb10", "cmti1"}, {"cmss1", "cmtt1"}, {"stixg"}]


def test_surfaces_of_a_part_come_from_a_band_of_their_own():
    parts = images._surfaces()
    assert {k: len(v[0]) for k, v in parts.items()} == {
        "train": 3200,
        "validation": 600,
        "test": 1000,
    }
    assert all(x.shape == (32, 32) and x.dtype == np.uint8 for x in parts["test"][0])
    assert np.bincount(parts["test"][1]).tolist() == [125] * 8


def test_letters_can_be_told_from_their_paper():
    rng = np.random.default_rng(0)
    drawn = [images._letter("DejaVuSans", "M", rng) for _ in range(20)]
    assert all(np.ptp(x.astype(int)) > 40 for x in drawn)


def test_splits_are_disjoint_and_complete():
    pictures = [np.full((2, 2), i, np.uint8) for i in range(50)]
    parts = images._split(pictures, range(50))
    assert {k: len(v[1]) for k, v in parts.items()} == {"test": 10, "validation": 5, "train": 35}
    assert sorted(label for _, labels in parts.values() for label in labels) == list(range(50))
    assert all(x[0, 0] == y for xs, ys in parts.values() for x, y in zip(xs, ys, strict=True))


def test_digits_are_scikit_learns(digits):
    data = digits.backend._images("digits")
    assert {p: len(data.rows(p)) for p in PARTS} == {"train": 1079, "validation": 179, "test": 539}
    assert data.names == list("0123456789")


@pytest.mark.parametrize(("name", "count"), [("mnist", 5000), ("silhouettes", 10_000)])
def test_packages_hold_what_they_should(name, count):
    data = ImageSet(f"package:{name}", validation="validation")
    labels = torch.cat([data.labels(part) for part in PARTS])
    assert labels.bincount().tolist() == [count // 10] * 10
    images = pixels(data, "validation", vision_packages_size()).images
    assert images.shape == (count // 10, 3, 32, 32)
    assert (images[:, 0] == images[:, 1]).all()  # grey
    assert images.std() > 50


def vision_packages_size():
    from eval.vision.models import preprocessing

    return preprocessing("ViT-S-8-32px")


def test_pretraining_sees_some_classes_of_the_training_split(digits):
    rows, labels, weights = pretrain._mixture(digits.backend._sets, every=2)
    data = digits.backend._images("digits")
    own = data.labels("train")
    assert len(rows) == len(labels) == int((own % 2 == 0).sum())
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert rows.column_names == ["image"]
    assert weights.sum().item() == pytest.approx(len(rows) ** 0.5, rel=1e-5)


def test_base_is_pre_trained_once_and_named_by_its_recipe(digits):
    first = digits.backend._base_path
    again = Suite(replace(digits.backend))
    assert again.backend._base_path == first
    longer = {**digits.backend.pretraining, "steps": 4}
    other = replace(digits.backend, pretraining=longer)
    assert other.base_key != digits.backend.base_key


def test_heads_are_the_class_means_under_the_base(digits):
    images, labels = pixels(
        digits.backend._images("digits"), "train", digits.backend._preprocessing
    )
    digits.backend.load(digits.base())
    embedded = digits.backend._embed(np.array_split(images, 5))
    assert torch.allclose(embedded.norm(dim=1), torch.ones(len(images)), atol=1e-5)
    means = torch.stack([embedded[labels == c].double().mean(0) for c in range(10)])
    torch.testing.assert_close(
        digits.backend._head("digits").double(), F.normalize(means, dim=1), atol=1e-5, rtol=0
    )


def test_heads_of_few_shots_are_the_means_of_those(digits):
    few = Suite(replace(digits.backend, shots=2))
    images, labels = pixels(few.backend._images("digits"), "train", few.backend._preprocessing)
    few.backend.load(few.base())
    for c, row in enumerate(few.backend._head("digits")):
        chosen = (labels == c).nonzero().flatten()[:2]
        mean = few.backend._embed([images[chosen.numpy()]]).mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=0)
    keys = [s.identity(finetuning="full", seed=0)["experts"]["digits"] for s in (digits, few)]
    assert keys[0] != keys[1]


def test_an_expert_merges_and_scores(digits):
    state = load_file(digits.expert("digits", finetuning="full", seed=0))
    merged = merging.merge_state_dicts(
        digits.base(), {"digits": state}, merging.create("average"), layers=digits.layers()
    )
    assert all(torch.allclose(merged[k], state[k], atol=1e-6) for k in state)
    score = digits.evaluate(merged, "validation", limit=50)["digits"]
    assert score.count == 50 and 0 <= score.accuracy <= 1


def test_a_resnets_convolutions_merge_and_its_norms_stay_the_bases():
    config = configuration("embedded_cnn")
    config["datasets"] = {"digits": config["datasets"]["digits"]}
    config["pretraining"]["steps"] = config["recipes"]["full"]["steps"] = 2
    suite = Suite(VisionBackend(**config))
    base, own = suite.base(), {"finetuning": "full", "seed": 0}
    expert = load_file(suite.expert("digits", **own))
    norms = {name for name in base if re.search(r"bn\d|downsample\.1", name)}
    assert any(name.endswith("running_var") for name in norms)
    assert all(torch.equal(base[name], expert[name]) for name in norms)
    layers = suite.layers()
    assert layers["layer2.0.conv2.weight"].kernel == (3, 3)
    assert not any(torch.equal(base[name], expert[name]) for name in layers)
    assert suite.unmeasured == {f"attnpool.{x}_proj.weight" for x in "qkvc"}
    half = {name: (base[name] + tensor) / 2 for name, tensor in expert.items()}
    merged = merging.merge_state_dicts(
        base, {"a": expert, "b": half}, merging.create("task_arithmetic", alpha=1), layers=layers
    )
    assert all(torch.equal(base[name], merged[name]) for name in norms)
    name = "layer2.0.conv2.weight"
    torch.testing.assert_close(merged[name] - base[name], 1.5 * (expert[name] - base[name]))
    moments = load_file(suite.statistics("digits", "covariance", **own, batches=1, batch_size=8))
    assert moments["layer2.0.conv2.weight"].shape == (9 * 48, 9 * 48)
    assert set(moments) == set(layers) - suite.unmeasured

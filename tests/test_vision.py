"""Vision suites on made-up image folders and random CLIP weights: data, heads, experts, scores."""

import re
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file

import merging
from eval import training
from eval.recipes import Recipe
from eval.statistics import second_moments
from eval.suite import Suite
from eval.vision import data as vision_data
from eval.vision import heads, models
from eval.vision.data import ImageSet, pixels, training_batches
from eval.vision.suite import VisionBackend
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from tests.images import COLOURS, image_folder

CONFIGS = Path(__file__).parents[1] / "configs"
PREPROCESS = PreprocessCfg(size=32)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODEL_MERGING_CHECKPOINTS", str(tmp_path))


@pytest.fixture
def suite(tmp_path):
    """Two tasks of coloured noise on a CLIP with random weights, by the code of ViT-B/32."""
    model = models.build("ViT-S-8-32px-quickgelu", seed=5)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors")
    recipe = {"lr": 1e-3, "batch_size": 8, "steps": 30, "warmup_steps": 3}
    backend = VisionBackend(
        name="colours",
        family="random",
        model="ViT-S-8-32px",
        clip={"local": "clip.safetensors"},
        datasets={
            "bright": {"path": str(image_folder(tmp_path / "bright"))},
            "two": {"path": str(image_folder(tmp_path / "two", ("up", "down"), seed=1))},
        },
        recipes={"full": recipe, "lora": recipe | {"r": 2, "alpha": 4}},
    )
    return Suite(backend)


def full(suite, seed=0):
    return {t: load_file(suite.expert(t, finetuning="full", seed=seed)) for t in suite.tasks}


# --- data -----------------------------------------------------------------------------------------


def test_validation_is_cut_from_training_data(tmp_path):
    data = ImageSet(str(image_folder(tmp_path / "d")), held_out=0.25)
    whole = [row["image"]["bytes"] for row in data._split("train")]
    train, validation = (
        [row["image"]["bytes"] for row in data.rows(p)] for p in ("train", "validation")
    )
    assert (len(train), len(validation)) == (30, 10)
    assert sorted(train + validation) == sorted(whole)
    assert len(data.rows("test")) == 12


def test_cached_pixels_are_open_clips_preprocessing_exactly(tmp_path):
    data = ImageSet(str(image_folder(tmp_path / "d")))
    images, labels = pixels(data, "test", PREPROCESS)
    assert images.dtype == np.uint8 and images.shape == (12, 3, 32, 32)
    assert labels.tolist() == [i % 3 for i in range(12)]
    transform = image_transform_v2(PREPROCESS, is_train=False)
    rows = data.rows("test")
    expected = torch.stack([transform(vision_data.decode(row, "image", "")) for row in rows])
    found = vision_data.normalise(images, PREPROCESS, "cpu")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_pixels_are_decoded_once(tmp_path, monkeypatch):
    data = ImageSet(str(image_folder(tmp_path / "d")))
    first, _ = pixels(data, "test", PREPROCESS)
    monkeypatch.setattr(vision_data, "decode", None)  # a second decoding would fail
    again, _ = pixels(data, "test", PREPROCESS)
    assert np.array_equal(first, again)


def test_class_names_come_from_the_data_unless_given(tmp_path):
    path = str(image_folder(tmp_path / "d", ("tabby_cat", "dog")))
    assert ImageSet(path).names == ["tabby cat", "dog"]
    assert ImageSet(path, classes=["a", "b"]).names == ["a", "b"]


def test_head_that_does_not_match_its_data_is_refused(tmp_path):
    path = str(image_folder(tmp_path / "d"))
    with pytest.raises(InputError, match=r"has 2 classes, the data set has 3"):
        ImageSet(path, classes=["a", "b"]).labels("test")


def test_labels_beyond_the_head_are_refused(tmp_path):
    folder = image_folder(tmp_path / "d")
    for part in ("train", "test"):
        path = str(folder / f"{part}.parquet")
        rows = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "hf"))
        rows.cast_column("label", datasets.Value("int64")).to_parquet(path)
    data = ImageSet(str(folder), classes=["a", "b"])
    with pytest.raises(InputError, match=r"labels from 0 to 2, its head has 2 classes"):
        data.labels("test")


def test_image_that_cannot_be_decoded_is_named():
    with pytest.raises(InputError, match=r"image 7 of split 'test' of cars cannot be decoded"):
        row = {"image": {"bytes": b"\x89PNG no more", "path": None}}
        vision_data.decode(row, "image", "image 7 of split 'test' of cars")


def test_absent_column_and_split_are_named(tmp_path):
    path = str(image_folder(tmp_path / "d"))
    with pytest.raises(InputError, match=r"no column 'img', it has: image, label"):
        ImageSet(path, image="img").rows("test")
    with pytest.raises(InputError, match=r"split 'dev' of data set .* is not to be had"):
        ImageSet(path, test="dev").rows("test")


def test_data_set_that_is_nowhere_says_where_to_put_it(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        ImageSet("./no/such/folder").rows("test")
    assert "MODEL_MERGING_DATA" in caught.value.hint


def test_local_copies_of_hub_data_are_found(tmp_path, monkeypatch):
    image_folder(tmp_path / "data" / "owner" / "name")
    monkeypatch.setenv("MODEL_MERGING_DATA", str(tmp_path / "data"))
    assert len(ImageSet("owner/name").rows("test")) == 12


@pytest.mark.parametrize("templates", [[], ["a photo."], ["{} and {}"]])
def test_templates_name_the_class_once(templates):
    with pytest.raises(InputError, match="templates"):
        ImageSet("d", templates=templates)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_batch_is_a_function_of_its_number(tmp_path, workers):
    data = ImageSet(str(image_folder(tmp_path / "d")))
    order = vision_data.epochs(len(data.rows("train")), steps=6, batch_size=4, seed=3)
    made = [
        training_batches(
            data.rows("train"),
            data.labels("train"),
            PREPROCESS,
            order=order,
            batch_size=4,
            crop_scale=(0.5, 1.0),
            seed=3,
            workers=w,
        )
        for w in (0, workers)
    ]
    whole, rest = list(made[0](0)), list(made[1](4))
    assert len(whole) == 6
    for (x, y), (again, labels) in zip(whole[4:], rest, strict=True):
        assert torch.equal(x, again) and torch.equal(y, labels)


def test_every_epoch_sees_every_image():
    order = vision_data.epochs(10, steps=5, batch_size=4, seed=0)
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))


# --- the suite ------------------------------------------------------------------------------------


def test_scores_are_cosines_with_the_text_head(suite):
    state, tower = suite.base(), models.build("ViT-S-8-32px-quickgelu").visual.eval()
    tower.load_state_dict(state)
    data = suite.backend._images("bright")
    x = vision_data.normalise(pixels(data, "test", PREPROCESS).images, PREPROCESS, "cpu")
    head = heads.text_head(
        suite.backend._clip.path(),
        suite.backend.architecture,
        list(COLOURS),
        ["a photo of a {}."],
    )
    with torch.no_grad():
        predicted = (F.normalize(tower(x), dim=-1) @ head.T).argmax(1)
    expected = (predicted == data.labels("test")).double().mean().item()
    score = suite.evaluate(state, "test", ["bright"])["bright"]
    assert score[:3] == (expected, 12, len(predicted.unique()) == 1)


def test_evaluation_of_a_few_images_counts_them(suite):
    assert suite.evaluate(suite.base(), "test", limit=5)["two"].count == 5


def test_fine_tuning_fits_its_task(suite):
    before = suite.evaluate(suite.base(), "test")
    for task, state in full(suite).items():
        assert suite.evaluate(state, "test", [task])[task].accuracy > before[task].accuracy


def test_lora_experts_are_adapters_of_every_linear_layer(suite):
    folder = suite.expert("bright", finetuning="lora", seed=0)
    adapter = open_checkpoint(folder)
    assert set(adapter.keys()) == set(suite.layers())
    assert all(adapter.rank(name) == 2 for name in adapter.keys())
    merged = merging.merge_state_dicts(
        suite.base(), {"bright": adapter}, merging.create("average"), layers=suite.layers()
    )
    expected = training.expert_state(suite.base(), folder)
    assert all(torch.allclose(merged[k], expected[k], atol=1e-6) for k in expected)


def test_adapters_start_from_one_random_matrix_or_each_from_its_own(suite):
    own = Suite(replace(suite.backend, adapter_seeds="independent"))

    def starts(suite, tasks):
        model = suite.training(tasks, finetuning="lora", seed=0).model
        named = model.named_parameters()
        return torch.cat([p.detach().flatten() for n, p in named if "lora_A" in n])

    shared = starts(suite, ["bright"])
    assert torch.equal(shared, starts(suite, ["two"]))
    assert not torch.isclose(starts(own, ["bright"]), starts(own, ["two"])).any()
    assert torch.equal(starts(own, ["bright", "two"]), shared)  # one model of all has one anyway
    for finetuning, same in (("full", True), ("lora", False)):
        names = [s.identity(finetuning=finetuning, seed=0)["experts"] for s in (suite, own)]
        assert all((names[0][task] == names[1][task]) is same for task in suite.tasks)


def test_experts_depend_on_what_they_are_made_of(suite):
    def key(task="bright", finetuning="full", seed=0):
        return suite.identity(finetuning=finetuning, seed=seed)["experts"][task]

    assert key() == key()
    assert len({key(), key(seed=1), key(finetuning="lora"), key(task="two")}) == 4


def test_published_experts_are_converted_and_lora_refused(suite, tmp_path):
    save_file({f"visual.{k}": v for k, v in suite.base().items()}, tmp_path / "bright.safetensors")
    experts = {"experts": {"local": "{task}.safetensors"}, "task_names": {"two": "bright"}}
    published = Suite(VisionBackend(**vars_of(suite) | experts))
    for task in published.tasks:
        found = load_file(published.expert(task, finetuning="full", seed=0))
        assert all(torch.equal(found[k], v) for k, v in suite.base().items())
    with pytest.raises(InputError, match="the random family publishes no LoRA experts"):
        published.expert("bright", finetuning="lora", seed=0)


def vars_of(suite):
    return {name: getattr(suite.backend, name) for name in suite.backend.__dataclass_fields__}


def test_unknown_task_and_contradictory_settings(suite):
    with pytest.raises(InputError, match="no task 'cars'"):
        suite.evaluate(suite.base(), "test", ["cars"])
    with pytest.raises(InputError, match="either clip or pretraining"):
        VisionBackend(**vars_of(suite) | {"clip": None})
    with pytest.raises(InputError, match="either steps or epochs"):
        Recipe(lr=1.0, batch_size=1)
    with pytest.raises(InputError, match="no recipe for finetuning 'lora'"):
        recipes = {"full": suite.backend.recipes["full"]}
        Suite(VisionBackend(**vars_of(suite) | {"recipes": recipes})).expert(
            "two", finetuning="lora", seed=0
        )


def test_state_of_another_model_is_refused(suite):
    state = suite.base() | {"proj": torch.zeros(3, 3)}
    with pytest.raises(InputError, match="'proj'"):
        suite.evaluate(state, "test")


def test_recipe_lengths():
    recipe = Recipe(lr=1e-5, batch_size=128, epochs={"cars": 35, "svhn": 4})
    assert recipe.length("cars", 7330) == round(35 * 7330 / 128)
    assert Recipe(lr=1e-5, batch_size=128, steps=7).length("cars", 7330) == 7


# --- merged models and statistics -----------------------------------------------------------------


@pytest.mark.parametrize("split_qkv", [True, False])
def test_merged_tower_equals_the_one_rebuilt_by_hand(suite, split_qkv):
    base, experts, method = suite.base(), full(suite), merging.create("iso_c")
    merged = merging.merge_state_dicts(
        base, experts, method, layers=suite.layers(), split_qkv=split_qkv
    )
    rebuilt = {}
    for name, W0 in base.items():
        deltas = torch.stack([experts[task][name] - W0 for task in suite.tasks])
        if name in suite.layers():
            parts = 3 if split_qkv and name.endswith("in_proj_weight") else 1
            delta = torch.cat([method(block) for block in deltas.chunk(parts, 1)])
        else:
            delta = deltas.mean(0)
        rebuilt[name] = W0 + delta
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for state in (merged, rebuilt):
        tower = models.build(suite.backend.architecture).visual.eval()
        tower.load_state_dict(state)
        with torch.no_grad():
            outputs.append(tower(x))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def attention_inputs(block, x):
    """Inputs of a block's four kinds of linear layer, by the definition of attention, float64."""
    y = block.ln_1(x)
    heads, width = block.attn.num_heads, y.shape[-1]
    q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, -1)
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    weights = (q @ k.mT / (width // heads) ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    x = x + mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    hidden = block.ln_2(x)
    inner = block.mlp.gelu(block.mlp.c_fc(hidden))
    return {
        "attn.in_proj_weight": y,
        "attn.out_proj.weight": mixed,
        "mlp.c_fc.weight": hidden,
        "mlp.c_proj.weight": inner,
    }, x + block.mlp.c_proj(inner)


def test_moments_of_every_layer_inside_the_fused_attention(suite):
    tower = models.build(suite.backend.architecture).visual.double().eval()
    tower.load_state_dict(suite.base())
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tower(x)
        moments = second_moments(tower, x.split(2), suite.layers())
        after = tower(x)
        hidden = tower._embeds(x)  # tokens after the embedding and ln_pre
        for i, block in enumerate(tower.transformer.resblocks):
            inputs, hidden = attention_inputs(block, hidden)
            for name, z in inputs.items():
                rows = z.flatten(0, 1)
                found = moments.pop(f"transformer.resblocks.{i}.{name}")
                expected = (rows.T @ rows / len(rows)).float()
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not moments  # and nothing else
    assert torch.equal(before, after)


def test_regmean_equals_a_direct_solve_from_recorded_inputs(suite):
    experts = full(suite)
    settings = {"finetuning": "full", "seed": 0, "batches": 1, "batch_size": 16}
    measured = {t: load_file(suite.statistics(t, "covariance", **settings)) for t in suite.tasks}
    merged = merging.merge_state_dicts(
        suite.base(),
        experts,
        merging.create("regmean", gram_scale=1.0),
        layers=suite.layers(),
        statistics=measured,
    )
    name, N, S = "transformer.resblocks.1.mlp.c_fc.weight", 0, 0
    W0 = suite.base()[name].double()
    for task, state in experts.items():
        tower = models.build(suite.backend.architecture).visual.eval()
        tower.load_state_dict(state)
        recorded = []
        layer = tower.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda m, args, out=recorded: out.append(args[0]))
        (images,) = suite.backend.sample(task, 16, 16)
        with torch.no_grad():
            tower(images)
        z = recorded[0].flatten(0, -2).double()
        C = z.T @ z / len(z)
        N, S = N + (state[name].double() - W0) @ C, S + C
    # as many activations as there are, S is ill-conditioned: compare what the layer does on them
    error = ((merged[name].double() - W0) @ S - N).norm() / N.norm()
    assert error < 1e-2


def test_kfac_regmean_takes_both_factors_of_every_layer(suite):
    own = {"finetuning": "full", "seed": 0}
    base, experts = suite.base(), {task: suite.expert(task, **own) for task in suite.tasks}
    files = {t: suite.statistics(t, "kfac", **own, batches=2, batch_size=4) for t in suite.tasks}
    merged = merging.merge_state_dicts(
        base,
        {task: training.expert_state(base, path) for task, path in experts.items()},
        merging.create("kfac_regmean"),
        layers=suite.layers(),
        statistics={task: load_file(path) for task, path in files.items()},
    )
    assert set(load_file(files["two"])) == {
        name + side for name in suite.layers() for side in ("", merging.method.registry.OUTPUTS)
    }
    assert not torch.equal(
        merged["transformer.resblocks.0.attn.in_proj_weight"],
        base["transformer.resblocks.0.attn.in_proj_weight"],
    )
    assert suite.evaluate(merged, "test")["two"].accuracy > 0.5


def test_fisher_has_every_parameter_of_the_tower(suite):
    path = suite.statistics("two", "fisher", finetuning="full", seed=0, batches=1, batch_size=3)
    fisher, base = load_file(path), suite.base()
    assert {k: v.shape for k, v in fisher.items()} == {k: v.shape for k, v in base.items()}
    assert all((v >= 0).all() for v in fisher.values())
    with pytest.raises(InputError, match=r"has 36 training images, .* 10 x 32"):
        suite.statistics("two", "fisher", finetuning="full", seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_evaluation_agrees_with_float32(suite):
    on_gpu = Suite(VisionBackend(**vars_of(suite) | {"device": "cuda"}))
    for task, state in full(suite).items():
        expected = suite.evaluate(state, "test", [task])[task].accuracy
        found = on_gpu.evaluate(state, "test", [task])[task].accuracy
        assert found == pytest.approx(expected, abs=0.001)


# --- configs --------------------------------------------------------------------------------------


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("experiment", list(overrides)).suite
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize(("name", "count"), [("vision8", 8), ("vision14", 14), ("vision20", 20)])
@pytest.mark.parametrize("family", ["finetuned", "fusionbench", "tall", "actmat"])
def test_suites_compose_for_every_model_and_family(name, count, family):
    hubs = {"ViT-B-32": "clip-vit-base-patch32", "ViT-L-14": "clip-vit-large-patch14"}
    for model, hub in hubs.items():
        config = composed(f"suite={name}", f"suite.model={model}", f"suite/checkpoints={family}")
        assert config.pop("kind") == "vision"
        suite = VisionBackend(**config)
        assert len(suite.tasks) == count
        assert suite.name == f"{name}_{model}_{suite.family}"
        assert set(suite.tasks) <= set(suite.recipes["full"]["epochs"])
        assert suite.architecture == f"{model}-quickgelu"
        size, patch = re.fullmatch(r"clip-vit-(\w+)-patch(\d+)", hub).groups()
        timm = f"timm/vit_{size}_patch{patch}_clip_224.openai"
        assert suite._clip.hub == timm
        published = suite._published.expert("cars", "full")
        if family == "fusionbench":
            assert published.hub == f"tanganke/{hub}_stanford-cars"
        elif family == "finetuned":
            assert published is None
        elif family == "actmat":
            assert published.local == f"actmat/**/{model}/**/CarsVal/finetuned.pt"
            lora = suite._published.expert("cars", "lora")
            assert lora.local == f"actmat/**/{model}/**/CarsVal/lora_finetuned.pt"
        else:
            assert published.hub == "nik-dim/tall_masks"
            file = f"{model}/CarsVal/nonlinear_finetuned.pt"
            assert published.file == f"single_task/{file}"
            assert published.local == f"tall/**/{file}"
            assert suite.base_tower is None  # its base is OpenAI's
        for task, fields in config["datasets"].items():
            assert ImageSet(**fields).templates, task


def test_ilharcos_family_has_the_eight_tasks():
    config = composed("suite=vision8", "suite/checkpoints=ilharco")
    assert set(config["task_names"]) == set(config["datasets"])


def test_the_families_that_know_emnists_digits_are_given_them():
    digits = "suite/dataset@suite.datasets.emnist=emnist_digits"
    for overrides, classes in (([], 26), ([digits], 10)):
        config = composed("suite=vision20", "suite/checkpoints=tall", *overrides)
        assert len(config["datasets"]["emnist"]["classes"]) == classes


@pytest.mark.parametrize(
    ("name", "count"),
    [("gtsrb", 43), ("flowers102", 102), ("eurosat", 10), ("emnist", 26), ("fer2013", 7)],
)
def test_class_names_written_here_are_complete_and_distinct(name, count):
    fields = OmegaConf.load(CONFIGS / "suite" / "dataset" / f"{name}.yaml")
    assert len(fields.classes) == len(set(fields.classes)) == count

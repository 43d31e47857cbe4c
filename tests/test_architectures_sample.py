"""A sample of the sweep over model types: see `python -m tests.sweep_architectures` for all."""

import pytest

from tests import sweep_architectures as sweep

SAMPLE = [
    "bert", "clip", "cohere", "deepseek_v3", "detr", "gemma", "gemma3", "gpt_oss", "granitemoe",
    "internvl", "jamba", "jina_embeddings_v3", "llama4", "llava", "mixtral", "nomic_bert",
    "olmoe", "paligemma", "phi3", "qwen2_5_vl", "qwen2_moe", "qwen3_vl_moe", "sam2", "swin",
    "t5", "whisper",
]  # fmt: skip


@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_method_reaches_a_model_as_its_files_name_it(model_type):
    pytest.importorskip("transformers")
    found = sweep.transformers_reach(model_type, through_folder=True)
    assert found.share > sweep.LIMIT, found


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_the_method_reaches_timms_models(name):
    assert sweep.timm_reach(name).share > sweep.LIMIT


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "convnext_base"])
def test_the_method_reaches_open_clips_models(name):
    assert sweep.open_clip_reach(name).share > sweep.LIMIT


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_the_method_reaches_diffusers_models(name):
    pytest.importorskip("diffusers")
    assert sweep.diffusers_reach(name).share > sweep.LIMIT


def test_what_is_left_is_counted_with_its_reason():
    from merging.layers.choice import Choice
    from merging.layers.layout import Layer

    shapes = {"a.weight": (4, 4), "b.weight": (2, 2), "wte.weight": (9, 4), "head.weight": (3, 4),
              "bias": (4,)}  # fmt: skip
    choice = Choice({"a.weight": Layer()}, {"b.weight": "why", "head.weight": "output head"})
    found = sweep.reach(shapes, choice)
    assert found == (16 / 20, 20, {"why": 4}, "b.weight [2, 2]")

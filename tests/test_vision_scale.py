"""Towers at the shapes of the paper's models, weights drawn here: files to scores."""

import json
import os

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from eval.suite import Suite
from eval.vision import models
from eval.vision.models import tower_state
from eval.vision.suite import VisionBackend
from merging.formats.checkpoints import open_checkpoint
from tests.images import image_folder


def symlinked_experts(folder, base, count=8):
    """Eight experts on disk, two of them distinct, in half precision."""
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        moved = {
            k: v + (1e-3 * torch.randn(v.shape, generator=generator)).half()
            for k, v in base.items()
        }
        save_file(moved, folder / f"distinct{i}.safetensors")
    for i in range(count):
        os.symlink(folder / f"distinct{i % 2}.safetensors", folder / f"task{i}.safetensors")
    return {f"task{i}": folder / f"task{i}.safetensors" for i in range(count)}


def test_vit_b_32_with_eight_experts_from_disk_to_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODEL_MERGING_CHECKPOINTS", str(tmp_path))
    clip = models.build("ViT-B-32-quickgelu")
    save_file({k: v.half() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    suite = Suite(
        VisionBackend(
            name="colours",
            family="random",
            model="ViT-B-32",
            clip={"local": "clip.safetensors"},
            datasets={"colours": {"path": str(image_folder(tmp_path / "colours", counts=(20, 5)))}},
            recipes={},
        )
    )
    base = {k: v.half() for k, v in clip.visual.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    report = merging.merge_checkpoints(
        tmp_path / "base.safetensors",
        symlinked_experts(tmp_path, base),
        merging.create("task_arithmetic"),
        tmp_path / "merged.safetensors",
        layers=suite.layers(),
    )
    merged = tower_state(open_checkpoint(tmp_path / "merged.safetensors"), "ViT-B-32-quickgelu")
    assert set(report.rules) == set(base) == set(merged)  # every tensor is accounted for
    assert sum(t.numel() for t in merged.values()) == 87_849_216
    assert sum(rule.startswith("task_arithmetic (3") for rule in report.rules.values()) == 12
    # two distinct tensors are held at once, not nine models of 176 MB
    assert 0 < report.peak_bytes < 4 * 2**30
    name = "transformer.resblocks.5.mlp.c_fc.weight"
    alpha = merging.create("task_arithmetic").alpha
    deltas = [load_file(tmp_path / f"distinct{i}.safetensors")[name].double() for i in (0, 1)]
    expected = base[name].double() + alpha * 4 * sum(d - base[name].double() for d in deltas)
    torch.testing.assert_close(merged[name].double(), expected, atol=2e-3, rtol=2e-3)
    score = suite.evaluate(merged, "test")["colours"]
    assert score.count == 5 and 5 * score.accuracy == pytest.approx(round(5 * score.accuracy))


def test_vit_l_14_widths_on_two_of_its_blocks(tmp_path):
    config = open_clip.get_model_config("ViT-L-14")
    config["vision_cfg"]["layers"] = 2
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    (tmp_path / "ViT-L-14-two-blocks.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    tower = models.build("ViT-L-14-two-blocks").visual
    base = {k: v.half() for k, v in tower.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    report = merging.merge_checkpoints(
        tmp_path / "base.safetensors",
        symlinked_experts(tmp_path, base),
        merging.create("average"),
        tmp_path / "merged.safetensors",
        layers=tower,
    )
    merged = load_file(tmp_path / "merged.safetensors")
    assert set(report.rules) == set(base) == set(merged)
    assert merged["transformer.resblocks.1.attn.in_proj_weight"].shape == (3072, 1024)
    tower.load_state_dict(merged)
    with torch.inference_mode():
        assert tower.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 768)

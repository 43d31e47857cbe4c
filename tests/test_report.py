"""What a merge says of itself: coverage, what was left out and why, and what looks wrong."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merging import InputError, Layer, create, linalg, merge_checkpoints, merge_state_dicts
from merging.formats import checkpoints
from merging.formats.writer import write_adapter

ROOT = Path(__file__).parents[1]
SHAPES = {
    "embed.weight": (100, 8),
    "blocks.0.fc.weight": (10, 8),
    "blocks.1.fc.weight": (10, 8),
    "blocks.0.mixer": (5, 8),
    "blocks.1.mixer": (5, 8),
    "head.weight": (3, 8),
    "norm.bias": (8,),
}
FC = ["blocks.0.fc.weight", "blocks.1.fc.weight"]
MIXERS = ["blocks.0.mixer", "blocks.1.mixer"]


def draw(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


@pytest.fixture
def base():
    return draw(0)


@pytest.fixture
def experts(base):
    return {t: {k: base[k] + d for k, d in draw(ord(t), 0.02).items()} for t in "ab"}


def report_of(base, experts, layers, method="actmat", **options):
    return merge_state_dicts(base, experts, create(method), layers=layers, **options).report


def test_coverage_counts_the_weights_of_matrices_but_tables_and_heads(base, experts):
    layers = {name: Layer() for name in FC}
    reasons = {"embed.weight": "embedding", "head.weight": "output head"}
    report = report_of(base, experts, None)
    left = {x.kind: (x.rule, x.reason, x.weights, x.tensors) for x in report.left_out}
    assert report.coverage == pytest.approx(160 / (160 + 80))
    for name, reason in reasons.items():
        assert left[name][:2] == ("average", reason)
    assert left["blocks.*.mixer"] == ("average", "parameter of no linear module", 80, 2)
    assert "norm.bias" not in left
    (warning,) = report.warnings
    assert "reached 66.7%" in warning and "blocks.*.mixer (80, average: para" in warning
    assert "embed" not in warning
    named = report_of(base, experts, layers)
    assert (named.coverage, named.left_out) == (report.coverage, report.left_out)
    assert report_of(base, experts, [*FC, *MIXERS]).coverage == 1


def test_strict_refuses_what_is_left_out_before_anything_is_written(base, experts, tmp_path):
    for task, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{task}.safetensors")
    paths = {task: tmp_path / f"{task}.safetensors" for task in experts}
    output = tmp_path / "out" / "merged.safetensors"
    with pytest.raises(InputError, match=r"reached 66\.7% .*mixer") as error:
        merge_checkpoints(
            tmp_path / "base.safetensors", paths, create("actmat"), output, strict=True
        )
    assert "strict=false" in error.value.hint
    assert not output.parent.exists()
    with pytest.raises(InputError, match="66"):
        report_of(base, experts, None, strict=True)
    assert report_of(base, experts, None, method="task_arithmetic", strict=True).coverage == 1


def test_layers_of_one_kind_that_are_treated_in_two_ways(base, experts):
    base |= {name: torch.randn(400, 8) for name in FC}
    experts = {t: {**e, **{n: base[n] + 0.01 for n in FC}} for t, e in experts.items()}
    big = {name: t for name, t in base.items() if name not in MIXERS and "embed" not in name}
    experts = {t: {name: e[name] for name in big} for t, e in experts.items()}
    report = report_of(big, experts, ["blocks.0.fc.weight"])
    (two,) = [w for w in report.warnings if "two ways" in w]
    assert "blocks.*.fc.weight (1 of 2, blocks.1.fc.weight: not named)" in two
    assert not [w for w in report_of(big, experts, FC).warnings if "two ways" in w]


def test_tensors_that_no_expert_changes_are_not_left_out(base, tmp_path):
    A, B = torch.ones(2, 8), torch.ones(10, 2)
    write_adapter(tmp_path / "one", {"blocks.0.fc.weight": (A, B)}, {})
    save_file(base, tmp_path / "base.safetensors")
    report = merge_checkpoints(
        tmp_path / "base.safetensors",
        {"a": tmp_path / "one"},
        create("actmat"),
        tmp_path / "merged.safetensors",
        layers=FC,
    )
    assert (report.coverage, report.left_out, report.warnings) == (1, [], [])
    assert report.rules["blocks.1.fc.weight"] == "base"


def test_an_output_that_is_the_base_is_refused(base, experts, tmp_path):
    save_file(base, tmp_path / "base.safetensors")
    save_file({k: v.clone() for k, v in base.items()}, tmp_path / "same.safetensors")
    for name, zero in (("actmat", {}), ("average", {}), ("task_arithmetic", {})):
        with pytest.raises(InputError, match="no tensor of the merge differs from the base"):
            merge_checkpoints(
                tmp_path / "base.safetensors",
                {"a": tmp_path / "same.safetensors"},
                create(name, **zero),
                tmp_path / "merged.safetensors",
            )
        assert not (tmp_path / "merged.safetensors").exists()
    write_adapter(tmp_path / "idle", {FC[0]: (torch.ones(2, 8), torch.zeros(10, 2))}, {})
    for form in ("dense", "adapter"):
        with pytest.raises(InputError, match="no tensor of the merge differs"):
            merge_checkpoints(
                tmp_path / "base.safetensors", {"a": tmp_path / "idle"}, create("actmat"),
                tmp_path / form, form=form,
            )  # fmt: skip
    report = report_of(base, {"a": base}, FC, method="average")
    assert report.unchanged and "differs from the base" in report.warnings[-1]
    assert not report_of(base, experts, FC).unchanged


@pytest.mark.parametrize("method", ["actmat", "task_arithmetic"])
def test_an_expert_of_another_base_is_told(base, experts, method):
    experts["other"] = draw(9)
    report = report_of(base, experts, FC, method=method)
    (told,) = [w for w in report.warnings if "unrelated" in w]
    assert "expert 'other'" in told
    for task, moved in report.moved.items():
        names = FC if method == "actmat" else [n for n, s in SHAPES.items() if len(s) > 1]
        rows = slice(None, 32)  # of each matrix a few are looked at
        ratios = [((experts[task][n] - base[n])[rows].norm() / base[n][rows].norm()) for n in names]
        assert moved == pytest.approx(torch.stack(ratios).quantile(0.5).item(), rel=1e-4)


def test_the_text_is_short_and_says_what_matters(base, experts):
    experts |= {f"other{i}": draw(i) for i in range(9)}
    report = report_of(base, experts, ["blocks.0.fc.weight"])
    lines = report.text().splitlines()
    assert len(lines) <= 10
    assert lines[0] == "tensors: 6 average, 1 actmat"
    assert lines[1] == "coverage: the method merged 33.3% of the weights in matrices"
    assert lines[2] == "left to other rules: embed.weight (800, average: embedding)"
    assert any(line.startswith("warning: the method reached 33.3%") for line in lines)
    assert lines[-1].endswith("GiB read")


def test_one_report_may_take_several_merges(base, experts):
    whole, parts = report_of(base, experts, FC), None
    for names in (FC, [*MIXERS, "embed.weight", "head.weight", "norm.bias"]):
        pieces = [{n: s[n] for n in names} for s in (base, *experts.values())]
        merged = merge_state_dicts(
            pieces[0], dict(zip(experts, pieces[1:], strict=True)), create("actmat"),
            layers=[n for n in names if n in FC], **({"report": parts} if parts else {}),
        )  # fmt: skip
        parts = merged.report
    assert parts.coverage == whole.coverage and parts.rules == whole.rules
    assert parts.left_out == whole.left_out and parts.warnings == whole.warnings


class Reached(Exception):
    pass


@pytest.mark.parametrize("where", ["memory", "files"])
def test_few_frames_lie_between_a_call_and_the_linear_algebra(
    base, experts, tmp_path, monkeypatch, where
):
    def eigh(*_, **__):
        frame, own = sys._getframe(1), []
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT / "merging"):
                own.append(f"{path.relative_to(ROOT)}:{frame.f_code.co_name}")
            frame = frame.f_back
        raise Reached(own)

    real = linalg.eigh
    for module in list(sys.modules.values()):  # wherever the name was imported to
        if getattr(module, "eigh", None) is real:
            monkeypatch.setattr(module, "eigh", eigh)
    with pytest.raises(Reached) as reached:
        if where == "memory":
            merge_state_dicts(base, experts, create("bounded"), layers=FC)
        for task, state in {"base": base, **experts}.items():
            save_file(state, tmp_path / f"{task}.safetensors")
        paths = {task: tmp_path / f"{task}.safetensors" for task in experts}
        base = paths["a"].with_stem("base")
        merge_checkpoints(base, paths, create("bounded"), tmp_path / "out", layers=FC)
    (frames,) = reached.value.args
    engine = [frame for frame in frames if frame.startswith("merging/engine/")]
    assert len(engine) <= 6, engine


def test_files_are_closed_also_after_a_failure(base, experts, tmp_path, monkeypatch):
    for task, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{task}.safetensors")
    paths = {task: tmp_path / f"{task}.safetensors" for task in experts}
    opened = []
    real = checkpoints.open_checkpoint

    def open_checkpoint(path):
        opened.append(real(path))
        return opened[-1]

    monkeypatch.setattr(checkpoints, "open_checkpoint", open_checkpoint)  # of the base
    monkeypatch.setitem(merge_checkpoints.__globals__, "open_checkpoint", open_checkpoint)
    experts["b"]["blocks.1.fc.weight"][0, 0] = float("nan")
    save_file(experts["b"], paths["b"])
    with pytest.raises(InputError, match="not finite"):
        merge_checkpoints(
            tmp_path / "base.safetensors", paths, create("actmat"), tmp_path / "out", layers=FC
        )
    assert len(opened) == 3
    assert [checkpoint._files for checkpoint in opened] == [{}, {}, {}]

"""The benchmark: its textbook agrees with the library, its sums and its tables are right."""

import json
import math
from dataclasses import asdict

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

import merging
from experiments.bench import command as bench
from experiments.bench import files as bench_files
from experiments.bench import report as bench_report
from experiments.bench.command import Bench, cost
from experiments.cli import CONFIGS
from experiments.hydra_run import read_settings
from merging import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.method.reference import TEXTBOOK

RATES = cost.Rates(*[1e9] * 7)
TINY = [
    "repeats.most=1",
    "accuracy={experts: 2, shapes: [[1, 12, 16]], methods: [actmat]}",
    "~models.vit_l_14",
    "~models.t5_large",
    "models.vit_b_32={experts: 2, shapes: [[2, 12, 16], [1, 16, 8]]}",
    "models.vit_b_32.methods=[average, actmat, ridge, regmean, fisher, tsv_m, iso_c]",
    "lora={experts: 2, rank: 2, shapes: [[3, 12, 16]], methods: [actmat, tsv_m]}",
    "scaling={experts: [2, 4], shape: [8, 12], widths: [8, 16], at: 2, methods: [average]}",
    "checkpoints={experts: 2, blocks: 1, width: 16, methods: [average, actmat]}",
    "clip={models: [ViT-S-8-32px], experts: 2, images: 2, methods: [average, actmat]}",
    "decoder={experts: 2, hidden: 16, intermediate: 24, vocabulary: 50}",
]


def settings(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return read_settings(Bench, compose("bench", overrides=list(overrides)))


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- The textbook -----------------------------------------------------------------------------


def test_every_method_has_its_textbook():
    # "interference" is all of the family, regmean_pp is regmean on one layer, slerp takes two
    families = {"interference", "regmean_pp", "slerp"}
    assert set(merging.methods()) - set(TEXTBOOK) == families


# --- Costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum, ratio", [("decaying", 1 / 12), ("gap", 1e-8)])
def test_synthetic_deltas_have_their_spectrum(spectrum, ratio):
    D = cost.deltas(4, 3000, 12, spectrum=spectrum).double()
    l = torch.linalg.eigvalsh((D.mT @ D).sum(0))
    assert l[0] / l[-1] == pytest.approx(ratio, rel=0.2)
    assert D.square().sum() / D[..., 0].numel() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(cost.deltas(2, 5, 7), cost.deltas(2, 5, 7))


def test_floors_by_hand():
    D = torch.randn(2, 4, 4)
    # three matrices of 16 float32 entries pass through memory at 1 GB/s
    assert cost.floor("average", D, {}, RATES) == pytest.approx(3 * 16 * 4e-9)
    # S: 2 x 4 rows, half a product, 128; N: 2 products, 512; Cholesky 64 / 3; solving 128
    by_hand = 128 + 2 * 2 * 4**3 + 64 / 3 + 2 * 4**3
    assert cost.floor("ridge", D, {}, RATES) == pytest.approx(by_hand * 1e-9)
    assert cost.floor("actmat", D, {}, RATES) == cost.floor("ridge", D, {}, RATES)
    # a 4 x 4 matrix made tridiagonal, and one eigenvector: applied to N from both sides
    low_rank = torch.randn(2, 4, 1) @ torch.randn(1, 1, 4)
    spectral = 128 + 256 + 4 / 3 * 4**3 + (2 + 4) * 4**2
    assert cost.floor("actmat", low_rank, {}, RATES) == pytest.approx(spectral * 1e-9)


def test_a_fresh_process_measures_time_and_memory():
    D = torch.zeros(4, 512, 1024)
    found = cost.cost(cost.Repeats(most=2), cost.ours, D, "average", {}, {})
    assert found.seconds > 0
    assert D[0].nbytes <= found.bytes < 100 * D.nbytes  # the result at least


def test_hardware_is_measured(tmp_path):
    rates = cost.rates(tmp_path, width=64, entries=1000)
    assert all(rate > 0 and math.isfinite(rate) for rate in rates)
    assert not list(tmp_path.iterdir())


# --- Files ------------------------------------------------------------------------------------


def test_the_script_and_the_library_merge_files_alike(tmp_path):
    base, experts = bench_files.vision(tmp_path, blocks=1, width=8, experts=2)
    for name in bench_files.SCRIPTS:
        cost_of = bench_files.merge(base, experts, name, tmp_path / "ours.safetensors")
        bench_files.textbook_merge(base, experts, name, tmp_path / "script.safetensors")
        ours, script = (
            open_checkpoint(tmp_path / f"{who}.safetensors") for who in ("ours", "script")
        )
        assert set(ours.keys()) == set(script.keys())
        for key in ours.keys():
            assert torch.allclose(ours.read(key), script.read(key), atol=1e-7)
        (tmp_path / "ours.safetensors").unlink()
        assert cost_of["bytes_read"] == 3 * sum(script.read(k).nbytes for k in script.keys())


def test_shards_come_and_go_with_the_runs(tmp_path):
    files = bench_files.Decoder(tmp_path, experts=2, hidden=8, intermediate=12, vocabulary=20)
    base, experts = files.models(2, vocabulary=False)
    names = open_checkpoint(base).keys()
    assert len(names) == 16 and "model.layers.1.mlp.down_proj.weight" in names
    assert open_checkpoint(base).dtype(names[0]) == torch.bfloat16
    moved = open_checkpoint(experts["model-1"]).read(names[0]).float()
    start = open_checkpoint(base).read(names[0]).float()
    assert 0.01 < distance(moved, start) < 0.04
    files.keep([(1, True)])
    assert len(list(tmp_path.glob("shard-*"))) == 3
    base, _ = files.models(1, vocabulary=True)
    assert open_checkpoint(base).shape("lm_head.weight") == (20, 8)


# --- Report -----------------------------------------------------------------------------------


def test_models_add_up_their_layers():
    measured = pd.DataFrame(
        {
            "experts": [2, 2, 2],
            "d_out": [4, 4, 4],
            "d_in": [4, 8, 4],
            "method": ["actmat", "actmat", "oas"],
            "floor": [0.5, 1.0, 1.0],
            "ours_seconds": [1.0, 2.0, 9.0],
            "textbook_seconds": [2.0, 6.0, 9.0],
            "ours_bytes": [10, 30, 0],
            "textbook_bytes": [20, 10, 0],
        }
    )
    models = {"small": (2, [[3, 4, 4], [2, 4, 8]])}
    (row,) = bench_report.whole_models(measured, models).to_dict("records")  # oas lacks a shape
    assert row["method"] == "actmat"
    assert (row["ours_seconds"], row["textbook_seconds"], row["floor"]) == (7.0, 18.0, 3.5)
    assert (row["ours_bytes"], row["textbook_bytes"]) == (30, 20)
    assert row["ratio"] == pytest.approx(18 / 7) and row["over_floor"] == 2.0


def test_exponents_and_doublings():
    table = pd.DataFrame(
        [
            {"axis": axis, "size": n, "method": "x", "seconds": 0.1 * n**power}
            for axis, power in (("experts", 1), ("width", 3))
            for n in (2, 4, 8)
        ]
    )
    found = bench_report.exponents(table).loc["x"]
    assert found["experts"] == pytest.approx(1) and found["width"] == pytest.approx(3)
    runs = pd.DataFrame(
        {"method": "average", "vocabulary": False, "blocks": [4, 2, 1], "seconds": [9.0, 4.0, 2.0],
         "peak_bytes": 7e9}
    )  # fmt: skip
    lines = bench_report.targets({"decoder": runs})
    assert [line[2:] for line in lines] == [
        ["7.0", "**missed**"],
        ["2.00", "reached"],
        ["2.25", "**missed**"],
    ]


# --- The command ------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """Measure in this process: a fresh one for each number takes seconds."""

    def call(function, *arguments):
        return function(*arguments)

    for module in (bench, cost):
        monkeypatch.setattr(module, "in_fresh_process", call)
    monkeypatch.setattr(cost, "rates", lambda folder: RATES)


def test_all_parts_leave_tables_figures_and_a_summary(here, tmp_path):
    runs = [{"method": "average", "blocks": n, "vocabulary": n == 1} for n in (2, 1)]
    chosen = settings(*TINY, f"output={tmp_path}/out", f"folder={tmp_path}")
    chosen.decoder.runs = [bench.DecoderRun(**run) for run in runs]
    bench.measure(chosen)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "machine.json", "summary.md", "speed.png", "speed.pdf", "scaling.png", "scaling.pdf",
        *(f"{part}.csv" for part in bench.PARTS),
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no checkpoint stays
    summary = (tmp_path / "out" / "summary.md").read_text()
    for title in ("Targets", "vit_b_32", "float64", "own rank", "Growth", "files", "CLIP", "7B"):
        assert title in summary
    table = pd.read_csv(tmp_path / "out" / "methods.csv")
    assert len(table) == 14 and (table.filter(like="seconds") > 0).all(axis=None)
    towers = pd.read_csv(tmp_path / "out" / "clip.csv")
    assert (towers.tensors == 4 * 12 + 8).all()  # blocks of 12; embeddings, two norms, projection
    assert towers.layers.tolist() == [4 * 12 + 8, 4 * 4]  # average is the rule of all tensors
    errors = pd.read_csv(tmp_path / "out" / "accuracy.csv")
    assert (errors.ours < 1e-4).all()


def test_a_part_is_renewed_alone_and_another_machine_starts_over(here, tmp_path, monkeypatch):
    overrides = [*TINY, f"output={tmp_path}", "parts=[accuracy]"]
    (tmp_path / "lora.csv").write_text("left by\n1\n")
    bench.describe(RATES, tmp_path, [])
    bench.describe(RATES, tmp_path, [])
    assert (tmp_path / "lora.csv").exists()
    bench.describe(RATES._replace(read=1.0), tmp_path, ["lora"])
    assert json.loads((tmp_path / "machine.json").read_text())["rates"] == RATES._asdict()
    machine = json.loads((tmp_path / "machine.json").read_text())
    (tmp_path / "machine.json").write_text(json.dumps(machine | {"cpu": "another"}))
    bench.measure(settings(*overrides))
    assert {path.stem for path in tmp_path.glob("*.csv")} == {"accuracy"}
    assert json.loads((tmp_path / "machine.json").read_text())["rates"] == RATES._asdict()


@pytest.mark.parametrize(
    "override, message",
    [
        ("parts=[speed]", "unknown part 'speed'"),
        ("lora.methods=[dwim]", "no textbook implementation of 'dwim'"),
        ("models.vit_b_32.methods=[slerp]", "no textbook implementation of 'slerp'"),
        ("scaling.methods=[dwim]", "unknown method 'dwim'"),
        ("checkpoints.methods=[regmean]", "needs statistics"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(override, message):
    with pytest.raises(InputError, match=message):
        bench.check(settings(override))


def test_the_committed_shapes_are_the_models():
    models = settings().models
    sizes = {
        name: sum(count * d_out * d_in for count, d_out, d_in in asdict(model)["shapes"])
        for name, model in models.items()
    }
    assert sizes == {
        "vit_b_32": 12 * 12 * 768**2,
        "vit_l_14": 24 * 12 * 1024**2,
        "t5_large": (24 * 12 + 24 * 16) * 1024**2,
    }
    assert len(settings().scaling.shape) == 2  # one matrix: d_out, d_in

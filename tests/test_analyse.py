"""The analysis on a tiny fine-tuning: every table against its definition, nothing trained twice."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

from eval import spectra, theory
from experiments import hydra_run
from experiments.commands import analyse
from experiments.report import theory as theory_report
from experiments.settings import Statistics
from experiments.suites import load_suite
from merging.errors import InputError
from merging.method.registry import OUTPUTS

ROOT = Path(__file__).parents[1]
LAYER = "encoder.layer.1.output.dense.weight"


def suite_config():
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/suite/tiny_text.yaml"))
    full = {"lr": 2.0e-3, "batch_size": 16, "epochs": 3}
    lora = {"lr": 2.0e-3, "batch_size": 16, "epochs": 1, "r": 4, "alpha": 4}
    return config | {"recipes": {"full": full, "lora": lora}}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_MERGING_CACHE", str(folder / "cache"))
        own = analyse.Analyse(
            suite_config(), record=1, snapshots=3, probe=2, truth=128, samples=[1, 16],
            methods=["average", "regmean"], statistics=Statistics(2, 32), gradients=64,
            published=str(ROOT / "results/published/actmat_theory.csv"), output=str(folder / "out"),
            device="cpu",
        )  # fmt: skip
        analyse.analyse(own)
        yield own


def table(settings, name):
    return pd.read_csv(Path(settings.output) / f"{name}.csv")


@pytest.fixture
def measured(settings):
    """Of one layer: {task: difference}, {task: true second moment}."""
    suite = load_suite(settings.suite, "cpu")
    own = {"finetuning": "full", "seed": 0}
    deltas = {
        t: load_file(suite.expert(t, **own))[LAYER] - suite.base()[LAYER] for t in suite.tasks
    }
    size = {"batches": 4, "batch_size": 32}
    moments = {
        t: load_file(suite.statistics(t, "covariance", **own, **size))[LAYER] for t in suite.tasks
    }
    return deltas, moments


def test_conditions_cover_every_layer_and_snapshot(settings):
    frame = table(settings, "conditions")
    steps = 3 * math.ceil(150 / 16)
    at = {quantity: sorted(set(part.step)) for quantity, part in frame.groupby("quantity")}
    inner = [round(steps / 3), round(2 * steps / 3)]
    assert at == {
        **{q: [*inner, steps] for q in ("cross_term", "correlation", "optimiser", "alignment")},
        "drift": [0, *inner],
        "energy_rho": [steps],
    }
    assert (frame.groupby(["quantity", "step"]).layer.nunique() == 12).all()
    assert frame.task.unique().tolist() == ["animals"]
    assert frame.cosine.between(-1, 1).all()
    drift = frame[frame.quantity == "drift"].groupby("step").cosine.mean()
    assert drift.is_monotonic_increasing  # it nears the end it is compared with
    own = frame[frame.quantity == "correlation"]
    assert own.angular.tolist() == pytest.approx(own.cosine.map(math.acos) / math.pi, abs=1e-4)
    assert frame[frame.quantity == "energy_rho"].angular.isna().all()


def test_the_recording_is_the_experts_own_training(settings, measured):
    """Recorded anew, D^T D at the last step is that of the expert which was trained without."""
    deltas, _ = measured
    suite = load_suite(settings.suite, "cpu")
    training = suite.training(["animals"], finetuning="full", seed=0)
    probe = [batch for batch, _ in zip(training.batches(0), range(2), strict=False)]
    state = load_file(suite.expert("animals", finetuning="full", seed=0))
    training.model.load_state_dict(state)
    C = analyse.second_moments(
        training.model, probe, [LAYER], forward=training.loss, mask=training.mask
    )[LAYER]
    D = deltas["animals"]
    frame = table(settings, "conditions")
    last = frame[(frame.layer == LAYER) & (frame.quantity == "alignment")].cosine.iloc[-1]
    assert last == pytest.approx(theory.cosine(D.T @ D, C), rel=1e-3)


def test_layers_are_described_by_type_and_block(settings):
    frame = table(settings, "estimates").drop_duplicates("layer").set_index("layer")
    assert frame.loc[LAYER, ["type", "block"]].tolist() == ["output.dense", 1]
    assert frame.type.nunique() == 6
    convolutions = ["layer2.0.downsample.0.weight", "layer3.1.conv2.weight", "conv2.weight"]
    described = analyse._described(pd.DataFrame({"task": "t", "layer": convolutions}))
    assert described.type.tolist() == ["downsample", "conv2", "conv2"]
    assert described.block.tolist() == [0, 1, 0]


def test_estimates_against_their_definition(settings, measured):
    frame = table(settings, "estimates")
    assert set(frame.estimate) == {"delta", "identity", "random", "regmean_1", "regmean_16"}
    own = frame[(frame.layer == LAYER) & (frame.task == "meals")].set_index("estimate")
    D, C = (part["meals"].double() for part in measured)
    S = D.T @ D
    assert own.cosine["delta"] == pytest.approx(((S * C).sum() / S.norm() / C.norm()).item(), 1e-4)
    assert own.cosine["identity"] == pytest.approx((C.trace() / 8 / C.norm()).item(), rel=1e-4)
    V, U = (torch.linalg.eigh(x)[1][:, -4:] for x in (C, S))  # 5 % of 64, rounded up
    assert own.overlap["delta"] == pytest.approx((U.T @ V).square().sum().item() / 4, rel=1e-3)
    assert own.overlap["random"] == pytest.approx(4 / 64)
    means = frame.groupby("estimate").cosine.mean()
    assert means["regmean_16"] > means["regmean_1"] > means["random"]


def test_both_sides_against_their_definition(settings, measured):
    frame = table(settings, "sides")
    own = frame[(frame.layer == LAYER) & (frame.task == "meals")].set_index(["side", "estimate"])
    D, C = (part["meals"].double() for part in measured)
    suite = load_suite(settings.suite, "cpu")
    size = {"finetuning": "full", "seed": 0, "batches": 2, "batch_size": 32}
    G = load_file(suite.statistics("meals", "kfac", **size))[LAYER + OUTPUTS].double()
    for side, moment, estimate in (("inputs", C, D.T @ D), ("outputs", G, D @ D.T)):
        expected = (estimate * moment).sum() / estimate.norm() / moment.norm()
        assert own.cosine[side, "delta"] == pytest.approx(expected.item(), rel=1e-3)
        identity = moment.trace() / len(moment) ** 0.5 / moment.norm()
        assert own.cosine[side, "identity"] == pytest.approx(identity.item(), rel=1e-3)
    text = (Path(settings.output) / "summary.md").read_text()
    assert "D D^T, output gradients" in text and "Adapters B A" not in text


def test_adapters_of_one_start_share_their_rows_and_random_ones_by_chance(settings, tmp_path):
    lora = {"finetuning": "lora", "record": 0, "methods": [], "tasks": 2, "gradients": 0}
    analyse.analyse(replace(settings, **lora, output=str(tmp_path)))
    frame = pd.read_csv(tmp_path / "adapters.csv").set_index("side")
    assert not (tmp_path / "sides.csv").exists()
    assert frame.overlap["inputs"].mean() > 0.9 and (frame.randomness["inputs"] > 0.05).mean() > 0.8
    assert frame.overlap["outputs"].mean() < 0.9 and (frame.chance <= 4 / 32).all()
    assert "| inputs (A) |" in (tmp_path / "summary.md").read_text()


def test_a_spectrum_is_told_from_a_random_one():
    """The law has mean 1 and variance r / d; entries may be of any distribution and scale."""
    grid = np.linspace(0, 4, 40_001)
    mass = np.diff(spectra.marchenko_pastur(grid, 0.25))
    middle = (grid[1:] + grid[:-1]) / 2
    assert (mass * middle).sum() == pytest.approx(1, abs=1e-4)
    assert (mass * middle**2).sum() == pytest.approx(1 + 0.25, abs=1e-3)
    generator = torch.Generator().manual_seed(1)
    uniform = 7 * (torch.rand(16, 64, generator=generator) - 0.5)
    assert spectra.distance(uniform) < 0.15 and spectra.randomness(uniform) > 0.05
    assert spectra.distance(uniform) == pytest.approx(spectra.distance(uniform.mT))
    learned = uniform * torch.logspace(0, -2, 16)[:, None]
    assert spectra.randomness(learned) == pytest.approx(1 / 200)


def test_scale_and_interference_against_their_definition(settings, measured):
    deltas, moments = measured
    scale = table(settings, "scale").set_index(["layer", "task"]).ratio
    D, C = deltas["weather"].double(), moments["weather"].double()
    expected = (D.square().sum() / C.trace()).item()
    assert scale[LAYER, "weather"] == pytest.approx(expected, rel=1e-3)
    ranks = table(settings, "scale").set_index(["layer", "task"]).loc[(LAYER, "weather")]
    s = torch.linalg.svdvals(D)
    of_layer = float(s.sum() ** 2 / (s @ s)) / min(D.shape)
    assert ranks.effective_rank == pytest.approx(of_layer, rel=1e-3)
    assert ranks.effective_rank_bfloat16 > ranks.effective_rank  # noise is in every direction
    frame = table(settings, "interference").set_index(["layer", "method", "task"])
    R = torch.stack([*deltas.values()]).double().mean(0) - D
    after = torch.trace(R @ C @ R.T).item()
    assert frame.after[LAYER, "average", "weather"] == pytest.approx(after, rel=1e-3)
    before = torch.trace(D @ C @ D.T).item()
    assert frame.before[LAYER, "average", "weather"] == pytest.approx(before, rel=1e-3)
    total = frame.groupby("method").after.sum()
    assert total["regmean"] < total["average"]  # which is what it minimises


def test_the_summary_puts_the_papers_means_beside_ours(settings):
    text = (Path(settings.output) / "summary.md").read_text()
    cross = table(settings, "conditions").query("quantity == 'cross_term'")
    ours = cross[cross.step == cross.step.max()].cosine.mean()
    assert f"| cross_term | 0.915 | {ours:.3f} |" in text
    assert "| identity | 0.09 to 0.14 |" in text
    assert "| attention.self.query |" in text
    assert "| regmean | " in text
    widest = table(settings, "scale").groupby("layer").effective_rank.max()
    assert f"is highest: {widest.min():.3f} in the least layer" in text
    for figure in ("conditions", "training", "estimates", "scale", "interference"):
        for suffix in ("png", "pdf"):
            assert (Path(settings.output) / f"{figure}.{suffix}").stat().st_size > 1000


def test_nothing_is_trained_twice_and_the_same_is_written_again(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(analyse, "train", lambda *a, **k: pytest.fail("trained again"))
    analyse.analyse(replace(settings, output=str(tmp_path)))
    for path in Path(settings.output).iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("folder", sorted((ROOT / "results").glob("*/theory")), ids=str)
def test_committed_summaries_follow_from_the_committed_tables(folder, tmp_path):
    for path in (*folder.glob("*.csv"), folder / "about.json"):
        shutil.copy(path, tmp_path)
    published = theory_report.read_published(ROOT / "results/published/actmat_theory.csv")
    written = theory_report.render(tmp_path, published)
    assert written.read_text() == (folder / "summary.md").read_text()


def test_estimates_can_be_had_without_recording(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(analyse, "train", lambda *a, **k: pytest.fail("recorded"))
    analyse.analyse(replace(settings, record=0, methods=[], output=str(tmp_path)))
    assert "| delta | 0.3 |" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "conditions.png").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": "nowhere"}, "has 'nowhere' in its name"),
        ({"methods": ["acmat"]}, "unknown method 'acmat'"),
        ({"tasks": ["chess"]}, "has no task 'chess'"),
        ({"finetuning": "lora"}, "cannot be recorded"),
        ({"published": "none.csv"}, "none.csv does not exist"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, monkeypatch, change, told):
    for work in ("train", "prepare", "second_moments"):
        monkeypatch.setattr(analyse, work, lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(InputError, match=told):
        analyse.analyse(replace(settings, **change))


def test_snapshots_fall_between_optimiser_steps():
    seen = []
    loss = analyse._at_steps(lambda model, batch: batch, {0, 2, 3}, seen.append, accumulate=2)
    for batch in range(8):
        assert loss(None, batch) == batch
    assert seen == [0, 2, 3]


def test_the_config_composes():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        settings = hydra_run.read_settings(analyse.Analyse, compose("analyse"))
    assert (ROOT / settings.published).exists()
    assert settings.output == "results/embedded_text/theory"


def test_few_tasks_are_spread_evenly():
    assert analyse._spread("abcdefgh", 4) == ["a", "c", "e", "g"]
    assert analyse._spread("abc", 2) == ["a", "b"]
    assert analyse._spread("abc", 5) == ["a", "b", "c"]
    assert analyse._spread("abc", 0) == []

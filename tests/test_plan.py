"""The diagnosis of a merge: right values computed plainly, words, and the page in a browser."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import merging
from experiments import plan as command
from experiments.report import picture
from experiments.report.plan_page import page
from experiments.report.plan_words import MOST, sentences
from merging import InputError
from merging.diagnosis import diagnose, residual, shared_inputs
from merging.formats.writer import write_adapter
from tests.fixtures.commands import called

SHAPES = {
    f"blocks.{i}.{name}.weight": shape
    for i in range(2)
    for name, shape in {"attn.q_proj": (6, 8), "mlp.fc1": (12, 8), "mlp.fc2": (8, 12)}.items()
}


def draw(seed, scale, shape):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def files(tmp_path):
    """A base and three experts; `law` is `code` once more, a little longer."""
    base = {name: draw(i, 0.5, shape) for i, (name, shape) in enumerate(SHAPES.items())}
    moved = {
        t: {n: draw(seed_of(t, n), 0.01, s) for n, s in SHAPES.items()} for t in ("math", "code")
    }
    moved["law"] = {n: 1.1 * d + draw(7, 1e-4, d.shape) for n, d in moved["code"].items()}
    paths = {}
    for task, deltas in {"base": {n: torch.zeros(s) for n, s in SHAPES.items()}, **moved}.items():
        paths[task] = tmp_path / f"{task}.safetensors"
        state = {n: base[n] + d for n, d in deltas.items()} | {"norm.bias": torch.zeros(8)}
        save_file(state, paths[task])
    return paths.pop("base"), paths, moved


def seed_of(*names):
    return sum(map(ord, "".join(names)))


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 7, 5)])
def test_sums_of_one_layer_are_those_of_the_formulas(shape):
    deltas, W0 = draw(0, 1.0, shape).double(), draw(1, 1.0, shape[1:]).double()
    found = diagnose(W0, deltas)
    for s in range(3):
        for t in range(3):
            D, E = deltas[s], deltas[t]
            assert found.inner[s, t] == pytest.approx((D * E).sum().item())
            assert found.shared[s, t] == pytest.approx((D @ E.T).square().sum().item())
            if s != t:
                smaller = torch.minimum(D.abs(), E.abs())
                assert found.common[s, t] == pytest.approx(smaller.sum().item())
                opposed = smaller[D.sign() != E.sign()].sum().item()
                assert found.opposed[s, t] == pytest.approx(opposed)


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 7, 5)])
def test_the_residual_is_the_interference_with_the_experts_own_moments(shape):
    deltas = draw(0, 1.0, shape).double()
    merged = deltas.mean(0)
    inputs, outputs = residual(deltas, merged)
    for t, D in enumerate(deltas):
        gap = D - merged
        assert inputs[t] == pytest.approx(torch.trace(gap @ D.T @ D @ gap.T).item())
        assert outputs[t] == pytest.approx(torch.trace(gap.T @ D @ D.T @ gap).item())
    still = residual(deltas, torch.zeros_like(merged)) / shared_inputs(deltas).diagonal()
    assert torch.allclose(still, torch.ones(2, 3).double())  # the base leaves all undone
    alone = residual(deltas[:1], deltas[0])
    assert torch.equal(alone, torch.zeros(2, 1).double())  # the expert itself leaves nothing


def test_a_plan_sums_over_layers_and_ranks_methods(files):
    base, experts, moved = files
    plan = merging.plan(base, experts, methods=["average", "actmat"])
    assert plan.tasks == ["code", "law", "math"]
    every = [torch.cat([moved[t][n].flatten() for n in SHAPES]).double() for t in plan.tasks]
    cosine = torch.stack(every) @ torch.stack(every).T
    length = cosine.diagonal().sqrt()
    assert torch.allclose(plan.cosine, cosine / length / length[:, None], atol=1e-3)
    undone = {}
    for t in plan.tasks:
        top = below = 0.0
        for n in SHAPES:
            D = moved[t][n].double()
            gap = D - torch.stack([moved[s][n] for s in plan.tasks]).double().mean(0)
            top, below = top + (gap @ D.T).square().sum(), below + (D @ D.T).square().sum()
        undone[t] = (top / below).item()
    found = plan.residuals["average", ("code", "law", "math")]
    for t in plan.tasks:
        assert found[t][0] == pytest.approx(undone[t], rel=1e-3)
    assert {tasks for _, tasks in plan.residuals} == {
        ("code", "law", "math"), ("code", "law"), ("code", "math"), ("law", "math"),
    }  # fmt: skip
    assert [score for _, score in plan.ranking] == sorted(score for _, score in plan.ranking)
    assert (plan.covered, plan.matrices) == (2 * (48 + 96 + 96),) * 2


def test_adapters_are_planned_as_the_dense_experts_they_stand_for(files, tmp_path):
    base, _, _ = files
    state, dense, adapters = load_file(base), {}, {}
    for seed, task in enumerate(("math", "code")):
        factors = {
            name: (draw(seed, 1.0, (2, shape[1])), draw(9, 0.01, (shape[0], 2)))
            for name, shape in SHAPES.items()
        }
        adapters[task] = tmp_path / task
        write_adapter(adapters[task], factors, {})
        dense[task] = tmp_path / f"dense-{task}.safetensors"
        moved = {n: state[n] + B @ A for n, (A, B) in factors.items()}
        save_file(state | moved, dense[task])
    found, expected = (merging.plan(base, experts) for experts in (adapters, dense))
    size = sum(f.stat().st_size for d in adapters.values() for f in d.glob("*.safetensors"))
    assert found.bytes == base.stat().st_size + size
    assert torch.allclose(found.cosine, expected.cosine, atol=1e-3)
    assert torch.allclose(found.overlap, expected.overlap, atol=1e-3)
    for key, residuals in expected.residuals.items():
        for task, sides in residuals.items():
            assert found.residuals[key][task] == pytest.approx(sides, rel=0.02, abs=1e-3), key


def test_words_name_twins_strangers_and_experts_that_did_not_move(files, tmp_path):
    base, experts, _ = files
    told = " ".join(sentences(merging.plan(base, experts, methods=["average", "tsv_m"])))
    assert "code and law are nearly the same model" in told
    assert "overlap most" in told
    save_file(
        {n: draw(50 + i, 0.5, s) for i, (n, s) in enumerate(SHAPES.items())}
        | {"norm.bias": torch.zeros(8)},
        tmp_path / "stranger.safetensors",
    )
    odd = {"stranger": tmp_path / "stranger.safetensors", "still": base}
    told = " ".join(sentences(merging.plan(base, odd, methods=["average"])))
    assert "stranger differs from the base by" in told
    assert "still is the base itself" in told


def test_what_does_not_fit_is_said_in_ten_lines_before_weights_are_read(files, tmp_path):
    base, experts, _ = files
    save_file({f"x{i}": torch.zeros(1) for i in range(50)}, tmp_path / "odd.safetensors")
    plan = merging.plan(base, experts | {"odd": tmp_path / "odd.safetensors"})
    assert plan.problems and not plan.groups
    assert len(sentences(plan)) <= MOST + 1
    with pytest.raises(InputError, match="needs statistics"):
        merging.plan(base, experts, methods=["regmean"])


@pytest.fixture
def call(monkeypatch, capsys):
    def invoke(*arguments):
        return called(monkeypatch, capsys, command.main, "plan", *arguments)

    return invoke


def test_the_command_prints_words_and_writes_a_page(files, tmp_path, call):
    base, experts, _ = files
    named = [f"experts.{task}={path}" for task, path in experts.items()]
    code, out, err = call(f"base={base}", *named, f"output={tmp_path}/plan.html", "subsets=false")
    assert code == 0, err
    assert "They fit" in out and f"written to {tmp_path}/plan.html" in out
    html = (tmp_path / "plan.html").read_text()
    assert "http" not in html.replace("<!doctype html>", "")  # nothing is fetched
    code, _, err = call(f"base={base}", *named, f"output={tmp_path}/plan.txt")
    assert code == 2 and ".html" in err


CHROMIUM = next(filter(None, map(shutil.which, picture.NAMES)), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_has_its_picture_taken(files, tmp_path, call):
    base, experts, _ = files
    line = [f"base={base}", *(f"experts.{task}={path}" for task, path in experts.items())]
    line += ["methods=[average,tsv_m]", "subsets=false", f"picture={tmp_path}/sub/plan.png"]
    code, _, err = call(*line)
    assert code == 2 and "which output=NAME.html writes" in err
    code, out, err = call(*line, f"output={tmp_path}/plan.html")
    assert code == 0, err
    assert out.splitlines()[-1] == f"its picture: {tmp_path}/sub/plan.png"
    with Image.open(tmp_path / "sub/plan.png") as taken:
        assert taken.size == picture.SIZE
        colours = taken.convert("L").getextrema()
    assert colours[0] < 100 and colours[1] == 255  # ink on paper
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["plan.png"]


def test_a_machine_without_a_browser_says_so_before_anything_is_read(monkeypatch, call):
    monkeypatch.setattr(picture.shutil, "which", lambda name: None)
    code, _, err = call("base=a", "experts.b=c", "output=plan.html", "picture=plan.png")
    assert code == 2 and "none is installed" in err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_sorts_and_switches_in_a_browser_without_errors(files, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    base, experts, _ = files
    html = tmp_path / "plan.html"
    html.write_text(page(merging.plan(base, experts), "Merging three"))
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab, errors, requests = browser.new_page(), [], []
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(html.as_uri())
        methods = tab.locator("table.sortable").first

        def column(i):
            return methods.locator(f"tbody td:nth-child({i})").all_inner_texts()

        ascending = column(2)
        assert ascending == sorted(ascending, key=float) and len(ascending) == len(merging.PLANNED)
        methods.locator("th").nth(1).click()
        methods.locator("th").nth(1).click()
        assert column(2) == sorted(ascending, key=float, reverse=True)
        methods.locator("th").first.click()
        assert column(1) == sorted(merging.PLANNED)
        shown = tab.locator("table.measure:visible")
        assert shown.count() == 1
        first = shown.get_attribute("data-measure")
        tab.select_option("#measure", index=1)
        assert shown.count() == 1 and shown.get_attribute("data-measure") != first
        tab.emulate_media(media="print")
        assert tab.locator("table.measure:visible").count() == 3  # paper cannot switch
        for scheme in ("light", "dark"):
            tab.emulate_media(media="screen", color_scheme=scheme)
            ink, paper = (
                tab.evaluate(f"getComputedStyle(document.body).{name}")
                for name in ("color", "backgroundColor")
            )
            assert ink != paper
        browser.close()
    assert errors == []
    assert requests == [html.as_uri()]

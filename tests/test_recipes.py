"""Recipes, ours and mergekit's, give what the same choices give by hand; the rest is refused."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from experiments import cli, merge, recipes
from merging import InputError, create, merge_checkpoints
from merging.formats.writer import write_adapter
from tests.fixtures.commands import called

BAD_INPUT = 2
SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    **{f"model.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(3)},
    **{f"model.layers.{i}.mlp.up_proj.weight": (12, 8) for i in range(3)},
    "model.norm.weight": (8,),
}
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def files(tmp_path):
    paths = {}
    for i, task in enumerate(["base", "math", "code"]):
        folder = tmp_path / task
        folder.mkdir()
        state = {}
        for j, (name, shape) in enumerate(SHAPES.items()):
            g = torch.Generator().manual_seed(j)
            state[name] = torch.randn(shape, generator=g)
            state[name] += 0.05 * bool(i) * torch.randn(shape, generator=g.manual_seed(100 * i + j))
        save_file(state, folder / "model.safetensors")
        paths[task] = folder
    return paths


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return called(monkeypatch, capsys, merge.main, "merge", *arguments)

    return call


def by_hand(files, method, output, experts=("math", "code"), base="base", **options):
    paths = {e: files[e] for e in experts} if not isinstance(experts, dict) else experts
    merge_checkpoints(files[base], paths, method, output, **options)
    return load_file(output)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# --- the command line -----------------------------------------------------------------------------


def test_weights_and_parts_on_the_command_line(call, files, tmp_path):
    code, out, err = call(
        f"base={files['base']}", f"experts.math={files['math']}", f"experts.code={files['code']}",
        "method=actmat", "weights.math=0.7", "weights.code=-0.3", f"output={tmp_path}/out",
        'parts=[{match:"*.mlp.*",method:tsv_m},{match:"blocks 0-1",method:average,alpha:0.5}]',
        "dtype=float16", "shard_size=500MB",
    )  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[-1] == f"written to {tmp_path}/out"
    expected = by_hand(
        files, create("actmat"), tmp_path / "hand.safetensors", dtype="float16",
        weights={"math": 0.7, "code": -0.3},
        parts=[
            {"match": "*.mlp.*", "method": "tsv_m"},
            {"match": "blocks 0-1", "method": "average", "alpha": 0.5},
        ],
    )  # fmt: skip
    same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert '- weights: `{"code": -0.3, "math": 0.7}`' in card
    assert '- part: `{"match": "*.mlp.*", "method": "tsv_m"}`' in card


def test_a_gradient_of_the_method_itself(call, files, tmp_path):
    code, _, err = call(
        f"base={files['base']}", f"experts.math={files['math']}", "method=task_arithmetic",
        "method.alpha=[0.0,1.0]", f"output={tmp_path}/out.safetensors",
    )  # fmt: skip
    assert code == 0, err
    found = load_file(tmp_path / "out.safetensors")
    base = load_file(files["base"] / "model.safetensors")
    math = load_file(files["math"] / "model.safetensors")
    for i, alpha in enumerate((0.0, 0.5, 1.0)):
        expected = base[UP.format(i)] + alpha * (math[UP.format(i)] - base[UP.format(i)])
        torch.testing.assert_close(found[UP.format(i)], expected)


@pytest.mark.parametrize(
    "line, told",
    [
        (["weights.maths=1"], "weights names 'maths', which is no expert"),
        (["parts=[{match:nothing,method:ties}]"], "'nothing' matches no tensor"),
        (["rank=4"], "rank is that of an adapter"),
        (["form=adapter", "rank=4"], "is a dense checkpoint"),
        (["dtype=int4"], "dtype is 'int4'"),
        (["shard_size=huge"], "shard_size is 'huge'"),
        (["rank=0", "form=adapter"], "rank is 0"),
        (["rank=2.5", "form=adapter"], "error: rank: Value '2.5' of type 'float' could not be"),
        (["output=out.safetensors", "shard_size=1MB"], "shard_size splits the weights of a folder"),
    ],
)
def test_what_cannot_hold_is_told_early(call, files, tmp_path, line, told):
    code, _, err = call(
        f"base={files['base']}", f"experts.math={files['math']}", f"output={tmp_path}/out", *line
    )
    assert code == BAD_INPUT, err
    assert told in err and not (tmp_path / "out").exists()


# --- our own keys ---------------------------------------------------------------------------------


def test_a_recipe_says_what_the_command_line_says(call, files, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
base: {files["base"]}
experts: {{math: {files["math"]}, code: {files["code"]}}}
method: {{name: ridge, lam: 1e-2}}
weights: {{math: 0.5}}
parts:
  - {{match: "*.mlp.*", method: task_arithmetic, alpha: [0.1, 0.9]}}
dtype: bfloat16
""")
    code, _, err = call(f"recipe={recipe}", f"output={tmp_path}/out.safetensors", "dtype=float32")
    assert code == 0, err
    expected = by_hand(
        files, create("ridge", lam=1e-2), tmp_path / "hand.safetensors", weights={"math": 0.5},
        parts=[{"match": "*.mlp.*", "method": "task_arithmetic", "alpha": [0.1, 0.9]}],
        dtype="float32",
    )  # fmt: skip
    same(load_file(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize(
    "content, told",
    [
        ("methods: ties", "Could not override 'methods'|unknown config key|methods"),
        ("- a list", "should hold keys such as base"),
        ("base: [", "is no YAML"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_recipe_is_one_sentence(call, tmp_path, content, told):
    recipe = tmp_path / "recipe.yaml"
    if content:
        recipe.write_text(content)
    code, _, err = call(f"recipe={recipe}", f"output={tmp_path}/out")
    assert code == BAD_INPUT
    assert any(piece in err for piece in told.split("|")), err
    assert len(err.splitlines()) <= 10


# --- mergekit's -----------------------------------------------------------------------------------


def mergekit(files, method, top="", math="", code="", base=True):
    lines = [f"merge_method: {method}", "models:"]
    for name, parameters in (("math", math), ("code", code)):
        lines.append(f"  - model: {files[name]}")
        if parameters:
            lines.append(f"    parameters: {{{parameters}}}")
    lines += [f"base_model: {files['base']}"] * base
    return "\n".join([*lines, top]) + "\n"


ELECTED = {"scope": "layer", "alpha": 1.0}
CASES = {
    "linear": (
        {"math": "weight: 3", "code": "weight: 1", "base": False},
        create("average"),
        {"weights": {"math": 3.0, "code": 1.0}, "weights_on": "task"},
    ),
    "task_arithmetic": (
        {"math": "weight: 0.7", "code": "weight: -0.2", "top": "parameters: {lambda: 0.5}"},
        create("task_arithmetic", alpha=0.5),
        {"weights": {"math": 0.7, "code": -0.2}, "weights_on": "delta"},
    ),
    "ties": (
        {"top": "parameters: {density: 0.5, weight: 0.3}\ndtype: bfloat16"},
        create("ties", k=0.5, merge="mean", **ELECTED),
        {"dtype": "bfloat16"},
    ),
    "dare_linear": (
        {"top": "parameters: {density: 0.25}", "math": "weight: 2"},
        create("dare", p=0.75, alpha=1.0),
        {"weights": {"math": 2.0, "code": 1.0}, "weights_on": "delta"},
    ),
    "dare_ties": (
        {"top": "parameters: {density: 0.25}"},
        create("dare_ties", p=0.75, merge="sum", alpha=1.0),
        {"weights": {"math": 1.0, "code": 1.0}, "weights_on": "delta"},
    ),
    "della": (
        {"top": "parameters: {density: 0.6, epsilon: 0.1, lambda: 1.1}"},
        create("della", density=0.6, eps=0.1, merge="mean", alpha=1.1),
        {},
    ),
    "breadcrumbs": (
        {"math": "density: 0.9, gamma: 0.05", "code": "density: 0.9, gamma: 0.05"},
        create("breadcrumbs", beta=1 - 0.9 - 0.05, gamma=0.05, alpha=1.0),
        {},
    ),
    "breadcrumbs_ties": (
        {"top": "parameters: {density: 0.6, gamma: 0.1, normalize: true, lambda: 0.9}"},
        create("breadcrumbs_ties", beta=1 - 0.6 - 0.1, gamma=0.1, alpha=0.9),
        {},
    ),
    "della_linear": (
        {"top": "parameters: {density: 0.6, epsilon: 0.1}", "math": "weight: 0.5"},
        create("della_linear", density=0.6, eps=0.1, alpha=1.0),
        {"weights": {"math": 0.5, "code": 1.0}, "weights_on": "delta"},
    ),
    "sce": ({"top": "parameters: {select_topk: 0.4}"}, create("sce", k=0.4), {}),
    "model_stock": ({}, create("model_stock"), {}),
}


@pytest.mark.parametrize("method", CASES)
def test_mergekits_recipe_is_ours_by_hand(call, files, tmp_path, method):
    said, ours, options = CASES[method]
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(mergekit(files, method, **said))
    code, _, err = call(f"recipe={recipe}", f"output={tmp_path}/out.safetensors")
    assert code == 0, err
    base = "base" if said.get("base", True) else "math"
    expected = by_hand(
        files, ours, tmp_path / "hand.safetensors", base=base, split_qkv=False, **options
    )
    same(load_file(tmp_path / "out.safetensors"), expected)


def test_mergekits_formulas_written_plainly(call, files, tmp_path):
    """Normalised weights; TIES per tensor, by equal weights."""
    states = {t: load_file(p / "model.safetensors") for t, p in files.items()}
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(mergekit(files, "linear", math="weight: 3", code="weight: 1", base=False))
    assert call(f"recipe={recipe}", f"output={tmp_path}/linear.safetensors")[0] == 0
    for name, tensor in load_file(tmp_path / "linear.safetensors").items():
        plain = (3 * states["math"][name].double() + states["code"][name].double()) / 4
        torch.testing.assert_close(tensor.double(), plain, rtol=1e-5, atol=1e-6)
    recipe.write_text(mergekit(files, "ties", top="parameters: {density: 0.5, weight: 0.3}"))
    assert call(f"recipe={recipe}", f"output={tmp_path}/ties.safetensors")[0] == 0
    for name, tensor in load_file(tmp_path / "ties.safetensors").items():
        W0 = states["base"][name].double()
        D = torch.stack([states[t][name].double() - W0 for t in ("math", "code")])
        cuts = [d.abs().flatten().kthvalue(d.numel() // 2 + 1)[0] for d in D]
        kept = torch.stack([d * (d.abs() >= cut) for d, cut in zip(D, cuts, strict=True)])
        sign = kept.sum(0).sign()
        agree = (kept.sign() == sign) & (kept != 0)
        weighted = (0.3 * kept * agree).sum(0) / (0.3 * agree).sum(0).clamp_min(1e-12)
        torch.testing.assert_close(tensor.double(), W0 + weighted, rtol=1e-5, atol=1e-6)


def test_slerp_runs_from_the_base_to_the_other_with_filters(call, files, tmp_path):
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(f"""
models: [{{model: {files["math"]}}}, {{model: {files["code"]}}}]
merge_method: slerp
base_model: {files["code"]}
parameters:
  t:
    - {{filter: mlp, value: [0, 1]}}
    - {{value: 0.25}}
dtype: float32
""")
    code, _, err = call(f"recipe={recipe}", f"output={tmp_path}/out.safetensors")
    assert code == 0, err
    math, code = (load_file(files[t] / "model.safetensors") for t in ("math", "code"))
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        t = {UP.format(i): i / 2 for i in range(3)}.get(name, 0.25)
        a, b = code[name].double().flatten(), math[name].double().flatten()
        angle = torch.acos(a @ b / (a.norm() * b.norm()))
        plain = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / angle.sin()
        torch.testing.assert_close(tensor.double().flatten(), plain, rtol=1e-4, atol=1e-5)


def arc(a, b, t):
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / angle.sin()


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("by", ["tensor", "row", "column"])
def test_nuslerp_by_its_weights_with_and_without_a_base(call, files, tmp_path, caplog, by, base):
    """t is the second's share of the weights; vectors as mergekit's code cuts a matrix."""
    flat, first = by == "tensor", by == "column"
    said = f"nuslerp_flatten: {flat}, nuslerp_row_wise: {first}, normalize: true".lower()
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(
        mergekit(files, "nuslerp", f"parameters: {{{said}}}", "weight: 3", "weight: 1", base=base)
    )
    code, _, err = call(f"recipe={recipe}", f"output={tmp_path}/out.safetensors")
    assert code == 0, err
    assert "normalize of nuslerp is left aside, as mergekit does" in caplog.text
    states = {t: load_file(p / "model.safetensors") for t, p in files.items()}
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        W0 = states["base"][name].double() * base
        a, b = (states[t][name].double() - W0 for t in ("math", "code"))
        if flat or a.ndim == 1:
            plain = arc(a.flatten(), b.flatten(), 0.25).view(a.shape)
        else:
            pairs = zip(a.T, b.T, strict=True) if first else zip(a, b, strict=True)
            plain = torch.stack([arc(x, y, 0.25) for x, y in pairs])
            plain = plain.T if first else plain
        torch.testing.assert_close(tensor.double(), W0 + plain, rtol=1e-4, atol=1e-5)


def test_a_density_of_1_drops_nothing(call, files, tmp_path):
    """mergekit's default for DELLA, whose window would reach beyond 1."""
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(mergekit(files, "della_linear"))
    code, _, err = call(f"recipe={recipe}", f"output={tmp_path}/out.safetensors")
    assert code == 0, err
    expected = by_hand(
        files, create("task_arithmetic", alpha=1.0), tmp_path / "hand.safetensors", split_qkv=False
    )
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])


def test_karcher_is_the_mean_on_the_sphere_of_weights(call, files, tmp_path):
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(mergekit(files, "karcher", top="parameters: {max_iter: 20}", base=False))
    code, _, err = call(f"recipe={recipe}", f"output={tmp_path}/out.safetensors")
    assert code == 0, err
    expected = by_hand(
        files, create("karcher", steps=20, of="weights"), tmp_path / "hand.safetensors",
        base="math", split_qkv=False,
    )  # fmt: skip
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "said, told",
    [
        ({"method": "passthrough"}, "merge_method 'passthrough' has no equivalent"),
        ({"method": "nearswap"}, "merge_method 'nearswap' has no equivalent"),
        ({"method": "ties", "top": "slices: []"}, "slices"),
        ({"method": "ties", "math": "weight: 2"}, "unequal ones"),
        ({"method": "ties", "math": "density: 0.3"}, "models of different density"),
        ({"method": "ties", "base": False}, "ties needs a base_model"),
        ({"method": "ties", "top": "tokenizer_source: union"}, "only the base's tokenizer"),
        ({"method": "ties", "top": "moe: 3"}, "the key 'moe' has no equivalent"),
        ({"method": "ties", "math": "epsilon: 3"}, "the parameter 'epsilon' of ties"),
        ({"method": "linear", "top": "parameters: {normalize: false}"}, "scale the model"),
        ({"method": "task_arithmetic", "math": "weight: [0, 1]"}, "only numbers are read"),
        ({"method": "slerp"}, "slerp needs two models"),
        ({"method": "dare_ties", "top": "parameters: {rescale: false}"}, "rescale: false"),
        ({"method": "nuslerp"}, "nuslerp needs the weight of model"),
        ({"method": "sce", "math": "weight: 1"}, "the parameter 'weight' of sce"),
        ({"method": "sce", "base": False}, "sce needs a base_model"),
        ({"method": "breadcrumbs_ties", "math": "gamma: 0.5"}, "models of different gamma"),
        ({"method": "della", "top": "parameters: {density: 0.9}"}, "0.9 ± epsilon 0.15"),
        ({"method": "multislerp"}, "merge_method 'multislerp' has no equivalent"),
    ],
)
def test_what_mergekit_has_and_we_have_not_is_refused(call, files, tmp_path, said, told):
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(mergekit(files, **said))
    code, _, err = call(f"recipe={recipe}", f"output={tmp_path}/out")
    assert code == BAD_INPUT
    assert told in err and str(recipe) in err, err
    with pytest.raises(InputError):
        recipes.read(recipe)


def test_the_readmes_recipe(call, files, tmp_path):
    text = (cli.CONFIGS.parent / "README.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    for task in ("base", "math", "code"):
        recipe = recipe.replace("PATH", str(files[task]), 1)
    (tmp_path / "recipe.yaml").write_text(recipe)
    code, out, err = call("recipe=recipe.yaml", f"output={tmp_path}/out.safetensors")
    assert code == 0, err
    assert "task_arithmetic" in out and out.splitlines()[-1].startswith("written to")
    expected = by_hand(
        files, create("tsv_m"), tmp_path / "hand.safetensors", dtype="bfloat16",
        weights={"math": 0.7, "code": 0.5},
        parts=[
            {"match": "norm", "method": "average"},
            {"match": "*.mlp.*", "method": "task_arithmetic", "alpha": [0.2, 0.5]},
        ],
    )  # fmt: skip
    same(load_file(tmp_path / "out.safetensors"), expected)


def test_adapters_become_one_of_the_rank_that_was_asked_for(call, files, tmp_path):
    name = UP.format(1)
    for task in ("a", "b"):
        g = torch.Generator().manual_seed(ord(task))
        factors = torch.randn(3, 8, generator=g), torch.randn(12, 3, generator=g)
        write_adapter(tmp_path / task, {name: factors}, {})
    line = [f"base={files['base']}", f"experts.a={tmp_path}/a", f"experts.b={tmp_path}/b"]
    code, out, err = call(*line, "method=tsv_m", "form=adapter", "rank=2", "output=merged")
    assert code == 0, err
    merged = merging.open_checkpoint(tmp_path / "merged")
    assert merged.rank(name) == 2
    assert call(*line, "method=tsv_m", "form=adapter", "output=whole")[0] == 0
    whole = merging.open_checkpoint(tmp_path / "whole").delta(name)
    s = torch.linalg.svdvals(whole.double()).square()
    kept = s[:2].sum() / s.sum()
    assert f"the adapter's rank keeps {kept:.1%} of the merge's squared norm" in out


def test_the_commands_of_the_configuration_are_those_tested_here():
    header = (cli.CONFIGS / "merge.yaml").read_text().partition("defaults:")[0]
    for piece in ("weights.math=0.7 weights.code=-0.3", "form=adapter rank=16", "recipe=FILE.yaml"):
        assert piece in header

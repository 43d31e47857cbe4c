"""Weights of experts, methods of parts, the form of the output: against merges done by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import InputError, create, merge_checkpoints, merge_state_dicts, methods
from merging.engine.choices import at_depth, read_bytes
from merging.factors import Factors, truncate
from merging.formats.checkpoints import open_checkpoint
from merging.formats.writer import write_adapter
from merging.layers.parts import kind, matcher

SHAPES = {
    "embed_tokens.weight": (20, 8),
    **{f"layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(3)},
    **{f"layers.{i}.mlp.up_proj.weight": (12, 8) for i in range(3)},
    **{f"layers.{i}.mlp.up_proj.bias": (12,) for i in range(3)},
    "norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
LAYERS = [name for name in SHAPES if "proj.weight" in name]
Q, UP = "layers.{}.self_attn.q_proj.weight", "layers.{}.mlp.up_proj.weight"


def draw(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


@pytest.fixture
def base():
    return draw(0)


@pytest.fixture
def experts(base):
    return {t: {k: base[k] + d for k, d in draw(ord(t), 0.05).items()} for t in "abc"}


def merged(base, experts, method, **options):
    options = {"layers": LAYERS} | options
    return merge_state_dicts(base, experts, method, **options)


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], **({"rtol": 1e-4, "atol": 1e-6} | tolerance)
        )


# --- weights --------------------------------------------------------------------------------------

METHODS = ["average", "task_arithmetic", "ties", "actmat", "tsv_m", "bounded", "symmetric"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("on", ["delta", "task"])
def test_weight_0_is_leaving_the_expert_out_and_1_is_nothing(base, experts, name, on):
    method = create(name)
    if on == "task" and "weights" not in method.context:
        with pytest.raises(InputError, match=f"method '{name}' has no weights of tasks"):
            merged(base, experts, method, weights={"a": 2}, weights_on=on)
        return
    two = {t: experts[t] for t in "ac"}
    close(merged(base, experts, method, weights={"b": 0}, weights_on=on), merged(base, two, method))
    same = merged(base, experts, method, weights={"a": 1, "b": 1.0}, weights_on=on)
    close(same, merged(base, experts, method), rtol=1e-4, atol=1e-5)


def test_weight_0_is_leaving_the_expert_out_for_every_method(base, experts):
    """Bit by bit: it is no expert with a difference of 0, which would count among T."""
    two = {t: experts[t] for t in "ac"}
    for name in methods():
        method = create(name)
        if method.needs or name == "wudi":  # 300 steps, by the same engine
            continue
        found = merged(base, experts, method, weights={"b": 0}, weights_on="delta")
        expected = merged(base, two, method)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("name", METHODS)
def test_weights_on_differences_scale_them_before_the_method(base, experts, name):
    method, weights = create(name), {"a": 0.7, "c": -0.3}
    scaled = {
        t: {k: base[k] + weights.get(t, 1) * (e[k] - base[k]) for k in base}
        for t, e in experts.items()
    }
    found = merged(base, experts, method, weights=weights, weights_on="delta")
    close(found, merged(base, scaled, method), rtol=1e-3, atol=1e-5)
    # all alike: what alpha does
    halved = merged(base, experts, method, weights=dict.fromkeys("abc", 0.5), weights_on="delta")
    whole = merged(base, experts, method)
    close(halved, {k: base[k] + 0.5 * (w - base[k]) for k, w in whole.items()}, atol=1e-5)


def test_task_weights_count_an_expert_so_often(base, experts):
    """Twice is as if it were there twice, where no count of experts enters otherwise."""
    twice = {**experts, "d": experts["a"]}
    for name in ("average", "actmat"):
        method = create(name)
        found = merged(base, experts, method, weights={"a": 2.0}, weights_on="task")
        close(found, merged(base, twice, method), rtol=1e-3, atol=1e-5)
        scaled = {"a": 6.0, "b": 3.0, "c": 3.0}
        close(found, merged(base, experts, method, weights=scaled, weights_on="task"), atol=1e-5)


def test_an_average_is_weighted_by_default(base, experts):
    found = merged(base, experts, create("average"), weights={"a": 0.7, "b": 0.3, "c": 0})
    close(found, {k: 0.7 * experts["a"][k] + 0.3 * experts["b"][k] for k in base})


def test_weights_of_adapters_in_their_own_rank(base, tmp_path):
    g, paths, dense = torch.Generator().manual_seed(1), {}, {}
    for t in "ab":
        A, B = torch.randn(2, 8, generator=g), torch.randn(8, 2, generator=g)
        write_adapter(tmp_path / t, {Q.format(0): (A, B)}, {})
        paths[t], dense[t] = tmp_path / t, base | {Q.format(0): base[Q.format(0)] + B @ A}
    save_file(base, tmp_path / "base.safetensors")
    weights = {"a": 0.5, "b": -2.0}
    merge_checkpoints(
        tmp_path / "base.safetensors", paths, create("actmat"), tmp_path / "out.safetensors",
        layers=LAYERS, weights=weights,
    )  # fmt: skip
    expected = merged(base, dense, create("actmat"), weights=weights)
    close(load_file(tmp_path / "out.safetensors"), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"weights": {"d": 1}}, "weights names 'd', which is no expert"),
        ({"weights": {"a": "much"}}, "weight of expert 'a' is 'much'"),
        ({"weights": {"a": float("nan")}}, "weight of expert 'a' is nan"),
        ({"weights": dict.fromkeys("abc", 0)}, "every expert has weight 0"),
        ({"weights": {"a": -1}, "weights_on": "task"}, "weight of expert 'a' is negative"),
        ({"weights": {"a": 1}, "weights_on": "both"}, "weights_on is 'both', expected one of"),
        ({"parts": [{"match": "*"}]}, "a part lacks 'method'"),
        ({"parts": [{"match": "*.none.*", "method": "ties"}]}, "'*.none.*' matches no tensor"),
        ({"parts": [{"match": "blocks 5-2", "method": "ties"}]}, "the last block comes before"),
        (
            {"parts": [{"match": "*", "method": "ties"}, {"match": "mlp", "method": "average"}]},
            "'mlp' matches only what earlier parts match",
        ),
        ({"parts": [{"match": "*", "method": "ties", "k": ["a"]}]}, "k of method 'ties' is"),
        ({"parts": [{"match": "*", "method": "ties", "rank": 3}]}, "has no hyperparameter 'rank'"),
        ({"parts": [{"match": "mlp", "method": "regmean"}]}, "needs covariance statistics"),
        ({"dtype": "int8"}, "dtype is 'int8', expected float32"),
    ],
)
def test_bad_choices_are_told_early(base, experts, options, told):
    with pytest.raises(InputError) as error:
        merged(base, experts, create("actmat"), **options)
    assert told in error.value.message


# --- parts ----------------------------------------------------------------------------------------


def test_the_first_part_that_matches_wins(base, experts):
    parts = [
        {"match": "blocks 0-1", "method": "average"},
        {"match": "*.mlp.*", "method": "tsv_m", "alpha": 0.5},
        {"match": "embedding", "method": "ties", "k": 0.5, "scope": "layer"},
        {"match": "head", "method": "iso_c"},
    ]
    found = merged(base, experts, create("actmat"), parts=parts)
    whole = {n: merged(base, experts, create(n)) for n in ("average", "actmat")}
    tsv = merged(base, experts, create("tsv_m", alpha=0.5))
    head = merged(base, experts, create("iso_c"), layers=["lm_head.weight"])
    ties = merged(base, experts, create("ties", k=0.5, scope="layer"))
    for name in base:
        own = whole["actmat"]
        if name.startswith(("layers.0", "layers.1")):
            own = whole["average"]
        elif ".mlp." in name:
            own = tsv
        elif "embed" in name:
            own = ties
        elif "head" in name:
            own = head
        torch.testing.assert_close(found[name], own[name], rtol=1e-4, atol=1e-6)
    rules = found.report.rules
    assert rules[UP.format(2)] == "tsv_m" and rules["lm_head.weight"] == "iso_c"
    assert rules["layers.2.mlp.up_proj.bias"] == "average" and rules[Q.format(2)] == "actmat"


def test_a_method_that_looks_at_the_whole_model_looks_at_its_part(base, experts):
    parts = [{"match": "mlp", "method": "ties", "k": 0.3}]
    found = merged(base, experts, create("average"), parts=parts)
    names = [name for name in base if ".mlp." in name]
    alone = [{n: s[n] for n in names} for s in (base, *experts.values())]
    expected = merge_state_dicts(
        alone[0], dict(zip(experts, alone[1:], strict=True)), create("ties", k=0.3), layers=[]
    )
    close({name: found[name] for name in names}, expected)


def test_a_list_of_values_runs_from_the_first_block_to_the_last(base, experts):
    method = create("task_arithmetic", alpha=[0.0, 1.0])
    found = merged(base, experts, method)
    total = {k: sum(e[k] - base[k] for e in experts.values()) for k in base}
    for i, alpha in enumerate((0.0, 0.5, 1.0)):
        for name in (Q.format(i), UP.format(i)):
            torch.testing.assert_close(found[name], base[name] + alpha * total[name])
    torch.testing.assert_close(found["embed_tokens.weight"], base["embed_tokens.weight"])
    assert at_depth(create("wudi", steps=[10, 31, 50]), 0.25).hyperparameters["steps"] == 20
    assert at_depth(create("dc_merge", rank=[2, 8]), 0.3).hyperparameters["rank"] == 4
    assert at_depth(create("ties", k=[0.5]), 0.7).hyperparameters["k"] == 0.5


def test_kinds_and_patterns():
    kinds = {
        "model.layers.3.self_attn.k_proj.weight": "attention",
        "encoder.layer.0.attention.output.dense.weight": "attention",
        "h.0.mlp.c_fc.weight": "mlp",
        "encoder.layer.0.intermediate.dense.bias": "mlp",
        "model.embed_tokens.weight": "embedding",
        "transformer.wte.weight": "embedding",
        "model.layers.3.input_layernorm.weight": "norm",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
        "logit_scale": "other",
    }
    assert {name: kind(name) for name in kinds} == kinds
    assert matcher("blocks 0-5")("model.layers.5.x") and not matcher("block 3")("layers.33.x")
    assert matcher("*.mlp.*")("layers.0.mlp.up.weight") and not matcher("mlp.*")("layers.0.mlp.x")


# --- the output -----------------------------------------------------------------------------------


@pytest.fixture
def files(base, experts, tmp_path):
    paths = {}
    for task, state in {"base": base, **experts}.items():
        paths[task] = tmp_path / f"{task}.safetensors"
        save_file({k: v.bfloat16() for k, v in state.items()}, paths[task])
    return paths.pop("base"), paths


@pytest.mark.parametrize("name", ["actmat", "average", "ties"])
def test_the_outputs_dtype_is_rounded_once(files, tmp_path, name):
    base, paths = files
    states = {t: load_file(p) for t, p in paths.items()}
    for dtype in ("float32", "float16", torch.bfloat16):
        output = tmp_path / f"{dtype}.safetensors"
        merge_checkpoints(base, paths, create(name), output, layers=LAYERS, dtype=dtype)
        found = load_file(output)
        wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        whole = {t: {k: v.float() for k, v in s.items()} for t, s in states.items()}
        exact = merged({k: v.float() for k, v in load_file(base).items()}, whole, create(name))
        for key, tensor in found.items():
            assert tensor.dtype == wanted
            tolerance = torch.finfo(wanted).eps * exact[key].abs() + 2e-5
            assert ((tensor.float() - exact[key]).abs() <= tolerance).all()
    same = merge_state_dicts(load_file(base), states, create(name), layers=LAYERS, dtype="float32")
    assert all(torch.equal(same[k], load_file(tmp_path / "float32.safetensors")[k]) for k in same)


def test_shards_are_no_larger_than_asked(files, tmp_path):
    base, paths = files
    merge_checkpoints(
        base, paths, create("average"), tmp_path / "out", layers=LAYERS, shard_size="1KB"
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [
        f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))
    ]
    assert len(names) > 1
    for name in names:
        tensors = load_file(tmp_path / "out" / name)
        assert sum(t.nbytes for t in tensors.values()) <= 1000
    assert open_checkpoint(tmp_path / "out").shape("norm.weight") == (8,)
    merge_checkpoints(
        base, paths, create("average"), tmp_path / "one", layers=LAYERS, shard_size="5 gb"
    )
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    assert [read_bytes(x) for x in ("5GB", "1.5 MB", 7)] == [5 * 10**9, 15 * 10**5, 7]
    for size in ("much", "0", "-1GB"):
        with pytest.raises(InputError, match="shard_size is"):
            read_bytes(size)


def test_truncation_keeps_the_largest_singular_values():
    g = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(6, 30, generator=g), torch.randn(20, 6, generator=g), -0.5)
    U, s, Vh = torch.linalg.svd(factors.dense().double(), full_matrices=False)
    short, kept, lost = truncate(factors, 2)
    assert short.A.shape == (2, 30) and short.B.shape == (20, 2)
    best = (U[:, :2] * s[:2]) @ Vh[:2]
    torch.testing.assert_close(short.dense().double(), best, rtol=1e-4, atol=1e-4)
    assert kept == pytest.approx(s[:2].square().sum().item(), rel=1e-5)
    assert lost == pytest.approx(s[2:].square().sum().item(), rel=1e-4)


def test_an_adapter_of_a_rank_is_the_nearest_one(base, tmp_path):
    g, paths, name = torch.Generator().manual_seed(1), {}, UP.format(1)
    for t in "ab":
        A, B = torch.randn(2, 8, generator=g), torch.randn(12, 2, generator=g)
        write_adapter(tmp_path / t, {name: (A, B)}, {})
        paths[t] = tmp_path / t
    save_file(base, tmp_path / "base.safetensors")

    def merge(output, **options):
        report = merge_checkpoints(
            tmp_path / "base.safetensors", paths, create("tsv_m"), tmp_path / output,
            layers=LAYERS, form="adapter", **options,
        )  # fmt: skip
        return report, open_checkpoint(tmp_path / output)

    _, exact = merge("exact")
    for rank in (4, 9):  # the sum of ranks, and more
        report, whole = merge(f"rank{rank}", rank=rank)
        torch.testing.assert_close(whole.delta(name), exact.delta(name))
        assert report.kept == 1
    report, short = merge("rank1", rank=1)
    assert short.rank(name) == 1
    s = torch.linalg.svdvals(exact.delta(name).double())
    error = (short.delta(name) - exact.delta(name)).norm()
    assert error == pytest.approx(s[1:].norm().item(), rel=1e-4)
    assert report.kept == pytest.approx((s[0] ** 2 / s.square().sum()).item(), rel=1e-4)
    assert f"rank keeps {report.kept:.1%} of the merge's squared norm" in report.text()
    for told, options in [
        ("rank is 0", {"form": "adapter", "rank": 0}),
        ("rank is that of an adapter", {"rank": 4}),
        ("those of a dense output", {"form": "adapter", "dtype": "float32"}),
    ]:
        with pytest.raises(InputError, match=told):
            merge_checkpoints(
                tmp_path / "base.safetensors", paths, create("tsv_m"), tmp_path / "no", **options
            )

"""Whole state dicts and checkpoints through the engine, against merges done by hand."""

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import InputError, Layer, Report, create, merge_checkpoints, merge_state_dicts
from merging.engine import passes, routes
from merging.engine.job import prepare
from merging.engine.pipeline import behind
from merging.engine.plan import Item, depths, share
from merging.engine.routes import KEPT
from merging.formats.checkpoints import open_checkpoint
from merging.formats.writer import write_adapter
from merging.threads import each

LAYERS = {"blocks.0.attn.in_proj_weight": Layer(3), "blocks.1.fc.weight": Layer()}


def state(seed, dtype=torch.float32, vocabulary=11):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    return {
        "embed.weight": draw(vocabulary, 8),
        "blocks.0.attn.in_proj_weight": draw(24, 8),
        "blocks.0.attn.in_proj_bias": draw(24),
        "blocks.1.fc.weight": draw(5, 8),
        "scale": draw(1)[0],
        "steps": torch.tensor([7]),
    }


@pytest.fixture
def base():
    return state(0)


@pytest.fixture
def experts(base):
    def moved(seed):
        return {
            k: v + 0.1 * d if v.is_floating_point() else v
            for (k, v), d in zip(base.items(), state(seed).values(), strict=True)
        }

    return {name: moved(i) for i, name in enumerate(("a", "b", "c"), 1)}


def stack(base, experts, name):
    return torch.stack([e[name] - base[name] for e in experts.values()])


def test_layers_by_the_method_everything_else_averaged(base, experts):
    report = Report()
    merged = merge_state_dicts(base, experts, create("actmat"), layers=LAYERS, report=report)
    assert list(merged) == list(base)
    D = stack(base, experts, "blocks.0.attn.in_proj_weight")
    by_hand = torch.cat([create("actmat")(d) for d in D.chunk(3, 1)])
    name = "blocks.0.attn.in_proj_weight"
    assert torch.allclose(merged[name], base[name] + by_hand, atol=1e-6)
    for name in ("embed.weight", "blocks.0.attn.in_proj_bias", "scale"):
        assert torch.allclose(merged[name], base[name] + stack(base, experts, name).mean(0))
    assert torch.equal(merged["steps"], base["steps"])
    assert report.rules == {
        "embed.weight": "average",
        "blocks.0.attn.in_proj_weight": "actmat (3 parts)",
        "blocks.0.attn.in_proj_bias": "average",
        "blocks.1.fc.weight": "actmat",
        "scale": "average",
        "steps": "base",
    }
    assert report.summary() == {"average": 3, "actmat (3 parts)": 1, "actmat": 1, "base": 1}
    assert report.seconds > 0 and report.peak_bytes > 0


def test_packed_attention_can_stay_whole(base, experts):
    merged = merge_state_dicts(base, experts, create("actmat"), layers=LAYERS, split_qkv=False)
    name = "blocks.0.attn.in_proj_weight"
    whole = base[name] + create("actmat")(stack(base, experts, name))
    assert torch.allclose(merged[name], whole, atol=1e-6)


def test_rules_for_the_rest(base, experts):
    kept = merge_state_dicts(base, experts, create("wudi", steps=1), layers=LAYERS)
    assert torch.equal(kept["embed.weight"], base["embed.weight"])
    summed = merge_state_dicts(base, experts, create("task_arithmetic", alpha=1.0), layers=LAYERS)
    for name in ("embed.weight", "scale", "blocks.1.fc.weight"):
        assert torch.allclose(summed[name], base[name] + stack(base, experts, name).sum(0))


@pytest.mark.parametrize("name", ["average", "ties", "fisher"])
@pytest.mark.parametrize("window, block", [(1 << 27, 400), (700, 300), (1500, 1 << 23)])
def test_windows_and_blocks_of_rows_change_nothing(
    base, experts, monkeypatch, tmp_path, name, window, block
):
    fishers = {t: {k: x.float().square() for k, x in e.items()} for t, e in experts.items()}
    settings = {"layers": LAYERS, "statistics": fishers if name == "fisher" else None}
    whole = merge_state_dicts(base, experts, create(name), **settings)
    monkeypatch.setattr("merging.engine.plan.WINDOW_BYTES", window)
    monkeypatch.setattr("merging.engine.routes.BLOCK_BYTES", block)
    pieces = merge_state_dicts(base, experts, create(name), **settings, device=["cpu", "cpu"])
    assert all(torch.equal(pieces[k], whole[k]) for k in base)
    paths = {}
    for task, state in {"base": base, **experts}.items():
        paths[task] = tmp_path / f"{task}.safetensors"
        save_file(state, paths[task])
    paths_base, output = paths.pop("base"), tmp_path / "merged.safetensors"
    merge_checkpoints(paths_base, paths, create(name), output, **settings)
    written = load_file(output)
    assert all(torch.equal(written[k], whole[k]) for k in base)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ties", {"scope": "layer"}),
        ("ties", {"scope": "layer", "cancelled": "majority"}),
        ("consensus_ties", {"scope": "layer", "k": 0.5}),
        ("dare", {"p": 0.5}),
        ("dare_ties", {"p": 0.5}),
    ],
)
def test_masks_of_a_tensor_are_the_same_in_windows_of_it(monkeypatch, name, settings):
    """A tensor whose masks are its own is read twice in windows, never held as a whole."""
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(300, 40).bfloat16(), "norm": torch.randn(64)}
    experts = {t: {k: v + 0.1 * torch.randn(v.shape).to(v) for k, v in base.items()} for t in "xyz"}
    method = create(name, **settings)
    deltas = {k: torch.stack([e[k].float() - base[k].float() for e in experts.values()])
              for k in base}  # fmt: skip
    monkeypatch.setattr("merging.engine.plan.WINDOW_BYTES", 40 * 2 * 5 * 70)  # 70 rows
    monkeypatch.setattr("merging.engine.routes.BLOCK_BYTES", 40 * 4 * 5 * 32)  # 32 rows
    monkeypatch.setattr(passes, "_FEW", 1 << 11)
    monkeypatch.setattr("merging.method.masks._SAMPLED", 1000)  # every 12th entry
    expected = {k: (base[k].float() + method(deltas[k])).to(base[k].dtype) for k in base}
    sizes = []
    read = routes.read_values
    monkeypatch.setattr(routes, "read_values",
                        lambda *a: sizes.append(a[3].numel()) or read(*a))  # fmt: skip
    merged = merge_state_dicts(base, experts, method, layers=["a.weight"])
    assert all(torch.equal(merged[k], expected[k]) for k in base)
    assert max(sizes) == 70 * 40
    whole = 4 * base["a.weight"].nbytes
    reads = 3 if "cancelled" in settings else 2
    assert merged.report.bytes_read <= (reads + 0.2) * whole + 4 * base["norm"].nbytes


def test_blocks_are_computed_by_threads_that_compute_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = threading.Barrier(2)

        def alone(number):
            together.wait(20)  # two at a time
            return number, torch.get_num_threads()

        assert list(each(alone, range(4))) == [(number, 1) for number in range(4)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_writing_raises_is_raised_by_a_later_call_or_at_the_end():
    written = []

    def write(number):
        if number == 2:
            raise OSError("no space")
        written.append(number)

    with behind(write) as put:
        for number in (0, 1, 3, 4):
            put(number)
    assert written == [0, 1, 3, 4]
    with pytest.raises(OSError, match="no space"), behind(write) as put:
        put(2)
    with pytest.raises(OSError, match="no space"), behind(write, waiting=1) as put:
        put(2)
        put(5)
        pytest.fail("the second call waits for the first")


@pytest.mark.parametrize("name", ["actmat", "ties", "tsv_m", "average"])
def test_devices_and_task_order_change_no_bit(base, experts, name):
    method = create(name)
    merged = merge_state_dicts(base, experts, method, layers=LAYERS)
    shared = merge_state_dicts(base, experts, method, layers=LAYERS, device=["cpu", "cpu"])
    assert all(torch.equal(merged[k], shared[k]) for k in base)
    turned = dict(reversed(experts.items()))
    other = merge_state_dicts(base, turned, method, layers=LAYERS)
    assert all(torch.equal(merged[k], other[k]) for k in base)


def test_slerp_goes_from_the_first_name_to_the_second(base, experts):
    pair = {t: experts[t] for t in ("b", "a")}
    for method in (create("slerp", t=0.0), create("slerp", t=1.0)):
        merged = merge_state_dicts(base, pair, method, layers=LAYERS)
        expected = pair["a" if method.hyperparameters["t"] == 0 else "b"]
        assert all(torch.allclose(merged[k], expected[k], atol=1e-5) for k in base)


def test_one_report_names_every_value_that_is_not_finite(base, experts, tmp_path):
    base["blocks.0.attn.in_proj_bias"][3] = float("nan")
    experts["a"]["scale"] = torch.tensor(float("inf"))
    experts["c"]["embed.weight"][2, 5] = -float("inf")
    with pytest.raises(InputError) as error:
        merge_state_dicts(base, experts, create("actmat"), layers=LAYERS, device=["cpu", "cpu"])
    told = error.value.message.split("; ")
    assert len(told) == 3
    for sentence, pieces in zip(
        told,
        (
            ("the base", "'blocks.0.attn.in_proj_bias' has 1 values", "first at [3]"),
            ("expert 'a'", "'scale' has 1 values", "first at []"),
            ("expert 'c'", "'embed.weight' has 1 values", "first at [2, 5]"),
        ),
        strict=True,
    ):
        assert all(piece in sentence for piece in pieces), sentence


def test_statistics_and_results_that_are_not_finite_are_told(base, experts):
    moments = {t: {name: torch.eye(8) for name in LAYERS} for t in experts}
    moments["b"]["blocks.1.fc.weight"][0, 1] = float("nan")
    with pytest.raises(InputError, match=r"covariance statistics of task 'b': .*'blocks.1.fc.wei"):
        merge_state_dicts(base, experts, create("regmean"), layers=LAYERS, statistics=moments)
    half = {name: tensor.half() for name, tensor in base.items() if tensor.is_floating_point()}
    far = {t: {k: v + 4e4 for k, v in half.items()} for t in experts}
    with pytest.raises(InputError, match="the merge: tensor 'embed.weight'") as error:
        merge_state_dicts(half, far, create("task_arithmetic", alpha=1.0), layers=LAYERS)
    assert "leaves torch.float16's range" in error.value.hint


def test_a_difference_that_overflows_is_told(base, experts):
    base["blocks.1.fc.weight"].fill_(-3e38)
    experts["b"]["blocks.1.fc.weight"].fill_(3e38)
    with pytest.raises(InputError, match=r"expert 'b' .* 'blocks.1.fc.weight' has 40 values"):
        merge_state_dicts(base, experts, create("actmat"), layers=LAYERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_lifted_and_the_output_follows_the_base(dtype):
    base = state(0, dtype)
    experts = {str(i): state(i, dtype) for i in (1, 2)}
    merged = merge_state_dicts(base, experts, create("average"), layers=LAYERS)
    for name, tensor in merged.items():
        assert tensor.dtype == base[name].dtype
        if tensor.is_floating_point():
            mean = torch.stack([e[name].double() for e in experts.values()]).mean(0)
            assert torch.allclose(tensor.double(), mean, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_tied_tensors_are_merged_once_and_stay_tied(base, experts):
    for s in (base, *experts.values()):
        s["lm_head.weight"] = s["embed.weight"]
    merged = merge_state_dicts(base, experts, create("average"), layers=LAYERS)
    assert merged["lm_head.weight"] is merged["embed.weight"]


def test_statistics_are_found_by_task_name(base, experts):
    g = torch.Generator().manual_seed(9)
    moments = {}
    for task in reversed(experts):  # another order on purpose
        z = torch.randn(40, 8, generator=g)
        moments[task] = {name: z.T @ z / 40 for name in LAYERS}
    merged = merge_state_dicts(base, experts, create("regmean"), layers=LAYERS, statistics=moments)
    name = "blocks.1.fc.weight"
    C = torch.stack([moments[t][name] for t in experts])
    expected = base[name] + create("regmean")(stack(base, experts, name), covariances=C)
    assert torch.allclose(merged[name], expected, atol=1e-6)
    # the same moments as packed upper triangles
    i, j = torch.triu_indices(8, 8)
    packed = {t: {n: m[i, j] for n, m in s.items()} for t, s in moments.items()}
    again = merge_state_dicts(base, experts, create("regmean"), layers=LAYERS, statistics=packed)
    assert torch.equal(again[name], merged[name])


def test_fisher_statistics_cover_all_tensors(base, experts):
    fisher = {
        t: {k: torch.rand_like(v) + 0.1 for k, v in base.items() if v.is_floating_point()}
        for t in experts
    }
    merged = merge_state_dicts(base, experts, create("fisher"), layers=LAYERS, statistics=fisher)
    for name in ("embed.weight", "blocks.0.attn.in_proj_weight"):
        F = torch.stack([fisher[t][name] for t in experts])
        W = torch.stack([e[name] for e in experts.values()])
        assert torch.allclose(merged[name], (F * W).sum(0) / F.sum(0), atol=1e-4)


def test_vocabularies_of_different_size_follow_the_named_rule(base, experts):
    base = state(0, vocabulary=11)
    experts = {"more": state(1, vocabulary=13), "less": state(2, vocabulary=9)}
    with pytest.raises(InputError, match="embed.weight"):
        merge_state_dicts(base, experts, create("average"), layers=LAYERS)
    merged = merge_state_dicts(
        base, experts, create("average"), layers=LAYERS, vocabulary="common_rows"
    )["embed.weight"]
    both = (experts["more"]["embed.weight"][:9] + experts["less"]["embed.weight"]) / 2
    one = (experts["more"]["embed.weight"][9:11] + base["embed.weight"][9:]) / 2
    assert torch.allclose(merged, torch.cat([both, one]), atol=1e-6)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda e: e.pop("b"), None),
        (lambda e: e["b"].pop("blocks.1.fc.weight"), "blocks.1.fc.weight"),
        (lambda e: e["b"].update(extra=torch.zeros(1)), "extra"),
        (lambda e: e["b"].update(scale=torch.zeros(2)), "scale"),
        (lambda e: e["b"]["embed.weight"].fill_(float("nan")), "embed.weight"),
        (lambda e: e["b"]["blocks.1.fc.weight"].fill_(float("inf")), "blocks.1.fc.weight"),
    ],
)
def test_bad_experts_are_named(base, experts, spoil, message):
    spoil(experts)
    if message is None:
        merge_state_dicts(base, experts, create("average"), layers=LAYERS)
        return
    with pytest.raises(InputError) as error:
        merge_state_dicts(base, experts, create("average"), layers=LAYERS)
    assert message in error.value.message and "b" in error.value.message


def test_no_experts_and_missing_statistics(base, experts):
    with pytest.raises(InputError, match="no experts"):
        merge_state_dicts(base, {}, create("average"))
    with pytest.raises(InputError, match="the base holds no tensors"):
        merge_state_dicts({}, {"a": {}}, create("ties"), split_qkv=False)
    with pytest.raises(InputError, match="statistics of task 'a'"):
        merge_state_dicts(base, experts, create("regmean"), layers=LAYERS)
    some = {t: {"blocks.1.fc.weight": torch.eye(8)} for t in experts}
    with pytest.raises(InputError, match="lack 'blocks.0.attn.in_proj_weight'"):
        merge_state_dicts(base, experts, create("regmean"), layers=LAYERS, statistics=some)


def test_checkpoints_give_what_state_dicts_give(base, experts, tmp_path):
    for name, tensors in {"base": base, **experts}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = {t: tmp_path / f"{t}.safetensors" for t in experts}
    output = tmp_path / "merged.safetensors"
    report = merge_checkpoints(
        tmp_path / "base.safetensors", paths, create("ties"), output, layers=LAYERS
    )
    expected = merge_state_dicts(base, experts, create("ties"), layers=LAYERS)
    written = load_file(output)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[k], expected[k]) for k in expected)
    floats = sum(x.nbytes for x in base.values() if x.is_floating_point())
    # base and three experts: one pass for TIES' thresholds and one to merge; "steps" once
    assert report.bytes_read == 2 * 4 * floats + base["steps"].nbytes
    assert set(report.rules) == set(base)


@pytest.mark.parametrize("name", ["ties", "consensus_ties"])
def test_thresholds_of_a_whole_model_take_one_pass(name, monkeypatch):
    """Of a model that is not kept in memory: two reads and a sample, and the same bytes."""
    torch.manual_seed(0)
    shapes = {f"blocks.{i}.fc.weight": (2048, 16 * (i + 1)) for i in range(3)} | {"norm": (48,)}
    base = {k: torch.randn(s).bfloat16() for k, s in shapes.items()}
    moves = [{k: 0.01 * torch.randn(s) for k, s in shapes.items()} for _ in range(3)]
    experts = {
        f"e{t}": {k: (v + (1 + t) * move[k]).bfloat16() for k, v in base.items()}
        for t, move in enumerate(moves)
    }
    plain = merge_state_dicts(base, experts, create(name))  # small: it is kept
    monkeypatch.setattr(passes, "_SMALL", 4096)
    monkeypatch.setattr(passes, "_SAMPLE", 64)
    streamed = merge_state_dicts(base, experts, create(name))
    assert all(torch.equal(plain[k], streamed[k]) for k in base)
    size = 4 * sum(v.nbytes for v in base.values())
    assert plain.report.bytes_read == 2 * size
    assert 2 * size < streamed.report.bytes_read < 2.05 * size


def test_depth_runs_along_the_blocks():
    places = {"embed.weight": 0, "blocks.0.a": 0, "blocks.2.b": 0.5, "blocks.4.c": 1, "norm.w": 1}
    assert depths(places) == depths(reversed(places)) == places
    assert depths(["weight"]) == {"weight": 0.0}
    # T5's file is alphabetical: its embedding comes last
    t5 = {"decoder.block.0.a": 0, "encoder.final_layer_norm.w": 1, "lm_head.w": 1, "shared.w": 0}
    assert depths(t5) == t5
    clip = {"proj": 1, "class_embedding": 0, "conv1.weight": 0, "ln_pre.bias": 0, "ln_post.bias": 1}
    assert depths(["blocks.0.a", *clip]) == {"blocks.0.a": 0} | clip


def test_work_is_dealt_out_largest_first():
    items = [Item(str(n), (n,), "method", None, None, KEPT, 0) for n in (1, 5, 3, 4)]
    assert [[i.numel for i in share] for share in share(items, 2)] == [[5, 1], [4, 3]]


def test_other_statistics_start_an_interrupted_merge_over(base, experts, tmp_path):
    moments = {t: {name: torch.eye(8) for name in LAYERS} for t in experts}
    paths = {t: tmp_path / f"{t}.safetensors" for t in ("base", *experts)}
    for path, state in zip(paths.values(), (base, *experts.values()), strict=True):
        save_file(state, path)
    source, *opened = map(open_checkpoint, paths.values())

    def key(name):
        opened_by_task = dict(zip(experts, opened, strict=True))
        options = {"layers": LAYERS, "statistics": moments}
        return prepare(source, opened_by_task, create(name), **options).key()

    first = key("regmean")
    assert key("regmean") == first
    moments["a"]["blocks.1.fc.weight"] *= 2
    assert key("regmean") != first
    assert key("actmat") != first


def test_statistics_may_be_files(base, experts, tmp_path):
    """Read tensor by tensor, with the result of the same statistics in memory."""
    generator = torch.Generator().manual_seed(1)
    moments = {}
    for task in experts:
        z = torch.randn(40, 8, generator=generator)
        moments[task] = {name: z.mT @ z for name in LAYERS}
        save_file(moments[task], tmp_path / f"{task}.moments.safetensors")
    for name, tensors in {"base": base, **experts}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    merge_checkpoints(
        tmp_path / "base.safetensors",
        {t: tmp_path / f"{t}.safetensors" for t in experts},
        create("regmean"),
        tmp_path / "merged.safetensors",
        layers=LAYERS,
        statistics={t: tmp_path / f"{t}.moments.safetensors" for t in experts},
    )
    expected = merge_state_dicts(
        base, experts, create("regmean"), layers=LAYERS, statistics=moments
    )
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_what_fisher_statistics_leave_out_is_averaged(base, experts):
    fisher = {t: {name: torch.rand(base[name].shape) for name in LAYERS} for t in experts}
    report = Report()
    merge_state_dicts(
        base, experts, create("fisher"), layers=LAYERS, statistics=fisher, report=report
    )
    assert report.rules["embed.weight"] == "average"
    assert report.rules["blocks.1.fc.weight"] == "fisher"


def adapter(folder, a):
    factors = {"fc.weight": (a, torch.ones(4, len(a)))}
    write_adapter(folder, factors, {"modules_to_save": ["head"]}, dense={"head": torch.ones(3)})
    return open_checkpoint(folder)


def test_values_of_adapters_and_their_base_that_are_not_finite(tmp_path):
    base = {"fc.weight": torch.zeros(4, 5), "head": torch.zeros(3)}
    good = adapter(tmp_path / "good", torch.ones(2, 5))
    bad = adapter(tmp_path / "bad", torch.full((2, 5), float("nan")))
    for name in ("actmat", "average", "tact"):
        with pytest.raises(InputError, match=r"expert 'y' .*bad\): tensor 'fc.weight' has 10"):
            merge_state_dicts(base, {"x": good, "y": bad}, create(name), layers=["fc.weight"])
        broken = base | {"fc.weight": torch.full((4, 5), float("inf"))}
        with pytest.raises(InputError, match="the base .* 'fc.weight' has 20 values"):
            merge_state_dicts(broken, {"x": good}, create(name), layers=["fc.weight"])
    with pytest.raises(InputError, match="is an adapter, expected a whole checkpoint"):
        merge_checkpoints(tmp_path / "good", {"x": tmp_path / "bad"}, create("average"), "out")

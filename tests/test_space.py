"""Methods in a space that all adapters share: against the methods of such a space, and by hand."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from eval import tiny
from experiments.merge import main
from merging import InputError, create, merge_checkpoints
from merging.formats.checkpoints import open_checkpoint
from merging.formats.writer import write_adapter

LAYERS = ["layers.0.up_proj.weight", "layers.1.up_proj.weight"]
SHAPE = (9, 7)


@pytest.fixture
def base(tmp_path):
    g = torch.Generator().manual_seed(0)
    state = {name: torch.randn(SHAPE, generator=g) for name in LAYERS}
    save_file(state | {"norm.weight": torch.ones(7)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def adapters(tmp_path):
    """Two of rank 2 that share one row, so that their core is narrower than the sum of ranks."""
    g, paths = torch.Generator().manual_seed(1), {}
    shared = torch.randn(1, SHAPE[1], generator=g)
    for task in "ab":
        pairs = {}
        for name in LAYERS:
            own = torch.randn(1, SHAPE[1], generator=g)
            pairs[name] = torch.cat([shared, own]), torch.randn(SHAPE[0], 2, generator=g)
        write_adapter(tmp_path / task, pairs, {})
        paths[task] = tmp_path / task
    return paths


def merged(base, adapters, method, output, **options):
    report = merge_checkpoints(base, adapters, method, output, layers=LAYERS, **options)
    return (load_file(output) if output.suffix else None), report


def deltas(base, adapters, name):
    """(T, d_out, d_in) in float64."""
    pairs = [open_checkpoint(path).factors(name) for path in adapters.values()]
    return torch.stack([pair.scale * pair.B.double() @ pair.A.double() for pair in pairs])


def cores(D):
    """U, U^T D_t V and V^T by torch's SVD of all D_t side by side and above each other."""
    U, s, _ = torch.linalg.svd(torch.cat(list(D), dim=1), full_matrices=False)
    _, z, Vt = torch.linalg.svd(torch.cat(list(D), dim=0), full_matrices=False)
    U, Vt = U[:, s > 1e-9 * s[0]], Vt[z > 1e-9 * z[0]]
    return U, U.T @ D @ Vt.T, Vt


@pytest.mark.parametrize(
    "method, space, same",
    [
        (create("ties", scope="layer"), "core", create("core_space", of="ties")),
        (create("tsv_m"), "core", create("core_space", of="tsv_m")),
        (create("ties", scope="layer", k=0.4), "knots", create("knots", k=0.4, alpha=1.0)),
        (
            create("dare_ties", p=0.5, seed=3),
            "knots",
            create("knots", merge="dare_ties", p=0.5, seed=3, alpha=1.0),
        ),
    ],
)
def test_a_space_is_what_the_methods_of_that_space_do(
    base, adapters, tmp_path, method, space, same
):
    found, _ = merged(base, adapters, method, tmp_path / "space.safetensors", space=space)
    expected, _ = merged(base, adapters, same, tmp_path / "method.safetensors")
    plain, _ = merged(base, adapters, method, tmp_path / "full.safetensors")
    for name in LAYERS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[name], plain[name], rtol=1e-2, atol=1e-3)


def test_ties_over_the_whole_model_trims_the_cores_of_all_layers(base, adapters, tmp_path):
    method = create("ties", k=0.5)
    found, report = merged(base, adapters, method, tmp_path / "out.safetensors", space="core")
    assert report.rules[LAYERS[0]] == "ties in core space"
    inside = [cores(deltas(base, adapters, name)) for name in LAYERS]
    whole = torch.cat([C.flatten(1) for _, C, _ in inside], dim=1)  # (T, entries of all layers)
    floor = whole.abs().sort(dim=1, descending=True).values[:, int(0.5 * whole.shape[1]) - 1]
    for name, (U, C, Vt) in zip(LAYERS, inside, strict=True):
        kept = torch.where(C.abs() >= floor[:, None, None], C, 0)
        agree = kept * (kept.sign() == kept.sum(0).sign())
        M = agree.sum(0) / (agree != 0).sum(0).clamp_min(1)
        expected = load_file(base)[name] + (U @ M @ Vt).float()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["core", "knots"])
def test_one_adapter_returns_itself_and_order_changes_no_bit(base, adapters, tmp_path, space):
    keeps = create("ties", k=1.0)
    one, _ = merged(base, {"a": adapters["a"]}, keeps, tmp_path / "1.safetensors", space=space)
    for name in LAYERS:
        alone = load_file(base)[name] + deltas(base, {"a": adapters["a"]}, name)[0].float()
        torch.testing.assert_close(one[name], alone, rtol=1e-4, atol=1e-5)
    for i, given in enumerate([adapters, dict(reversed(adapters.items()))]):
        merged(base, given, create("dare"), tmp_path / f"o{i}.safetensors", space=space)
    assert (tmp_path / "o0.safetensors").read_bytes() == (tmp_path / "o1.safetensors").read_bytes()


@pytest.mark.parametrize("space", ["core", "knots"])
def test_in_a_space_ties_makes_an_adapter_of_the_joint_rank(base, adapters, tmp_path, space):
    options = {"space": space, "weights": {"a": 0.5}}
    dense, _ = merged(base, adapters, create("ties"), tmp_path / "d.safetensors", **options)
    merged(base, adapters, create("ties"), tmp_path / "adapter", form="adapter", **options)
    source = open_checkpoint(tmp_path / "adapter")
    for name in LAYERS:
        assert source.rank(name) <= 4
        whole = load_file(base)[name] + source.delta(name)
        torch.testing.assert_close(whole, dense[name], rtol=1e-4, atol=1e-5)


def test_what_adapters_hold_in_full_is_merged_on_its_own_axes_and_said(base, adapters, tmp_path):
    for i, (task, path) in enumerate(adapters.items()):
        source = open_checkpoint(path)
        pairs = {name: source.factors(name)[:2] for name in LAYERS}
        settings = {"modules_to_save": ["norm"]}
        norm = {"norm.weight": torch.full((7,), 2.0 + i)}
        write_adapter(tmp_path / f"{task}2", pairs, settings, dense=norm)
    saved = {task: tmp_path / f"{task}2" for task in adapters}
    found, report = merged(
        base, saved, create("ties", k=1.0), tmp_path / "o.safetensors", space="core"
    )
    assert any("1 other tensors ('norm.weight') are merged on their own" in n for n in report.notes)
    torch.testing.assert_close(found["norm.weight"], torch.full((7,), 2.5))


@pytest.mark.parametrize(
    "method, options, told",
    [
        ("ties", {"space": "narrow"}, "space is 'narrow', expected one of: full, core, knots"),
        ("average", {"space": "core"}, "method 'average' is linear: its merge is the same in"),
        ("task_arithmetic", {"space": "knots"}, "method 'task_arithmetic' is linear"),
        ("regmean", {"space": "core"}, "'regmean' needs covariance statistics"),
    ],
)
def test_a_space_is_refused_where_it_has_no_meaning(
    base, adapters, tmp_path, method, options, told
):
    with pytest.raises(InputError) as error:
        merged(base, adapters, create(method), tmp_path / "out.safetensors", **options)
    assert told in error.value.message


def test_dense_experts_are_refused_and_what_changes_nothing_is_said(base, adapters, tmp_path):
    with pytest.raises(InputError, match="expert 'c' .* is a dense checkpoint, space=core"):
        merged(base, adapters | {"c": base}, create("ties"), tmp_path / "o", space="core")
    _, report = merged(base, adapters, create("iso_c"), tmp_path / "o.safetensors", space="core")
    assert report.notes == ["space=core: method 'iso_c' gives there what it gives without"]


@pytest.mark.parametrize("space", ["core", "knots"])
def test_rank_rule_tells_adapters_by_the_layer_and_not_by_the_space(tmp_path, space):
    """In its own space an adapter is not narrow; the merge says that it is the one without."""
    g, name = torch.Generator().manual_seed(0), "layers.0.up_proj.weight"
    save_file({name: torch.randn(50, 40, generator=g)}, tmp_path / "base.safetensors")
    paths = {task: tmp_path / task for task in "abc"}
    for path in paths.values():
        A, B = torch.randn(2, 40, generator=g), torch.randn(50, 2, generator=g)
        write_adapter(path, {name: (A, B)}, {})
    results = []
    for i, options in enumerate(({}, {"space": space})):
        output = tmp_path / f"{i}.safetensors"
        report = merge_checkpoints(
            tmp_path / "base.safetensors", paths, create("rank_rule"), output, layers=[name],
            **options,
        )  # fmt: skip
        results.append(load_file(output)[name])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert report.notes == [f"space={space}: method 'rank_rule' gives there what it gives without"]


def test_a_space_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    folder, name = tiny.encoder(), "encoder.layer.0.attention.self.query.weight"
    state, g = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(2)
    rows, columns = state[name].shape
    for task in "ab":
        A, B = torch.randn(2, columns, generator=g), torch.randn(rows, 2, generator=g)
        write_adapter(tmp_path / task, {name: (A, B)}, {})
    paths = {task: tmp_path / task for task in "ab"}
    given = [f"base={folder}", *(f"experts.{t}={p}" for t, p in paths.items())]
    line = [*given, "method=ties", "space=core", f"output={tmp_path / 'out'}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["merge", *line])
    main()
    assert "1 ties in core space" in capsys.readouterr().out
    assert "merged in core space" in (tmp_path / "out" / "README.md").read_text()
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    D = deltas(folder, paths, name).float()
    expected = state[name] + merging.create("core_space")(D)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

"""What every registered method promises, whichever it is: a new method is covered by its name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import merging

METHODS = merging.methods()


def keeping(law):
    """The methods whose formula keeps a law. Those that break "scale" hold a constant in the units
    of the weights (a ridge, a step, a time, a tanh), or draw a mask from the weights' values; those
    that break "outputs" or "inputs" look at single entries or rows, or take steps of Adam."""
    return pytest.mark.parametrize(
        "name", [name for name in METHODS if law not in merging.create(name).breaks]
    )


# A single expert is trimmed, dropped or scaled with the default hyperparameters; with these it is
# returned.
WITHOUT_LOSS = {
    "ties": {"k": 1.0}, "dare": {"p": 0.0}, "dare_ties": {"p": 0.0},
    "della": {"density": 1.0, "eps": 0.0}, "breadcrumbs": {"beta": 0.0, "gamma": 0.0},
    "della_linear": {"density": 1.0, "eps": 0.0},
    "breadcrumbs_ties": {"beta": 0.0, "gamma": 0.0},
    "consensus": {"agree": 1}, "consensus_ta": {"agree": 1},
    "consensus_ties": {"agree": 1, "k": 1.0}, "knots": {"k": 1.0},
    "star": {"eta": 1.0}, "subspace_boosting": {"beta": 1.0, "of": "sum"},
    "aswudi": {"anchor": "sum"}, "ridge": {"lam": 0.0}, "tact": {"k": 1.0}, "mats": {"start": 1.0},
}  # fmt: skip

shapes = st.sampled_from([(6, 6), (4, 9), (11, 5)])
seeds = st.integers(0, 10_000)
every_method = pytest.mark.parametrize("name", METHODS)
few = settings(deadline=None, max_examples=5)


def tasks(name):
    return 2 if name == "slerp" else 3


@st.composite
def problems(draw, name):
    """Deltas (T, d_out, d_in) in float64 of any count, shape and rank, and all statistics."""
    T = 2 if name == "slerp" else draw(st.integers(2, 5), label="tasks")
    d_out, d_in = (draw(st.integers(3, 12), label=side) for side in ("d_out", "d_in"))
    rank = draw(st.sampled_from([None, 1, 2]), label="rank")
    seed = draw(seeds, label="seed")
    deltas = stack(T, (d_out, d_in), seed).double()
    if rank:
        deltas = deltas[:, :, :rank] @ stack(T, (rank, d_in), seed + 1).double() / 0.02
    return deltas, statistics(deltas, seed)


def rotation(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def stack(T, shape, seed=0):
    """Deltas of the size fine-tuning makes, (T, *shape), of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(0.5, 1.5, T).view(-1, *[1] * len(shape))
    return 0.02 * lengths * torch.randn(T, *shape, generator=generator)


def statistics(deltas, seed=0):
    """All a method can ask for, for deltas (T, d_out, d_in) or (T, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    fishers = torch.rand(deltas.shape, generator=generator).to(deltas)
    base = torch.randn(deltas.shape[1:], generator=generator, dtype=torch.float64).to(deltas)
    if deltas.ndim != 3:
        return {"fishers": fishers, "base": base}
    T, d_in = len(deltas), deltas.shape[-1]
    inputs = torch.randn(T, 4 * d_in, d_in, generator=generator, dtype=torch.float64)
    covariances = (inputs.mT @ inputs / (4 * d_in)).to(deltas)
    outputs = torch.randn(T, 4 * len(base), len(base), generator=generator, dtype=torch.float64)
    gradients = (outputs.mT @ outputs / (4 * len(base))).to(deltas)
    moments = {"covariances": covariances, "gradients": gradients}
    return moments | {"fishers": fishers, "base": base}


def close(merged, expected, tolerance=1e-4):
    assert (merged - expected).norm() <= tolerance * expected.norm() + 1e-12


@every_method
@few
@given(shape=shapes, seed=seeds)
def test_shape_dtype_and_determinism(name, shape, seed):
    deltas, method = stack(tasks(name), shape, seed), merging.create(name)
    before, stats = deltas.clone(), statistics(deltas, seed)
    merged = method(deltas, **stats, depth=0.5)
    assert merged.shape == shape and merged.dtype == torch.float32
    assert merged.isfinite().all()
    assert torch.equal(deltas, before), "the input was changed"
    assert torch.equal(merged, method(deltas, **stats, depth=0.5))
    wide = method(deltas.double(), **statistics(deltas.double(), seed), depth=0.5)
    assert wide.dtype == torch.float64
    close(merged, wide)


@every_method
@few
@given(data=st.data())
def test_the_order_of_the_tasks_changes_nothing(name, data):
    (deltas, stats), method = data.draw(problems(name)), merging.create(name)
    order = data.draw(st.permutations(range(len(deltas))))
    shuffled = {key: value if key == "base" else value[order] for key, value in stats.items()}
    close(method(deltas[order], **shuffled), method(deltas, **stats))


@keeping("scale")
@few
@given(data=st.data(), exponent=st.integers(-8, 8), sign=st.sampled_from([1, -1]))
def test_scaling_every_delta_scales_the_merge(name, data, exponent, sign):
    (deltas, stats), method = data.draw(problems(name)), merging.create(name)
    scale = sign * 2.0**exponent
    close(method(scale * deltas, **stats), scale * method(deltas, **stats))


@keeping("outputs")
@few
@given(data=st.data())
def test_rotating_the_outputs_rotates_the_merge(name, data):
    (deltas, stats), method = data.draw(problems(name)), merging.create(name)
    P = rotation(deltas.shape[1], data.draw(seeds))
    rotated = stats | {"base": P @ stats["base"], "gradients": P @ stats["gradients"] @ P.mT}
    close(method(P @ deltas, **rotated), P @ method(deltas, **stats))


@keeping("inputs")
@few
@given(data=st.data())
def test_rotating_the_inputs_rotates_the_merge(name, data):
    (deltas, stats), method = data.draw(problems(name)), merging.create(name)
    Q = rotation(deltas.shape[2], data.draw(seeds))
    rotated = {"covariances": Q.mT @ stats["covariances"] @ Q, "base": stats["base"] @ Q}
    rotated = stats | rotated
    close(method(deltas @ Q, **rotated), method(deltas, **stats) @ Q)


@every_method
@few
@given(data=st.data())
def test_torchs_routines_give_what_those_of_blas_give(name, data):
    """The first run on a GPU and in other dtypes, the second on a CPU; here both do on the CPU."""
    (deltas, stats), method = data.draw(problems(name)), merging.create(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merging.linalg._on_cpu", lambda matrix: False)
        expected = method(deltas, **stats)
    close(method(deltas, **stats), expected)


@every_method
@few
@given(data=st.data())
def test_the_route_to_the_solution_changes_nothing(name, data):
    """By Cholesky, or by eigenvectors; singular vectors from a Gram matrix, or from an SVD."""
    (deltas, stats), method = data.draw(problems(name)), merging.create(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merging.method.equations.solve_positive", lambda *_, **__: None)
        patch.setattr("merging.method.spectral._inexact", lambda values: True)
        expected = method(deltas, **stats)
    close(method(deltas, **stats), expected)


@every_method
def test_alpha_scales_the_merge(name):
    deltas = stack(tasks(name), (5, 7))
    stats = statistics(deltas)
    one = merging.create(name, alpha=1.0)(deltas, **stats)
    close(merging.create(name, alpha=-2.5)(deltas, **stats), -2.5 * one, 1e-6)


@every_method
@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (9, 4)])
def test_degenerate_deltas_stay_finite(name, shape):
    T, method = tasks(name), merging.create(name)
    deltas = stack(T, shape)
    zero = torch.zeros_like(deltas)
    rank_one = deltas[:, :, :1] @ deltas[:, :1, :] / 0.02
    cases = {
        "zero": zero,
        "one of them zero": torch.cat([deltas[:-1], zero[:1]]),
        "equal": deltas[:1].repeat(T, 1, 1),
        "opposed": torch.cat([deltas[:1], -deltas[:1], zero])[:T],
        "rank one": rank_one,
        "one row": deltas * (torch.arange(shape[0]) == 1).view(-1, 1),
        "one column": deltas * (torch.arange(shape[1]) == 1),
        "tiny": 1e-18 * deltas,
        "ill-conditioned": deltas * torch.logspace(0, -12, shape[1]),
    }
    for case, given_deltas in cases.items():
        merged = method(given_deltas, **statistics(given_deltas))
        assert merged.isfinite().all(), case
    assert torch.equal(method(zero, **statistics(zero)), zero[0])


@every_method
def test_one_expert_alone(name):
    deltas = stack(1, (5, 7))
    merged = merging.create(name)(deltas, **statistics(deltas))
    assert merged.shape == (5, 7) and merged.isfinite().all()


@keeping("expert")
@few
@given(d_in=st.integers(1, 9), more=st.integers(1, 4), seed=seeds)
def test_one_expert_is_returned_where_the_formula_does_so(name, d_in, more, seed):
    deltas = stack(1, (d_in + more, d_in), seed).double()
    method = merging.create(name, alpha=1.0, **WITHOUT_LOSS.get(name, {}))
    close(method(deltas, **statistics(deltas, seed)), deltas[0])


@pytest.mark.parametrize("name", [n for n in METHODS if merging.create(n).row_space])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(12, 20, 2), (20, 12, 2), (8, 40, 3)])
def test_a_row_space_method_may_run_in_the_adapters_own_rank(name, d_out, d_in, rank):
    T, method = tasks(name), merging.create(name)
    B, A = stack(T, (d_out, rank)), stack(T, (rank, d_in), seed=1) / 0.02
    Q = torch.linalg.qr(A.reshape(-1, d_in).mT)[0]  # (d_in, T rank)
    narrow = method(B @ (A @ Q), d_in=d_in, depth=0.5)
    close(narrow @ Q.mT, method(B @ A, depth=0.5))


@pytest.mark.parametrize("name", [n for n in METHODS if merging.create(n).column_space])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(12, 20, 2), (20, 12, 2), (40, 8, 3)])
def test_a_column_space_method_may_run_on_few_rows(name, d_out, d_in, rank):
    T, method = tasks(name), merging.create(name)
    B, A = stack(T, (d_out, rank)), stack(T, (rank, d_in), seed=1) / 0.02
    P = torch.linalg.qr(B.transpose(0, 1).reshape(d_out, -1))[0]  # (d_out, T rank)
    short = method((P.mT @ B) @ A, d_out=d_out)
    close(P @ short, method(B @ A))


@pytest.mark.parametrize("name", [n for n in METHODS if merging.create(n).elementwise])
def test_an_elementwise_method_may_run_on_blocks_of_rows(name):
    deltas, method = stack(tasks(name), (10, 7)), merging.create(name)
    context = method.prepare(lambda: iter([("weight", deltas)])) | {"depth": 0.3}
    fishers = statistics(deltas)["fishers"]
    whole = method(deltas, fishers=fishers, **context)
    blocks = [
        method(deltas[:, rows], fishers=fishers[:, rows], **context)
        for rows in (slice(0, 3), slice(3, 4), slice(4, 10))
    ]
    assert torch.equal(torch.cat(blocks), whole)


@pytest.mark.parametrize("name", [n for n in METHODS if merging.create(n).rest == "method"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4), (2, 3, 2, 2)])
def test_a_method_for_the_rest_takes_tensors_of_any_shape(name, shape):
    deltas, method = stack(tasks(name), shape), merging.create(name)
    merged = method(deltas, **statistics(deltas))
    assert merged.shape == shape and merged.isfinite().all()


@pytest.mark.parametrize("name", [n for n in METHODS if merging.create(n).one_tensor])
def test_a_method_prepared_for_a_tensor_may_run_on_its_blocks_in_their_order(name):
    deltas, method = stack(tasks(name), (10, 7)), merging.create(name)
    context = method.prepare_tensor(lambda: iter([("w", deltas[:, :6]), ("w", deltas[:, 6:])]))
    rows = (slice(0, 3), slice(3, 4), slice(4, 10))
    blocks = [method(deltas[:, block], **context) for block in rows]
    assert torch.equal(torch.cat(blocks), method(deltas))


@pytest.mark.parametrize("name", [n for n in METHODS if merging.create(n).whole_model])
def test_a_model_of_one_tensor_is_that_tensor(name):
    deltas, method = stack(tasks(name), (10, 7)), merging.create(name)
    context = method.prepare(lambda: iter([("weight", deltas)]))
    assert_close(method(deltas, **context), method(deltas))


@every_method
def test_a_method_says_its_formula_its_source_and_its_hyperparameters(name):
    method = merging.create(name)
    formula, _, source, settings, *_ = method.__doc__.splitlines()
    assert formula == method.formula and source == f"Source: {method.source}"
    assert all(f"{key}={value!r}" in settings for key, value in method.hyperparameters.items())
    assert method.formula and method.source and method.function.__doc__

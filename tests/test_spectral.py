"""Spectral methods: cases by hand, limits, low rank. Plain formulas: test_reference.py."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits
from torch.testing import assert_close

import merging
from merging import InputError, cores
from merging.method import spectral
from merging.method.reference import TEXTBOOK
from merging.method.spectral import orthonormalise, singular_triplets

SPECTRAL = ["tsv_m", "iso_c", "iso_cts", "knots", "star", "subspace_boosting", "svc"]
SHAPES = [(12, 12), (9, 15), (16, 7)]


def stack(T=3, shape=(12, 12), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, *shape, generator=generator, dtype=torch.float64).to(dtype)


def low_rank(T=3, shape=(12, 12), rank=2, seed=0):
    d_out, d_in = shape
    return stack(T, (d_out, rank), seed) @ stack(T, (rank, d_in), seed + 1)


def rotation(n, seed=0):
    return torch.linalg.qr(stack(1, (n, n), seed, torch.float64)[0])[0]


def svd(matrix):
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U, s, Vh.mT


# --- By hand ----------------------------------------------------------------------------------


def test_two_orthogonal_tasks_by_hand():
    deltas = torch.zeros(2, 3, 3)
    deltas[0, 0, 0], deltas[1, 1, 1] = 4.0, 2.0
    both = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    assert_close(merging.create("tsv_m")(deltas), both)
    assert_close(merging.create("iso_c")(deltas), torch.diag(torch.tensor([3.0, 3.0, 0.0])))
    assert_close(merging.create("svc")(deltas), both)  # nothing is shared
    assert_close(merging.create("star")(deltas), both / 2)
    boosted = merging.create("subspace_boosting", of="sum")(deltas)
    assert_close(boosted, torch.diag(torch.tensor([4.0, 4.0, 0.0])))


def test_svc_counts_a_shared_direction_once():
    deltas = torch.zeros(2, 2, 2)
    deltas[:, 0, 0] = torch.tensor([1.0, 1.0])
    deltas[1, 1, 1] = 5.0
    # along e_1: <2, 1> / 1 = 2 for both tasks; along e_2: floor 1 and <5, 5> / 25 = 1
    assert_close(merging.create("svc")(deltas), torch.diag(torch.tensor([1.0, 5.0])))


def test_equal_deltas_merge_to_their_truncation_under_tsv_m():
    delta = stack(T=1)[0]
    U, s, V = svd(delta)
    merged = merging.create("tsv_m")(delta.repeat(3, 1, 1))
    assert_close(merged, (U[:, :4] @ s[:4].diag() @ V[:, :4].mT).float(), rtol=1e-4, atol=1e-5)
    # the same direction at different lengths is still one direction
    merged = merging.create("tsv_m")(torch.stack([delta, 2 * delta, -delta]))
    assert (merged - (2 / 3) * (U[:, :4] @ s[:4].diag() @ V[:, :4].mT)).norm() < 1e-4 * delta.norm()


def test_a_single_expert():
    delta = stack(T=1, shape=(9, 15))
    for method in (
        merging.create("tsv_m"),
        merging.create("knots", k=1.0, alpha=1.0),
        merging.create("star", eta=1.0),
        merging.create("subspace_boosting", beta=1.0, of="sum"),
        merging.create("svc"),
    ):
        assert_close(method(delta), delta[0], rtol=1e-4, atol=1e-5)


def test_iso_cts_collects_as_many_directions_as_the_layer_has():
    """At r = 13 and T = 3 a floor of each task's share would leave some out."""
    for common in (0.8, 0.5, 0.0):
        merged = merging.create("iso_cts", common=common)(stack(T=3, shape=(13, 20)))
        s = svd(merged)[1]
        assert_close(s, s.mean().expand(13), rtol=1e-4, atol=0)  # 13 equal ones, none 0


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_the_zeros_of_low_rank_deltas_count_in_the_authors_mean(name):
    deltas = low_rank(T=3, shape=(12, 14), rank=2)
    s = svd(deltas.double().sum(0))[1]
    few, all_of_them = (
        svd(merging.create(name, rank=rank)(deltas))[1] for rank in ("nonzero", "full")
    )
    assert (few > 1e-3 * few[0]).sum() == 6 and (all_of_them > 1e-3 * all_of_them[0]).sum() == 12
    if name == "iso_c":
        assert_close(few[:6], (s.sum() / 6).expand(6), rtol=1e-4, atol=0)
        assert_close(all_of_them, (s.sum() / 12).expand(12), rtol=1e-4, atol=0)
    assert not merging.create(name, rank="full").row_space
    full_rank = stack(T=3)
    assert_close(
        merging.create(name, rank="full")(full_rank),
        merging.create(name)(full_rank),
        atol=1e-5,
        rtol=0,
    )


def test_null_vectors_turn_tsv_m_and_are_raised_by_subspace_boosting():
    deltas = low_rank(T=3, shape=(12, 14), rank=2)
    few = merging.create("tsv_m")(deltas)
    full = merging.create("tsv_m", rank="full")(deltas)
    assert (few - full).norm() > 0.05 * few.norm()
    boost = {"of": "sum", "beta": 0.5}
    raised = svd(merging.create("subspace_boosting", rank="full", **boost)(deltas))[1]
    assert (raised > 1e-3 * raised[0]).sum() == 12
    kept = svd(merging.create("subspace_boosting", **boost)(deltas))[1]
    assert (kept > 1e-3 * kept[0]).sum() == 6


def test_an_unknown_rank_is_refused():
    with pytest.raises(InputError, match="unknown rank 'some'"):
        merging.create("iso_c", rank="some")


def test_knots_without_the_singular_values_is_another_method():
    """What the ACTMat paper's rows KnOTS-TSV and KnOTS-Iso-C are: by hand on two diagonal tasks."""
    deltas = torch.zeros(2, 2, 2)
    deltas[0, 0, 0], deltas[1, 1, 1] = 4.0, 2.0
    # U = I, s = (4, 2), V_1^T = diag(1, 0), V_2^T = diag(0, 1): their Iso-C is I, theirs times s is
    # diag(4, 2); with the values inside Iso-C makes both 3
    after = merging.create("knots", merge="iso_c", values="after", alpha=1.0)(deltas)
    assert_close(after, torch.diag(torch.tensor([4.0, 2.0])))
    inside = merging.create("knots", merge="iso_c", alpha=1.0)(deltas)
    assert_close(inside, torch.diag(torch.tensor([3.0, 3.0])))
    for merge in ("tsv_m", "iso_c"):
        given = stack(T=3, shape=(9, 15))
        plain = merging.create(merge)(given)
        merged = merging.create("knots", merge=merge, values="after", alpha=1.0)(given)
        assert (merged - plain).norm() > 0.1 * plain.norm()


def test_knots_trims_over_all_layers_where_asked():
    small, large = stack(T=3, shape=(6, 8)), 10 * stack(T=3, shape=(5, 7), seed=1)
    method = merging.create("knots", scope="model", k=0.3, alpha=1.0)
    context = method.prepare(lambda: iter([("a", small), ("b", large)]))
    blocks, bases = [], []
    for deltas in (small, large):
        U, s, Vh = torch.linalg.svd(torch.cat(list(deltas.double()), dim=1), full_matrices=False)
        bases.append(U)
        blocks.append(s[:, None] * torch.stack(Vh.chunk(3, dim=1)))
    joint = TEXTBOOK["ties"](torch.cat([b.flatten(1) for b in blocks], dim=1), k=0.3)
    for deltas, U, block, merged in zip(
        (small, large), bases, blocks, joint.split([b[0].numel() for b in blocks]), strict=True
    ):
        expected = U @ merged.view(block.shape[1:])
        assert_close(method(deltas, **context), expected.float(), atol=1e-5, rtol=1e-4)
    assert merging.create("knots").prepare(lambda: iter([])) == {}


def test_knots_by_dare_ties_drops_entries_of_the_blocks():
    deltas = low_rank(T=3, rank=2)
    whole = merging.create("knots", merge="dare_ties", p=0.0)(deltas)
    assert_close(whole, merging.create("knots", k=1.0)(deltas), rtol=1e-4, atol=1e-5)
    some = merging.create("knots", merge="dare_ties", p=0.5)(deltas)
    assert not torch.allclose(some, whole)
    assert not torch.allclose(
        some, merging.create("knots", merge="dare_ties", p=0.5, seed=1)(deltas)
    )


def test_knots_in_a_shared_basis_leaves_tsv_m_and_iso_c_as_they_are():
    for deltas in (stack(T=3, shape=(9, 15)), low_rank(T=3)):
        for name in ("tsv_m", "iso_c"):
            shared = merging.create("knots", merge=name, alpha=1.0)(deltas)
            assert_close(shared, merging.create(name)(deltas), rtol=1e-4, atol=1e-5)


def test_what_a_post_processing_works_on_can_be_chosen():
    deltas = stack()
    merged = merging.create("tsv_m")(deltas)
    U, s, V = svd(merged)
    boosted = merging.create("subspace_boosting", of="tsv_m", beta=0.5)(deltas)
    floor = next(s[r - 1] for r in range(1, 13) if s[:r].sum() >= 0.5 * s.sum())
    assert_close(boosted, (U @ s.clamp_min(floor).diag() @ V.mT).float(), rtol=1e-4, atol=1e-5)
    assert merging.create("svc", of="tsv_m").row_space
    assert not merging.create("svc", of="ties").row_space


@pytest.mark.parametrize("name", ["star", "subspace_boosting", "svc"])
def test_an_unknown_merge_to_work_on_is_refused(name):
    with pytest.raises(InputError, match="unknown method 'tiles'"):
        merging.create(name, of="tiles")(stack())


def test_an_unknown_merge_of_knots_is_refused():
    with pytest.raises(InputError, match="unknown merge 'sum' of knots"):
        merging.create("knots", merge="sum")(stack())


# --- Low rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_deltas_do_not_depend_on_their_null_space(name, rank):
    deltas = low_rank(T=3, shape=(14, 20), rank=rank)
    merged = merging.create(name)(deltas)
    # rounding noise far below float32's rounds the null space differently
    noise = 1e-8 * deltas.abs().amax() * stack(3, (14, 20), seed=5)
    other = merging.create(name)((deltas + noise).float())
    assert (merged - other).norm() < 1e-4 * merged.norm()
    # and what is merged stays in the span of the deltas
    columns = torch.linalg.qr(torch.cat(list(deltas.double()), dim=1))[0][:, : 3 * rank]
    U, s, _ = svd(torch.cat(list(deltas), dim=1))
    U = U[:, s > 1e-5 * s[0]]
    assert columns.shape[1] == U.shape[1] == 3 * rank
    assert (merged - U @ (U.mT @ merged.double())).norm() < 1e-4 * merged.norm()


@pytest.mark.parametrize("name", [n for n in SPECTRAL if n != "knots"])
def test_narrow_basis_gives_the_dense_result(name):
    B, A = stack(3, (14, 2)), stack(3, (2, 10), seed=1)
    Q = torch.linalg.qr(A.reshape(-1, 10).mT)[0]  # (10, 6)
    dense = merging.create(name)(B @ A)
    narrow = merging.create(name)(B @ (A @ Q), d_in=10)
    assert (dense - narrow @ Q.mT).norm() < 1e-4 * dense.norm()
    if name == "tsv_m":  # 2 triplets a task by the ambient width and by rank, 2 by the narrow one
        many = merging.create(name)(torch.cat([B, B]) @ torch.cat([A, A]) @ Q, d_in=10)
        assert many.shape == (14, 6)


@pytest.mark.parametrize("name", SPECTRAL)
def test_zero_deltas(name):
    zero = torch.zeros(2, 5, 6)
    assert torch.equal(merging.create(name)(zero), zero[0])
    one = torch.cat([stack(1, (5, 6)), zero[:1]])
    assert merging.create(name)(one).isfinite().all()


# --- Equivariance -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from([n for n in SPECTRAL if n != "knots"]),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
    scale=st.floats(1e-4, 1e4),
)
def test_rotations_and_scales_pass_through(name, shape, seed, scale):
    deltas = stack(2, shape, seed, torch.float64)
    left, right = rotation(shape[0], seed + 1), rotation(shape[1], seed + 2)
    method = merging.create(name)
    merged = scale * left @ method(deltas) @ right
    assert_close(method(scale * left @ deltas @ right), merged, rtol=1e-6, atol=1e-6 * scale)


# --- Helpers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_triplets_are_the_svds(shape):
    matrix = stack(1, shape)[0]
    U, s, V = singular_triplets(matrix)
    assert_close(s, svd(matrix)[1])
    assert_close((U * s) @ V.mT, matrix.double())
    assert_close(U.mT @ U, torch.eye(min(shape), dtype=torch.float64))
    assert_close(V.mT @ V, torch.eye(min(shape), dtype=torch.float64))
    U, s, V = singular_triplets(matrix, 3)
    assert (U.shape[1], len(s), V.shape[1]) == (3, 3, 3)
    assert_close(s, svd(matrix)[1][:3])


def blas_threads(*_):
    return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_triplets_side_by_side_are_those_of_one_core_to_the_last_bit(three_threads):
    deltas = stack(6, (300, 280))
    together = spectral.leading_triplets(deltas, 40)
    with threadpool_limits(1, user_api="blas"):
        alone = [singular_triplets(delta, 40) for delta in deltas]
    for found, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, found, expected))


def test_cores_are_shared_for_a_while_only(three_threads):
    before = blas_threads()
    assert cores.each_on_a_core(blas_threads, stack(6, (300, 280))) == 6 * [{1}]
    assert blas_threads() == before
    meeting = threading.Barrier(3)  # passed by three threads at once, or by none
    cores.each_on_a_core(lambda matrix: meeting.wait(timeout=60), stack(3, (9, 4)))
    large = torch.empty(2, 1, 1).expand(2, 4096, 4096)  # too large for two at once
    names = cores.each_on_a_core(lambda matrix: threading.current_thread(), large)
    assert set(names) == {threading.current_thread()}


def test_singular_triplets_of_nothing_and_relative_to_something_larger():
    U, s, V = singular_triplets(torch.zeros(4, 6))
    assert (U.shape, s.shape, V.shape) == ((4, 0), (0,), (6, 0))
    assert len(singular_triplets(1e-7 * torch.eye(3))[1]) == 3
    assert len(singular_triplets(1e-7 * torch.eye(3), largest=1.0)[1]) == 0


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-4, 6e-6, 1e-6, 1e-9])
def test_orthonormalise_at_any_conditioning(smallest, monkeypatch):
    s = torch.logspace(0, math.log10(smallest), 8, dtype=torch.float64)
    matrix = rotation(12, 1)[:, :8] * s @ rotation(8, 2)
    kept = s > spectral.RANK_RTOL
    expected = (rotation(12, 1)[:, :8] * kept) @ rotation(8, 2)
    for tall, wanted in ((matrix, expected), (matrix.mT, expected.mT)):
        assert_close(orthonormalise(tall), wanted, atol=1e-5, rtol=0)
        U, found, V = singular_triplets(tall)
        assert_close(found, s[kept], rtol=1e-5, atol=0)
        assert_close(U @ V.mT, wanted, atol=1e-5, rtol=0)


def test_the_nearest_orthonormal_columns():
    matrix = stack(1, (9, 4))[0].double()
    P = orthonormalise(matrix)
    assert_close(P.mT @ P, torch.eye(4, dtype=torch.float64))
    best = (P - matrix).norm()
    for seed in range(20):
        other = torch.linalg.qr(P + 0.1 * stack(1, (9, 4), seed)[0])[0]
        other = other * (other * P).sum(0).sign()
        assert (other - matrix).norm() > best

"""The routines behind the solvers, in every layout and at their limits."""

import os

import pytest
import torch

import merging
from merging import linalg
from merging.linalg import eigh, gram, in_row_space, product, row_space, sharpen, solve_positive
from merging.loading import _amd_with_avx512, loading_torch
from merging.triangles import pack, unpack


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_product_in_every_layout(left, right, dtype):
    a, b = draw(5, 7, dtype=dtype), draw(7, 3, dtype=dtype, seed=1)
    found = product(LAYOUTS[left](a), LAYOUTS[right](b))
    assert found.dtype == dtype and torch.allclose(found, a @ b, atol=1e-6)


@pytest.mark.parametrize("m, k, n", [(0, 3, 2), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
def test_product_of_nothing(m, k, n):
    assert torch.equal(
        product(torch.ones(m, k), torch.ones(k, n)), torch.ones(m, k) @ torch.ones(k, n)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, d", [(9, 5), (3, 600), (600, 3), (0, 4)])
def test_gram_is_exactly_symmetric(n, d, layout):
    x = LAYOUTS[layout](draw(n, d, dtype=torch.float64))
    assert torch.equal(gram(x), gram(x).T)
    assert torch.allclose(gram(x), x.T @ x, rtol=1e-12, atol=1e-12)


def test_positive_solve_only_where_all_eigenvalues_are_above_the_cut():
    Q = torch.linalg.qr(draw(6, 6, dtype=torch.float64))[0]
    matrix = Q * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).double() @ Q.T
    right = draw(4, 6, dtype=torch.float64, seed=1)
    solved = solve_positive(right, matrix, above=0.99)
    assert torch.allclose(solved, right @ torch.linalg.inv(matrix), rtol=1e-10)
    assert solve_positive(right, matrix, above=1.01) is None
    before = matrix.clone()
    solve_positive(right, matrix)
    assert torch.equal(matrix, before)  # factored in a copy


def test_sharpened_eigenpairs_are_those_of_float64():
    d, kept = 200, 120
    rows = draw(3 * d, d) * torch.arange(1, d + 1).pow(-1.2)
    rows = rows @ torch.linalg.qr(draw(d, d, seed=1))[0]
    S = gram(rows)
    exact = torch.linalg.eigh(S.double())[1].flip(1)[:, :kept]
    values, V = eigh(S)

    def error(V):
        return (V[:, :kept].double() @ V[:, :kept].mT.double() - exact @ exact.mT).norm().item()

    before = error(V)
    sharpen(S, values, V, at=values[kept - 1])
    assert error(V) < 0.03 < 0.1 < before
    assert torch.allclose(V.mT @ V, torch.eye(d), atol=1e-5)
    assert (values.diff() <= 1e-6 * values[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0, 1, 200, 600])
def test_leading_eigenpairs_of_a_wide_matrix(dtype, kept):
    """600 columns: a last panel of reflections narrower than the others, and a null space."""
    d, eps = 600, torch.finfo(dtype).eps
    S = gram(draw(450, d, dtype=dtype) * torch.arange(1, d + 1).pow(-0.5).to(dtype))
    values, V = linalg.leading(S, lambda values: kept)
    exact = torch.linalg.eigvalsh(S.double()).flip(0).clamp_min(0)
    assert values.dtype == V.dtype == dtype and (values.diff() <= 10 * eps * values[0]).all()
    assert (values.double() - exact).abs().max() < 20 * eps * exact[0]
    assert V.shape[0] == d and V.shape[1] >= kept  # and those that float32 mixes with the last
    assert torch.allclose(V.mT @ V, torch.eye(V.shape[1], dtype=dtype), atol=50 * eps)
    assert ((S @ V - V * values[: V.shape[1]]).abs() < 50 * eps * exact[0]).all()


def test_leading_eigenvectors_of_diagonal_matrices():
    """Nothing is reflected: every tau is 0."""
    values = torch.arange(600, 0, -1).double()
    found, V = linalg.leading(values.diag(), lambda values: 2)
    assert torch.equal(found, values) and torch.equal(V.abs(), torch.eye(600).double()[:, :2])


def test_row_space_is_an_orthonormal_basis():
    x = draw(2, 3, 20)
    Q = row_space(x)
    assert Q.shape == (20, 6) and torch.allclose(Q.T @ Q, torch.eye(6), atol=1e-6)
    assert torch.allclose(x @ Q @ Q.T, x, atol=1e-5)


def test_only_amd_cpus_with_avx512_get_its_kernels(tmp_path):
    flags = "flags\t: fpu avx2 avx512f avx512bw avx512cd avx512dq avx512vl sse2\n"
    cases = {
        "vendor_id\t: AuthenticAMD\n" + flags: True,
        "vendor_id\t: GenuineIntel\n" + flags: False,
        "vendor_id\t: AuthenticAMD\nflags\t: fpu avx2\n": False,
    }
    for text, expected in cases.items():
        (tmp_path / "cpuinfo").write_text(text + "\nprocessor\t: 1\n")
        assert _amd_with_avx512(tmp_path / "cpuinfo") is expected
    assert not _amd_with_avx512(tmp_path / "absent")


def test_settings_for_loading_are_defaults_for_a_while(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with loading_torch():
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    with loading_torch():
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in os.environ


def test_what_is_hardly_positive_definite_is_left_to_the_spectral_route():
    right = torch.ones(1, 2, dtype=torch.float64)
    assert solve_positive(right, torch.diag(torch.tensor([1.0, 1e-16]).double())) is None
    assert solve_positive(right, torch.diag(torch.tensor([1.0, 1e-14]).double())) is not None


@pytest.mark.parametrize("name", ["actmat", "wudi_closed", "aswudi", "swudi", "ridge", "oas"])
def test_wide_layers_solved_in_float32_agree_with_float64(name, monkeypatch):
    deltas = 0.02 * torch.randn(3, 20, 40, generator=torch.Generator().manual_seed(0))
    hyper = {"rtol": 1e-2} if name in {"actmat", "wudi_closed"} else {}
    expected = merging.create(name, **hyper)(deltas.double())
    monkeypatch.setattr(linalg, "DOUBLE_UP_TO", 0)
    monkeypatch.setattr(linalg, "SOLVED_IN_DOUBLE_UP_TO", 0)
    merged = merging.create(name, **hyper)(deltas)
    assert (merged - expected).norm() < 1e-4 * expected.norm()


def test_packing_a_symmetric_matrix():
    matrix = torch.arange(9.0).view(3, 3)
    matrix = matrix + matrix.mT
    assert pack(matrix).tolist() == [0.0, 4.0, 8.0, 8.0, 12.0, 16.0]
    assert torch.equal(unpack(pack(matrix)), matrix)
    with pytest.raises(merging.InputError, match="5 numbers are no upper triangle"):
        unpack(torch.zeros(5))


def test_rows_are_given_in_their_basis():
    rows = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    Q, X = in_row_space(rows)
    assert X.shape == (2, 3, 6) and torch.equal(Q, row_space(rows))
    torch.testing.assert_close(X @ Q.mT, rows)

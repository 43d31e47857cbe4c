"""What a merge costs here, measured in fresh processes, and what this hardware cannot go below."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
import torch.multiprocessing  # its import teaches multiprocessing to pass tensors
from scipy.linalg import blas
from torch import Tensor

import merging
from merging.factors import Factors, merge_factors
from merging.linalg import gram, product, row_space, solve_positive, working_dtype
from merging.method.equations import spectral_filter, task_weights
from merging.method.reference import TEXTBOOK
from merging.method.registry import Method

Result = TypeVar("Result")
Context = Mapping[str, Tensor]

# --- Synthetic experts ------------------------------------------------------------------------


def deltas(T: int, d_out: int, d_in: int, *, spectrum: str = "decaying") -> Tensor:
    """Seeded differences (T, d_out, d_in), with shared input directions of unequal strength.

    spectrum: of the inputs; "decaying" as the eigenvalue's rank to the power -1, which is what
        fine-tuned text encoders show (a wide layer then has eigenvalues around ACTMat's cut), or
        "gap": one half of the eigenvalues 1e-8 of the other, with nothing near the cut.
    """
    draw = torch.Generator().manual_seed(T * d_out + d_in)
    directions = row_space(torch.randn(d_in, d_in, generator=draw))
    rank = torch.arange(1, d_in + 1, dtype=torch.float32)
    strength = rank.rsqrt() if spectrum == "decaying" else torch.where(rank <= d_in / 2, 1.0, 1e-4)
    mixed = strength[:, None] * directions.mT / strength.norm()
    rows = torch.randn(T * d_out, d_in, generator=draw)
    return 0.1 * product(rows, mixed).view(T, d_out, d_in)


def statistics_for(method: Method, D: Tensor) -> dict[str, Tensor]:
    """Measured second moments (T, d_in, d_in) or Fishers, where the method asks for them."""
    if method.needs == "fisher":
        return {"fishers": D.square() + D.square().mean()}
    found, (T, d_out, d_in) = {}, D.shape
    widths = {
        "covariance": {"covariances": d_in},
        "kfac": {"covariances": d_in, "gradients": d_out},
    }
    for name, d in widths.get(method.needs or "", {}).items():
        rows = deltas(T, 2 * d, d)  # twice as many as directions
        found[name] = torch.stack([gram(z) / len(z) for z in rows])
    return found


def adapters(T: int, d_out: int, d_in: int, rank: int) -> list[Factors]:
    draw = torch.Generator().manual_seed(T * d_out + d_in)
    return [
        Factors(
            torch.randn(rank, d_in, generator=draw),
            torch.randn(d_out, rank, generator=draw),
            0.1 / (rank * d_in) ** 0.5,
        )
        for _ in range(T)
    ]


# --- What is measured -------------------------------------------------------------------------


def ours(D: Tensor, name: str, hyperparameters: Mapping[str, Any], context: Context) -> Tensor:
    return merging.create(name, **hyperparameters)(D, **context)


def textbook(D: Tensor, name: str, hyperparameters: Mapping[str, Any], context: Context) -> Tensor:
    return TEXTBOOK[name](D, **context, **hyperparameters)


def narrow(factors: list[Factors], name: str) -> Tensor:
    """The engine's route for adapters: in their own rank, dense at the end."""
    return merge_factors(factors, merging.create(name)).dense()


def dense(factors: list[Factors], name: str) -> Tensor:
    return merging.create(name)(torch.stack([f.dense() for f in factors]))


def dense_textbook(factors: list[Factors], name: str) -> Tensor:
    return TEXTBOOK[name](torch.stack([f.dense() for f in factors]))


# --- Processes --------------------------------------------------------------------------------


class Cost(NamedTuple):
    seconds: float  # median
    bytes: int  # highest resident memory, beyond what the inputs and the libraries take


@dataclass
class Repeats:
    """How often to measure: at most so many times, and no more after `patience` seconds."""

    most: int = 15
    patience: float = 2.0

    def wanted(self, seconds: Sequence[float]) -> bool:
        """Whether to measure once more after these."""
        return len(seconds) < self.most and sum(seconds) < self.patience


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments) in a process that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    # what experiments.bench imports: naming that too, the main module, would run it twice
    modules = ["experiments.bench.files", "experiments.bench.report", "experiments.report.records"]
    context.set_forkserver_preload([*modules, "merging.method.reference"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def cost(repeats: Repeats, function: Callable[..., Any], *arguments: Any) -> Cost:
    """What function(*arguments) takes, in a fresh process."""
    return in_fresh_process(_measure, repeats, function, *arguments)


def _measure(repeats: Repeats, function: Callable[..., Any], *arguments: Any) -> Cost:
    function(*(_tiny(a) for a in arguments))  # libraries set themselves up at their first call
    before = psutil.Process().memory_info().rss
    seconds = []
    while repeats.wanted(seconds):
        start = time.perf_counter()
        function(*arguments)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(statistics.median(seconds), max(0, peak - before))


def _tiny(argument: Any) -> Any:
    """A corner of every tensor in an argument."""
    if isinstance(argument, Tensor):
        return argument[..., :16, :16].contiguous()
    if isinstance(argument, Factors):
        return Factors(argument.A[:, :16].contiguous(), argument.B[:16], argument.scale)
    if isinstance(argument, list):
        return [_tiny(a) for a in argument]
    if isinstance(argument, Mapping):
        return {key: _tiny(value) for key, value in argument.items()}
    return argument


# --- Hardware ---------------------------------------------------------------------------------


class Rates(NamedTuple):
    """What this machine does in a second, at best."""

    flops32: float  # of a matrix product
    flops64: float
    vector32: float  # of a symmetric matrix times a vector
    vector64: float
    copied: float  # bytes read and written back
    read: float  # bytes of files, as the operating system has them at hand
    written: float  # bytes of a file, until they are on the disk


def rates(folder: Path, width: int = 3072, entries: int = 1 << 26) -> Rates:
    """Measured in this process on matrices of that width, and so many entries to move.

    Files go to `folder`.
    """
    found = []
    for dtype, symv in ((torch.float32, blas.ssymv), (torch.float64, blas.dsymv)):
        square = torch.rand(width, width, dtype=dtype)
        products = (lambda a=square: product(a, a), lambda a=square: a @ a)
        found.append(2 * width**3 / min(map(_fastest, products)))
        half = square[: width // 2, : width // 2].contiguous().numpy()  # the mean of a reduction
        found.append(2 * half.size / _fastest(lambda a=half, f=symv: f(1.0, a.T, a[0], lower=1)))
    source = torch.rand(entries)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    path = folder / "rate"
    data = [memoryview(source.numpy()).cast("B")]
    written = source.nbytes / _fastest(lambda: write_file(path, data), 2)
    read = source.nbytes / _fastest(lambda: read_file(path), 2)
    path.unlink()
    gemm32, symv32, gemm64, symv64 = found
    return Rates(gemm32, gemm64, symv32, symv64, copied, read, written)


def _fastest(function: Callable[[], Any], repeats: int = 4) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_file(path: Path) -> int:
    """Bytes read, into memory that is used again and again."""
    total, buffer = 0, bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def write_file(path: Path, chunks: Iterable[memoryview]) -> None:
    """Write bytes until they are on the disk."""
    with path.open("wb", buffering=0) as file:
        for rest in chunks:
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file)


# --- The floor --------------------------------------------------------------------------------


class Work(NamedTuple):
    """Floating-point operations of a method's cheapest known exact route."""

    products: float = 0.0  # in matrix products
    vectors: float = 0.0  # in products of a symmetric matrix and a vector

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.products + other.products, self.vectors + other.vectors)

    def times(self, n: float) -> Work:
        return Work(n * self.products, n * self.vectors)


def spectral_work(n: int, vectors: int | None = None) -> Work:
    """Eigendecomposition: n^3 4/3 to a tridiagonal matrix, half of that in products by a vector
    (one-stage reduction, as LAPACK has it), and 2 n^2 per eigenvector back."""
    return Work(2 / 3 * n**3 + 2 * n**2 * (n if vectors is None else vectors), 2 / 3 * n**3)


def interference_work(
    method: Method, T: int, d_out: int, d_in: int, inverted: bool, kept: int | None = None
) -> Work:
    """Normal equations by the cheaper of two routes, then Cholesky, or the kept eigenvectors.

    kept: how many the filter leaves; None is all.
    """
    if method.arguments["estimator"] == "inputs":
        equations = 2 * T * d_out * d_in**2
    else:
        second = T * d_out * d_in**2  # half of a product: the result is symmetric
        by_outputs = T * d_out**2 * d_in + 2 * T * d_out**2 * d_in
        equations = second + min(by_outputs, 2 * T * d_out * d_in**2)
    if method.arguments["filter"] in {"ridge", "none"} or inverted:
        return Work(equations + d_in**3 / 3 + 2 * d_out * d_in**2)
    kept = d_in if kept is None else kept
    return Work(equations + 4 * d_out * d_in * kept) + spectral_work(d_in, kept)


def tsv_work(T: int, d_out: int, d_in: int) -> Work:
    short, long = sorted((d_out, d_in))
    k = short // T
    triplets = spectral_work(short, k) + Work(short**2 * long + 2 * short * long * k)
    r = T * k
    orthonormal = spectral_work(r).times(2) + Work(3 * (short + long) * r**2)
    return triplets.times(T) + orthonormal + Work(2 * short * long * r)


def iso_work(d_out: int, d_in: int) -> Work:
    short, long = sorted((d_out, d_in))
    return spectral_work(short) + Work(5 * short**2 * long)


def floor(name: str, D: Tensor, context: Context, rates: Rates) -> float:
    """Seconds below which this hardware cannot merge D: bytes moved once, operations done once.

    Operations are counted for the interference family, TSV-M and Iso-C; other methods are
    bounded by their bytes alone.
    """
    T, d_out, d_in = D.shape
    moved = D.nbytes + D[0].nbytes + sum(c.nbytes for c in context.values())
    method = merging.create(name)
    double = working_dtype(D) == torch.float64
    work = Work()
    if method.function.__name__ == "interference":
        n = min(d_in, T * d_out) if method.row_space else d_in
        inverted = method.arguments["filter"] == "cut" and nothing_is_cut(D)
        measured = method.arguments["estimator"] == "inputs"
        vectors = None if inverted or measured else kept(method, D)
        work = interference_work(method, T, d_out, n, inverted, vectors)
    elif name == "tsv_m":
        work, double = tsv_work(T, d_out, d_in), True
    elif name == "iso_c":
        work, double = iso_work(d_out, d_in), True
    flops, vector = (rates.flops64, rates.vector64) if double else (rates.flops32, rates.vector32)
    return max(moved / rates.copied, work.products / flops + work.vectors / vector)


def kept(method: Method, D: Tensor) -> int | None:
    """How many eigenvectors of sum_t w_t D_t^T D_t the method's filter keeps; None: it has none."""
    chosen = method.arguments
    if chosen["filter"] in {"ridge", "none"}:
        return None
    weights = task_weights(chosen["task_weight"], D).sqrt().view(-1, 1, 1)
    S = gram((weights * D).reshape(-1, D.shape[-1]))
    values = torch.linalg.eigvalsh(S).flip(0).clamp_min(0)
    options = {key: chosen[key] for key in ("rtol", "t", "rho")}
    rows = D.shape[0] * D.shape[1]
    filter = spectral_filter(chosen["filter"], values, d_in=len(values), rows=rows, **options)
    return int((filter > 0).sum())


def nothing_is_cut(D: Tensor) -> bool:
    """Whether all eigenvalues of sum_t D_t^T D_t are above ACTMat's cut, so that it inverts."""
    S = gram(D.reshape(-1, D.shape[-1]))
    cut = len(S) * torch.finfo(torch.float32).eps * S.norm()
    return solve_positive(S[:1], S, above=cut) is not None

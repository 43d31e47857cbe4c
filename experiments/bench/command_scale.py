"""`python -m experiments.bench.scale`: what merging 70B and 400B models costs, on paper.

Bytes, operations and memory of a merge follow from the shapes of the layers; the seconds of a
machine follow from its rates. The model is held against what this repository has measured
(results/bench) before it says anything about what it has not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import merging
from experiments.bench.cost import Work, interference_work, tsv_work
from experiments.hydra_run import Command
from experiments.report.markup import markdown
from merging.formats.disk import write_synced

METHODS = ("average", "actmat", "tsv_m")


@dataclass
class Scale:
    """The keys of configs/bench_scale.yaml."""

    results: str = "results/bench"


class Model(NamedTuple):
    """A checkpoint by the shapes of its matrices; what is no layer's matrix is `rest` entries."""

    layers: tuple[tuple[int, int, int], ...]  # count, d_out, d_in
    rest: int
    bytes_per_entry: int = 2

    @property
    def entries(self) -> int:
        return sum(n * d_out * d_in for n, d_out, d_in in self.layers) + self.rest


class Machine(NamedTuple):
    """Rates per second; a node is so many devices behind one disk."""

    flops: float  # float32 matrix products of one device
    vectors: float  # operations of symmetric matrix times vector, one device
    moved: float  # bytes of memory, one device
    disk: float  # bytes read or written, all devices together
    devices: int


def decoder(blocks: int, hidden: int, inner: int, keys: int, vocabulary: int) -> Model:
    """A Llama-shaped decoder: q, o; k, v of `keys` rows; gate, up, down; embedding and head."""
    shapes = ((2, hidden, hidden), (2, keys, hidden), (2, inner, hidden), (1, hidden, inner))
    layers = tuple((blocks * n, d_out, d_in) for n, d_out, d_in in shapes)
    return Model(layers, 2 * vocabulary * hidden)


def mixture(blocks: int, hidden: int, inner: int, experts: int, vocabulary: int) -> Model:
    """A decoder whose every second block has so many feed-forward experts and a shared one."""
    dense = decoder(blocks // 2, hidden, 2 * inner, hidden // 5, vocabulary)
    attention = ((blocks, hidden, hidden), (blocks, hidden // 5, hidden))
    count = (blocks // 2) * (experts + 1)
    return Model(
        (*dense.layers, *attention, (2 * count, inner, hidden), (count, hidden, inner)), dense.rest
    )


MODELS = {
    "70B, 8 experts": (decoder(80, 8192, 28672, 1024, 128256), 8),
    "400B mixture of 128, 3 experts": (mixture(48, 5120, 8192, 128, 202048), 3),
}
# Assumptions, not measurements: the float32 rate of an H100 from its data sheet at 60 %, a shared
# disk of 5 GB/s for reading and writing together.
GPU = Machine(40e12, 1e12, 2e12, 5e9, 1)


MEMBERS = 4  # machines that share a merge


def work(method: str, T: int, d_out: int, d_in: int) -> Work:
    """Operations on one matrix of T experts."""
    if method == "average":
        return Work()
    if method == "tsv_m":
        return tsv_work(T, d_out, d_in)
    created = merging.create(method)
    width = min(d_in, T * d_out)
    return interference_work(created, T, d_out, width, inverted=False)


class Bill(NamedTuple):
    """What one merge takes."""

    bytes: float  # read and written
    seconds_disk: float
    seconds_computing: float
    memory: float  # bytes, per device

    @property
    def seconds(self) -> float:
        """Reading, computing and writing overlap: the slower of the two decides."""
        return max(self.seconds_disk, self.seconds_computing)


def bill(model: Model, T: int, method: str, machine: Machine) -> Bill:
    """Of merging T experts by a method on a machine, whose devices share the matrices."""
    size = model.entries * model.bytes_per_entry
    seconds = 0.0
    for count, d_out, d_in in model.layers:
        operations = work(method, T, d_out, d_in)
        products = operations.products / machine.flops + operations.vectors / machine.vectors
        # every value is read, its difference written, read again and the merge written, in float32
        moved = 4 * d_out * d_in * (3 * T + 2) / machine.moved
        seconds += count * (products + moved)
    largest = max(d_out * d_in for _, d_out, d_in in model.layers)
    memory = 4 * largest * (T + 2) + 8 * max(min(s[1:]) for s in model.layers) ** 2
    return Bill((T + 2) * size, (T + 2) * size / machine.disk, seconds / machine.devices, memory)


def shared(model: Model, T: int, method: str, machine: Machine, members: int) -> Bill:
    """Of the same on several such machines over one disk: the merge is read and written again."""
    b, size = bill(model, T, method, machine), model.entries * model.bytes_per_entry
    again = 2 * size if members > 1 else 0
    seconds = (b.bytes + again) / machine.disk
    return Bill(b.bytes + again, seconds, b.seconds_computing / members, b.memory)


def bench_scale(settings: Scale) -> None:
    """Write scale.md beside the measurements it is checked against."""
    folder = Path(settings.results)
    write_synced(folder / "scale.md", page(folder))
    print(f"written to {folder / 'scale.md'}")


def page(folder: Path) -> str:
    """The model, its check and its answers, as Markdown."""
    machine = measured_machine(folder)
    checked, factors = _check(folder, machine)
    one, eight = GPU, GPU._replace(devices=8)
    rows = [
        [name, method, *_answers(model, T, method, machine, one, eight, factors)]
        for name, (model, T) in MODELS.items()
        for method in METHODS
    ]
    header = ["model", "method", "GB moved", "GB of memory", "two cores, h", "one GPU, min",
              "eight GPUs, min", "limited by", f"{MEMBERS} machines of eight, min"]  # fmt: skip
    return "\n".join(
        [
            "# Merging at scale, on paper",
            "",
            "Written by `python -m experiments.bench.scale`. Bytes, operations and memory follow",
            "from the layers' shapes, seconds from a machine's rates; the two cores' rates were",
            "measured (machine.json), the GPU's are assumed: 40 TFLOP/s in float32 and 5 GB/s of",
            "disk shared by all devices. **No figure for a GPU was measured.**",
            "",
            "## The model against what was measured",
            "",
            markdown(["measured", "s", "model s", "measured / model"], checked),
            "The last column is what the model leaves out (conversions, hashing of headers,",
            "steps that the rates of large products do not reach); the answers below are",
            "multiplied by it, method by method.",
            "",
            "## The answers",
            "",
            markdown(header, rows),
            *_conclusions(machine, factors),
            "",
        ]
    )


def measured_machine(folder: Path) -> Machine:
    """The machine of results/bench as its rates were measured there."""
    found = json.loads((folder / "machine.json").read_text())["rates"]
    disk = 2 / (1 / found["read"] + 1 / found["written"])
    return Machine(found["flops32"], found["vector32"], found["copied"], disk, 1)


def _check(folder: Path, machine: Machine) -> tuple[list[list[str]], dict[str, float]]:
    """Rows of measured points beside the model, and what to multiply each method by."""
    block = decoder(1, 4096, 11008, 4096, 0)
    vit = Model(((48, 768, 768), (12, 3072, 768), (12, 768, 3072)), 0, 4)
    points = []
    for n in (1, 2, 4):
        seconds = _seconds(folder / "decoder.csv", method="average", blocks=n, vocabulary=False)
        what = f"{n} block{'s' * (n > 1)} of a 7B model"
        points.append(("average", what, decoder(n, 4096, 11008, 4096, 0), 3, seconds))
    points.append(
        ("actmat", "1 block of a 7B model", block, 3,
         _seconds(folder / "decoder.csv", method="actmat", blocks=1))
    )  # fmt: skip
    for name in ("actmat", "tsv_m"):
        seconds = _methods_seconds(folder / "methods.csv", name, vit)
        points.append((name, "ViT-B/32's layers in memory", vit, 8, seconds))
    rows, ratios = [], {}
    for method, what, model, T, seconds in points:
        predicted = bill(model, T, method, machine).seconds
        ratios.setdefault(method, []).append(seconds / predicted)
        rows.append([f"{method}, {what}", f"{seconds:.3g}", f"{predicted:.3g}",
                     f"{seconds / predicted:.1f}"])  # fmt: skip
    return rows, {method: max(found) for method, found in ratios.items()}


def _seconds(path: Path, **where: object) -> float:
    table = pd.read_csv(path)
    for column, value in where.items():
        table = table[table[column] == value]
    return float(table.seconds.iloc[0])


def _methods_seconds(path: Path, name: str, model: Model) -> float:
    table = pd.read_csv(path)
    table = table[table.method == name]
    return sum(
        count * float(table[(table.d_out == d_out) & (table.d_in == d_in)].ours_seconds.iloc[0])
        for count, d_out, d_in in model.layers
    )


def _answers(
    model: Model, T: int, method: str, cores: Machine, one: Machine, eight: Machine,
    factors: Mapping[str, float],
) -> Iterator[str]:  # fmt: skip
    bills = [bill(model, T, method, machine) for machine in (cores, one, eight)]
    bills.append(shared(model, T, method, eight, MEMBERS))
    spent = [max(b.seconds_disk, factors[method] * b.seconds_computing) for b in bills]
    yield f"{bills[0].bytes / 1e9:,.0f}"
    yield f"{bills[0].memory / 1e9:.1f}"
    yield f"{spent[0] / 3600:.1f}"
    yield f"{spent[1] / 60:.0f}"
    yield f"{spent[2] / 60:.0f}"
    yield "the disk" if spent[2] == bills[2].seconds_disk else "computing"
    yield f"{spent[3] / 60:.0f}"


def _conclusions(cores: Machine, factors: Mapping[str, float]) -> Sequence[str]:
    """Where more than one machine pays, from the same model."""
    lines = ["## Where more than one machine pays", ""]
    for name, (model, T) in MODELS.items():
        for method in METHODS[1:]:
            b = bill(model, T, method, GPU)
            enough = max(1, round(factors[method] * b.seconds_computing / b.seconds_disk))
            lines.append(
                f"- {name}, {method}: about {enough} such GPUs compute as fast as the disk reads; "
                "beyond that a faster disk helps, not another machine."
            )
    return [
        *lines,
        "",
        "An average is limited by the disk on any machine. A merge uses all devices of one",
        "machine (`device=[cuda:0,cuda:1]`), and several machines over a common disk: each merges",
        "its share of the tensors (`share=1/4` to `share=4/4`, started by hand or all at once by",
        "`-m share=1/4,2/4,3/4,4/4 hydra/launcher=submitit_slurm`), what is finished is kept, and",
        "the last one copies all shares into the output, which moves the merge twice more. A pass",
        "over the whole model before the merge (TIES) is made by every machine. Tested with",
        "processes of one machine, one of them killed: the bytes are those of one process.",
        "**Sharing between machines was not measured.**",
        "",
        "On a GPU, transfers from pinned memory overlap with computing, results are fetched while",
        "the next layer computes, layers of one shape are merged in one call, and products are in",
        "full float32, without TF32. Order, overlap, batches and lack of memory are tested on a",
        "CPU; speed is not known: `make bench-gpu` measures it on a machine with a GPU.",
    ]


COMMAND = Command("bench_scale", Scale, task=bench_scale)

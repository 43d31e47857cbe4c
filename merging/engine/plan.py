"""What becomes of each tensor of the base, decided once: by which method, on which route."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, NamedTuple, TypeVar

import torch

from merging.engine.choices import assign, at_depth
from merging.engine.job import Job, check_method, check_values
from merging.engine.routes import DENSE, ENTRIES, FACTORS, KEPT, TO_FACTORS, Route
from merging.engine.rows import row_blocks
from merging.errors import InputError
from merging.experts import Expert
from merging.formats.names import is_buffer, listed
from merging.layers import Layer
from merging.method.registry import Method, create
from merging.method.space import within

# Rules that look at single entries read windows of rows of about this size from all files together,
# which bounds the memory of merging a 100,000-row embedding.
WINDOW_BYTES = 1 << 26
_NUMBER = re.compile(r"\.(\d+)\.")  # of a block
# Pieces of names of what comes before the first block: embeddings, patches, a first norm.
_STEM = re.compile(
    r"embed(?!_out)|wte|wpe|shared|position|token|conv1|stem|patch|ln_pre|norm_pre|pre_layrnorm"
)

Work = TypeVar("Work")
Rule = Literal["method", "average", "base"]
AS_LAYERS = ("embedding", "head")  # parts that are named by what is else no layer
NO_NUMBERS, UNTOUCHED = "no floating-point numbers", "no expert changes it"
BUFFER, MOMENTS = "follows from the configuration", "moments of a batch norm's inputs"
NO_STATISTICS, FEWER_ROWS = "no statistics of it", "some experts lack rows of it"


@dataclass(frozen=True)
class Item:
    """One tensor of the base, with the names that share its memory."""

    name: str
    shape: tuple[int, ...]
    rule: Rule
    method: Method | None = field(repr=False)  # None: the base's values are kept
    layer: Layer | None  # how a linear layer's matrix is laid out
    route: Route
    depth: float  # place along the model, 0 to 1
    reason: str = ""  # why the merge's method does not apply
    copies: tuple[str, ...] = ()  # a file cannot share memory: they are written under each name

    @property
    def merger(self) -> Method:
        """The method, of a tensor that is merged."""
        if self.method is None:
            raise ValueError(f"{self.name!r} keeps the base's values")
        return self.method

    @property
    def in_block(self) -> bool:
        """Whether the name has a block's number."""
        return bool(_NUMBER.search(f".{self.name}"))

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def matrix(self) -> bool:
        """Whether its weights count in a merge's coverage."""
        return len(self.shape) >= 2 and self.reason not in {NO_NUMBERS, UNTOUCHED}

    @property
    def label(self) -> str:
        """The rule as reports name it."""
        if self.rule != "method":
            return self.rule
        parts = self.layer.blocks if self.layer else 1
        return f"{self.merger.name} ({parts} parts)" if parts > 1 else self.merger.name


class Piece(NamedTuple):
    """What is read, merged and written at a time."""

    item: Item
    rows: slice | None  # of the base's tensor; None: all

    @property
    def first(self) -> bool:
        """Whether the tensor begins with it."""
        return self.rows is None or self.rows.start == 0


def plan(job: Job) -> list[Item]:
    """One item per tensor of the base, in file order; tied copies are merged with their first.

    Raises InputError if a method lacks statistics, or cannot make what was asked for.
    """
    base, average = job.base, create("average")
    held = {task: set(expert.names()) for task, expert in job.experts.items()}
    names = [name for name in base.keys() if name not in base.tied]
    places, copies = depths(names), _copies(base.tied)
    choices, items = _choices(job, names, places), []
    for name in names:
        chosen, layer = choices[name]
        holders = [e for t, e in job.experts.items() if name in held[t]]
        rule, reason = _rule(job, name, chosen, layer, holders)
        method = {"method": chosen, "average": average, "base": None}[rule]
        layer = layer if rule == "method" else None
        route = _route(job, name, method, layer)
        shape = base.shape(name)
        place, others = places[name], copies.get(name, ())
        items.append(Item(name, shape, rule, method, layer, route, place, reason, others))
    methods = [i.method for i in items] + ([job.method] if job.space == "full" else [])
    for method in {id(m): m for m in methods}.values():
        if method is not None:
            theirs = [i for i in items if i.method is method]
            factored = any(i.route is TO_FACTORS for i in theirs)
            check_method(job, method, [i.name for i in theirs if i.layer], factored)
            if theirs:
                check_values(method, len(job.experts))
    if not any(i.method and i.method.space == job.space for i in items):
        raise InputError(f"space={job.space}: no layer is held as factors by every adapter")
    return items


def _choices(
    job: Job, names: Sequence[str], places: Mapping[str, float]
) -> dict[str, tuple[Method, Layer | None]]:
    """Each tensor's method, by parts and depth, and its layout if it is merged as a layer."""
    parts = assign(job.parts, names)
    made: dict[tuple[int, float], Method] = {}
    inside: dict[int, Method] = {}  # by the id of a method in `made`: one object, one first pass
    choices = {}
    for name in names:
        part = parts.get(name)
        method, layer = part.method if part else job.method, job.layers.get(name)
        if part and part.match in AS_LAYERS and method.rest != "method":
            layer = layer or (Layer() if len(job.base.shape(name)) == 2 else None)
        key = id(method), places[name]
        method = made.setdefault(key, at_depth(method, places[name]))
        if job.space != "full" and layer and _factored(job, name):
            method = inside.setdefault(id(method), within(method, job.space))
        choices[name] = method, layer
    return choices


def _rule(
    job: Job, name: str, method: Method, layer: Layer | None, holders: Sequence[Expert]
) -> tuple[Rule, str]:
    """How a tensor is merged, and why not by the method where it is not.

    holders: the experts that hold or change it.
    """
    if not job.base.dtype(name).is_floating_point:
        return "base", NO_NUMBERS
    if not holders or not torch.Size(job.base.shape(name)).numel():
        return "base", UNTOUCHED
    if is_buffer(name, job.base.shape(name)):
        return "base", BUFFER
    if name.endswith(("running_var", "running_mean")):
        return "average", MOMENTS  # a variance stays positive on average only
    if layer:
        return "method", ""
    if method.rest != "method":
        return method.rest, job.reasons.get(name, "no matrix")
    if method.needs and not job.measured(name):
        return "average", NO_STATISTICS
    if any(expert.shape(name) != job.base.shape(name) for expert in holders):
        return "average", FEWER_ROWS  # only averaging has a meaning for them
    return "method", ""


def _route(job: Job, name: str, method: Method | None, layer: Layer | None) -> Route:
    if method is None:
        return KEPT
    factored = _factored(job, name)
    if factored and job.form == "adapter":
        return TO_FACTORS
    if method.elementwise or (method.one_tensor and _in_order(layer)):
        return ENTRIES
    return FACTORS if factored and layer and method.row_space else DENSE


def _in_order(layer: Layer | None) -> bool:
    """Whether the matrix that is merged is the stored tensor, row by row."""
    return layer is None or not (layer.transposed or layer.experts or layer.blocks > 1)


def _factored(job: Job, name: str) -> bool:
    """Whether factors hold every expert's difference."""
    return all(expert.rank(name) is not None for expert in job.experts.values())


def outside(job: Job, items: Iterable[Item]) -> list[str]:
    """What a merge's space does not hold of what the method merges, a sentence."""
    left = [i.name for i in items if i.rule == "method" and i.merger.space != job.space]
    if not left:
        return []
    return [
        f"space={job.space} holds differences of layers that adapters have as factors; "
        f"{len(left)} other tensors ({listed(left)}) are merged on their own axes"
    ]


def pieces(job: Job, item: Item) -> Iterator[Piece]:
    """Windows of rows where the route looks at single entries, one of fused experts where each is
    a matrix, else the whole tensor."""
    if item.route is DENSE and item.layer and item.layer.experts:
        for expert in range(item.layer.experts):
            yield Piece(item, slice(expert, expert + 1))
        return
    if not item.route.windows:
        yield Piece(item, None)
        return
    row = torch.Size(item.shape[1:]).numel() * job.base.dtype(item.name).itemsize
    for rows in row_blocks(item.shape, row * (len(job.experts) + 2), WINDOW_BYTES):
        yield Piece(item, rows)


def share(
    items: Sequence[Work], workers: int, size: Callable[[Work], int] = attrgetter("numel")
) -> list[list[Work]]:
    """Items dealt out largest first, each to the worker with the least work so far."""
    shares: list[list[Work]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for item in sorted(items, key=size, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(item)
        loads[least] += size(item)
    return shares


def depths(names: Iterable[str]) -> dict[str, float]:
    """Each tensor's place along the model in [0, 1], from the block number in its name.

    Without a number it is 0 if the name says that it comes before the blocks (`_STEM`), else 1; in
    a model without blocks it is 0. From names alone: the order of tensors in a file is often
    alphabetical, and says nothing.
    """
    numbers = {name: _NUMBER.search(f".{name}") for name in names}
    blocks = {name: int(match[1]) for name, match in numbers.items() if match}
    last = max(blocks.values(), default=0) or 1
    after = {name: float(bool(blocks) and not _STEM.search(name)) for name in numbers}
    return after | {name: block / last for name, block in blocks.items()}


def _copies(tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """{first name: the other names of the same memory}"""
    copies: dict[str, tuple[str, ...]] = {}
    for name, first in tied.items():
        copies[first] = (*copies.get(first, ()), name)
    return copies

"""What a merge did, how much of the model its method reached, and what looks wrong about it."""

from __future__ import annotations

import re
import statistics
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merging.errors import InputError
from merging.factors import Factors
from merging.layers.names import EMBEDDING, HEAD

if TYPE_CHECKING:
    from merging.engine.plan import Item, Piece
    from merging.engine.routes import Loaded

ENOUGH = 0.9  # of the matrices' weights; below, the report warns
UNRELATED = 0.7  # |W_t - W_0| / |W_0| in most layers; a fine-tuned model moves by a few percent
_LINES = 10
# Reasons that count against no coverage: a table is looked up, not multiplied, and outputs stand
# for other things in each task.
BY_PROTOCOL = frozenset({EMBEDDING, HEAD})
UNCHANGED = "no tensor of the merge differs from the base"


@dataclass
class LeftOut:
    """Matrices of one kind that the method did not reach."""

    kind: str  # their names, the numbers of blocks taken out
    rule: str  # what was done instead: "average", or "base" where the base's values were kept
    reason: str
    weights: int = 0
    tensors: int = 0

    def __str__(self) -> str:
        return f"{self.kind} ({quantity(self.weights)}, {self.rule}: {self.reason})"


@dataclass
class Report:
    """What a merge did and what it cost."""

    seconds: float = 0.0
    peak_bytes: int = 0  # resident memory of the process, or allocated memory of the GPUs
    bytes_read: int = 0
    rules: dict[str, str] = field(default_factory=dict)  # tensor name -> the rule applied to it
    left_out: list[LeftOut] = field(default_factory=list)  # largest first
    distances: dict[str, list[float]] = field(default_factory=dict)  # task -> |W_t - W_0| / |W_0|
    notes: list[str] = field(default_factory=list)  # what was left out of experts, and the like
    unchanged: bool = False  # no tensor differs from the base
    pending: str = ""  # of a shared merge whose output this member did not write: who does
    # layer -> squared norms of what the rank of an adapter keeps of the merge, and of what it loses
    energies: dict[str, tuple[float, float]] = field(default_factory=dict)
    # weights in matrices (tensors of two or more dimensions that some expert changes): those that
    # the method merged, and those it should have; embeddings and heads, left to the average by
    # every paper's protocol, are no part of them
    reached: int = 0
    reachable: int = 0
    two_ways: list[str] = field(default_factory=list)  # kinds that the method reached in part

    @property
    def coverage(self) -> float:
        """Share of the matrices' weights that went through the method, 0 to 1."""
        return self.reached / self.reachable if self.reachable else 1.0

    @property
    def moved(self) -> dict[str, float]:
        """How far each expert lies from the base: the median of its distances over layers."""
        return {
            task: statistics.median(shares) for task, shares in self.distances.items() if shares
        }

    @property
    def kept(self) -> float:
        """Share of the merged differences' squared norm that the output's rank keeps."""
        kept = sum(kept for kept, _ in self.energies.values())
        total = sum(kept + lost for kept, lost in self.energies.values())
        return kept / total if total else 1.0

    @property
    def warnings(self) -> list[str]:
        """What a person should look at before trusting the merge, a sentence each."""
        return [*self._of_coverage(), *self._of_weights()]

    def summary(self) -> dict[str, int]:
        """How many tensors each rule was applied to."""
        return dict(Counter(self.rules.values()))

    def text(self) -> str:
        """At most ten lines for a person."""
        counts = sorted(self.summary().items(), key=lambda item: -item[1])
        lines = [
            "tensors: " + ", ".join(f"{count} {rule}" for rule, count in counts),
            f"coverage: the method merged {self.coverage:.1%} of the weights in matrices",
        ]
        if self.left_out:
            lines += [f"left to other rules: {left}" for left in self.left_out[:3]]
            if (more := len(self.left_out) - 3) > 0:
                lines[-1] += f" and {more} kinds more"
        if self.moved:
            moved = (f"{task} {share:.1%}" for task, share in list(self.moved.items())[:8])
            lines.append(f"experts' distance from the base: {', '.join(moved)}")
        if self.energies:
            lines.append(f"the adapter's rank keeps {self.kept:.1%} of the merge's squared norm")
        cost = f"{self.seconds:.1f} s, peak {self.peak_bytes / 2**30:.2f} GiB, "
        cost += f"{self.bytes_read / 2**30:.2f} GiB read"
        room = _LINES - len(lines) - 1
        warnings = [f"warning: {warning}" for warning in self.warnings]
        if len(warnings) > room:
            rest = len(warnings) - room + 1
            warnings = [*warnings[: room - 1], f"and {rest} warnings more"]
        return "\n".join([*lines, *warnings, cost])

    def cover(self, items: Sequence[Item], strict: bool = False) -> None:
        """Take up what a plan says.

        Raises InputError if `strict` and something is left out that should not be.
        """
        self.rules |= {item.name: item.label for item in items}
        matrices = [i for i in items if i.matrix]
        counted = [i for i in matrices if i.rule == "method" or i.reason not in BY_PROTOCOL]
        self.reachable += sum(i.numel for i in counted)
        self.reached += sum(i.numel for i in counted if i.rule == "method")
        self.left_out = _left_out(matrices, self.left_out)
        self.two_ways += _two_ways(counted)
        if strict and (warnings := self._of_coverage()):
            raise InputError("; ".join(warnings), hint="nothing was merged; strict=false merges it")

    def _of_coverage(self) -> list[str]:
        sentences = []
        if self.coverage < ENOUGH:
            left = [left for left in self.left_out if left.reason not in BY_PROTOCOL]
            sentences.append(
                f"the method reached {self.coverage:.1%} of the weights in matrices, "
                f"expected at least {ENOUGH:.0%}; left out, largest first: {_names(left)}"
            )
        if self.two_ways:
            sentences.append(
                f"layers of one kind are treated in two ways; left out of: {_names(self.two_ways)}"
            )
        return sentences

    def _of_weights(self) -> list[str]:
        sentences = [UNCHANGED] if self.unchanged else []
        return sentences + [
            f"expert {task!r} seems unrelated to the base: in most layers its weights "
            f"differ by {share:.0%} of the base's own norm"
            for task, share in self.moved.items()
            if share > UNRELATED
        ]


def _left_out(matrices: Iterable[Item], before: Sequence[LeftOut]) -> list[LeftOut]:
    """By kind, largest first, added to those of another call."""
    kinds = {(left.kind, left.rule, left.reason): left for left in before}
    for item in matrices:
        if item.rule != "method":
            key = kind(item.name), item.label, item.reason
            left = kinds.setdefault(key, LeftOut(*key))
            left.weights += item.numel
            left.tensors += 1
    return sorted(kinds.values(), key=lambda left: -left.weights)


def _two_ways(matrices: Iterable[Item]) -> list[str]:
    """Kinds of which some blocks went through the method and some did not."""
    kinds: dict[str, list[Item]] = defaultdict(list)
    for item in matrices:
        kinds[kind(item.name)].append(item)
    mixed = []
    for name, items in kinds.items():
        left = [item for item in items if item.rule != "method"]
        if left and len(left) < len(items):
            largest = max(left, key=lambda item: item.numel)
            mixed.append(f"{name} ({len(left)} of {len(items)}, {largest.name}: {largest.reason})")
    return mixed


def _names(kinds: Sequence[object]) -> str:
    more = f" and {len(kinds) - 3} kinds more" if len(kinds) > 3 else ""
    return "; ".join(map(str, kinds[:3])) + more


def kind(name: str) -> str:
    """A tensor's name without the numbers of blocks and experts in it."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}")[1:]


def quantity(number: int) -> str:
    """12,345,678 as "12.3 M"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


class Watch:
    """What a merge shows of itself while it runs: whether anything changes, how far experts lie.

    From a few rows of each matrix: differences as large as the weights show in any of them.
    """

    def __init__(self, tasks: Iterable[str], report: Report) -> None:
        self.changed = False
        self._notes = report.notes
        self._distances = [report.distances.setdefault(task, []) for task in tasks]
        self._lock = threading.Lock()

    def look(self, piece: Piece, loaded: Loaded) -> None:
        """At what was read of a matrix that the method will merge."""
        item, rows = piece
        if item.rule != "method" or not item.matrix or (rows and rows.start):
            return
        if (deltas := item.route.sample(loaded)) is None or not deltas.numel():
            return
        size = torch.linalg.vector_norm(loaded.W0[: deltas.shape[1]].float()).item()
        norms = torch.linalg.vector_norm(deltas.float().flatten(1), dim=1).tolist()
        with self._lock:
            for distances, norm in zip(self._distances, norms, strict=True):
                distances.append(norm / size if size else 0.0)

    def compare(self, item: Item, loaded: Loaded, merged: Tensor | Factors) -> None:
        """What came out with the base's own values, until the first difference."""
        if self.changed or not item.method:
            return
        if isinstance(merged, Factors):
            self.changed = all(bool(factor.any()) for factor in merged[:2])
        else:
            self.changed = not torch.equal(merged, loaded.W0.to(merged.dtype))

    def tell(self, note: str) -> None:
        """What became of a merge on the way, for its report; once."""
        with self._lock:
            if note not in self._notes:
                self._notes.append(note)

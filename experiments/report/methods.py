"""merging/README.md: every method, from the registry and comparisons with its authors' code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import merging
from merging.method.registry import Method

ROOT = Path(__file__).resolve().parents[2]
PARITY = Path(__file__).with_name("parity.yaml")
INTRODUCTION = """\
# Methods

Written by `python -m experiments.methods` from the registry; `help(merging.create("actmat"))` says
the same of one of them. T experts differ from the base by D_t (d_out, d_in); every method makes one
D of them, and the merged weight is W_0 + alpha D. Adding one takes a function, as in
[tests/norm_mean.py](../tests/norm_mean.py), and a file in [configs/method](../configs/method).

## What they compute

"""
ARGUMENTS = """
## What they take

Hyperparameters with their defaults; what of the training data a method sees (a statistic collected
by `python -m experiments.statistics`); what decides the time of a layer; whether adapters are
merged in their own rank, without ever forming a matrix (d_out, d_in); what `weights.NAME=` of an
expert is: a factor on its D_t for every method (`weights_on=delta`), or, where "task" stands, what
the expert counts for (`weights_on=task`), as if it were there so many times.

"""
AGREEMENT = """
## Beside their authors' code

On the same tensors: 36 cases a method (192 x 64, 64 x 192, 96 x 96; two and eight tasks; Gaussian,
decaying, low-rank, half-empty, identical and log-normal differences) and whole models of 12 blocks.
Agreement is |ours - theirs| / |theirs| of the merged difference, the largest, with the same
settings; what differs is what our defaults do otherwise, with the option that does as they do. The
code of the methods marked "packed" merges attention's q, k and v as one matrix, as
`split_qkv=false` does here; the ACTMat paper cuts them, as we do by default.

"""
RULES = """
Rules that hold for all of them:

- Equal magnitudes: masks of one tensor (TACT, Breadcrumbs, DELLA, SCE) keep exactly the share that
  was asked for, the first in row-major order. TIES' trim, whose threshold belongs to a whole model,
  keeps all that are as large as the last one kept, as its authors' code does.
- What float32 cannot tell from rounding (a ridge, a cut or an effective rank below its resolution)
  is set up and solved in float64, at any width.
- Singular values below 2^-18 of the largest are rounding and take no part, unless rank=full.
- Weights of experts: 0 leaves an expert out, so that T is smaller too; without `weights_on` they
  are factors on D_t, but for `average` what the experts count for. Factors may be negative and need
  not sum to 1; multiplying all of them by s multiplies the merge by s where the method has
  f(s D) = s f(D). What counts is positive; a common factor drops out where the method has no
  constant of its own (ridge's lam and SWUDI's t are such). What no method reaches is averaged with
  the same weights.
- `space=core` and `space=knots` merge adapters by any method that is not linear in the coordinates
  of a space they share (2509.17786, 2410.19735): entries, ranks and the trims of TIES over a whole
  model are those of the space, and the result is again an adapter of the joint rank. What adapters
  hold in full, or as DoRA, stays on its own axes, and is said.
- Not here: TALL's masks of single tasks and what adapts at test time, since they make a model per
  task.
"""


def page(names: Iterable[str] | None = None) -> str:
    """The page as Markdown, of these methods; None: of all."""
    compared: Any = OmegaConf.to_container(OmegaConf.load(PARITY))
    chosen = merging.methods() if names is None else names
    methods = sorted(map(merging.create, chosen), key=lambda m: (_file(m), m.name))
    rows = {m.name: {k: str(v) for k, v in compared.get(m.name, {}).items()} for m in methods}
    formulas = _table(
        ["method", "formula", "source", "file"],
        [[f"`{m.name}`", f"`{m.formula}`", m.source, _link(m)] for m in methods],
    )
    arguments = _table(
        ["method", "hyperparameters", "data", "cost", "adapters in their rank", "weights"],
        [[f"`{m.name}`", *_arguments(m, rows[m.name].get("cost", "–"))] for m in methods],
    )
    agreement = _table(
        ["method", "agreement", "what differs", "packed"],
        [
            [f"`{name}`", *(row.get(key, "") for key in ("agrees", "differs", "packed"))]
            for name, row in rows.items()
            if row
        ],
    )
    parts = [INTRODUCTION, formulas, ARGUMENTS, arguments, AGREEMENT, agreement, RULES]
    return "".join(parts)


def _arguments(method: Method, cost: str) -> list[str]:
    weights = "delta, task" if "weights" in method.context else "delta"
    return [_settings(method), method.data, cost, "yes" * method.row_space, weights]


def _table(header: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _settings(method: Method) -> str:
    values: dict[str, Any] = dict(method.hyperparameters)
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _file(method: Method) -> str:
    return Path(inspect.getsourcefile(method.function) or "").name


def _link(method: Method) -> str:
    lines = Path(inspect.getsourcefile(method.function) or "").read_text().splitlines()
    preset = re.compile(rf'\s*"{method.name}": \w+\(')  # in a table of presets
    rows = [i for i, line in enumerate(lines, 1) if preset.match(line)]
    line = rows[0] if rows else inspect.getsourcelines(method.function)[1]
    return f"[{_file(method)}:{line}](method/{_file(method)}#L{line})"

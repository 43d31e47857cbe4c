"""A `merging.Plan` as one self-contained HTML page: no server, no network, readable in print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from torch import Tensor

from experiments.report.plan_words import place, sentences
from merging.planning import Group, Plan, mean_residual

METHODS_NOTE = (
    "Click a column to sort by it. These are no accuracies: ACTMat leaves least undone by "
    "construction, and over 100 % seen from the outputs tells that a method overshoots. On eight "
    "text tasks the rank correlation with what a merge kept was -0.3 for the inputs' side with "
    "full fine-tuning, but +0.3 with LoRA, where the outputs' side predicted better (-0.6)."
)


def page(plan: Plan, title: str) -> str:
    """The whole page; numbers are written into tables, the script only sorts and switches."""
    template = files("experiments.report").joinpath("plan.html").read_text()
    parts = {"title": escape(title), "words": _words(plan), "body": ""}
    if not plan.problems and plan.groups:
        parts["body"] = "".join(
            [
                _section("Methods", _methods(plan), METHODS_NOTE),
                _section("Experts", _experts(plan), ""),
                _section("Pairs of experts", _matrices(plan), ""),
                _section("Layers", _heat_maps(plan), "By block and kind of layer."),
                _section(
                    "Subsets", _subsets(plan), "What merging fewer experts would leave undone."
                ),
            ]
        )
    for name, part in parts.items():
        template = template.replace(f"<!-- {name} -->", part)
    return template


def _section(title: str, content: str, note: str) -> str:
    note = f"<p class=note>{escape(note)}</p>" if note and content else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>" if content else ""


def _words(plan: Plan) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in sentences(plan))


def _table(header: Sequence[str], rows: Iterable[Sequence[str | float]], caption: str = "") -> str:
    """Numbers are printed as shares in percent and sort as numbers."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f"<table class=sortable>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td data-value="{value:.6g}">{100 * value:.1f}</td>'


def _methods(plan: Plan) -> str:
    every, rows = tuple(plan.tasks), []
    for method, mean in plan.ranking:
        sides = plan.residuals[method, every]
        outputs = sum(seen for _, seen in sides.values()) / len(sides)
        rows.append([method, mean, *(sides[t][0] for t in every), outputs])
    header = ["method", "mean", *every, "seen from the outputs"]
    return _table(header, rows, "Left undone of the experts' changes, in percent: less is better")


def _experts(plan: Plan) -> str:
    entries = sum(g.diagnosis.entries for g in plan.groups)
    moved = sum(g.diagnosis.moved for g in plan.groups) / entries
    rows = [[t, plan.movement[t], moved[i].item()] for i, t in enumerate(plan.tasks)]
    return _table(["expert", "moved, % of the norm", "weights that moved, %"], rows)


def _matrices(plan: Plan) -> str:
    named = {"cosine": plan.cosine, "overlap of inputs": plan.overlap, "conflict": plan.conflict}
    return '<div class="row">' + "".join(_matrix(plan, *item) for item in named.items()) + "</div>"


def _matrix(plan: Plan, title: str, values: Tensor) -> str:
    head = "".join(f"<th scope=col>{escape(t)}</th>" for t in plan.tasks)
    body = "".join(
        f"<tr><th scope=row>{escape(task)}</th>"
        + "".join(_shade(values[i, j].item(), 1.0) for j in range(len(plan.tasks)))
        + "</tr>"
        for i, task in enumerate(plan.tasks)
    )
    return (
        f"<table class=heat><caption>{escape(title)}</caption><thead><tr><td></td>{head}</tr>"
        f"</thead><tbody>{body}</tbody></table>"
    )


def _shade(value: float, largest: float, label: str = "") -> str:
    strength = min(1.0, abs(value) / largest) if largest else 0.0
    shown = label or f"{value:z.2f}"
    return f'<td style="--s:{strength:.3f}" title="{value:.4g}">{escape(shown)}</td>'


def _heat_maps(plan: Plan) -> str:
    """One table a measure, experts or methods against groups of layers; a selector shows one."""
    best, worst = plan.ranking[0][0], plan.ranking[-1][0]
    measures: dict[str, Mapping[str, Callable[[Group], float]]] = {
        "movement, % of the norm": {t: _moved(i) for i, t in enumerate(plan.tasks)},
        f"left undone by {best}": {t: _undone(best, i) for i, t in enumerate(plan.tasks)},
        f"left undone by {worst}": {t: _undone(worst, i) for i, t in enumerate(plan.tasks)},
    }
    options = "".join(f"<option>{escape(name)}</option>" for name in measures)
    tables = "".join(_heat_map(plan, name, columns) for name, columns in measures.items())
    return f"<label>Show <select id=measure>{options}</select></label>{tables}"


def _moved(i: int) -> Callable[[Group], float]:
    def share(group: Group) -> float:
        return (group.diagnosis.inner[i, i].item() / max(group.diagnosis.base, 1e-300)) ** 0.5

    return share


def _undone(method: str, i: int) -> Callable[[Group], float]:
    def share(group: Group) -> float:
        own = group.diagnosis.shared[i, i].item()
        return group.residual[method][0, i].item() / own if own else 0.0

    return share


def _heat_map(plan: Plan, name: str, columns: Mapping[str, Callable[[Group], float]]) -> str:
    values = {t: [column(g) for g in plan.groups] for t, column in columns.items()}
    largest = max(max(column) for column in values.values())
    head = "".join(f"<th scope=col>{escape(t)}</th>" for t in columns)
    body = "".join(
        f"<tr><th scope=row>{escape(place(group))}</th>"
        + "".join(_shade(values[t][i], largest, f"{100 * values[t][i]:.1f}") for t in columns)
        + "</tr>"
        for i, group in enumerate(plan.groups)
    )
    return (
        f'<table class="heat measure" data-measure="{escape(name)}"><caption>{escape(name)}'
        f"</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _subsets(plan: Plan) -> str:
    rows = [
        [method, " + ".join(tasks), mean_residual(r)]
        for (method, tasks), r in plan.residuals.items()
        if len(tasks) < len(plan.tasks)
    ]
    return _table(["method", "experts", "left undone, %"], rows) if rows else ""

"""Tables of text cells as Markdown, LaTeX and CSV; **bold** is the only mark-up of a cell."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

_LATEX = str.maketrans(
    {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--", "†": r"$\dagger$",
     "‡": r"$\ddagger$", "−": "$-$"}
)  # fmt: skip


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, rule, *rows])


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a booktabs tabular."""
    lines = [" & ".join(map(_to_latex, line)) + r" \\" for line in [header, *rows]]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as CSV with a header: every row's keys, empty where a row lacks one."""
    text = io.StringIO(newline="")
    header = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _to_latex(cell: str) -> str:
    return re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", cell).translate(_LATEX)

"""Tables of text cells as Markdown and LaTeX; **bold** is the only mark-up a cell may hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def _to_latex(cell: str) -> str:
    return re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", cell).translate(_LATEX)

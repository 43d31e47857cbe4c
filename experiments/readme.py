"""`python -m experiments.readme`: the README's table and results/README.md, from results/."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.report.findings import page
from experiments.report.markup import markdown
from merging.formats.disk import write_synced

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- table: results -->\n", "<!-- end -->"
COLUMNS = {  # title -> suite, fine-tuning
    "text": ("embedded_text", "full"),
    "text, LoRA": ("embedded_text", "lora"),
    "vision": ("embedded_vision", "full"),
    "language model, LoRA": ("embedded_lm", "lora"),
}
ROWS = {
    "experts", "rank_rule", "aswudi", "tsv_m", "actmat", "iso_c", "ties", "task_arithmetic",
    "average", "zero_shot",
}  # fmt: skip


def table(results: Path) -> str:
    """Mean test accuracy of `ROWS` on every suite, best on the first one first, as Markdown."""
    parts = {
        title: _rows(results / suite / "table.csv", f) for title, (suite, f) in COLUMNS.items()
    }
    first = next(iter(parts.values()))
    rows = [row for row in first.index if row in ROWS]
    lines = [[row, *(part.accuracy.get(row, "–") for part in parts.values())] for row in rows]
    return markdown(["method", *parts], lines)


def _rows(csv: Path, finetuning: str) -> pd.DataFrame:
    """ "mean ± standard error" by row of a suite's table, best first."""
    rows = pd.read_csv(csv, keep_default_na=False, na_values={"mean_se": ""})
    rows = rows[rows.finetuning == finetuning].set_index("row")
    error = rows.mean_se.map(lambda e: "" if pd.isna(e) else f" ± {e:.1f}")  # none of one seed
    return rows.assign(accuracy=rows["mean"].map("{:.1f}".format) + error)


def inserted(readme: str, table: str) -> str:
    """The README's text with the table between its marks."""
    before, _, rest = readme.partition(START)
    return before + START + "\n" + table + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    write_synced(readme, inserted(readme.read_text(), table(ROOT / "results")))
    write_synced(ROOT / "results" / "README.md", page(ROOT / "results"))

"""`python -m experiments.readme`: the README's table, from results/embedded_text/table.csv."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.markup import markdown

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- table: results/embedded_text -->\n", "<!-- end -->"


def table(csv: Path) -> str:
    """Mean test accuracy, full fine-tuning and LoRA side by side, as Markdown."""
    rows = pd.read_csv(csv, keep_default_na=False)
    rows["accuracy"] = [
        f"{m:.1f} ± {e:.1f}" for m, e in zip(rows["mean"], rows.mean_se, strict=True)
    ]
    full = rows[rows.finetuning == "full"]
    lora = rows[rows.finetuning == "lora"].set_index("row").accuracy
    lines = [
        [row.row, row.data, row.accuracy, f"{row.normalised:.1f}", lora.get(row.row, "")]
        for row in full.itertuples()
    ]
    return markdown(["method", "data", "full", "normalised", "LoRA"], lines)


def inserted(readme: str, table: str) -> str:
    """The README's text with the table between its marks."""
    before, _, rest = readme.partition(START)
    return before + START + "\n" + table + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(inserted(page.read_text(), table(ROOT / "results/embedded_text/table.csv")))

"""Records as rows: one line per run, one line per method, points of a sweep's curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

import merging
from experiments.report import records
from experiments.report.records import Record
from experiments.settings import Statistics


def load(folder: str | Path) -> pd.DataFrame:
    """The records below a folder: `to_frame`, with a column for every setting that varies.

    folder: of runs (runs/records/SUITE), or of results (results/SUITE, with its records.jsonl).
    """
    folder = Path(folder)
    lines = folder / "records.jsonl"
    frame = to_frame(records.load_lines(lines) if lines.exists() else records.load_all(folder))
    settings = pd.DataFrame(list(frame.settings), index=frame.index)
    varying = [key for key in settings if settings[key].astype(str).nunique() > 1]
    return frame.join(settings[varying].drop(columns=set(varying) & set(frame)))


def to_frame(found: Sequence[Record]) -> pd.DataFrame:
    """One line per record, figures in percent.

    `row` names its line of a table; `settings` is everything a sweep could vary, `departs` the
    part of it that is not the default.
    """
    whole = max(len(record["key"]["tasks"]) for record in found)
    return pd.DataFrame([_line(record, whole) for record in found])


def _line(record: Record, whole: int) -> dict[str, Any]:
    key, selection = record["key"], record["selection"]
    settings = key["hyperparameters"] | (key["statistics"] or {}) | {"tasks": len(key["tasks"])}
    settings |= {"split_qkv": False} if key.get("split_qkv") is False else {}
    settings |= {f"weights.{task}": weight for task, weight in key.get("weights", {}).items()}
    settings |= {"weights_on": key["weights_on"]} if key.get("weights_on") else {}
    known = key["method"] in merging.methods()
    defaults = dict(merging.create(key["method"]).hyperparameters) if known else {}
    defaults |= asdict(Statistics()) | {"tasks": whole, "seed": key["seed"]}
    departs = {k: v for k, v in settings.items() if k not in defaults or v != defaults[k]}
    details = [f"{k}={v}" for k, v in departs.items()]
    details += [f"{selection['parameter']} selected"] if selection else []
    return {
        "finetuning": key["finetuning"],
        "method": key["method"],
        "row": key["method"] + (f" ({', '.join(details)})" if details else ""),
        "data": record["data"],
        "seed": key["seed"],
        "settings": settings,
        "departs": departs,
        "selected": bool(selection),
        "mean": 100 * record["mean"],
        "normalised": float("nan") if record["normalised"] is None else 100 * record["normalised"],
        "merge_seconds": record["seconds"]["merge"],
        "statistics_seconds": record["seconds"]["statistics"],
        "peak_gib": record["peak_bytes"] / 2**30,
        "accuracy": {task: 100 * score["accuracy"] for task, score in record["scores"].items()},
        "heldout": {
            f"held out: {task}": 100 * score["accuracy"]
            for task, score in record.get("heldout", {}).items()
        },
        "constant": {task for task, score in record["scores"].items() if score["constant"]},
    }


def summarise(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """One line per fine-tuning and row, best mean first: means over seeds and standard errors.

    `difference` is the mean over seeds of accuracy minus the baseline's with the same seed. Runs
    that differ in what they score beside, "held out: NAME", are one: their scores are joined.
    """
    lines, single = [], frame.drop_duplicates(["finetuning", "row", "seed"])
    for (finetuning, row), part in single.groupby(["finetuning", "row"]):
        reference = single[(single.row == baseline) & (single.finetuning == finetuning)]
        beside = frame.heldout[(frame.row == row) & (frame.finetuning == finetuning)]
        paired = part.set_index("seed")["mean"] - reference.set_index("seed")["mean"]
        first = part.iloc[0]
        lines.append(
            {
                "finetuning": finetuning,
                "method": first.method,
                "row": row,
                "data": first.data,
                "seeds": part.seed.nunique(),
                "mean": part["mean"].mean(),
                "mean_se": part["mean"].sem(),
                "normalised": part.normalised.mean(),
                "normalised_se": part.normalised.sem(),
                "difference": paired.mean(),
                "difference_se": paired.sem(),
                "merge_seconds": part.merge_seconds.median(),
                "statistics_seconds": part.statistics_seconds.median(),
                "peak_gib": part.peak_gib.max(),
                "constant": " ".join(sorted(set().union(*part.constant))),
            }
            | pd.DataFrame(list(part.accuracy)).mean().to_dict()
            | pd.DataFrame(list(beside)).mean().to_dict()
        )
    # the last bits depend on the order of the records; they decide how a tie is printed
    rows = pd.DataFrame(lines).round(9)
    return rows.sort_values(["finetuning", "mean", "row"], ascending=[True, False, True])


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Points of the line figures: runs that depart in one parameter, and their default runs."""
    plain = frame[~frame.selected]
    points = []
    for _, run in plain[plain.departs.map(len) == 1].iterrows():
        (parameter,) = run.departs
        points.append({"parameter": parameter, "value": run.settings[parameter], **_point(run)})
    for parameter, method in {(p["parameter"], p["method"]) for p in points}:
        for _, run in plain[(plain.method == method) & (plain.departs.map(len) == 0)].iterrows():
            points.append({"parameter": parameter, "value": run.settings[parameter], **_point(run)})
    columns = ["parameter", "value", "method", "finetuning", "seed", "mean", "normalised"]
    table = pd.DataFrame(points, columns=columns)
    numeric = table.value.map(lambda v: isinstance(v, int | float) and not isinstance(v, bool))
    numeric &= table.value.notna()  # a default of None has no place on an axis
    return table[numeric].astype({"value": float}).sort_values(columns, ignore_index=True)


def _point(run: pd.Series) -> dict[str, Any]:
    return {k: run[k] for k in ("method", "finetuning", "seed", "mean", "normalised")}

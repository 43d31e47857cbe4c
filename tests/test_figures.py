"""Figures show the numbers they are given: read back off the axes."""

import pandas as pd
import pytest

from experiments.report import figures


def rows(**columns):
    blank = {
        "finetuning": "full", "method": "actmat", "data": "none", "mean": 70.0, "normalised": 90.0,
        "merge_seconds": 2.0, "statistics_seconds": 0.0,
    }  # fmt: skip
    table = pd.DataFrame(columns)
    for name, value in blank.items():
        if name not in table:
            table[name] = value
    return table


def selected(method, seed, accuracy, chosen):
    selection = {"parameter": "alpha", "values": [0.5, 1.0], "accuracy": accuracy, "chosen": chosen}
    return {"key": {"method": method, "seed": seed}, "selection": selection}


def test_cost_counts_statistics_and_leaves_out_what_merges_nothing():
    table = rows(
        row=["experts", "regmean", "actmat"],
        method=["experts", "regmean", "actmat"],
        data=["none", "training inputs", "none"],
        mean=[90.0, 74.0, 76.0],
        statistics_seconds=[0.0, 8.0, 0.0],
    )
    (axes,) = figures.accuracy_against_cost(table).axes
    assert axes.collections[0].get_offsets().tolist() == [[10, 74], [2, 76]]
    assert [text.get_text() for text in axes.texts] == ["regmean", "actmat"]
    assert axes.get_xscale() == "log"


def test_full_and_lora_stand_in_one_row():
    table = rows(
        row=["average", "actmat", "average", "actmat", "ties"],
        finetuning=["full", "full", "lora", "lora", "full"],
        normalised=[89.0, 97.0, 91.0, 95.0, 93.0],
    )
    (axes,) = figures.full_against_lora(table).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["average", "actmat"]
    full, lora = axes.lines
    assert (full.get_label(), list(full.get_xdata())) == ("full", [89, 97])
    assert (lora.get_label(), list(lora.get_xdata())) == ("lora", [91, 95])


def test_selection_shows_the_mean_over_seeds_and_rings_each_choice():
    found = [
        selected("ties", 0, [0.6, 0.7], 1.0),
        selected("ties", 1, [0.8, 0.7], 0.5),
        selected("iso_c", 0, [0.5, 0.6], 1.0),
    ]
    (axes,) = figures.selection_curves(found).axes
    curves = {line.get_label(): line for line in axes.lines if line.get_label()[0] != "_"}
    assert list(curves["ties"].get_ydata()) == pytest.approx([70, 70])
    assert list(curves["iso_c"].get_ydata()) == pytest.approx([50, 60])
    rings = [tuple(line.get_xdata()) for line in axes.lines if line.get_label()[0] == "_"]
    assert rings == [(1.0,), (0.5,), (1.0,)]
    assert axes.get_xlabel() == "alpha"

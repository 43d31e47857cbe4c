"""Published tables: every file picks real figures, and ours stand beside them or are refused."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import merging
from experiments import hydra_run
from experiments.commands.tables import Tables
from experiments.report import paper, records
from experiments.report.frames import to_frame
from merging.errors import InputError

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published"
NAMES = sorted(path.stem for path in (ROOT / "configs/paper").glob("*.yaml"))


@cache
def load(name):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra_run.read_settings(Tables, compose("tables", [f"paper={name}"])).paper


def record(method, scores, *, hyperparameters=None, selection=None, **changes):
    """A finished run with these percentages; `changes` go to the key."""
    known = method in merging.methods()
    defaults = dict(merging.create(method).hyperparameters) if known else {}
    key = {
        "suite": "s", "experts": {}, "method": method, "finetuning": "full", "seed": 0,
        "split": "test", "tasks": list(scores), "limit": None, "statistics": None,
        "hyperparameters": dict(sorted((defaults | (hyperparameters or {})).items())),
        "selection": selection,
    } | changes  # fmt: skip
    return dict.fromkeys(records.FIELDS) | {
        "schema": records.SCHEMA,
        "key": key,
        "family": "theirs",
        "data": "none",
        "selection": selection,
        "scores": {t: {"accuracy": x / 100, "constant": False} for t, x in scores.items()},
        "mean": sum(scores.values()) / len(scores) / 100,
        "normalised": None,
        "seconds": {"merge": 2.0, "statistics": 0.5, "evaluation": 9.0},
        "peak_bytes": 0,
    }


@pytest.fixture
def table(tmp_path):
    """A published table of two methods and two tasks, one task called otherwise than here."""
    (tmp_path / "p.csv").write_text(
        "suite,method,task,metric,value,source\n"
        "s,actmat,A,accuracy,0.80,there\n"
        "s,actmat,b,accuracy,0.60,there\n"
        "s,task_arithmetic_tuned,A,accuracy,0.50,there\n"
        "s,task_arithmetic_tuned,b,accuracy,0.40,there\n"
        "s,experts,average,accuracy,0.90,there\n"
        "s,actmat,all,seconds,7.5,there\n"
    )
    return paper.Paper(
        name="t", title="T", published="p.csv", where={"suite": "s", "metric": "accuracy"},
        family="theirs", suite="ours", columns={"a": {"task": "A"}, "b": {"task": "b"}},
        methods={"task_arithmetic (alpha selected)": "task_arithmetic_tuned"},
        marks={"b": "it leaked"},
    )  # fmt: skip


def rendered(table, tmp_path, *found):
    records.save_lines(tmp_path / "ours" / "records.jsonl", found)
    return paper.render_paper(table, tmp_path, tmp_path, tmp_path)


def tasks_of(table):
    """Names that the scores of the table's suite can have, from its files."""
    if (ROOT / f"configs/suite/{table.suite}.yaml").exists():
        suite = OmegaConf.load(ROOT / f"configs/suite/{table.suite}.yaml")
        chosen = (suite.get("protocols") or {}).get(table.protocol) or suite
        return set(chosen.get("benchmarks") or suite.tasks)
    name, model, family = table.suite.split("_")  # a vision suite is named after all three
    assert (ROOT / f"configs/suite/{name}.yaml").exists()
    assert model == table.where["backbone"]
    checkpoints = (ROOT / "configs/suite/checkpoints").glob("*.yaml")
    assert family == table.family
    assert family in {OmegaConf.load(path).family for path in checkpoints}
    return {path.stem for path in (ROOT / "configs/suite/dataset").glob("*.yaml")}


@pytest.mark.parametrize("name", NAMES)
def test_every_table_picks_published_figures_of_a_suite_that_exists(name):
    settings = load(name)
    assert settings.name.startswith(name)
    published = paper.read_published(settings, PUBLISHED)
    assert not published.duplicated(["method", "task"]).any()
    columns = set(published.task) - {"mean"}
    assert columns <= tasks_of(settings)
    assert set(settings.marks) <= columns | {"mean"}
    assert set(published.task) == columns | {"mean"}
    assert settings.finetuning == settings.where.get("finetuning", "full")


@pytest.mark.parametrize("name", NAMES)
def test_every_table_opens_with_what_it_reports_its_cost_and_a_command(name):
    settings, text = load(name), (ROOT / f"configs/paper/{name}.yaml").read_text()
    header = re.match(r"(#.*\n)+", text)[0].replace("\n#", "")
    reported, _, rest = header.partition("Cost: ")
    published = paper.read_published(settings, PUBLISHED)
    means = set(published.value[published.task == "mean"].map("{:.1f}".format))
    figures = re.findall(r"(?<![(\d])\d+\.\d\b", reported)
    assert len(figures) >= 5
    assert set(figures) <= means
    assert f"python -m experiments.paper {name}" in rest or "experiments.tables" in rest


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_one_that_records_can_make(name):
    """The name of a row in `methods` is the one `frames` gives to such a run."""
    settings = load(name)
    for row in settings.methods:
        method, _, details = row.rstrip(")").partition(" (")
        pairs = [detail.split("=") for detail in details.split(", ") if "=" in detail]
        parsed = {k: OmegaConf.create(f"v: {v}").v for k, v in pairs}
        chosen = {"parameter": "alpha"} if details.endswith("selected") else None
        run = record(method, {"a": 50}, hyperparameters=parsed, selection=chosen)
        assert to_frame([run]).row.item() == row


def test_olmos_average_is_the_mean_of_the_five_first_attempts():
    published = paper.read_published(load("olmo3_7b"), PUBLISHED)
    means = published[published.task == "mean"].set_index("method").value.round(1)
    assert means.to_dict() == {
        "zero_shot": 34.5, "experts": 54.1, "actmat": 45.9, "regmean": 45.7, "tsv_m": 43.6,
        "average": 41.8, "iso_c": 40.1,
    }  # fmt: skip


def test_latency_is_in_seconds():
    published = paper.read_published(load("latency"), PUBLISHED).set_index("method").value.round(1)
    assert published["regmean"] == 279.5
    assert published["average"] == 2.7


def test_paper_ours_and_difference(table, tmp_path):
    tuned = {"parameter": "alpha", "chosen": 0.4, "split": "validation"}
    path = rendered(
        table,
        tmp_path,
        record("actmat", {"a": 82, "b": 60}),
        record("actmat", {"a": 84, "b": 60}, seed=1),
        record("task_arithmetic", {"a": 49.5, "b": 41}, selection=tuned),
        record("experts", {"a": 91, "b": 89}),
    )
    frame = pd.read_csv(path.with_suffix(".csv")).set_index(["method", "task"])
    assert frame.loc[("actmat", "a"), ["paper", "ours", "difference"]].tolist() == [80, 83, 3]
    assert frame.loc[("actmat", "mean"), ["paper", "ours", "difference"]].tolist() == [
        70,
        71.5,
        1.5,
    ]
    assert frame.loc[("experts", "mean"), "difference"] == 0
    text = path.read_text()
    assert (
        "| task_arithmetic (alpha selected) | validation | paper | 50.0 | 40.0 ‡ | 45.0 |" in text
    )
    assert "|  |  | difference | -0.5 | +1.0 ‡ | +0.2 |" in text
    assert "‡ b: it leaked." in text
    assert "Checkpoints: theirs." in text
    assert text.index("experts") < text.index("actmat") < text.index("task_arithmetic")
    latex = path.with_suffix(".tex").read_text()
    assert r"task\_arithmetic (alpha selected) & validation & paper" in latex
    assert paper.NOT_MEASURED not in text


def test_what_was_not_measured_is_said(table, tmp_path):
    text = paper.render_paper(table, tmp_path, tmp_path, tmp_path).read_text()
    assert text.count(paper.NOT_MEASURED) == 1
    assert "nan" not in text


def test_a_difference_comes_with_what_the_test_sets_size_leaves(table, tmp_path):
    made = record("actmat", {"a": 82, "b": 60})
    for score, count in zip(made["scores"].values(), (100, 400), strict=True):
        score["count"] = count
    text = rendered(table, tmp_path, made).read_text()
    variances = [0.82 * 0.18 / 100, 0.6 * 0.4 / 400]
    first, second = (100 * v**0.5 for v in variances)
    mean = 100 * sum(variances) ** 0.5 / 2
    assert f"+2.0 ± {first:.1f} | +0.0 ± {second:.1f} ‡ | +1.0 ± {mean:.1f}" in text
    assert paper.ERRORS in text


def test_what_the_authors_corrected_stands_beside_it(table, tmp_path):
    (tmp_path / "later.csv").write_text(
        "suite,method,task,metric,value,source\n"
        "s,actmat,A,accuracy,0.81,there\n"
        "s,actmat,b,accuracy,0.60,there\n"
    )
    later = replace(table, later=paper.Later("later.csv"))
    text = paper.render_paper(later, tmp_path, tmp_path, tmp_path).read_text()
    assert "|  |  | later | 81.0 | 60.0 ‡ | 70.5 |" in text
    assert paper.LATER in text
    (tmp_path / "later.csv").write_text((tmp_path / "p.csv").read_text())
    assert paper.LATER not in paper.render_paper(later, tmp_path, tmp_path, tmp_path).read_text()


def test_rows_that_nobody_published_are_shown_alone(table, tmp_path):
    text = rendered(table, tmp_path, record("bounded", {"a": 82, "b": 60})).read_text()
    assert "| bounded | none | ours | 82.0 | 60.0 | 71.0 |" in text


def test_a_mean_over_other_columns_is_no_mean(table, tmp_path):
    text = rendered(table, tmp_path, record("actmat", {"a": 82})).read_text()
    assert "|  |  | ours | 82.0 | – | – |" in text


def test_seconds(table, tmp_path):
    where = {"suite": "s", "metric": "seconds"}
    seconds = replace(table, unit="seconds", where=where, columns={}, marks={})
    frame = pd.read_csv(rendered(seconds, tmp_path, record("actmat", {"a": 1})).with_suffix(".csv"))
    assert frame[["paper", "ours"]].to_numpy().tolist() == [[7.5, 2.5]]


def test_other_checkpoints_are_refused(table, tmp_path):
    other = record("actmat", {"a": 82, "b": 60}) | {"family": "mine"}
    with pytest.raises(InputError, match="family 'mine', the published figures are of 'theirs'"):
        rendered(table, tmp_path, other)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"published": "none.csv"}, "does not exist"),
        ({"where": {"colour": "red"}}, "has no column 'colour'"),
        ({"where": {"suite": "none"}}, "has no row with"),
        ({"columns": {"a": {"task": "none"}}}, "has no row with {'task': 'none'}"),
    ],
)
def test_figures_that_are_not_there_are_refused(table, tmp_path, change, told):
    with pytest.raises(InputError) as caught:
        paper.read_published(replace(table, **change), tmp_path)
    assert told in caught.value.message
    assert caught.value.message.startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ("actmat", "none"),
        ("regmean_pp", "training inputs"),
        ("fisher", "training inputs"),
        ("data_free_fisher", "none"),
        ("task_arithmetic_tuned", "validation"),
        ("task_arithmetic (alpha=1.0)", "none"),
        ("ties (alpha selected)", "validation"),
        ("iso_c_larv", "none"),
        ("wudi (another source)", "none"),
        ("experts", "–"),
        ("zero_shot", "–"),
        ("unheard_of", ""),
    ],
)
def test_data_use_of_a_row(row, data):
    assert paper.data_use(row) == data


def test_a_second_source_of_a_row_is_named():
    table = paper.read_published(load("fusionbench_vision8"), PUBLISHED).set_index("method").value
    assert table["wudi"] == 84.5
    assert table["wudi (arXiv 2606.07289 code results)"] == 84.63

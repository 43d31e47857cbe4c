"""The README says what the repository does and what results/ holds."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import merging
from experiments.readme import ROOT, inserted, table
from experiments.report.findings import answer, page
from experiments.report.markup import markdown
from merging.errors import InputError

README = (ROOT / "README.md").read_text()


def test_the_table_is_the_one_of_the_results():
    assert inserted(README, table(ROOT / "results")) == README


def test_the_findings_are_those_of_the_results():
    found = (ROOT / "results" / "README.md").read_text()
    assert found == page(ROOT / "results")
    for target in re.findall(r"\]\(([^)#]+)\)", found):
        assert (ROOT / "results" / target).exists(), target


def test_a_finding_is_answered_from_the_table_or_refused(tmp_path):
    (tmp_path / "embedded_text").mkdir()
    (tmp_path / "embedded_text" / "table.csv").write_text(
        "finetuning,row,mean,mean_se,merge_seconds,statistics_seconds\n"
        "full,experts,80.0,,0,0\nfull,actmat,60.04,0.26,1.5,2.0\nfull,average,50.0,0.1,1,0\n"
    )
    (tmp_path / "both_sides").mkdir()
    (tmp_path / "both_sides" / "table.csv").write_text(
        "regime,row,mean\nlong,tsv_m,60\nlong,actmat,50\nshort,actmat,41\nlast,actmat,40\n"
        "last,tsv_m,61\n"
    )
    (tmp_path / "embedded_text" / "theory").mkdir()
    (tmp_path / "embedded_text" / "theory" / "scale.csv").write_text(
        "task,layer,effective_rank\na,1,0.1\nb,1,0.3\na,2,0.5\nb,2,0.2\n"
    )
    (tmp_path / "bench" / "default").mkdir(parents=True)
    (tmp_path / "bench" / "default" / "methods.csv").write_text(
        "d_out,d_in,method,ours_seconds\n8,8,a,1\n9,8,a,4\n8,8,b,2\n9,8,b,0\n"
    )
    regimes = [["long", "50.0", "60.0"], ["last", "40.0", "61.0"], ["mean", "45.0", "60.5"]]
    asked = {
        "times a b": "1.00",
        "ranks text full": "0.30 to 0.50",
        "regimes actmat tsv_m": markdown(["validation examples", "actmat", "tsv_m"], regimes),
        "mean text full actmat": "60.0 ± 0.3", "gap text full actmat average": "10.0",
        "share text full actmat": "75 %", "seconds text full actmat": "3.5",
        "best text full": "actmat",
    }  # fmt: skip
    assert {question: answer(question, tmp_path) for question in asked} == asked
    with pytest.raises(InputError, match="no row 'nothing'"):
        answer("mean text full nothing", tmp_path)


@pytest.mark.parametrize("line", re.findall(r"^python -m experiments\.run (.*)$", README, re.M))
def test_commands_compose(line):
    overrides = [x for x in line.partition("#")[0].split() if x != "-m"]
    overrides = [re.sub(r"^method=.*,", "method=", x) for x in overrides]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("experiment", overrides)
    assert config.method.name in {*merging.methods(), "zero_shot", "experts"}


def test_links_and_folders_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)|^\| `(\w+/)` ", README, re.M)
    assert len(linked) >= 7
    for path in ("".join(pair) for pair in linked):
        assert Path(ROOT, path).exists(), path

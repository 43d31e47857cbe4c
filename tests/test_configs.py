"""Every file under configs composes, says the defaults that the code has, and names real things."""

import importlib
import itertools
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import merging
from experiments import cli, hydra_run
from experiments.commands.finetune import Finetune
from experiments.commands.merge import MergeCheckpoints
from experiments.commands.paper import Reproduce
from experiments.commands.statistics import Collect
from experiments.commands.tables import Tables
from experiments.report import configs as configs_page
from experiments.settings import UNMERGED, Experiment, Selection, Statistics
from experiments.trackers import TRACKERS

CONFIGS = Path(__file__).parents[1] / "configs"


def names(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(config, *overrides, hydra=False):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config, list(overrides), return_hydra_config=hydra)


def test_every_method_has_a_file_and_every_file_a_method():
    assert names("method") == sorted([*merging.methods(), *UNMERGED, "recommended"])
    assert composed("experiment", "method=recommended").method.name in merging.methods()


@pytest.mark.parametrize("name", merging.methods())
def test_a_methods_file_holds_the_defaults_of_the_code(name):
    config = OmegaConf.to_container(composed("experiment", f"method={name}").method, resolve=True)
    assert config.pop("name") == name
    assert config == dict(merging.create(name).hyperparameters)
    for key, value in merging.create(name).hyperparameters.items():
        assert type(config[key]) is type(value), key


PAPER = r"arXiv \d{4}\.\d{4,5}|[A-Z]\w+(?: et al\.| & [A-Z]\w+)?(?:'s)? \(?(?:19|20)\d\d\b"
SOURCE = re.compile(rf"{PAPER}|\b[Oo]urs\b|the authors'|python -m experiments\.\w+ .*method=(\w+)")


@pytest.mark.parametrize("name", names("method"))
def test_a_methods_file_opens_with_its_source_or_a_command(name):
    lines = (CONFIGS / "method" / f"{name}.yaml").read_text().splitlines()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("# "), lines))
    found = SOURCE.search(header)
    assert found, header
    assert found[1] in {None, name}  # a command is that of this file
    assert (found[1] is None) == (name in merging.methods())


@pytest.mark.parametrize("suite", names("suite"))
def test_every_suite_composes_and_may_be_constructed(suite):
    settings = hydra_run.read_settings(Experiment, composed("experiment", f"suite={suite}"))
    assert settings.suite["name"].startswith(suite)


@pytest.mark.parametrize("tracker", names("tracker"))
def test_every_tracker_has_a_function(tracker):
    settings = hydra_run.read_settings(Experiment, composed("experiment", f"tracker={tracker}"))
    assert settings.tracker["name"] == tracker
    assert set(names("tracker")) == set(TRACKERS)


def test_defaults_of_the_schema_and_of_the_file_agree():
    settings = hydra_run.read_settings(Experiment, composed("experiment"))
    assert settings.statistics == Statistics()
    assert settings.selection == Selection()
    plain = Experiment(settings.suite, settings.method, settings.tracker)
    assert settings == plain


def test_selection_is_made_on_validation():
    for name in names("selection"):
        settings = hydra_run.read_settings(Experiment, composed("experiment", f"selection={name}"))
        assert settings.selection.split == "validation"


@pytest.mark.parametrize("sweep", names("sweep"))
def test_every_sweep_opens_with_a_command_and_names_only_methods(sweep):
    text = (CONFIGS / "sweep" / f"{sweep}.yaml").read_text()
    assert f"sweep={sweep}" in text
    config = composed("experiment", f"sweep={sweep}", hydra=True)
    params = dict(config.hydra.sweeper.params or {})
    assert config.hydra.mode.name == "MULTIRUN"
    known = {*merging.methods(), *UNMERGED}
    for name in str(params.get("method", config.method.name)).replace(" ", "").split(","):
        assert name in known
        own = merging.create(name).hyperparameters if name not in UNMERGED else {}
        for key in params:
            if key.startswith("method."):
                assert key.removeprefix("method.") in own, f"{key} of {name}"


@pytest.mark.parametrize("sweep", names("sweep"))
def test_what_a_sweep_sets_holds(sweep):
    """A file of configs/sweep is the last to speak before the command line."""
    config = composed("experiment", f"sweep={sweep}", hydra=True)
    own = OmegaConf.load(CONFIGS / "sweep" / f"{sweep}.yaml")
    choices = [next(iter(choice.items())) for choice in own.pop("defaults", [])]
    for group, option in choices:
        assert config.hydra.runtime.choices[group.removeprefix("override /")] == option
    merged = OmegaConf.merge(config, own)
    assert merged == config
    assert composed("experiment", f"sweep={sweep}", "split=test").split == "test"


def test_the_sweep_over_tasks_names_tasks_of_its_suite():
    config = composed("experiment", "sweep=tasks", "suite=embedded_text", hydra=True)
    subsets = OmegaConf.create(f"[{config.hydra.sweeper.params.tasks}]")
    assert [len(subset) for subset in subsets] == list(range(2, 8))
    assert {task for subset in subsets for task in subset} <= set(config.suite.corpora)


@pytest.mark.parametrize(
    ("config", "schema", "overrides"),
    [
        ("finetune", Finetune, []),
        ("statistics", Collect, []),
        ("tables", Tables, []),
        ("reproduce", Reproduce, ["paper=olmo3_7b"]),
        ("merge", MergeCheckpoints, ["base=a", "output=b", "+experts.x=c"]),
    ],
)
def test_every_command_composes(config, schema, overrides):
    hydra_run.read_settings(schema, composed(config, *overrides))


@pytest.mark.parametrize("paper", names("paper"))
def test_every_paper_table_composes(paper):
    settings = hydra_run.read_settings(Tables, composed("tables", f"paper={paper}"))
    assert (CONFIGS.parent / settings.published / settings.paper.published).exists()


GIVEN = {
    "merge": ["base=a", "output=b"],
    "plan": ["base=a"],
    "extract": ["base=a", "expert=b", "output=c"],
}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_defaults_of_every_dataclass_are_those_of_its_file(name):
    """A default that is empty leaves the choice to the file alone."""
    place = cli.COMMANDS[name]
    schema = importlib.import_module(place.module).COMMAND.settings
    settings = hydra_run.read_settings(schema, composed(place.config, *GIVEN.get(name, [])))
    file = OmegaConf.load(CONFIGS / f"{place.config}.yaml")
    for own in fields(schema):
        if own.name in file and OmegaConf.is_interpolation(file, own.name):
            continue
        default = own.default if own.default_factory is MISSING else own.default_factory()
        if default is not MISSING and default not in ([], {}, ""):
            assert getattr(settings, own.name) == default, own.name


# --- the page of all files ------------------------------------------------------------------------


def test_the_committed_page_of_configs_is_the_generated_one():
    committed = (CONFIGS / "README.md").read_text().splitlines()
    page = configs_page.page().splitlines()
    rows = {line.partition("|")[2].partition("|")[0] for line in committed}
    # a new method passes with its function and its file alone; the command adds its row
    page = [
        x for x in page if "](method/" not in x or x.partition("|")[2].partition("|")[0] in rows
    ]
    assert committed == page, "run: python -m experiments.configs"


def test_every_file_is_on_the_page_once_and_says_what_it_is():
    links = re.findall(
        r"^\| \[\w+\]\(([\w/]+\.yaml)\) \| (\S.*?) \|", configs_page.page(), re.MULTILINE
    )
    assert sorted(path for path, _ in links) == sorted(
        path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")
    )


def test_a_row_is_read_from_its_file(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# Merge by halves (arXiv 1234.5678), e.g. two. More of it.\n#\n"
        "#   python -m experiments.run suite=tiny_text \\\n#     method=average   # seconds\n"
        "name: x\nplain: 1\nshare: 0.5 # of all\nlong: [10, 20, 30, 40, 50, 60, 70] # many\n"
    )
    assert configs_page.about(file) == "Merge by halves (arXiv 1234.5678), e.g. two"
    assert configs_page.keys(file) == "`share 0.5`, `long`"
    line = "python -m experiments.run suite=tiny_text method=average"
    assert configs_page.example(file) == f"`{line}`"
    file.write_text("# A sweep.\nhydra:\n  sweeper:\n    params:\n      method.alpha: 0.1, 0.2\n")
    assert configs_page.keys(file) == "`method.alpha`"

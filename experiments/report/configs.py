"""configs/README.md: every group and file of the configuration, from the files themselves.

A file opens with a comment: what it is, in a sentence, then what else there is to say, with
commands. Its keys stand there with a comment each where they are not plain.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from experiments.cli import COMMANDS, CONFIGS

_PLAIN = {"defaults", "hydra", "name"}
_SHORT = 24  # characters of a value that is shown beside its key
_MOST = 8  # keys of a file that are shown
_COMMAND = re.compile(r"python -m experiments\.[^#\n]*")

INTRODUCTION = """\
# Configuration

Written by `python -m experiments.configs` from the files. A command composes its own file with one
of each group it names (Hydra); every key can be set on the command line, `--help` lists them all
and `--cfg job` prints what a line comes to. Unknown keys are refused. Files of your own go into a
folder of the same groups: `--config-dir FOLDER`.

## Commands

"""


class Group(NamedTuple):
    """A folder of files one of which is chosen."""

    about: str
    example: str  # a command line, empty where the files' own or another group's serve


GROUPS = {
    "method": Group(
        "How experts are merged: the defaults of every method of [merging](../merging/README.md). "
        "`alpha` is a factor on the result.",
        "python -m experiments.run suite=embedded_text method=ties method.k=0.3",
    ),
    "suite": Group(
        "What is merged and measured: a base, experts on several tasks, and the test of each.", ""
    ),
    "suite/checkpoints": Group(
        "Where a suite's experts come from; the families are never compared with each other.",
        "python -m experiments.run suite=vision8 suite/checkpoints=fusionbench method=actmat",
    ),
    "suite/dataset": Group(
        "Data sets of the vision suites: where their images lie, and the prompts of their classes.",
        "",
    ),
    "suite/class_names": Group("Class names that replace the data sets' own.", ""),
    "sweep": Group(
        "Many runs of one command: the axes, of which all combinations are run.",
        "python -m experiments.run sweep=core suite=embedded_text",
    ),
    "selection": Group(
        "How a hyperparameter is chosen, never on the test split.",
        "python -m experiments.run suite=embedded_text method=ties selection=alpha",
    ),
    "tracker": Group(
        "Where a run is reported to, beside its record.",
        "python -m experiments.run suite=embedded_text method=actmat tracker=csv",
    ),
    "paper": Group("Published tables, each reproduced by one command.", ""),
    "paper/rows": Group("What several published tables share: their rows and figures.", ""),
    "lm_tasks": Group(
        "Tasks of language models in lm-eval's own format, beside those it brings.", ""
    ),
}


def page() -> str:
    """The page as Markdown."""
    commands = {place.config: name for name, place in COMMANDS.items()}
    files = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem in commands]
    parts = [INTRODUCTION, _table(files)]
    for name, group in GROUPS.items():
        example = f"\n\n    {group.example}" if group.example else ""
        parts.append(f"\n## {name}\n\n{group.about}{example}\n\n{_table(_files(name))}")
    return "".join(parts)


def _files(group: str) -> list[Path]:
    """Of a group itself; lm-eval's tasks lie in folders, one for each suite."""
    pattern = "**/*.yaml" if group == "lm_tasks" else "*.yaml"
    return sorted((CONFIGS / group).glob(pattern))


def _table(files: list[Path]) -> str:
    rows = [
        [f"[{path.stem}]({path.relative_to(CONFIGS)})", about(path), keys(path), example(path)]
        for path in files
    ]
    header = ["file", "what it is", "keys", "example"]
    if not any(row[3] for row in rows):
        header, rows = header[:3], [row[:3] for row in rows]
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _header(path: Path) -> str:
    """The comment that a file opens with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    return re.sub(r"\\\n *", "", "\n".join(lines))  # a command may go on in the next line


def about(path: Path) -> str:
    """What a file is: the first sentence of its comment."""
    paragraph = re.split(r"\n\s*\n", _header(path))[0]
    paragraph = _COMMAND.split(paragraph)[0]
    sentence = re.split(r"(?<=[\w)\]%])\.\s+(?=[A-Z])", " ".join(paragraph.split()))[0]
    return sentence.rstrip(".: ").replace("|", "\\|")


def keys(path: Path) -> str:
    """The keys that a comment explains, with values that are short.

    All keys of a method, and of a file that explains none; the axes of a sweep.
    """
    text = path.read_text()
    if axes := re.search(r"^    params:\n((?: {6}.*\n)+)", text, flags=re.MULTILINE):
        entries = re.findall(r"^ {6}([\w./@]+):() ?()", axes[1], flags=re.MULTILINE)
    else:
        entries = re.findall(r"^(\w+):(?: +([^#\n]*?))?( +#.*)?$", text, flags=re.MULTILINE)
    entries = [entry for entry in entries if entry[0] not in _PLAIN]
    explained = [entry for entry in entries if entry[2] and path.parent.name != "method"]
    chosen = explained or entries
    shown = [f"`{key} {value}`" if 0 < len(value) <= _SHORT else f"`{key}`" for key, value, _ in
             chosen[:_MOST]]  # fmt: skip
    return ", ".join([*shown, *["..."] * (len(chosen) > _MOST)]).replace("|", "\\|")


def example(path: Path) -> str:
    """The first command of a file's comment."""
    command = _COMMAND.search(_header(path))
    return f"`{command[0].strip()}`" if command else ""

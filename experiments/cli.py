"""The start of every command line, before anything heavy is imported.

Importing torch takes seconds, on a busy machine many. Until then: a line says what happens, an
interrupt is one line and exit code 130, `--help` is answered from the configuration file and a
shell's question for completions by Hydra alone.

Exit codes: 0 done, 1 a fault of the program, 2 bad input or configuration, 130 interrupted.
Tracebacks are printed with `--traceback` or MODEL_MERGING_TRACEBACK=1 only.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
INTERRUPTED = 130
TRACEBACK = "MODEL_MERGING_TRACEBACK"


class Place(NamedTuple):
    """Where a command is described (configs/<config>.yaml), and whose `COMMAND` it is."""

    config: str
    module: str


COMMANDS = {
    "merge": Place("merge", "experiments.commands.merge"),
    "plan": Place("plan", "experiments.commands.plan"),
    "extract": Place("extract", "experiments.commands.extract"),
    "run": Place("experiment", "experiments.commands.run"),
    "tables": Place("tables", "experiments.commands.tables"),
    "paper": Place("reproduce", "experiments.commands.paper"),
    "finetune": Place("finetune", "experiments.commands.finetune"),
    "statistics": Place("statistics", "experiments.commands.statistics"),
    "analyse": Place("analyse", "experiments.commands.analyse"),
    "factorial": Place("factorial", "experiments.commands.factorial"),
    "residuals": Place("residuals", "experiments.commands.residuals"),
    "regimes": Place("regimes", "experiments.commands.regimes"),
    "bench": Place("bench", "experiments.bench.command"),
    "bench.gpu": Place("bench_gpu", "experiments.bench.command_gpu"),
    "bench.peers": Place("bench_peers", "experiments.bench.command_peers"),
    "bench.scale": Place("bench_scale", "experiments.bench.command_scale"),
}


def entry(name: str) -> Callable[[], None]:
    """The function `main` of a command, for `python -m experiments.NAME`."""

    def main() -> None:
        if {"--help", "-h"} & set(sys.argv[1:]):
            sys.stdout.write(help_text(COMMANDS[name].config))
            return
        if {"--shell-completion", "-sc"} & set(sys.argv[1:]):
            complete(name, sys.argv[1:])
            return
        if "--traceback" in sys.argv:
            sys.argv.remove("--traceback")
            os.environ[TRACEBACK] = "1"
        with _loading():
            importlib.import_module("merging")  # it loads torch so that idle threads sleep
            hydra_run = importlib.import_module("experiments.hydra_run")
            command = importlib.import_module(COMMANDS[name].module).COMMAND
        with hydra_run.exit_codes():
            start = hydra_run.prepared(name, command, sys.argv[1:])
            start()

    return main


@contextmanager
def _loading() -> Iterator[None]:
    """Something to read while modules load, and a way out of it."""
    if "experiments.hydra_run" in sys.modules:
        yield
        return
    terminal = sys.stderr.isatty()
    sys.stderr.write("loading torch ..." + ("" if terminal else "\n"))
    sys.stderr.flush()
    before = signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.stderr.write("\r\033[K" * terminal)


def _interrupted(signum: int, frame: FrameType | None) -> None:
    """Leave at once: a KeyboardInterrupt inside an import is caught, or printed, by libraries."""
    os.write(2, b"\ninterrupted while modules were loading; nothing was done\n")
    os._exit(INTERRUPTED)


# --- answers that need no torch -------------------------------------------------------------------

OPTIONS = """\
Options, anywhere on the line:
  -m                  a sweep: run every combination of values that are given as key=a,b,c
  --cfg job           print the configuration that these arguments compose, and do nothing
  --config-dir FOLDER a folder of configurations of your own
  --traceback         print tracebacks of errors
  --hydra-help        what else Hydra offers
"""


def help_text(config: str) -> str:
    """What a command does, examples, its keys and its options, from configs/<config>.yaml.

    That file opens with a comment that says the first two; its keys stand there with a comment
    each. Every group of its defaults adds the names of its files.
    """
    text = (CONFIGS / f"{config}.yaml").read_text()
    header, _, rest = text.partition("defaults:\n")
    about = re.sub(r"^# ?", "", header, flags=re.MULTILINE).strip()
    defaults, keys = re.match(r"((?: +- [^\n]*\n)*)(.*)", rest, flags=re.DOTALL).groups()
    keys = keys.partition("\nhydra:")[0].strip()
    groups = re.findall(r"^ +- (\w+)(?:@([\w.]+))?: (\S+)", defaults, flags=re.MULTILINE)
    return "\n".join(
        [
            f"{about}\n",
            "Keys, as key=value, with their defaults (??? must be given):\n",
            *(_choices(*group) for group in groups),
            *(f"  {line}" for line in keys.splitlines()),
            f"\n{OPTIONS}",
        ]
    )


def _choices(group: str, place: str, default: str) -> str:
    names = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    key = place or group
    line = f"{key}: {default} # {', '.join(names)}; the keys of its file as {key}.KEY"
    return textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="      # ")


def complete(name: str, arguments: Sequence[str]) -> None:
    """Answer a shell; `eval "$(model-merging-run -sc install=bash)"` makes it ask."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path

    search_path = create_automatic_config_search_path(None, None, str(CONFIGS))
    own = [argument for argument in arguments if "=" in argument]
    Hydra.create_main_hydra2(name, search_path).shell_completion(COMMANDS[name].config, own)

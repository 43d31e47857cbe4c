"""The start of every command line, before anything heavy is imported.

Importing torch takes seconds, on a busy machine many. Until then: a line says what happens, an
interrupt is one line and exit code 130, and `--help` is answered from the configuration file alone.

Exit codes: 0 done, 1 a fault of the program, 2 bad input or configuration, 130 interrupted.
Tracebacks are printed with `--traceback` or MODEL_MERGING_TRACEBACK=1 only.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
INTERRUPTED = 130
TRACEBACK = "MODEL_MERGING_TRACEBACK"

# name of a command -> the module whose `COMMAND` it is
COMMANDS = {
    "merge": "experiments.commands.merge",
    "plan": "experiments.commands.plan",
    "extract": "experiments.commands.extract",
    "run": "experiments.commands.run",
    "tables": "experiments.commands.tables",
    "finetune": "experiments.commands.finetune",
    "statistics": "experiments.commands.statistics",
    "analyse": "experiments.commands.analyse",
    "factorial": "experiments.commands.factorial",
    "residuals": "experiments.commands.residuals",
    "regimes": "experiments.commands.regimes",
    "bench": "experiments.bench.command",
    "bench.gpu": "experiments.bench.gpu",
    "bench.scale": "experiments.bench.scale",
}


def entry(name: str) -> Callable[[], None]:
    """The function `main` of a command, for `python -m experiments.NAME`."""

    def main() -> None:
        if "--traceback" in sys.argv:
            sys.argv.remove("--traceback")
            os.environ[TRACEBACK] = "1"
        with _loading():
            importlib.import_module("merging")  # before torch: it sets how idle threads wait
            hydra_run = importlib.import_module("experiments.hydra_run")
            command = importlib.import_module(COMMANDS[name]).COMMAND
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

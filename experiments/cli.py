"""What every command line shares: Hydra, settings checked by type, one sentence per error.

Exit codes: 0 done, 1 a fault of the program, 2 bad input or configuration, 130 interrupted.
Tracebacks are printed with `--traceback` or MODEL_MERGING_TRACEBACK=1 only.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.suite import Unsupported
from merging.errors import InputError

log = logging.getLogger(__name__)
Settings = TypeVar("Settings")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FAULT, BAD_INPUT, INTERRUPTED = 1, 2, 130
MULTIRUN = ("-m", "--multirun")
TRACEBACK = "MODEL_MERGING_TRACEBACK"


class JobFailed(Exception):
    """A job of a sweep failed and has said why; carries its exit code to the sweep's end."""


def command(
    config: str, schema: type[Settings], prepare: Callable[[list[str]], list[str]] = list
) -> Callable[[Callable[[Settings], Any]], Callable[[], None]]:
    """Turn `task(settings)` into a command line composed by Hydra from `configs/<config>.yaml`.

    schema: dataclass with the type of every key; other keys and types are refused (not frozen:
        OmegaConf would make the configuration read-only).
    prepare: rewrites the command-line overrides before Hydra parses them.
    """

    def decorate(task: Callable[[Settings], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(composed: DictConfig) -> Any:
            _configure_logging()  # here, because a launcher may run jobs in other processes
            sweeps = HydraConfig.get().mode is RunMode.MULTIRUN
            try:
                return task(read_settings(schema, composed))
            except Exception as error:
                if sweeps and isinstance(error, Unsupported):
                    log.info("skipped: %s", error.message)  # a suite without it is no failure
                    return None
                code = report(error)
                if sweeps:
                    raise JobFailed(code) from None  # the other jobs of the sweep still run
                raise SystemExit(code) from None

        @functools.wraps(task)
        def main() -> None:
            if "--traceback" in sys.argv:
                sys.argv.remove("--traceback")
                os.environ[TRACEBACK] = "1"
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of Hydra's printer
            try:
                # argparse wants -m before all overrides, people write it anywhere
                sys.argv[1:] = prepare(sorted(sys.argv[1:], key=lambda a: a not in MULTIRUN))
                _refuse_foreign_targets(sys.argv[1:])
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config)(job)()
            except JobFailed as failed:
                sys.exit(failed.args[0])
            except KeyboardInterrupt:
                sys.stderr.write("interrupted; finished items are kept, run again to continue\n")
                sys.exit(INTERRUPTED)
            except Exception as error:
                sys.exit(report(error))

        return main

    return decorate


def _configure_logging() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their developers
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for ours in ("merging", "eval", "experiments", "hydra", "__main__"):
        logging.getLogger(ours).setLevel(logging.INFO)


def report(error: Exception) -> int:
    """Print an error the way a person can act on, and return the exit code it stands for."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    sentence, hint, code = _explain(error)
    sys.stderr.write(f"error: {sentence}\n" + (f"hint: {hint}\n" if hint else ""))
    return code


def _explain(error: Exception) -> tuple[str, str, int]:
    """(sentence, hint, exit code)."""
    cause = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    if cause is not None:  # also when Hydra wrapped it on its way up
        return _one_line(cause.message), _one_line(cause.hint), BAD_INPUT
    if isinstance(error, HydraException | OmegaConfBaseException):
        told = str(error).split("Config search path:")[0]
        if isinstance(error.__cause__, OmegaConfBaseException):
            told += f"\n{error.__cause__}"
        sentence, _, rest = told.strip().partition("\n")
        return _one_line(sentence), _one_line(rest), BAD_INPUT
    if isinstance(error, OSError) and error.strerror:  # no space, no permission, no such file
        return f"{error.strerror}: {error.filename or 'while writing'}", "", BAD_INPUT
    name = type(error).__name__
    return (
        f"{name}: {_one_line(str(error))}",
        f"this is not a message for bad input; run again with --traceback or {TRACEBACK}=1",
        FAULT,
    )


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def read_settings(schema: type[Settings], composed: DictConfig) -> Settings:
    """The composed configuration as an instance of `schema`, every `_target_` checked.

    Raises InputError for a key the schema lacks, a value of another type, or a `_target_`
    that is no suite of this project.
    """
    known = {field.name for field in fields(schema)}
    if unknown := sorted(set(composed) - known):
        raise InputError(f"unknown config key {unknown[0]!r}", _did_you_mean(unknown[0], known))
    plain = OmegaConf.to_container(composed, resolve=True)
    check_targets(plain)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))


def _did_you_mean(name: str, known: Sequence[str] | set[str]) -> str:
    close = get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}known: {', '.join(sorted(known))}"


def check_targets(node: Any, where: str = "config") -> None:
    """Refuse a `_target_` that is not a dataclass of eval/, and settings it does not have."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            known = {field.name for field in fields(_declared(node["_target_"], where))}
            if unknown := sorted(set(node) - known - {"_target_", "_convert_"}):
                raise InputError(
                    f"{where} has no setting {unknown[0]!r}", _did_you_mean(unknown[0], known)
                )
        for key, value in node.items():
            check_targets(value, f"{where}.{key}" if where != "config" else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            check_targets(value, f"{where}[{i}]")


def _declared(target: Any, where: str) -> type:
    """The class a `_target_` names, if it is one that configs may construct."""
    if isinstance(target, str) and re.fullmatch(r"eval\.[a-z_0-9]+\.[A-Za-z_0-9]+", target):
        module, _, name = target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            found = None
        # defined there, not merely imported there
        if isinstance(found, type) and is_dataclass(found) and found.__module__ == module:
            return found
    raise InputError(
        f"{where}._target_ is {target!r}, expected a suite of this project",
        hint="configs may construct only the dataclasses that modules of eval/ define",
    )


def _refuse_foreign_targets(overrides: Sequence[str]) -> None:
    """Hydra builds launchers and sweepers before `read_settings` could see their targets."""
    for override in overrides:
        if re.match(r"[+~]*hydra\b.*_target_", override):
            raise InputError(
                f"{override!r} would construct an object outside this project",
                hint="choose with hydra/launcher=... and hydra/sweeper=... instead",
            )


def build(node: Mapping[str, Any]) -> Any:
    """Instantiate a configuration that `check_targets` has admitted."""
    check_targets(node)
    return hydra.utils.instantiate(OmegaConf.create(dict(node)), _convert_="all")

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal import hydra as hydra_internals
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

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
                # argparse wants options before all overrides, people write them anywhere
                sys.argv[1:] = prepare(sorted(sys.argv[1:], key=_is_override))
                _refuse_options(sys.argv[1:])
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


def _is_override(argument: str) -> bool:
    return argument not in MULTIRUN and not re.match(r"--[a-z-]+=", argument)


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
    if isinstance(target, str) and re.fullmatch(r"eval(\.[a-z_0-9]+)+\.[A-Za-z_0-9]+", target):
        module, _, name = target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            found = None
        # defined there, not merely imported there
        if isinstance(found, type) and is_dataclass(found) and found.__module__ == module:
            return found
    raise InputError(
        f"{where}._target_ is {target!r}, expected a suite of this project",
        hint="configs may construct only the dataclasses that modules of eval/ define",
    )


def _refuse_options(arguments: Sequence[str]) -> None:
    """Refuse the options of Hydra that read something other than this project's configuration."""
    given = get_args_parser().parse_args(list(arguments))
    if given.experimental_rerun:
        raise InputError("--experimental-rerun would unpickle a file, which can run any code")
    if given.config_name or given.config_path:
        raise InputError(
            "each command has its own configuration, which cannot be exchanged",
            hint="add files of your own with --config-dir",
        )


_HANDLERS = {"logging.StreamHandler", "logging.FileHandler"}
_STREAMS = {"ext://sys.stdout", "ext://sys.stderr"}


def check_hydra(node: DictConfig, where: str = "hydra") -> None:
    """Refuse code named in the `hydra` part of a configuration, wherever that was set.

    Allowed: what the options of hydra/launcher, hydra/sweeper and hydra/sweeper/sampler construct,
    and logging to a terminal or a file. So no callbacks, and no functions for logging or a search
    space. A cluster's launcher may hold shell commands for its jobs (`setup`), as it must.
    """
    for key, value in _items(node):
        place = f"{where}.{key}"
        if key == "_target_":
            allowed = _registered(where.replace(".", "/"))
        elif key in {"()", "custom_search_space"}:  # names of functions, to logging and Optuna
            allowed = set()
        elif key == "class":
            allowed = _HANDLERS
        elif isinstance(value, str) and value.startswith("ext://"):
            allowed = _STREAMS
        else:
            check_hydra(value, place)
            continue
        if value is not None and value not in allowed:
            raise InputError(
                f"{place} is {value!r}, which would run code outside this project",
                hint="choose with hydra/launcher=... and hydra/sweeper=... instead",
            )


def _items(node: Any) -> Iterator[tuple[str, Any]]:
    """Keys and resolved values of a mapping or list; none of what is neither, or still unknown."""
    if not OmegaConf.is_config(node) or node._is_none() or node._is_missing():
        return
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        with suppress(InterpolationResolutionError):  # set by Hydra when a job starts: no mapping
            yield str(key), None if OmegaConf.is_missing(node, key) else node[key]


def _registered(group: str) -> set[str]:
    """What the options of a group construct that Hydra and its installed plugins registered."""
    store = ConfigStore.instance()
    with suppress(OSError):  # there is no such group
        names = [name for name in store.list(group) if name.endswith(".yaml")]
        return {store.load(f"{group}/{name}").node._target_ for name in names}
    return set()


class _CheckedLoader(ConfigLoaderImpl):
    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        composed = super().load_configuration(*args, **kwargs)
        check_hydra(composed.hydra)
        return composed


# Between composing a configuration and constructing what its `hydra` part names, which is before
# a job could see it, Hydra (1.3) asks nobody.
hydra_internals.ConfigLoaderImpl = _CheckedLoader


def build(node: Mapping[str, Any]) -> Any:
    """Instantiate a configuration that `check_targets` has admitted."""
    check_targets(node)
    return hydra.utils.instantiate(OmegaConf.create(dict(node)), _convert_="all")

"""What every command shares once its modules are loaded: Hydra, settings checked by type.

Hydra's own class is driven directly, not through `hydra.main`: so a configuration is checked before
anything in it is constructed, errors reach us as they are, and a sweep's members are known.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Generic, TypeVar

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from eval.backend import Unsupported
from experiments.cli import CONFIGS, INTERRUPTED
from experiments.errors import did_you_mean, report
from experiments.suites import check_suite
from experiments.sweeps import JobFailed, Recorder, conclude, tidied
from merging.errors import InputError

log = logging.getLogger(__name__)
Settings = TypeVar("Settings")
MULTIRUN = ("-m", "--multirun")


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """A command line, composed by Hydra from `configs/<config>.yaml`.

    settings: dataclass with the type of every key; other keys and types are refused (not frozen:
        OmegaConf would make the configuration read-only).
    task: what the command does with its settings.
    show: prints what the task returned; returns what Optuna maximises.
    check: refuses, cheaply, settings (and their `hydra` part) that the task would refuse; every
        member of a sweep is checked before the first one runs.
    found: what `show` returned when this was done before, None where it is to be done; a sweep
        over processes then starts none.
    prepare: rewrites the command-line overrides before Hydra parses them.
    """

    config: str
    settings: type[Settings]
    task: Callable[[Settings], Any]
    show: Callable[[Settings, Any], Any] = lambda settings, outcome: None
    check: Callable[[Settings, DictConfig], None] = lambda settings, hydra: None
    found: Callable[[Settings], float | None] = lambda settings: None
    prepare: Callable[[list[str]], list[str]] = list


@contextmanager
def exit_codes() -> Iterator[None]:
    """Whatever is raised inside ends the process with one sentence and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; finished items are kept, run again to continue\n")
        sys.exit(INTERRUPTED)
    except Exception as error:
        sys.exit(report(error).code)


def prepared(name: str, command: Command[Any], arguments: Sequence[str]) -> Callable[[], Any]:
    """What is left to call once the arguments are read: Hydra's run, sweep or answer."""
    # argparse wants options before all overrides, people write them anywhere
    arguments = command.prepare(sorted(arguments, key=_is_override))
    parser = get_args_parser()
    options = parser.parse_args(arguments)
    _refuse_options(options)
    hydra = _hydra(name, command, options.config_dir)
    own = {"config_name": command.config, "overrides": options.overrides}
    if options.hydra_help:
        return partial(hydra.hydra_help, command.config, args_parser=parser, args=options)
    if options.cfg:
        shown = {"cfg_type": options.cfg, "package": options.package, "resolve": options.resolve}
        return partial(hydra.show_cfg, **own, **shown)
    if options.info:
        return partial(hydra.show_info, options.info, **own)
    sweeps = options.multirun or hydra.get_mode(**own) is RunMode.MULTIRUN
    own["overrides"] += [f"hydra.mode={'MULTIRUN' if sweeps else 'RUN'}"]
    if sweeps:
        return partial(sweep, hydra, command, **own)
    return partial(hydra.run, task_function=partial(job, command), **own)


def sweep(hydra: Hydra, command: Command[Any], *, config_name: str, overrides: list[str]) -> None:
    """Every member of a sweep, then what became of them; SystemExit where one failed."""
    _configure_logging()  # the launcher says what it starts, the first member too
    config = hydra.compose_config(config_name, overrides, run_mode=RunMode.MULTIRUN)
    sweeper = Plugins.instance().instantiate_sweeper(
        config=config,
        hydra_context=HydraContext(hydra.config_loader, Callbacks(config)),
        task_function=partial(job, command),
    )
    launches = getattr(sweeper, "sweeper", sweeper)  # Optuna's plugin wraps the one that does

    def found(own: Sequence[str]) -> float | None:
        composed = hydra.config_loader.load_sweep_config(config, list(own))
        with suppress(InputError):  # for the job to tell
            return command.found(read_settings(command.settings, composed))
        return None

    launches.launcher = recorder = Recorder(launches.launcher, config, found)
    with tidied(recorder):
        try:
            sweeper.sweep(arguments=OmegaConf.to_container(config.hydra.overrides.task))
        except JobFailed:
            pass  # told below
        except ValueError:  # Optuna's, when no trial was completed
            if not all(member.failure for member in recorder.members) or not recorder.members:
                raise
    if code := conclude(recorder):
        sys.exit(code)


def job(command: Command[Settings], composed: DictConfig) -> Any:
    """One run of a command, in whichever process a launcher starts it."""
    _configure_logging()
    sweeps = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        settings = read_settings(command.settings, composed)
        command.check(settings, HydraConfig.get())
        return command.show(settings, command.task(settings))
    except Exception as error:
        if sweeps and isinstance(error, Unsupported):
            log.info("skipped: %s", error.message)  # a suite without it is no failure
            return None
        explained = report(error)
        if sweeps:  # the other jobs of the sweep still run
            raise JobFailed(explained.code, explained.sentence) from None
        raise SystemExit(explained.code) from None


def _is_override(argument: str) -> bool:
    return argument not in MULTIRUN and not re.match(r"--[a-z-]+=", argument)


def _configure_logging() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their developers
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for ours in ("merging", "eval", "experiments", "hydra"):
        logging.getLogger(ours).setLevel(logging.INFO)


def read_settings(schema: type[Settings], composed: DictConfig) -> Settings:
    """The composed configuration as an instance of `schema`.

    Raises InputError for a key that the schema or the kind of suite lacks, or a value of another
    type.
    """
    keys = [key for key in composed if key != "hydra"]
    known = {field.name for field in fields(schema)}
    if unknown := sorted(set(keys) - known):
        raise InputError(f"unknown config key {unknown[0]!r}", did_you_mean(unknown[0], known))
    plain = OmegaConf.to_container(OmegaConf.masked_copy(composed, keys), resolve=True)
    if "kind" in plain.get("suite", {}):
        check_suite(plain["suite"])
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))


def composed(command: Command[Settings], overrides: Sequence[str]) -> Settings:
    """The checked settings of a command line of another command, composed inside this one."""
    loader = _hydra(command.config, command, None).config_loader
    whole = loader.load_configuration(command.config, list(overrides), RunMode.RUN)
    settings = read_settings(command.settings, whole)
    command.check(settings, whole.hydra)
    return settings


def _refuse_options(options: Any) -> None:
    """Refuse the options of Hydra that read something other than this project's configuration."""
    if options.experimental_rerun:
        raise InputError("--experimental-rerun would unpickle a file, which can run any code")
    if options.config_name or options.config_path:
        raise InputError(
            "each command has its own configuration, which cannot be exchanged",
            hint="add files of your own with --config-dir",
        )


# --- Hydra, checked -------------------------------------------------------------------------------


def _hydra(name: str, command: Command[Any], folder: str | None) -> Hydra:
    """Hydra over `configs/`, and before it a folder of the user's own."""
    version.setbase("1.3")
    search_path = create_automatic_config_search_path(None, None, str(CONFIGS))
    if folder is not None:
        if not os.path.isdir(folder):
            raise InputError(f"--config-dir {folder} is no folder")
        search_path.prepend(
            provider="command-line",
            path=f"file://{os.path.abspath(folder)}",
            anchor=SearchPathQuery(provider="schema"),
        )
    return Hydra(task_name=name, config_loader=_CheckedLoader(search_path, command))


class _CheckedLoader(ConfigLoaderImpl):
    """Refuses what a configuration may not hold as soon as it is composed."""

    def __init__(self, search_path: ConfigSearchPath, command: Command[Any]) -> None:
        super().__init__(search_path)
        self.command = command

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        own = super().load_configuration
        try:
            composed = own(config_name, overrides, *args, **kwargs)
        except ConfigCompositionException as error:
            wrong = re.match(r"Could not override '([^']+)'", str(error))
            if wrong is None:
                raise
            others = [o for o in overrides if o.partition("=")[0] != wrong[1]]
            composed = own(config_name, others, *args, **kwargs)
            raise _no_such_key(wrong[1], composed) from error
        check_hydra(composed.hydra)
        return composed

    def load_sweep_config(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Of one member: its sweeper asks for all of them before it launches the first."""
        composed = super().load_sweep_config(*args, **kwargs)
        self.command.check(read_settings(self.command.settings, composed), composed.hydra)
        return composed


def _no_such_key(key: str, composed: DictConfig) -> InputError:
    """With the keys that stand beside its place."""
    beside, _, name = key.rpartition(".")
    node = OmegaConf.select(composed, beside) if beside else composed
    if beside and node is None:
        return _no_such_key(beside, composed)
    known = [str(other) for other in node if other != "hydra"] if OmegaConf.is_dict(node) else []
    return InputError(f"there is no key {key!r}", did_you_mean(name, known))


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

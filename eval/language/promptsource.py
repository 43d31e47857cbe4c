"""Prompts of promptsource (arXiv 2202.01279), read at run time from its template files.

The package's code is never run, nor is anything in the files: they are YAML with two tags of its
own, read as plain mappings, and Jinja templates, rendered in Jinja's sandbox.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eval.cache import digest
from merging.errors import InputError

PARTS = "|||"  # between a prompt and its answer, and between the answers to choose from


class Template(NamedTuple):
    """One named template: Jinja of "prompt ||| answer", and of the answers to choose from."""

    name: str
    jinja: str
    choices: str

    @property
    def sha256(self) -> str:
        """16 hex digits of the wording."""
        return digest({"jinja": self.jinja, "choices": self.choices})

    def ask(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """(prompt, answers to choose from) for one row of the template's data set."""
        try:
            choices = [part.strip() for part in _rendered(self.choices, row).split(PARTS)]
            text = _rendered(self.jinja, dict(row) | {"answer_choices": choices})
        except TemplateError as error:
            raise InputError(
                f"promptsource's template {self.name!r} does not fit its data: {error}",
                hint="take the templates and the data set of the same time",
            ) from error
        return text.split(PARTS)[0].strip(), choices


def folder(given: str | None) -> Path | None:
    """Where template files are: the folder that was given, or an installed promptsource's.

    Raises InputError for a given folder that does not exist. The package is not imported.
    """
    if given is not None:
        if not (path := Path(given).expanduser()).is_dir():
            raise InputError(
                f"suite.templates is {given}, which is no folder",
                hint="give promptsource's folder `templates`, or null",
            )
        return path
    found = importlib.util.find_spec("promptsource")
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) / "templates" if places else None


@functools.cache
def load(templates: Path, place: str, name: str) -> Template:
    """The template `name` of `<templates>/<place>/templates.yaml`.

    Raises InputError for a file or a name that is not there, and for a template that cannot ask.
    """
    path = templates / place / "templates.yaml"
    try:
        entries = yaml.load(path.read_text(), _Loader)["templates"].values()
        named = {entry["name"]: entry for entry in entries}
    except (OSError, yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"promptsource's {path} cannot be read: {error}") from error
    # a name was longer in older releases: "In the previous sentence, does the pronoun refer to"
    matching = [own for own in named if own == name] or [own for own in named if own.endswith(name)]
    if len(matching) != 1:
        raise InputError(f"{path} has no template {name!r}", f"known: {', '.join(sorted(named))}")
    entry = named[matching[0]]
    choices = entry.get("answer_choices")
    if not isinstance(entry.get("jinja"), str) or not choices:
        raise InputError(f"template {matching[0]!r} of {path} has no answers to choose from")
    joined = choices if isinstance(choices, str) else PARTS.join(choices)
    return Template(matching[0], entry["jinja"], joined)


class _Loader(yaml.SafeLoader):
    """Plain YAML; promptsource's tags are mappings."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))

_ENVIRONMENT = ImmutableSandboxedEnvironment()


def _rendered(template: str, values: Mapping[str, Any]) -> str:
    return _compiled(template).render(**values)


@functools.cache
def _compiled(template: str) -> Any:
    return _ENVIRONMENT.from_string(template)

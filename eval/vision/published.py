"""Where CLIP checkpoints are published: files on this machine or the hub, named by a family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.backend import Finetuning
from eval.cache import checkpoints_root
from eval.data import hub
from eval.requirements import Requirement, of_file, of_folder
from merging.errors import InputError


def published_names(name: str) -> dict[str, str]:
    """What a model is called by those who publish it: in open_clip, OpenAI's and timm's hub ids."""
    found = {"model": name, "hub_model": "", "timm_model": ""}
    if match := re.fullmatch(r"ViT-([BL])-(\d+)", name):
        size, patch = {"B": "base", "L": "large"}[match[1]], match[2]
        found["hub_model"] = f"clip-vit-{size}-patch{patch}"
        found["timm_model"] = f"vit_{size}_patch{patch}_clip_224.openai"
    return found


@dataclass(frozen=True)
class Published:
    """Where a checkpoint is published, and where it is looked for first.

    local: file or folder, or several of which the first that is there counts; relative to
        $MODEL_MERGING_CHECKPOINTS, or to `checkpoints`. `*` and `**` stand for any folders.
    hub: Hugging Face id, with `revision` and the `file` in it (None: the whole folder).
    origin: for people: where it is downloaded from if that is not the hub.
    """

    local: str | Sequence[str]
    hub: str | None = None
    revision: str | None = None
    file: str | None = None
    origin: str | None = None

    def path(self) -> Path:
        """The local copy, else the hub's. InputError saying what to download where."""
        if (found := self.here()) is not None:
            return found
        wanted = " or ".join(str(checkpoints_root() / pattern) for pattern in self._patterns)
        if not self.hub:
            raise InputError(
                f"checkpoint {wanted} is not there",
                hint=f"download {self.origin}, or set MODEL_MERGING_CHECKPOINTS to the folder "
                f"that holds {self._patterns[0].partition('/')[0]}",
            )
        try:
            if self.file:
                return hub.file(self.hub, self.file, self.revision)
            return hub.folder(self.hub, self.revision)
        except InputError as error:
            elsewhere = f"a copy that is here already belongs at {wanted}"
            raise type(error)(error.message, f"{error.hint}; {elsewhere}".lstrip("; ")) from error

    def here(self) -> Path | None:
        """The local copy, where there is one."""
        for pattern in self._patterns:
            if "*" not in pattern:
                found = [checkpoints_root() / pattern]
            else:
                found = sorted(checkpoints_root().glob(pattern))
            if found and found[0].exists():
                return found[0]
        return None

    @property
    def _patterns(self) -> list[str]:
        return [self.local] if isinstance(self.local, str) else list(self.local)

    def requirement(self, what: str) -> Requirement:
        """Whether it is here, or can be had; reads a header at most."""
        if (found := self.here()) is not None:
            return Requirement(what, str(found))
        if self.hub and self.file:
            return of_file(what, self.hub, self.file, self.revision)
        if self.hub:
            return of_folder(what, self.hub, self.revision)
        try:
            return Requirement(what, str(self.path()))
        except InputError as error:
            return Requirement(what, self._patterns[0], problem=error.message, hint=error.hint)

    def name(self) -> str:
        """Its address in a word, for records."""
        return f"{self.hub}/{self.file or ''}@{self.revision}" if self.hub else self._patterns[0]

    def stamp(self) -> dict[str, Any]:
        """What names the checkpoint in cache keys; a local file also by its size and time."""
        found = self.here()
        files = [found] if found is not None else []
        if found is not None and found.is_dir():
            files = sorted(p for p in found.rglob("*") if p.is_file())
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return {k: v for k, v in asdict(self).items() if k != "origin"} | {"files": stats}


@dataclass(frozen=True)
class Family:
    """Where the checkpoints of one model are published by those who fine-tuned it.

    In the fields of each `Published`, {model}, {hub_model}, {timm_model} and {task} are filled in,
    {task} by `task_names`. clip: the whole pre-trained model. base_tower: the family's own base,
    where it is published apart. experts, adapters, heads: None where there are none.
    """

    name: str
    model: str
    clip: Mapping[str, Any] | None
    base_tower: Mapping[str, Any] | None
    experts: Mapping[str, Any] | None
    adapters: Mapping[str, Any] | None
    heads: Mapping[str, Any] | None
    task_names: Mapping[str, str]

    def place(self, fields: Mapping[str, Any], task: str = "") -> Published:
        """A published checkpoint with the placeholders of its fields filled in."""
        names = published_names(self.model)
        names["task"] = self.task_names.get(task, task)

        def fill(value: str | Sequence[str] | None) -> str | list[str] | None:
            if isinstance(value, str) or value is None:
                return value.format(**names) if value else value
            return [item.format(**names) for item in value]

        return Published(**{key: fill(value) for key, value in fields.items()})

    @property
    def base(self) -> Published:
        return self.place(self.base_tower or self.clip)

    def expert(self, task: str, finetuning: Finetuning) -> Published | None:
        """Where the expert of a task is published; None where it is trained here."""
        fields = self.experts if finetuning == "full" else self.adapters
        if fields is None and self.experts is not None:
            raise InputError(
                f"the {self.name} family publishes no LoRA experts",
                hint="fine-tune them here: suite/checkpoints=finetuned",
            )
        return self.place(fields, task) if fields is not None else None

    def head(self, task: str) -> Published | None:
        return self.place(self.heads, task) if self.heads is not None else None

    def requirements(self, task: str, finetuning: Finetuning) -> list[Requirement]:
        """Of a task's expert and head, where they are published."""
        named = {"expert": self.expert(task, finetuning), "head": self.head(task)}
        return [p.requirement(f"{what} {task}") for what, p in named.items() if p is not None]

    def fetch(self, published: Published) -> Path:
        """A published checkpoint on this machine, its commit noted."""
        path = published.path()
        if published.hub and (commit := hub.commit(path)):
            self.commits[published.hub] = commit
        return path

    @cached_property
    def commits(self) -> dict[str, str]:
        """{repository: commit} of the checkpoints that came from the hub."""
        return {}

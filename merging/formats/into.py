"""An expert of one part of the base, as a language model is of a vision-language model.

The same module has another name in either, in memory and on disk. transformers' own tables say
which parameter a name on disk becomes; what follows the part's own name is then the same in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import nn

from merging.errors import InputError
from merging.experts import Expert, Source
from merging.layers.architecture import skeleton
from merging.layers.stored import loaded_as

LANGUAGE_MODEL = "language_model"
_PREFIXES = ("model.", "transformer.", "")  # of a model without its configuration


class Part:
    """A part of a base: what its tensors are called on disk, by their names within the part.

    name: of the module in memory. tensors: {name within the part, or the output head's: name in
    the base}. Both are as the base's file has them where loading would stack or split a tensor.
    """

    def __init__(self, base: Source, model: nn.Module, part: str) -> None:
        self.name = _module(model, part, base.path)
        head = _head(model)
        known = loaded_as(model, base.keys())
        self.tensors = _within(base.keys(), known, f"{self.name}.")
        for name in (n for n, memory in known.items() if memory == head):
            self.tensors["lm_head.weight"] = name
        if not self.tensors:
            raise InputError(f"{base.path} holds nothing of its part {self.name}")

    def names(self, expert: Expert) -> dict[str, str]:
        """{an expert's name: the base's} for as many as have one."""
        theirs, model = list(expert.names()), _model(Path(expert.path))
        known = loaded_as(model, theirs) if model is not None else {name: name for name in theirs}
        prefixes = ((f"{model.base_model_prefix}.",) if model is not None else ()) + _PREFIXES
        best: dict[str, str] = {}
        for prefix in prefixes:
            inner = _within(theirs, known, prefix)
            placed = {inner[name]: ours for name, ours in self.tensors.items() if name in inner}
            best = max(best, placed, key=len)
        head = self.tensors.get("lm_head.weight")
        outputs = {_head(model), "lm_head.weight"} if model is not None else {"lm_head.weight"}
        return best | {n: head for n in theirs if head and known.get(n) in outputs}

    def note(self, names: Collection[str], base: Source) -> str:
        """What becomes of an expert whose tensors these names of the base are."""
        others = f"none of the {len(base.keys()) - len(names)} others"
        return f"is merged into {self.name}: {len(names)} tensors, and into {others}"


def parts_of(
    base: Source, into: Mapping[str, str], experts: Collection[str], model: nn.Module | Path | None
) -> dict[str, Part]:
    """{expert: the part of the base that it is merged into}.

    model: the base's, or the folder of its config.json; None: the one beside its weights.
    Raises InputError for an unknown expert or part, and a base that nothing describes.
    """
    if not into:
        return {}
    if unknown := sorted(set(into) - set(experts)):
        raise InputError(
            f"into names {unknown[0]!r}, which is no expert", f"experts: {', '.join(experts)}"
        )
    if not isinstance(model, nn.Module):
        model = _model(Path(base.path) if model is None else model)
    if model is None:
        raise InputError(
            f"{base.path} has no configuration that says what its parts are",
            hint="into= needs the base's config.json beside its weights",
        )
    return {task: Part(base, model, part) for task, part in into.items()}


def _model(path: Path) -> nn.Module | None:
    """The model that lies at a path, if its configuration says what it is."""
    folder = path if path.is_dir() else path.parent
    described = path.exists() and (folder / "config.json").is_file()
    return skeleton(folder) if described else None


def _module(model: nn.Module, part: str, path: str) -> str:
    """The name of a module in memory; "language_model" is the decoder, whatever its name."""
    named = dict(model.named_modules())
    modules = [name for name in named if name == part or name.endswith(f".{part}")]
    if part == LANGUAGE_MODEL and not modules:
        decoder = getattr(model, "get_decoder", lambda: None)()
        modules = [name for name, module in named.items() if name and module is decoder]
    if not modules or not part:
        top = [n for n, m in named.items() if n.count(".") < 2 and any(True for _ in m.children())]
        raise InputError(
            f"the model of {path} has no part {part!r}",
            hint=f"its parts are: {', '.join(n for n in top if n)}",
        )
    shortest: str = min(modules, key=len)
    return shortest


def _head(model: nn.Module) -> str | None:
    """The name of the output head's weight in memory."""
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    named = model.named_modules(remove_duplicate=False)
    heads = (name for name, module in named if outputs is not None and module is outputs)
    return next((f"{name}.weight" for name in heads), None)


def _within(names: Iterable[str], known: Mapping[str, str], prefix: str) -> dict[str, str]:
    """{what follows a prefix in memory: name on disk}.

    Names that loading stacks or splits are no parameter's: what stands before the others' on disk
    is taken from them.
    """
    names = list(names)
    inner = {
        known[name].removeprefix(prefix): name
        for name in names
        if known.get(name, "").startswith(prefix)
    }
    before = {n.removesuffix(rest) for rest, n in inner.items() if n.endswith(rest)}
    for name in names:
        for start in before if len(before) == 1 and name not in known else ():
            if name.startswith(start):
                inner.setdefault(name.removeprefix(start), name)
    return inner

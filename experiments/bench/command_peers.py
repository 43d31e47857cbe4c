"""`python -m experiments.bench.peers mergekit=ENV/bin/mergekit-yaml`: whole commands side by side.

mergekit lives in an environment of its own (`python -m venv ENV; ENV/bin/pip install mergekit`).
Both programs read one recipe and merge the same files, a Llama-shaped model in bfloat16 with three
experts in shards. They are timed from the keystroke to the end of the process; the two outputs are
compared tensor by tensor, and in one block each with the plain formula in float64. Writes
peers.csv and peers.md.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from experiments.bench.files import tensors
from experiments.bench.formulas import DENSITY, FACTOR, PLAIN, THEIRS, Choices, distance, merged
from experiments.hydra_run import Command
from experiments.report.markup import comma_separated, markdown
from experiments.report.records import machine, versions
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.formats.disk import write_synced
from merging.progress import track

EXPERTS = ("code", "law", "math")
RECIPES: dict[str, dict[str, Any]] = {  # method, its parameters, an expert's parameters
    "linear": {"parameters": {"normalize": True}, "each": {"weight": 1.0}},
    "task_arithmetic": {"parameters": {"normalize": False}, "each": {"weight": FACTOR}},
    "ties": {"parameters": {"normalize": True}, "each": {"weight": 1.0, "density": DENSITY}},
    "dare_linear": {"parameters": {"normalize": False}, "each": {"weight": 0.3, "density": 0.5}},
}
RANDOM = {"dare_linear"}  # each program draws masks of its own


@dataclass
class Peers:
    """The keys of configs/bench_peers.yaml."""

    mergekit: str = "mergekit-yaml"
    output: str = "results/bench"
    folder: str | None = None
    methods: list[str] = field(default_factory=lambda: list(RECIPES))
    repeats: int = 3
    hidden: int = 2048
    intermediate: int = 5632
    blocks: int = 10
    vocabulary: int = 32000


@dataclass(frozen=True)
class Run:
    """One command: medians over the repeats."""

    method: str
    program: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    largest_difference: float | None  # to the other program's output, of a tensor's norm
    to_formula: float | None  # in the first attention: to the formula, rounded once
    to_steps: float | None  # to the formula with mergekit's choices


def bench_peers(settings: Peers) -> None:
    """Time whole merge commands of mergekit and of this repository on the same files."""
    if shutil.which(settings.mergekit) is None:
        raise InputError(
            f"{settings.mergekit} is not there",
            hint="python -m venv ENV; ENV/bin/pip install mergekit; mergekit=ENV/bin/mergekit-yaml",
        )
    if unknown := [name for name in settings.methods if name not in RECIPES]:
        raise InputError(f"unknown method {unknown[0]!r}", hint=f"known: {', '.join(RECIPES)}")
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        paths = models(Path(folder), settings)
        runs = []
        for name in track(settings.methods, "both programs"):
            runs += compare(Path(folder), name, paths, settings)
        shares = dict(choices_of_ties(paths))
    output = Path(settings.output)
    write_synced(output / "peers.csv", comma_separated([asdict(run) for run in runs]))
    write_synced(output / "peers.md", page(runs, settings, shares))
    print(f"written to {output / 'peers.md'}")


def models(folder: Path, settings: Peers) -> dict[str, Path]:
    """Folders of the base and the experts: config.json and two safetensors shards with an index."""
    d, wide = settings.hidden, settings.intermediate
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (settings.vocabulary, d)}
    for i in range(settings.blocks):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        shapes |= {f"{block}.mlp.{x}_proj.weight": (wide, d) for x in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (d, wide)}
        shapes |= {f"{block}.{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (settings.vocabulary, d)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": d, "intermediate_size": wide, "num_hidden_layers": settings.blocks,
        "num_attention_heads": d // 64, "num_key_value_heads": d // 64,
        "vocab_size": settings.vocabulary, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    names, paths = list(shapes), {}
    half = len(names) // 2
    for number, task in enumerate(("base", *EXPERTS)):
        paths[task] = folder / task
        paths[task].mkdir()
        (paths[task] / "config.json").write_text(json.dumps(config))
        state, index = tensors(shapes, number, torch.bfloat16), {}
        for shard, part in enumerate((names[:half], names[half:]), 1):
            file = f"model-{shard:05d}-of-00002.safetensors"
            save_file({n: state[n] for n in part}, paths[task] / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        content = {"metadata": {}, "weight_map": index}
        (paths[task] / "model.safetensors.index.json").write_text(json.dumps(content))
    return paths


def recipe(name: str, paths: Mapping[str, Path]) -> dict[str, Any]:
    """What both programs read."""
    chosen = RECIPES[name]
    made = {
        "merge_method": name,
        "models": [{"model": str(paths[t]), "parameters": chosen["each"]} for t in EXPERTS],
        "parameters": chosen["parameters"],
        "dtype": "bfloat16",
    }
    return made if name == "linear" else made | {"base_model": str(paths["base"])}


def compare(folder: Path, name: str, paths: Mapping[str, Path], settings: Peers) -> list[Run]:
    """Both programs in turn, as often as asked, on one recipe."""
    file = folder / f"{name}.yaml"
    write_synced(file, yaml.safe_dump(recipe(name, paths)))
    outputs = {program: folder / program for program in ("mergekit", "ours")}
    lines = {
        "mergekit": [settings.mergekit, str(file), str(outputs["mergekit"]), "--lazy-unpickle",
                     "--no-copy-tokenizer"],
        "ours": [sys.executable, "-m", "experiments.merge", f"recipe={file}",
                 f"output={outputs['ours']}", "overwrite=true", "device=cpu"],
    }  # fmt: skip
    if name == "linear":  # mergekit's linear has no base; ours needs one for what no expert holds
        lines["ours"].append(f"base={paths['base']}")
    costs: dict[str, list[tuple[float, float, int]]] = {program: [] for program in lines}
    for _ in range(settings.repeats):
        for program, line in lines.items():
            costs[program].append(timed(line))
    far = None if name in RANDOM else largest_difference(*outputs.values(), paths["base"])
    found = []
    for program, spent in costs.items():
        seconds, cpu, peak = (statistics.median(column) for column in zip(*spent, strict=True))
        apart = (None, None) if name in RANDOM else formulas(name, outputs[program], paths)
        found.append(Run(name, program, seconds, cpu, int(peak), far, *apart))
    for output in outputs.values():
        shutil.rmtree(output)
    return found


# In a process of a few megabytes: Linux counts into a command's peak what started it held then.
_WATCH = """
import os, subprocess, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:], stdout=sys.stderr).pid, 0)
seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(os.waitstatus_to_exitcode(status), seconds, cpu, usage.ru_maxrss * 1024)
"""


def timed(line: Sequence[str]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak bytes of a command; InputError if it fails."""
    watched = [sys.executable, "-S", "-c", _WATCH, *line]
    done = subprocess.run(watched, capture_output=True, text=True, check=True)
    code, seconds, cpu, peak = done.stdout.split()
    if int(code):
        raise InputError(f"{' '.join(line[:3])} ended with {code}: {done.stderr[-500:]}")
    return float(seconds), float(cpu), int(peak)


def largest_difference(one: Path, other: Path, base: Path) -> float:
    """Of two merged folders: the largest |A - B| / |A - W_0| over the tensors, from float32."""
    a, b, w = (open_checkpoint(path) for path in (one, other, base))
    if missing := set(w.keys()) ^ set(a.keys()) | set(w.keys()) ^ set(b.keys()):
        raise InputError(f"the outputs differ in their tensors, for example {min(missing)!r}")
    largest = 0.0
    for name in w.keys():
        x, y, z = (source.read(name).float() for source in (a, b, w))
        moved = (x - z).norm().clamp_min(1e-12)
        largest = max(largest, ((x - y).norm() / moved).item())
    return largest


def first_attention(paths: Mapping[str, Path]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, the base's values, those of all experts (T, ...)) of the first block's attention."""
    base, *experts = (open_checkpoint(paths[task]) for task in ("base", *EXPERTS))
    for name in base.keys():
        if ".layers.0.self_attn." in name:
            yield name, base.read(name), torch.stack([expert.read(name) for expert in experts])


def formulas(name: str, output: Path, paths: Mapping[str, Path]) -> tuple[float, float]:
    """The largest distances of an output to the formula, and to it with mergekit's choices."""
    source, found = open_checkpoint(output), []
    for tensor, W0, experts in first_attention(paths):
        exact, theirs = (merged(name, W0, experts, choices) for choices in (PLAIN, THEIRS))
        own = source.read(tensor)
        found.append((distance(own, exact, W0), distance(own, theirs, W0)))
    formula, steps = (max(column) for column in zip(*found, strict=True))
    return formula, steps


def choices_of_ties(paths: Mapping[str, Path]) -> Iterator[tuple[str, float]]:
    """How far each of mergekit's choices alone takes TIES from the formula."""
    for choice in Choices._fields:
        alone, found = Choices(**{choice: True}), []
        for _, W0, experts in first_attention(paths):
            exact, other = (merged("ties", W0, experts, c) for c in (PLAIN, alone))
            found.append(distance(other, exact, W0))
        yield choice, max(found)


_PACKAGES = ("mergekit", "torch", "transformers")
_VERSIONS = f"""
from importlib import metadata
for name in {_PACKAGES}:
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
"""


def their_versions(program: str) -> str:
    """What stands in the environment of a Python program, "mergekit 0.1.5, torch 2.13.0"."""
    first = Path(shutil.which(program) or program).read_bytes().partition(b"\n")[0].decode()
    asked = subprocess.run([first.removeprefix("#!").strip(), "-c", _VERSIONS],
                           capture_output=True, text=True, check=True)  # fmt: skip
    return ", ".join(asked.stdout.splitlines())


def page(runs: Sequence[Run], settings: Peers, shares: Mapping[str, float]) -> str:
    """Both programs side by side."""
    here, own = machine("cpu"), versions()
    by = {(run.method, run.program): run for run in runs}
    rows, exact = [], []
    for method in dict.fromkeys(run.method for run in runs):
        theirs, ours = by[method, "mergekit"], by[method, "ours"]
        far = "masks of their own" if ours.largest_difference is None else (
            f"{ours.largest_difference:.1e}"
        )  # fmt: skip
        cells = [f"{r.seconds:.1f} | {r.cpu_seconds:.1f} | {r.peak_bytes / 1e9:.2f}" for r in
                 (theirs, ours)]  # fmt: skip
        ratios = [theirs.seconds / ours.seconds, theirs.peak_bytes / ours.peak_bytes]
        rows.append([method, *cells, *(f"{x:.2f}" for x in ratios), far])
        if ours.to_formula is not None:
            apart = (theirs.to_formula, ours.to_formula, theirs.to_steps)
            exact.append([method, *(f"{x:.1e}" for x in apart)])
    size = f"{settings.blocks} blocks of width {settings.hidden}"
    table = markdown(
        ["method", "mergekit s", "CPU s", "GB", "ours s", "CPU s", "GB", "times faster",
         "times smaller", "largest difference"], rows,
    )  # fmt: skip
    return (
        f"# Whole commands beside mergekit\n\n{here['cpu']}, {here['cores']} cores, "
        f"{here['ram_gb']} GB. A Llama-shaped model ({size}) in bfloat16, three experts, two "
        f"shards each; medians of {settings.repeats}, from the keystroke to the end of the "
        f"process.\n\nTheirs: {their_versions(settings.mergekit)}. Ours: "
        f"{', '.join(f'{name} {own[name]}' for name in ('torch', 'transformers'))}.\n\n{table}\n"
        "The largest difference is of a tensor's own movement, after both programs have rounded to "
        "bfloat16. Memory is what is resident at most, pages of mapped files included.\n"
        + _explained(exact, shares)
    )


def _explained(exact: list[list[str]], shares: Mapping[str, float]) -> str:
    """Which program deviates from the formula, and by which of its choices."""
    table = markdown(
        ["method", "mergekit to the formula", "ours to the formula",
         "mergekit to the formula with its choices"], exact,
    )  # fmt: skip
    return (
        "\n## Whose the difference is\n\nIn the first block's attention, of a tensor's movement, "
        f"beside the plain formula in float64, rounded once to bfloat16:\n\n{table}\n"
        "mergekit's choices: differences, their factors and their sums are in bfloat16 (linear "
        "excepted); of magnitudes that are equal at TIES' threshold exactly the share is kept, "
        "where ours keeps all of them, as the authors' code does; kept values that cancel exactly "
        "elect plus, where ours elects no sign (`method.cancelled=majority` elects the commonest, "
        "as the authors' code does). Alone, they take TIES from the formula by "
        f"{shares['rounded']:.1e}, {shares['exactly']:.1e} and {shares['plus']:.1e}.\n"
    )


COMMAND = Command("bench_peers", Peers, task=bench_peers)

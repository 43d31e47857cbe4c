"""Same inputs, same bytes: in any process, whatever its hash seed, task order or threads."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import merging
from merging import Layer
from merging.method.registry import OUTPUTS

ROOT = Path(__file__).parents[1]
LAYERS = {"blocks.0.in_proj_weight": Layer(3), "blocks.0.up.weight": Layer(), "down": Layer()}
SHAPES = {
    "embed.weight": (50, 48),
    "blocks.0.in_proj_weight": (144, 48),
    "blocks.0.up.weight": (192, 64),
    "down": (64, 192),  # 36,864 entries of three tasks: torch shares such a sum between threads
    "norm.bias": (48,),
}
# Threads share the sums inside a matrix product, and round them in another order. An entry-by-entry
# method has none.
THREAD_TOLERANCE = 1e-5  # of the merged difference's norm
FEWER = {"wudi": {"steps": 10}}  # all of them take seconds


def draw(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(s, generator=generator) for name, s in SHAPES.items()}


def statistics(needs, seed):
    """Of one task: second moments of the layers, or a Fisher diagonal of everything."""
    if needs == "fisher":
        return {name: x.square() for name, x in draw(seed, 1.0).items()}
    widths = {name: SHAPES[name][1] for name in LAYERS}
    inputs = {
        name: torch.randn(300, d, generator=torch.Generator().manual_seed(seed))
        for name, d in widths.items()
    }
    moments = {name: z.mT @ z / len(z) for name, z in inputs.items()}
    if needs == "kfac":
        outputs = {name: draw(seed, 1.0)[name] for name in LAYERS}
        moments |= {name + OUTPUTS: g @ g.mT / g.shape[1] for name, g in outputs.items()}
    return moments


def merge_all(output, order):
    """Merge one small model by every method, its tasks given in some order; save all results."""
    base, merged = draw(0, 0.1), {}
    moved = {task: draw(seed, 0.01) for seed, task in enumerate("abc", 1)}
    for name in merging.methods():
        method = merging.create(name, **FEWER.get(name, {}))
        tasks = [task for task in order if name != "slerp" or task != "c"]
        experts = {t: {k: base[k] + moved[t][k] for k in base} for t in tasks}
        measured = {t: statistics(method.needs, ord(t)) for t in tasks} if method.needs else None
        state = merging.merge_state_dicts(base, experts, method, layers=LAYERS, statistics=measured)
        merged |= {f"{name}/{k}": tensor - base[k] for k, tensor in state.items()}
    save_file(merged, output)


def results(folder, order, hash_seed, threads):
    """What `merge_all` gives in a process of its own: {method/tensor: merged difference}."""
    own = {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    output = folder / f"{order}.safetensors"
    line = [sys.executable, "-m", "tests.test_determinism", str(output), order]
    subprocess.run(line, cwd=ROOT, env=os.environ | own, check=True)
    return load_file(output)


def test_every_method_in_other_processes_orders_and_threads(tmp_path):
    first = results(tmp_path, "abc", "0", "1")
    other = results(tmp_path, "cab", "1", "1")
    assert {name.split("/")[0] for name in first} == set(merging.methods())
    assert [name for name in first if not torch.equal(first[name], other[name])] == []
    threaded = results(tmp_path, "bca", "2", "2")
    for name, tensor in first.items():
        if merging.create(name.split("/")[0]).elementwise:
            assert torch.equal(threaded[name], tensor), name
        assert (threaded[name] - tensor).norm() <= THREAD_TOLERANCE * tensor.norm(), name


SMALL = """
import sys
import torch
import merging
generator = torch.Generator().manual_seed(0)
base, one, two = torch.randn(3, 40, 60, generator=generator)
experts = {"a": {"a.weight": base + one / 20}, "b": {"a.weight": base + two / 20}}
for name in ("actmat", "tsv_m", "ties"):
    merged = merging.merge_state_dicts(
        {"a.weight": base}, experts, merging.create(name), layers=["a.weight"]
    )
    sys.stdout.buffer.write(merged["a.weight"].numpy().tobytes())
"""


def test_torch_may_be_imported_first():
    other = SMALL.replace("import torch\nimport merging\n", "import merging\nimport torch\n")
    assert other != SMALL
    line = [sys.executable, "-c"]
    runs = [subprocess.run([*line, code], cwd=ROOT, capture_output=True) for code in (SMALL, other)]
    for run in runs:
        assert run.returncode == 0, run.stderr.decode()
    assert len(runs[0].stdout) == 3 * 40 * 60 * 4
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stderr == runs[1].stderr == b""


if __name__ == "__main__":
    merge_all(*sys.argv[1:])

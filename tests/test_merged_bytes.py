"""What every method makes of one small model, to the last bit.

    python -m tests.test_merged_bytes       # adds the rows of methods that have none
    python -m tests.test_merged_bytes NAME  # writes that method's anew: say why in the commit

Bits depend on the BLAS of a machine. Where its fingerprint is another one, the merged differences'
norm and their product with a fixed vector are compared instead.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import merging
from merging import Layer
from merging.method.registry import OUTPUTS
from tests.test_determinism import FEWER, LAYERS, statistics

TABLE = Path(__file__).with_name("merged_bytes.json")
SHAPES = {
    "embed.weight": (50, 48),
    "blocks.0.in_proj_weight": (144, 48),
    "blocks.0.up.weight": (192, 64),
    "blocks.1.up.weight": (320, 272),  # wider than what is computed in float64 throughout
    "down": (64, 192),
    "norm.bias": (48,),
}
ALL_LAYERS = LAYERS | {"blocks.1.up.weight": Layer()}
CLOSE = 2e-4  # of the norm, where the BLAS is another one


def draw(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(s, generator=generator) for name, s in SHAPES.items()}


def low_rank(seed):
    """Differences of rank 4 in the layers and none elsewhere, as adapters make them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.003
        * torch.randn(SHAPES[name][0], 4, generator=generator)
        @ torch.randn(4, SHAPES[name][1], generator=generator)
        for name in ALL_LAYERS
    }


def measured(needs, seed):
    found = statistics(needs, seed)
    generator = torch.Generator().manual_seed(seed)
    if needs == "fisher":
        return {n: torch.rand(s, generator=generator) for n, s in SHAPES.items()}
    inputs = torch.randn(600, 272, generator=generator)
    found |= {"blocks.1.up.weight": inputs.mT @ inputs / 600}
    if needs == "kfac":
        outputs = torch.randn(600, 320, generator=generator)
        found |= {"blocks.1.up.weight" + OUTPUTS: outputs.mT @ outputs / 600}
    return found


def merged(name, kind):
    """{tensor: merged difference} of three experts by one method, in float32 or bfloat16."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    base = {k: v.to(dtype) for k, v in draw(0, 0.1).items()}
    method = merging.create(name, **FEWER.get(name, {}))
    tasks = "ab" if name == "slerp" else "abc"
    moved = {t: low_rank(ord(t)) if kind == "low_rank" else draw(ord(t), 0.01) for t in tasks}
    experts = {t: {k: v + moved[t].get(k, 0) for k, v in base.items()} for t in tasks}
    experts = {t: {k: v.to(dtype) for k, v in state.items()} for t, state in experts.items()}
    needed = {t: measured(method.needs, ord(t)) for t in tasks} if method.needs else None
    return merging.merge_state_dicts(base, experts, method, layers=ALL_LAYERS, statistics=needed)


def summary(state):
    content, numbers = hashlib.sha256(), []
    for _, tensor in sorted(state.items()):
        content.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        values = tensor.double().flatten()
        probe = torch.randn(len(values), generator=torch.Generator().manual_seed(7)).double()
        numbers += [values.norm().item(), (values @ probe).item() / probe.norm().item()]
    return {"sha256": content.hexdigest()[:32], "numbers": [float(f"{x:.9g}") for x in numbers]}


def fingerprint():
    """Of the linear algebra here: the bits of a product, an eigendecomposition and a QR."""
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    symmetric = merging.linalg.gram(matrix)
    results = [merging.linalg.product(matrix, matrix), symmetric, *merging.linalg.eigh(symmetric)]
    results += [*torch.linalg.qr(matrix), matrix.exp()]
    content = b"".join(x.contiguous().numpy().tobytes() for x in results)
    return hashlib.sha256(content).hexdigest()[:32]


KINDS = ("float32", "bfloat16", "low_rank")


def renewed(table, names):
    """The table with the rows of these methods, and of those that have none."""
    one_thread()
    assert table["fingerprint"] == fingerprint(), "made on a machine with another BLAS"
    known, rows = table["rows"], {}
    for row in (f"{name}/{kind}" for name in merging.methods() for kind in KINDS):
        keep = row in known and row.partition("/")[0] not in names
        rows[row] = known[row] if keep else summary(merged(*row.split("/")))
    return table | {"rows": rows}


def one_thread():
    torch.set_num_threads(1)  # the order of a sum shared by threads is another one


@pytest.fixture(scope="module")
def committed():
    threads = torch.get_num_threads()
    one_thread()
    found = json.loads(TABLE.read_text())
    yield found["rows"], found["fingerprint"] == fingerprint()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", merging.methods())
def test_merged_bytes_are_those_of_the_committed_table(name, kind, committed):
    rows, same_machine = committed
    if f"{name}/{kind}" not in rows:
        pytest.skip("younger than the table: python -m tests.test_merged_bytes adds it")
    now, then = summary(merged(name, kind)), rows[f"{name}/{kind}"]
    if same_machine:
        assert now["sha256"] == then["sha256"]
    for i in range(0, len(now["numbers"]), 2):
        assert abs(now["numbers"][i] - then["numbers"][i]) <= CLOSE * then["numbers"][i]
        assert abs(now["numbers"][i + 1] - then["numbers"][i + 1]) <= CLOSE * then["numbers"][i]


if __name__ == "__main__":
    table = renewed(json.loads(TABLE.read_text()), sys.argv[1:])
    TABLE.write_text(json.dumps(table, indent=0) + "\n")

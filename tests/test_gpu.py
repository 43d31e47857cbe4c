"""What only a GPU can show: `pytest -m gpu` on a machine with one; skipped elsewhere."""

import pytest
import torch

import merging
from merging import create, merge_state_dicts
from merging.engine import batches
from merging.engine.transfers import Streams
from merging.method.reference import RANDOM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda"
METHODS = [n for n in merging.methods() if not create(n).needs and n not in RANDOM]
FAR = 1e-3  # relative distance of the merged differences


def models(layers=12, shape=(96, 64), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {f"blocks.{i}.fc.weight": shape for i in range(layers)} | {"norm.weight": shape[:1]}
    base = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    experts = {
        t: {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        for t in ("a", "b", "c")
    }
    return (
        {k: v.to(dtype) for k, v in base.items()},
        {t: {k: v.to(dtype) for k, v in e.items()} for t, e in experts.items()},
    )


def distance(base, one, other):
    moved = torch.cat([(other[k].double() - v.double()).flatten() for k, v in base.items()])
    apart = torch.cat([(one[k].double() - other[k].double()).flatten() for k in base])
    return float(apart.norm() / moved.norm())


@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_merges_what_the_cpu_merges(name):
    base, experts = models(layers=3)
    if name == "slerp":
        experts.pop("c")  # of two alone
    here = merge_state_dicts(base, experts, create(name), device=GPU)
    assert all(tensor.device.type == "cpu" for tensor in here.values())
    assert distance(base, here, merge_state_dicts(base, experts, create(name))) < FAR


def test_overlapping_streams_change_no_byte():
    """Often and with large tensors: what one stream reuses too early another would see."""
    base, experts = models(layers=30, shape=(768, 512), dtype=torch.bfloat16)
    first = merge_state_dicts(base, experts, create("actmat"), device=GPU)
    for _ in range(3):
        again = merge_state_dicts(base, experts, create("actmat"), device=GPU)
        assert all(torch.equal(first[k], again[k]) for k in base)


def test_the_number_of_devices_changes_no_byte():
    """The same GPU twice, and all there are."""
    base, experts = models()
    one = merge_state_dicts(base, experts, create("aswudi"), device=GPU)
    every = [f"{GPU}:{i}" for i in range(torch.cuda.device_count())]
    for devices in ([GPU, GPU], every):
        other = merge_state_dicts(base, experts, create("aswudi"), device=devices)
        assert all(torch.equal(one[k], other[k]) for k in base)


@pytest.mark.parametrize("name", ["actmat", "aswudi", "sided", "rank_rule"])
def test_batches_give_what_layers_alone_give(name, monkeypatch):
    base, experts = models()
    together = merge_state_dicts(base, experts, create(name), device=GPU)
    monkeypatch.setattr(batches, "BATCH_BYTES", 0)
    alone = merge_state_dicts(base, experts, create(name), device=GPU)
    assert distance(base, together, alone) < FAR


def test_tensors_travel_from_and_to_pinned_memory_on_streams_of_their_own():
    moves = Streams(GPU)
    assert len({moves.copies, moves.results, moves.computing}) == 3
    loaded = moves.receive(moves.load(lambda send: send(torch.arange(1e6))))
    wait = moves.back(loaded + 1)
    host = wait()
    assert host.is_pinned() and torch.equal(host, torch.arange(1e6) + 1)

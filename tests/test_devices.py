"""Every method and route on a device that is not the CPU, as far as a CPU can tell."""

import pytest
import torch

import merging
from merging import create, merge_state_dicts
from merging.engine import batches, pipeline
from merging.formats.writer import write_adapter
from tests.fixtures.pretended import Pretended, pretended
from tests.test_transfers import Recorded, models

SLOW = {"ctm": {}, "optmerge": {}, "ct_merging": {}, "wudi": {"steps": 2}, "mats": {"steps": 2}}
T, ROWS, COLUMNS = 3, 12, 10


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


CONTEXT = {
    "covariances": drawn(T, COLUMNS, 40) @ drawn(T, COLUMNS, 40).mT,
    "gradients": drawn(T, ROWS, 40) @ drawn(T, ROWS, 40).mT,
    "fishers": drawn(T, ROWS, COLUMNS).square(),
    "base": drawn(ROWS, COLUMNS),
}


def test_what_mixes_devices_is_found():
    here, there = torch.ones(2, 2), Pretended(torch.ones(2, 2))
    for mixes in (lambda: here + there, lambda: here @ there, lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match=r"of the CPU|of cuda:0"):
            mixes()
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    assert there.device.type == (there @ there).device.type == there.new_zeros(1).device.type
    assert there.device.type == "cuda" and float((there * 2).sum()) == 8
    with pretended():
        assert torch.arange(3, device=there.device).device.type == "cuda"
        assert here.to(there).device.type == here.to("cuda").device.type == "cuda"
        assert there.to("cpu").device.type == there.cpu().device.type == "cpu"


@pytest.mark.parametrize("name", [n for n in merging.methods() if n not in SLOW or SLOW[n]])
def test_a_method_stays_on_its_device_and_agrees_with_the_cpu(name):
    method = create(name, **SLOW.get(name, {}))
    deltas = drawn(2 if name == "slerp" else T, ROWS, COLUMNS)
    context = {k: v for k, v in CONTEXT.items() if k in method.context}
    plain = method(deltas, **context)
    sent = {kind: Pretended(value.clone()) for kind, value in context.items()}
    with pretended():
        merged = method(Pretended(deltas.clone()), **sent)
        many = method.many(Pretended(torch.stack([deltas] * 2)), **sent)
    assert isinstance(merged, Pretended) and isinstance(many, Pretended)
    for found in (merged.held, *many.held):
        assert (found - plain).norm() <= 1e-4 * plain.norm()


class Sent(Recorded):
    """To and from a pretended GPU."""

    def send(self, tensor):
        return Pretended(super().send(tensor))

    def _fetch(self, tensor):
        return tensor.held if isinstance(tensor, Pretended) else tensor


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("rank_rule", 0),
        ("sided", 1 << 20),
        ("tsv_m", 0),
        ("ties", 0),
        ("regmean", 0),
    ],
)
def test_a_merge_stays_on_the_device_from_the_first_copy_to_the_last(monkeypatch, name, limit):
    """What a route sends is `Pretended`, what it merges too: else mixing would have been told."""
    base, experts = models(layers=3)
    statistics = {t: {k: x.mT @ x for k, x in e.items() if x.ndim == 2} for t, e in experts.items()}
    own = {"statistics": statistics if name == "regmean" else None}
    plain = merge_state_dicts(base, experts, create(name), **own)
    made = []
    monkeypatch.setattr(pipeline, "transfers", lambda device: made.append(Sent([])) or made[-1])
    monkeypatch.setattr(batches, "limit", lambda devices: limit)
    with pretended():
        merged = merge_state_dicts(base, experts, create(name), **own)
    assert all(torch.allclose(merged[k], plain[k], atol=1e-5) for k in base)
    assert bool(made[0].sent) == (name != "ties")  # which is merged where it is


@pytest.mark.parametrize("name", ["actmat", "ties"])
def test_adapters_stay_on_the_device(monkeypatch, tmp_path, name):
    base = {"fc.weight": drawn(6, 8)}
    opened = {}
    for task, seed in (("x", 2), ("y", 3)):
        write_adapter(tmp_path / task, {"fc.weight": (drawn(seed, 8), drawn(6, seed))}, {})
        opened[task] = merging.formats.checkpoints.open_checkpoint(tmp_path / task)
    plain = merge_state_dicts(base, opened, create(name), layers=["fc.weight"])
    monkeypatch.setattr(pipeline, "transfers", lambda device: Sent([]))
    with pretended():
        merged = merge_state_dicts(base, opened, create(name), layers=["fc.weight"])
    assert torch.allclose(merged["fc.weight"], plain["fc.weight"], atol=1e-5)

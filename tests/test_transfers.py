"""What a merge moves to a device and back, proved without one: order, overlap, batches, bytes."""

import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging import InputError, Layer, create, merge_state_dicts
from merging.engine import batches, pipeline
from merging.engine.transfers import Streams, full_float32, tensors
from merging.factors import Factors
from merging.formats.checkpoints import open_checkpoint
from merging.formats.writer import write_adapter
from merging.method.registry import _TABLE, register

BATCHED = [
    "actmat",
    "wudi_closed",
    "swudi",
    "aswudi",
    "bounded",
    "balanced",
    "sided",
    "rank_rule",
    "ridge",
]


class Stream:
    """Says what was asked of it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        event = Event(self.name, self.log)
        self.log.append(f"{event} recorded")
        return event

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


class Event:
    """Of a stream, numbered."""

    def __init__(self, stream, log):
        self.number = 1 + sum(line.startswith(stream) and "recorded" in line for line in log)
        self.name, self.log = f"{stream} {self.number}", log

    def synchronize(self):
        self.log.append(f"the process waits for {self}")

    def __str__(self):
        return self.name


class Recorded(Streams):
    """The streams of a device that is the CPU: real tensors, and a log instead of CUDA."""

    def __init__(self, log):
        self.log, self.names = log, iter(("copies", "results"))
        self.sent, self.lock, self.used = 0, threading.Lock(), []
        super().__init__("cpu")

    def _stream(self):
        return Stream(next(self.names), self.log)

    def _default(self):
        return Stream("computing", self.log)

    @contextmanager
    def _on(self, stream):
        yield

    def _pinned(self, tensor):
        self.sent += 1
        return tensor.clone()

    def _empty_pinned(self, tensor):
        return torch.empty_like(tensor)

    def _fetch(self, tensor):
        self._used_on(tensor, self.results)
        return self._empty_pinned(tensor).copy_(tensor)

    def _used_on(self, tensor, stream):
        self.used.append((tensor.data_ptr(), stream.name))

    def free(self):
        self.log.append("freed")


@pytest.fixture
def recorded(monkeypatch):
    log, made = [], []

    def transfers(device):
        made.append(Recorded(log))
        return made[-1]

    monkeypatch.setattr(pipeline, "transfers", transfers)
    return log, made


def state(seed, layers=5, shape=(6, 8)):
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"blocks.{i}.fc.weight": shape for i in range(layers)} | {"norm.weight": (8,)}
    return {k: torch.randn(s, generator=generator) for k, s in shapes.items()}


def models(**options):
    base = state(0, **options)
    moved = {f"e{t}": state(t, **options) for t in (1, 2, 3)}
    return base, {t: {k: v + 0.01 * m[k] for k, v in base.items()} for t, m in moved.items()}


def test_streams_are_ordered_by_events_and_nothing_else(recorded, monkeypatch):
    base, experts = models(layers=3)
    merged = merge_state_dicts(base, experts, create("actmat"))
    log, (moves,) = recorded
    monkeypatch.undo()
    plain = merge_state_dicts(base, experts, create("actmat"))
    assert all(torch.equal(plain[k], merged[k]) for k in base)
    for k in range(1, 5):  # three layers and a norm, which is merged where it was read
        steps = [
            f"copies {k} recorded",
            f"computing waits for copies {k}",
            f"computing {k} recorded",
            f"results waits for computing {k}",
            f"results {k} recorded",
            f"the process waits for results {k}",
        ]
        assert [line for line in log if line in steps] == steps
    assert len(log) == 4 * len(steps)
    assert {name for _, name in moves.used} == {"computing", "results"}
    assert moves.sent == 3 * 4  # base and experts of each layer, as they are stored


def test_a_load_overlaps_with_computing_and_a_result_with_the_next_layer(recorded, monkeypatch):
    """Computing layer k waits here until k + 1 is loading; fetching k until k + 1 is merging."""
    base, experts = models(layers=4)
    loading, merging_ = ([threading.Event() for _ in range(6)] for _ in range(2))
    begun, most, done = [], [], []

    load = Recorded.load

    def counted(self, read):
        begun.append(1)
        loading[min(len(begun), 5) - 1].set()
        most.append(len(begun) - len(done))
        return load(self, read)

    def method(deltas):
        if deltas.shape[1:] != (6, 8):
            return deltas.mean(0)  # of the small merge that checks values
        merging_[len(done)].set()
        assert loading[len(done) + 1].wait(30)
        done.append(1)
        return deltas.mean(0)

    back = Recorded.back

    def late(self, merged):
        wait, k = back(self, merged), len(done)

        def waited():
            if k < 4:
                assert merging_[k].wait(30)  # the next layer is being merged already
            return wait()

        return waited

    monkeypatch.setattr(Recorded, "load", counted)
    monkeypatch.setattr(Recorded, "back", late)
    with added("waits_for_the_next", method):
        merged = merge_state_dicts(base, experts, create("waits_for_the_next"))
    monkeypatch.undo()
    plain = merge_state_dicts(base, experts, create("average"))
    assert all(torch.equal(merged[k], plain[k]) for k in base)
    assert max(most) == 2  # two buffers, in turn


@contextmanager
def added(name, function, **entry):
    """A method of this test's own."""
    register(name, source="a test", formula="a test", **entry)(function)
    try:
        yield
    finally:
        del _TABLE[name]


@pytest.mark.parametrize("name", ["average", "actmat", "ties", "tsv_m", "regmean", "fisher"])
def test_every_route_gives_the_same_bytes_through_streams(recorded, monkeypatch, name):
    base, experts = models(layers=2)
    statistics = None
    if name in {"regmean", "fisher"}:
        spread = (lambda x: x.mT @ x) if name == "regmean" else torch.square
        statistics = {
            t: {k: spread(x) for k, x in e.items() if x.ndim == 2 or name == "fisher"}
            for t, e in experts.items()
        }
    own = {"statistics": statistics}
    through = merge_state_dicts(base, experts, create(name), **own)
    monkeypatch.undo()
    plain = merge_state_dicts(base, experts, create(name), **own)
    assert all(torch.equal(plain[k], through[k]) for k in base)


@pytest.mark.parametrize("form", ["dense", "adapter"])
def test_adapters_go_through_streams_in_their_own_rank(recorded, monkeypatch, tmp_path, form):
    base, opened = {"fc.weight": torch.randn(6, 8)}, {}
    for task in ("x", "y"):
        write_adapter(tmp_path / task, {"fc.weight": (torch.randn(2, 8), torch.randn(6, 2))}, {})
        opened[task] = tmp_path / task
    save_file(base, tmp_path / "base.safetensors")
    files = []
    for output in ("through", "plain"):
        target = tmp_path / (output if form == "adapter" else f"{output}.safetensors")
        merging.merge_checkpoints(
            tmp_path / "base.safetensors", opened, create("actmat"), target, form=form
        )
        files.append(load_file(target / "adapter_model.safetensors" if target.is_dir() else target))
        monkeypatch.undo()
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert open_checkpoint(tmp_path / "x").is_adapter


def test_all_tensors_of_a_load_are_found():
    a, b, c = torch.ones(3)
    held = (a, [Factors(b, c, 1.0)], {"x": torch.zeros(2)}, None)
    assert len(list(tensors(held))) == 4


# --- batches --------------------------------------------------------------------------------------


@pytest.fixture
def batched(monkeypatch):
    """Of up to three layers, on the CPU; what was asked of the method."""
    calls, many = [], merging.Method.many

    def counted(self, deltas, **context):
        calls.append(tuple(deltas.shape))
        return many(self, deltas, **context)

    monkeypatch.setattr(merging.Method, "many", counted)
    monkeypatch.setattr(batches, "limit", lambda devices: 3 * 4 * 3 * 6 * 8)
    return calls


@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"], ["cpu"] * 3])
def test_batches_do_not_depend_on_the_number_of_devices(batched, devices):
    base, experts = models(layers=7)
    merged = merge_state_dicts(base, experts, create("aswudi"), device=devices)
    outer = [shape for shape in batched if shape[1:] == (3, 6, 8)]
    assert sorted(outer) == [(3, 3, 6, 8), (3, 3, 6, 8)]  # and a layer that is alone
    one = merge_state_dicts(base, experts, create("aswudi"))
    assert all(torch.equal(one[k], merged[k]) for k in base)


def test_packed_and_fused_layers_are_batched_by_block(batched, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    packed = {f"blocks.{i}.attn.in_proj_weight": (18, 8) for i in range(2)}
    shapes = packed | {"experts.weight": (5, 6, 8)}
    layers = dict.fromkeys(packed, Layer((6, 8, 4))) | {"experts.weight": Layer(experts=5)}
    base = {name: torch.randn(*s, generator=generator) for name, s in shapes.items()}
    experts = {
        t: {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        for t in "abc"
    }
    monkeypatch.setattr(batches, "limit", lambda devices: 3 * 4 * 3 * 18 * 8)
    together = merge_state_dicts(base, experts, create("actmat"), layers=layers)
    assert {shape[0] for shape in batched} >= {2, 5}
    monkeypatch.setattr(batches, "limit", lambda devices: 0)
    apart = merge_state_dicts(base, experts, create("actmat"), layers=layers)
    assert all(torch.allclose(together[k], apart[k], atol=1e-6) for k in base)


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize(
    ("shape", "doubled"), [((20, 12), 256), ((12, 20), 0), ((4, 40), 0)]
)  # tall in float64; wide, and with fewer rows in all experts than columns, in float32
def test_many_layers_are_merged_as_each_alone(name, shape, doubled, monkeypatch):
    """Regular layers, one of low rank, one that no expert moved, all in one batch."""
    monkeypatch.setattr("merging.linalg.DOUBLE_UP_TO", doubled)
    monkeypatch.setattr("merging.linalg.SOLVED_IN_DOUBLE_UP_TO", doubled)
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(5, 3, *shape, generator=generator)
    deltas[1] = torch.randn(3, shape[0], 2, generator=generator) @ torch.randn(
        3, 2, shape[1], generator=generator
    )
    deltas[2] = 0
    deltas[3, 1] = 0
    method = create(name)
    merged = method.many(deltas)
    alone = torch.stack([method(layer) for layer in deltas])
    scale = alone.flatten(1).norm(dim=1).clamp_min(1e-6)
    assert ((merged - alone).flatten(1).norm(dim=1) / scale).max() < (1e-5 if doubled else 2e-3)
    assert torch.equal(merged, method.many(deltas)) and merged.dtype == deltas.dtype


def test_weights_of_tasks_reach_every_layer_of_a_batch():
    deltas = torch.randn(4, 3, 10, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.2, 3.0])
    for name in ("actmat", "aswudi", "sided"):
        alone = torch.stack([create(name)(layer, weights=weights) for layer in deltas])
        assert torch.allclose(create(name).many(deltas, weights=weights), alone, atol=1e-5)
        assert not torch.allclose(create(name).many(deltas), alone, atol=1e-3)


# --- memory ---------------------------------------------------------------------------------------


def hungry(most):
    """A mean that runs out of memory on more layers at once than `most`."""

    def together(deltas):
        if len(deltas) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return deltas.mean(1)

    def alone(deltas):
        if not most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return deltas.mean(0)

    return alone, together


@pytest.mark.parametrize("most", [4, 2, 1])
def test_what_memory_does_not_hold_is_merged_in_halves_and_told(
    recorded, batched, monkeypatch, most
):
    monkeypatch.setattr(batches, "limit", lambda devices: 1 << 20)
    base, experts = models(layers=4)
    alone, together = hungry(most)
    with added("hungry", alone, batched=together):
        merged = merge_state_dicts(base, experts, create("hungry"))
    expected = merge_state_dicts(base, experts, create("average"))
    assert all(torch.allclose(merged[k], expected[k], atol=1e-6) for k in base)
    told = [note for note in merged.report.notes if "memory of cpu" in note]
    sizes = {4: [], 2: [(4, 2)], 1: [(4, 2), (2, 1)]}[most]
    assert told == [
        f"the memory of cpu did not hold {a} layers of shape [6, 8] at once: they were merged "
        f"{b} at a time" for a, b in sizes
    ]  # fmt: skip
    assert recorded[0].count("freed") == {4: 0, 2: 1, 1: 3}[most]


def test_a_layer_that_does_not_fit_alone_is_an_error(recorded):
    base, experts = models(layers=2)
    alone, together = hungry(0)
    with (
        added("hungry", alone, batched=together),
        pytest.raises(
            InputError, match=r"cpu has too little memory .*fc.weight' of shape \[6, 8\]"
        ) as error,
    ):
        merge_state_dicts(base, experts, create("hungry"))
    assert "device=cpu" in error.value.hint


def test_a_load_that_does_not_fit_beside_a_merge_is_done_after_it(recorded, monkeypatch):
    base, experts = models(layers=3)
    load, failures = Recorded.load, []

    def tight(self, read):
        if threading.current_thread() is not threading.main_thread() and len(failures) < 2:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(self, read)

    monkeypatch.setattr(Recorded, "load", tight)
    merged = merge_state_dicts(base, experts, create("actmat"))
    monkeypatch.undo()
    plain = merge_state_dicts(base, experts, create("actmat"))
    assert len(failures) == 2 and all(torch.equal(plain[k], merged[k]) for k in base)


def test_where_one_device_fails_the_others_stop(monkeypatch):
    """Rather than merge for hours what is thrown away."""
    base, experts = models(layers=40)
    done, failed = [], threading.Event()

    def method(deltas):
        if deltas.shape[1:] != (6, 8):
            return deltas.mean(0)  # of the small merge that checks values
        if not failed.is_set():
            failed.set()
            raise ArithmeticError("one device fails")
        assert failed.wait(30)
        done.append(threading.Event().wait(0.05))
        return deltas.mean(0)

    with added("fails_once", method), pytest.raises(ArithmeticError):
        merge_state_dicts(base, experts, create("fails_once"), device=["cpu", "cpu"])
    assert len(done) < 10


# --- precision ------------------------------------------------------------------------------------


def test_products_are_in_full_float32_and_the_setting_is_put_back(monkeypatch):
    base, experts = models(layers=1)
    seen = []

    def method(deltas):
        seen.append(torch.get_float32_matmul_precision())
        return deltas.mean(0)

    monkeypatch.setattr(torch, "get_float32_matmul_precision", torch.get_float32_matmul_precision)
    torch.set_float32_matmul_precision("high")
    try:
        with added("looks", method):
            merge_state_dicts(base, experts, create("looks"))
        assert seen and set(seen[-1:]) == {"highest"}
        with pytest.raises(KeyError), full_float32():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")

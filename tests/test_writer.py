"""The writer: right bytes, all or nothing, and the same bytes after any interruption."""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import merging
from merging.errors import InputError
from merging.formats import disk
from merging.formats import writer as writer_module
from merging.formats.checkpoints import open_checkpoint
from merging.formats.safetensors import SAFETENSORS_DTYPES
from merging.formats.writer import Writer, write_adapter

fork = multiprocessing.get_context("fork")


def layout(tensors):
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def example():
    generator = torch.Generator().manual_seed(1)
    return {
        "embed": torch.randn(10, 6, generator=generator),
        "ids": torch.arange(7),
        "half": torch.randn(5, 3, generator=generator).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "scale": torch.tensor(0.5),
        "empty": torch.empty(0, 4),
    }


def write_all(writer, tensors, rows=3):
    for name, tensor in tensors.items():
        if name in writer.done:
            continue
        if tensor.ndim and len(tensor) > rows:
            for start in range(0, len(tensor), rows):
                piece = slice(start, min(start + rows, len(tensor)))
                writer.write(name, tensor[piece], piece)
        else:
            writer.write(name, tensor)


def write_whole(output, tensors=None, extra=None, **options):
    tensors = tensors or example()
    with Writer(output, layout(tensors), **options) as writer:
        write_all(writer, tensors)
        writer.finish(extra)


def content(path):
    """{relative name: bytes} of a file or folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def fast(tmp_path):
    """A folder in memory where there is one: a kill forgets no pages, so the disk adds nothing."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


SHARDS = {"embed": "model-00001-of-00002.safetensors"}
SHARDS = dict.fromkeys(example(), "model-00002-of-00002.safetensors") | SHARDS


# --- the bytes ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda n: n != "__metadata__"),
            st.sampled_from(sorted(SAFETENSORS_DTYPES.values(), key=str)),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda item: item[0],
    )
)
def test_the_safetensors_library_reads_it(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("out") / "x.safetensors"
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, dtype, shape in items}
    write_whole(path, tensors)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert loaded[name].reshape(-1).view(torch.uint8).tolist() == (
            tensor.reshape(-1).view(torch.uint8).tolist()
        )
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_and_folders(tmp_path):
    tensors = example()
    write_whole(tmp_path / "new/x.safetensors", metadata={"method": "average"})
    write_whole(
        tmp_path / "one", extra={"config.json": b"{}", "sub/a": tmp_path / "new/x.safetensors"}
    )
    write_whole(tmp_path / "two", shards=SHARDS)
    # the shards of a base do not matter to an output in one file
    write_whole(tmp_path / "x.safetensors", shards=SHARDS, metadata={"method": "average"})
    assert content(tmp_path / "x.safetensors") == content(tmp_path / "new/x.safetensors")
    assert set(content(tmp_path / "one")) == {"model.safetensors", "config.json", "sub/a"}
    assert (tmp_path / "one/sub/a").read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    index = json.loads((tmp_path / "two/model.safetensors.index.json").read_text())
    assert index["weight_map"] == SHARDS
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(content(tmp_path / "two")) == {*SHARDS.values(), "model.safetensors.index.json"}
    for path in (tmp_path / "one", tmp_path / "two", tmp_path / "x.safetensors"):
        source = open_checkpoint(path)
        assert set(source.keys()) == set(tensors)
        assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())
    assert hidden(tmp_path) == []


def test_tensors_are_aligned_and_otherwise_in_order(tmp_path):
    write_whole(tmp_path / "x.safetensors")
    source = open_checkpoint(tmp_path / "x.safetensors")
    order = ["ids", "embed", "scale", "empty", "half", "flag"]
    assert sorted(source.keys(), key=order.index) == order
    assert [name for name in source.keys() if name != "empty"] == [n for n in order if n != "empty"]
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_programming_errors_are_refused(tmp_path):
    tensors = example()
    with Writer(tmp_path / "x", layout(tensors)) as writer:
        with pytest.raises(ValueError, match="announced as"):
            writer.write("embed", tensors["embed"].double())
        with pytest.raises(ValueError, match="announced as"):
            writer.write("embed", tensors["embed"][:3])
        with pytest.raises(ValueError, match="out of order"):
            writer.write("embed", tensors["embed"][3:6], slice(3, 6))
        writer.write("embed", tensors["embed"][:3], slice(0, 3))
        with pytest.raises(ValueError, match="out of order"):
            writer.write("embed", tensors["embed"][6:9], slice(6, 9))
        with pytest.raises(KeyError):
            writer.write("other", tensors["embed"])
        with pytest.raises(ValueError, match="6 tensors were not written, among them 'embed'"):
            writer.finish()
        write_all(writer, tensors)
        for name in ("../x", "/tmp/x", "model.safetensors"):
            with pytest.raises(ValueError, match="extra file"):
                writer.finish({name: b""})
        assert not (tmp_path / "x").exists()
    with Writer(tmp_path / "x.safetensors", layout(tensors)) as writer:
        write_all(writer, tensors)
        with pytest.raises(ValueError, match="extra files need a folder"):
            writer.finish({"config.json": b""})
    with pytest.raises(InputError, match="'c' is torch.complex128"):
        Writer(tmp_path / "y", {"c": ((1,), torch.complex128)})


# --- all or nothing -------------------------------------------------------------------------------


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path):
    for output in (tmp_path / "x", tmp_path / "x.safetensors"):
        write_whole(output)
        before = content(output)
        changed = {name: tensor + 1 for name, tensor in example().items() if name != "flag"}
        with pytest.raises(InputError, match="exists already"):
            Writer(output, layout(changed))
        assert content(output) == before
        with Writer(output, layout(changed), overwrite=True) as writer:
            write_all(writer, changed)
            assert content(output) == before
            writer.finish()
        source = open_checkpoint(output)
        assert all(torch.equal(source.read(name), tensor) for name, tensor in changed.items())
        assert hidden(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    for output in (tmp_path / "x", tmp_path / "x.safetensors"):
        with Writer(output, layout(example())) as writer:
            write_all(writer, example())
            output.write_text("mine")
            with pytest.raises(InputError, match="exists already"):
                writer.finish()
        assert output.read_text() == "mine"


def test_two_writers_of_one_output(tmp_path):
    with Writer(tmp_path / "x", layout(example())) as writer:
        with pytest.raises(InputError, match="another process is writing"):
            Writer(tmp_path / "x", layout(example()))
        child = fork.Process(target=write_whole, args=(tmp_path / "x",))
        child.start()
        child.join()
        assert child.exitcode == 1
        write_all(writer, example())
        writer.finish()
    assert open_checkpoint(tmp_path / "x").keys()


def test_many_processes_racing_leave_one_whole_output(tmp_path):
    write_whole(tmp_path / "expected")
    children = [fork.Process(target=write_whole, args=(tmp_path / "x",)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children].count(0) == 1
    assert content(tmp_path / "x") == content(tmp_path / "expected")
    assert hidden(tmp_path) == []


def test_an_unfinished_output_of_another_key_or_layout_is_started_over(tmp_path):
    tensors = example()

    def resumed(tensors=tensors, **options):
        with Writer(tmp_path / "x", layout(tensors), **options) as writer:
            done = set(writer.done)
            write_all(writer, tensors)
        return done

    assert resumed(key="a") == set()
    assert resumed(key="a") == set(tensors)
    assert resumed(key="b") == set()
    assert resumed(tensors | {"more": torch.ones(1)}, key="b") == set()
    assert resumed(key="b", metadata={"a": "b"}) == set()
    assert resumed(key="b", shards=SHARDS) == set()
    assert resumed(key="b", shards=SHARDS) == set(tensors)


@pytest.mark.parametrize("damage", ["data", "header", "journal", "tail", "short", "stray"])
def test_damage_is_found_and_made_good(tmp_path, damage):
    """What a power cut can leave: lost pages, a torn journal, a cut or additional file."""
    tensors = example()
    write_whole(tmp_path / "expected", extra={"config.json": b"{}"})
    with Writer(tmp_path / "x", layout(tensors)) as writer:
        write_all(writer, tensors)
    work = tmp_path / ".x.part"
    data, journal = work / "files/model.safetensors", work / "journal"
    whole, lines = bytearray(data.read_bytes()), journal.read_bytes()
    if damage == "data":
        whole[-2] ^= 1  # in "flag", the last
        data.write_bytes(whole)
    elif damage == "header":
        data.write_bytes(bytes(16) + whole[16:])
    elif damage == "journal":
        journal.write_bytes(lines.replace(b'"flag"', b'"flaw"') + b'\xff["\n[1]\n["embed", "x"]\n')
    elif damage == "tail":
        journal.write_bytes(lines[:-5])
    elif damage == "short":
        os.truncate(data, len(whole) - 2)
    else:
        (work / "files/config.json").write_text("stale")
    with Writer(tmp_path / "x", layout(tensors)) as writer:
        assert ("flag" in writer.done) == (damage in ("header", "tail", "stray"))
        write_all(writer, tensors)
        writer.finish({"config.json": b"{}"})
    assert content(tmp_path / "x") == content(tmp_path / "expected")


# --- killed at every step -------------------------------------------------------------------------


class Os:
    """The os module, with something happening at the n-th call that touches the disk."""

    CALLS = (
        "open",
        "pwrite",
        "write",
        "fsync",
        "replace",
        "rename",
        "ftruncate",
        "posix_fallocate",
    )

    def __init__(self, n, happen):
        self.left, self.happen = n, happen

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in self.CALLS:
            return function

        def counted(*args):
            self.left -= 1
            if not self.left:
                if name in ("pwrite", "write"):  # half a write reaches the file
                    file, data, *offset = args
                    function(file, data[: len(data) // 2], *offset)
                self.happen()
            return function(*args)

        return counted


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fill():
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(n, happen, swap, *args, **options):
    """Run `write_whole` in which something happens at the n-th call."""
    with pytest.MonkeyPatch.context() as patch:
        system = Os(n, happen)
        patch.setattr(writer_module, "os", system)
        patch.setattr(disk, "os", system)
        if not swap:
            patch.setattr(disk, "_swap", lambda *_: False)
        write_whole(*args, **options)


def survived(n, happen, *args, **options):
    """Whether nothing happened; a kill needs a process of its own."""
    if happen is kill:
        return run(interrupted, n, happen, *args, **options) == 0
    try:
        interrupted(n, happen, *args, **options)
    except InputError as error:
        assert "the disk is full" in error.message
        return False
    return True


def run(target, *args, **options):
    child = fork.Process(target=target, args=args, kwargs=options)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("happen", [kill, fill])
@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("x", None),
        ("x", "swapped"),
        ("x", "moved"),
        ("x.safetensors", None),
        ("x.safetensors", "swapped"),
    ],
)
def test_interrupted_at_every_call_that_touches_the_disk(fast, name, happen, old):
    """No half output at any instant, an older one survives, and a rerun gives the same bytes."""
    extra = {} if name.endswith("safetensors") else {"config.json": b"{}"}
    options = {"extra": extra, "overwrite": old is not None, "shards": SHARDS}
    write_whole(fast / f"expected/{name}", **options)
    expected, before, points = content(fast / f"expected/{name}"), None, 0
    while True:
        points += 1
        output = fast / str(points) / name
        if old:
            write_whole(output, {"w": torch.zeros(3)})
            before = content(output)
        done = survived(points, happen, old == "swapped", output, **options)
        if output.exists():
            assert content(output) in (expected, before)
        else:
            assert old != "swapped"
        if done:
            break
        if not output.exists() or content(output) == before:
            write_whole(output, **options)
        assert content(output) == expected
    assert points > 20


def test_killed_at_random_instants(fast):
    """As above, but by the clock: also between and inside calls."""
    tensors = {f"w{i}": torch.full((12, 500), float(i)) for i in range(60)}
    start = time.monotonic()
    assert run(write_whole, fast / "expected", tensors) == 0
    duration = time.monotonic() - start
    expected, chance, kills = content(fast / "expected"), random.Random(0), 0
    for attempt in range(1000):
        output = fast / f"x{attempt}"
        child = fork.Process(target=write_whole, args=(output, tensors))
        child.start()
        time.sleep(chance.uniform(0, duration))
        child.kill()
        child.join()
        if not output.exists():
            kills += 1
            leftovers = {p.name for p in fast.iterdir() if f"x{attempt}" in p.name}
            assert leftovers <= {f".x{attempt}.part", f".x{attempt}.lock"}
            write_whole(output, tensors)
        assert content(output) == expected
        if kills == 12:
            break
    assert kills == 12


def test_a_merge_stopped_at_every_call_continues(fast):
    """Through the engine, with a base whose tied tensors are written under both names."""
    embed, tasks = torch.randn(40, 6), ("a", "b")
    torch.save({"embed": embed, "fc.weight": torch.randn(6, 6), "head": embed}, fast / "base.bin")
    for task in tasks:
        tensors = {"embed": torch.randn(40, 6), "fc.weight": torch.randn(6, 6)}
        write_whole(fast / f"{task}.safetensors", tensors | {"head": tensors["embed"]})
    experts = {task: fast / f"{task}.safetensors" for task in tasks}

    def merge(output, **options):
        average = merging.create("average")
        merging.merge_checkpoints(fast / "base.bin", experts, average, output, **options)

    merge(fast / "expected")
    expected, points = content(fast / "expected"), 0
    while True:
        points += 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                system = Os(points, fill)
                patch.setattr(writer_module, "os", system)
                patch.setattr(disk, "os", system)
                merge(fast / str(points))
            break
        except InputError:
            merge(fast / str(points), overwrite=True)
            assert content(fast / str(points)) == expected
    assert points > 15


# --- disks ----------------------------------------------------------------------------------------


def test_too_little_space_is_told_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"needs 4000000.00 GB, the disk has"):
        Writer(tmp_path / "x", {"w": ((10**15,), torch.float32)})
    assert list(tmp_path.iterdir()) == []


def limited(output):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_whole(output, {"w": torch.zeros(10_000)})
    except InputError as error:
        assert "the disk is full" in error.message and "finished tensors are kept" in error.hint
        os._exit(7)


def test_a_real_limit_of_the_file_system(tmp_path):
    write_whole(tmp_path / "earlier")
    before = content(tmp_path / "earlier")
    assert run(limited, tmp_path / "x") == 7
    assert not (tmp_path / "x").exists() and content(tmp_path / "earlier") == before
    write_whole(tmp_path / "x", {"w": torch.zeros(10_000)})


def test_file_systems_without_preallocation(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write_whole(tmp_path / "x")
    assert open_checkpoint(tmp_path / "x").keys()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file/x: "):
        Writer(tmp_path / "file/x", layout(example()))


# --- adapters -------------------------------------------------------------------------------------


def test_an_adapter_that_peft_loads(tmp_path):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 3)), nn.Linear(3, 2))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = {
        "0.weight": (torch.randn(3, 5), torch.randn(4, 3)),
        "1.0.weight": (torch.randn(2, 4), torch.randn(3, 2)),
    }
    head = {"2.weight": torch.randn(2, 3), "2.bias": torch.randn(2)}
    config = {"base_model_name_or_path": "org/base", "modules_to_save": ["2"], "r": 99}
    write_adapter(tmp_path / "a", factors, config, dense=head)
    expected = base | head
    for name, (a, b) in factors.items():
        expected[name] = base[name] + b @ a
    ours = open_checkpoint(tmp_path / "a")
    assert ours.base_name == "org/base" and set(ours.keys()) == set(factors)
    for name in factors:
        torch.testing.assert_close(base[name] + ours.delta(name), expected[name])
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    with pytest.raises(InputError, match="exists already"):
        write_adapter(tmp_path / "a", factors, config)
    with pytest.raises(InputError, match="cannot hold 'attn.in_proj_weight'"):
        write_adapter(tmp_path / "b", {"attn.in_proj_weight": factors["0.weight"]}, config)

"""One merge by several members over a common folder: the bytes of one process, whoever is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from experiments.merge import main
from merging import InputError, create, merge_checkpoints
from merging.formats.writer import Writer
from tests.fixtures.commands import called

WIDTHS = (16, 8, 24, 8, 32)
BEGINS_AND_WAITS = """
import runpy, sys, time
from pathlib import Path
from merging.formats.writer import Writer
began, write = Path(sys.argv.pop()), Writer.write
def waits(self, *arguments):
    write(self, *arguments)
    if len(self.done) == 2:
        began.touch()
        time.sleep(600)
Writer.write = waits
sys.argv[0] = "merge"
runpy.run_module("experiments.merge", run_name="__main__")
"""


def state(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"blocks.{i}.fc.weight": (12, d) for i, d in enumerate(WIDTHS)}
    shapes |= {f"blocks.{i}.norm.weight": (12,) for i in range(len(WIDTHS))}
    shapes |= {"embed.weight": (40, 16)}
    return {k: scale * torch.randn(s, generator=generator) for k, s in shapes.items()}


@pytest.fixture
def paths(tmp_path):
    """A base and three experts in files."""
    base, files = state(0), {}
    for seed in range(4):
        moved = {k: v + bool(seed) * 0.01 * state(seed)[k] for k, v in base.items()}
        files["base" if not seed else f"e{seed}"] = tmp_path / f"{seed}.safetensors"
        save_file({k: v.bfloat16() for k, v in moved.items()}, tmp_path / f"{seed}.safetensors")
    return files


def merge(paths, output, name="actmat", **options):
    experts = {k: v for k, v in paths.items() if k != "base"}
    return merge_checkpoints(paths["base"], experts, create(name), output, **options)


@pytest.mark.parametrize("name", ["sided", "ties", "dare", "average"])
def test_members_in_any_order_write_the_bytes_of_one_process(paths, tmp_path, name, monkeypatch):
    merge(paths, tmp_path / "alone.safetensors", name)
    output = tmp_path / "shared.safetensors"
    monkeypatch.setattr("merging.engine.sharing.WINDOW_BYTES", 100)  # copied in many pieces
    merged = []
    for number in (2, 3, 1):
        report = merge(paths, output, name, share=f"{number}/3")
        merged.append(report.pending)
        assert output.exists() == (number == 1)
    assert merged == [
        f"the last of share=1/3, share=3/3 writes {output}",
        f"the last of share=1/3 writes {output}",
        "",
    ]
    assert output.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert report.rules.keys() == state(0).keys()  # of the whole model, in each member's report
    left = sorted(path.name for path in (tmp_path / ".shared.safetensors.shares").iterdir())
    assert [name for name in left if name != "lock"] == ["written"]


def test_a_member_for_each_tensor_though_some_are_empty(paths, tmp_path):
    """Tensors without entries weigh nothing: none of the members may be left without any."""
    for path in paths.values():
        save_file(load_file(path) | {f"empty.{i}": torch.zeros(0, 3) for i in "ab"}, path)
    merge(paths, tmp_path / "alone.safetensors", "average")
    for number in range(1, 14):
        merge(paths, tmp_path / "shared.safetensors", "average", share=f"{number}/13")
    shared, alone = (tmp_path / f"{x}.safetensors" for x in ("shared", "alone"))
    assert shared.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize("name", ["o.safetensors", "folder"])
def test_another_merge_written_over_a_shared_one_is_not_taken_for_it(paths, tmp_path, name):
    output = tmp_path / name
    for number in (1, 2):
        merge(paths, output, share=f"{number}/2")
    file = output / "model.safetensors" if output.is_dir() else output
    shared = file.read_bytes()
    merge(paths, tmp_path / "other.safetensors", "average")
    file.write_bytes((tmp_path / "other.safetensors").read_bytes())  # as `cp` does: into the file
    with pytest.raises(InputError, match="exists already"):
        merge(paths, output, share="1/2")
    for number in (1, 2):
        merge(paths, output, share=f"{number}/2", overwrite=True)
    assert file.read_bytes() == shared


def test_a_member_that_comes_late_finds_it_done_and_others_are_refused(paths, tmp_path):
    output = tmp_path / "shared.safetensors"
    for number in (1, 2):
        merge(paths, output, share=f"{number}/2")
    stamp = output.stat()
    report = merge(paths, output, share="1/2")
    assert (report.pending, report.bytes_read, output.stat()) == ("", 0, stamp)
    with pytest.raises(InputError, match="exists already"):
        merge(paths, output, "ties", share="1/2")  # another merge: nothing is done for it
    merge(paths, output, "ties", overwrite=True)
    with pytest.raises(InputError, match="exists already"):
        merge(paths, output, share="1/2")


def test_shares_of_another_merge_do_not_count(paths, tmp_path):
    output = tmp_path / "shared.safetensors"
    merge(paths, output, "average", share="1/2")
    told = merge(paths, output, share="2/2").pending
    assert told.startswith("the last of share=1/2 writes") and "other inputs or settings" in told
    assert not output.exists()
    assert merge(paths, output, share="1/2").pending == ""
    merge(paths, tmp_path / "alone.safetensors")
    assert output.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_while_one_member_writes_the_output_another_leaves_it_to_it(paths, tmp_path):
    output = tmp_path / "shared.safetensors"
    merge(paths, output, share="1/2")
    with FileLock(tmp_path / ".shared.safetensors.shares/lock"):
        told = merge(paths, output, share="2/2").pending
    assert told == f"another member is writing {output}" and not output.exists()
    assert merge(paths, output, share="2/2").pending == ""  # should it have been killed
    assert output.exists()


@pytest.mark.parametrize(
    "share, options, message",
    [
        ("3/2", {}, "share is '3/2', expected one of so many"),
        ("0/2", {}, "share is '0/2'"),
        ("half", {}, "share is 'half'"),
        ("1/99", {}, "there are 11 tensors to share"),
        ("1/2", {"shard_size": "1KB"}, "shard_size splits the weights of a folder"),
    ],
)
def test_what_cannot_be_shared_is_refused_at_once(paths, tmp_path, share, options, message):
    with pytest.raises(InputError, match=message):
        merge(paths, tmp_path / "shared.safetensors", share=share, **options)
    assert not (tmp_path / ".shared.safetensors.shares").exists()


def test_experts_that_did_not_move_are_told_by_the_last_member(paths, tmp_path):
    same = dict.fromkeys(paths, paths["base"])
    merge(same, tmp_path / "o.safetensors", share="1/2")
    with pytest.raises(InputError, match="no tensor of the merge differs from the base"):
        merge(same, tmp_path / "o.safetensors", share="2/2")


def test_two_processes_one_killed(paths, tmp_path, monkeypatch, capsys):
    """The command: what the killed member had finished is not merged again, bytes are equal."""
    words = [f"{'' if k == 'base' else 'experts.'}{k}={v}" for k, v in paths.items()]
    words += ["method=sided", "device=cpu", f"output={tmp_path / 'shared'}"]
    began = tmp_path / "began"
    line = [sys.executable, "-c", BEGINS_AND_WAITS, *words, "share=1/2", str(began)]
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL)

    def second(*more):
        return called(monkeypatch, capsys, main, "merge", *words, *more)

    code, out, err = second("share=2/2")
    assert code == 0, err
    assert out.endswith(
        f"share 2/2 is merged: the last of share=1/2 writes {tmp_path / 'shared'}\n"
    )
    deadline = time.monotonic() + 120
    while not began.exists() and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.05)
    code, _, err = second("share=1/2")  # the same one twice
    assert code == 2 and "another process is writing" in err
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "shared").exists()

    shares = next((tmp_path / ".shared.shares").glob("*/"))
    journal = (shares / ".1-of-2.safetensors.part/journal").read_text().splitlines()
    finished = {json.loads(line)[0] for line in journal[1:]}
    others = set(load_file(shares / "2-of-2.safetensors"))
    merged, write = [], Writer.write

    def counted(self, name, *rest):
        merged.append((self.output.name, name))
        write(self, name, *rest)

    monkeypatch.setattr(Writer, "write", counted)
    code, out, err = second("share=1/2")
    assert code == 0, err
    assert f"written to {tmp_path / 'shared'}" in out
    again = {name for file, name in merged if file == "1-of-2.safetensors"}
    assert len(finished) == 2 and again == set(state(0)) - others - finished

    code, _, err = second(f"output={tmp_path / 'alone'}")
    assert code == 0, err
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "shared" / file.name).read_bytes(), file.name

"""A cache entry is built once, appears whole or not at all, and is checked before it is used."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import cache
from eval.cache import cache_root, cached, digest
from merging.errors import InputError

# A build that reports that it has begun, then waits to be killed or for a file to appear.
CHILD = """
import sys, time
from pathlib import Path
from eval.cache import cached

def build(folder):
    (folder / "half.txt").write_text("half")
    Path(sys.argv[1], f"began-{sys.argv[2]}").touch()
    while not Path(sys.argv[1], "go").exists():
        time.sleep(0.01)
    (folder / "whole.txt").write_text(sys.argv[2])

print((cached("kind", {"x": 1}, build) / "whole.txt").read_text())
"""


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_verified", set())


def write(text="content"):
    return lambda folder: (folder / "file.txt").write_text(text) and None


def start(tmp_path, name):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), name], stdout=subprocess.PIPE, text=True
    )


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.01)


keys = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none())


@given(key=keys, other=keys)
@settings(deadline=None, max_examples=25)
def test_digest_depends_on_content_not_order(key, other):
    assert digest(key) == digest(dict(reversed(key.items())))
    assert (digest(key) == digest(other)) == (key == other)


def test_nan_in_a_key_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        digest({"lr": float("nan")})


def test_an_entry_is_built_once_per_key():
    built = []

    def build(folder):
        built.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "file.txt").write_text("content")

    first = cached("kind", {"a": 1, "b": 2}, build)
    assert cached("kind", {"b": 2, "a": 1}, build) == first
    assert first == cache_root() / "kind" / digest({"a": 1, "b": 2})
    assert (first / "sub" / "file.txt").read_text() == "content"
    assert cached("kind", {"a": 1, "b": 3}, build) != first
    assert len(built) == 2


def test_a_build_that_fails_leaves_no_entry():
    def build(folder):
        (folder / "file.txt").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cached("kind", {"x": 1}, build)
    entry = cached("kind", {"x": 1}, write("whole"))
    assert sorted(path.name for path in entry.iterdir()) == ["file.txt", "key.json"]


@pytest.mark.parametrize("resumable", [False, True])
def test_what_a_failed_build_left_reaches_only_a_resumable_one(resumable):
    def fail(folder):
        (folder / "step.txt").write_text("7")
        raise RuntimeError

    found = []

    def build(folder):
        found.extend(path.name for path in folder.iterdir())

    with pytest.raises(RuntimeError):
        cached("kind", {"x": 1}, fail, resumable=resumable)
    cached("kind", {"x": 1}, build, resumable=resumable)
    assert found == (["step.txt"] if resumable else [])


@pytest.mark.parametrize("damage", ["change", "remove", "record"])
def test_a_damaged_entry_is_named(monkeypatch, damage):
    entry = cached("kind", {"x": 1}, write())
    file = entry / ("key.json" if damage == "record" else "file.txt")
    file.unlink() if damage == "remove" else file.write_text("content?")
    monkeypatch.setattr(cache, "_verified", set())  # as in a new process
    with pytest.raises(InputError, match=file.name) as caught:
        cached("kind", {"x": 1}, write())
    assert str(entry) in caught.value.hint


def test_checksums_are_compared_only_when_asked_or_when_size_or_time_differ(monkeypatch):
    entry = cached("kind", {"x": 1}, write())
    file = entry / "file.txt"
    before = file.stat()
    file.write_text("x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # damage that a stamp cannot show
    monkeypatch.setattr(cache, "_verified", set())
    monkeypatch.setattr(cache, "file_sha256", lambda path: pytest.fail("a whole file was read"))
    cached("kind", {"x": 1}, write())
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_verified", set())
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(entry.parents[1]))
    monkeypatch.setenv(cache.VERIFY, "1")
    with pytest.raises(InputError, match="file.txt"):
        cached("kind", {"x": 1}, write())


def test_a_full_disk_is_said_and_leaves_no_entry():
    def build(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="no space left"):
        cached("kind", {"x": 1}, build)
    assert cached("kind", {"x": 1}, write()).exists()


def test_a_killed_build_leaves_no_entry(tmp_path):
    child = start(tmp_path, "killed")
    wait_for(tmp_path / "began-killed")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (cache_root() / "kind" / digest({"x": 1})).exists()
    entry = cached("kind", {"x": 1}, write("whole"))
    assert [path.name for path in sorted(entry.iterdir())] == ["file.txt", "key.json"]


def test_two_processes_build_one_entry(tmp_path):
    first = start(tmp_path, "first")
    wait_for(tmp_path / "began-first")
    second = start(tmp_path, "second")
    (tmp_path / "go").touch()
    outputs = [child.communicate(timeout=300)[0].strip() for child in (first, second)]
    assert outputs == ["first", "first"]
    assert not (tmp_path / "began-second").exists()

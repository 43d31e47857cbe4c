"""Progress shows on a terminal, is an occasional line elsewhere, and never changes the items."""

import io
import logging

import pytest
from rich.console import Console

from merging import progress


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal whose screen can be read."""
    screen = io.StringIO()
    monkeypatch.setattr(
        progress,
        "Console",
        lambda **_: Console(file=screen, force_terminal=True, width=100, color_system=None),
    )
    return screen


def test_items_pass_through_unchanged():
    assert list(progress.track([3, 1, 2], "x")) == [3, 1, 2]
    assert list(progress.track((i for i in range(2)), "x")) == [0, 1]
    assert list(progress.track([], "x")) == []


def test_lines_appear_now_and_then_with_time_left(monkeypatch, caplog):
    clock = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="merging.progress"):
        list(progress.track(range(4), "merging"))
    assert caplog.messages == ["merging: 2 of 4, 40 s left", "merging: 4 of 4, 0 s left"]


def test_an_unknown_total_promises_nothing(monkeypatch, caplog):
    clock = iter([0.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="merging.progress"):
        list(progress.track(iter("a"), "reading"))
    assert caplog.messages == ["reading: 1 of ?"]


def test_nested_loops_share_one_display(terminal):
    for _ in progress.track(range(2), "outer"):
        for _ in progress.track(range(3), "inner"):
            assert len(progress._bars.tasks) == 2
    assert progress._bars is None
    assert "outer" in terminal.getvalue()
    assert "inner" in terminal.getvalue()


def test_a_loop_left_early_takes_its_bar_along(terminal):
    with pytest.raises(RuntimeError):
        for _ in progress.track(range(3), "outer"):
            raise RuntimeError
    for _ in progress.track(range(3), "next"):
        break
    assert progress._bars is None

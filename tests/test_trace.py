"""How deep a traceback of a method is: our frames from a command to the factorisation."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import experiments.merge
import experiments.run
from experiments import measurement
from merging import linalg
from tests import linear_suite

ROOT = Path(__file__).parents[1]
OURS = tuple(f"{ROOT / room}/" for room in ("merging", "eval", "experiments"))


@pytest.fixture
def traces(monkeypatch, tmp_path):
    """Per call of `merging.linalg.eigh`, our functions that lead to it, the innermost first."""
    found, eigh = [], linalg.eigh

    def recorded(*arguments):
        frame, names = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(OURS):
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        found.append(names)
        return eigh(*arguments)

    monkeypatch.setattr(linalg, "eigh", recorded)
    monkeypatch.chdir(tmp_path)
    return found


def test_from_the_run_command(traces, tmp_path, monkeypatch):
    """Thirteen: the entry, the job, the command, the call and what all calls do, the devices, one
    of them, a batch, the route, the method by name, its function, the solver and its eigenpairs."""
    suite = linear_suite.LinearSuite(tmp_path)
    monkeypatch.setattr(measurement, "load_suite", lambda config, device: suite)
    same = linear_suite.DELTAS["first"]  # a singular sum: no Cholesky factor does
    monkeypatch.setitem(linear_suite.DELTAS, "second", same)
    line = ["suite=embedded_text", "method=actmat", "device=cpu", "tracker=none"]
    monkeypatch.setattr(sys, "argv", ["run", *line])
    experiments.run.main()
    assert [names[-1] for names in traces] == ["entry.<locals>.main"]
    assert len(traces[0]) <= 13, "\n".join(traces[0])


def test_from_the_merge_command(traces, tmp_path, monkeypatch):
    """Thirteen: the entry, the job, the command, the call and what all calls do, the devices, one
    of them, a batch, the route, the method by name, its function, the solver and its eigenpairs."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "sun", "rain"):  # a column that no expert moves
        moved = torch.cat([torch.randn(6, 3, generator=generator) / 100, torch.ones(6, 3)], 1)
        save_file({"layer.weight": moved}, f"{name}.safetensors")
    files = ["base=base", "experts.sun=sun", "experts.rain=rain", "output=out"]
    line = [*(f"{file}.safetensors" for file in files), "method=actmat", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["merge", *line])
    experiments.merge.main()
    assert Path("out.safetensors").is_file()
    assert [names[-1] for names in traces] == ["entry.<locals>.main"]
    assert len(traces[0]) <= 13, "\n".join(traces[0])

"""A file format takes a function and a line: one is added here, and everything reads it."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging import planning
from merging.formats.readers import READERS


@dataclass(frozen=True)
class Entry:
    """A tensor in NumPy's archive, a `Slot` that has to be unpacked."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    part: tuple[int, int] | None = None

    @property
    def files(self):
        return (self.path,)

    @property
    def nbytes(self):
        return torch.Size(self.shape).numel() * 4

    def rows(self, rows):
        start, stop, _ = rows.indices(self.shape[0])
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, part=(start, stop))

    def load(self, files):
        with open(files(self.path), "rb", closefd=False) as file:
            file.seek(0)
            array = np.load(file)[self.key]
        return torch.from_numpy(array if self.part is None else array[slice(*self.part)])


def npz_slots(path):
    with np.load(path) as archive:
        return {name: Entry(path, name, archive[name].shape) for name in archive.files}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and two experts, of which the base's folder and one expert are of the new format."""
    monkeypatch.setitem(READERS, ".npz", npz_slots)  # the one line
    generator = torch.Generator().manual_seed(0)
    states = {
        name: {
            "fc.weight": torch.randn(6, 4, generator=generator),
            "fc.bias": torch.randn(6, generator=generator),
        }
        for name in ("base", "one", "two")
    }
    paths = {name: tmp_path / f"{name}.npz" for name in states}
    paths["base"] = tmp_path / "base" / "weights.npz"
    paths["base"].parent.mkdir()
    paths["two"] = tmp_path / "two.safetensors"
    for name in ("base", "one"):
        np.savez(paths[name], **{k: v.numpy() for k, v in states[name].items()})
    save_file(states["two"], paths["two"])
    return states, paths | {"base": paths["base"].parent}


@pytest.mark.parametrize("name", ["average", "ties", "actmat"])
def test_a_merge_reads_it_beside_others(models, tmp_path, name):
    states, paths = models
    experts = {task: paths[task] for task in ("one", "two")}
    method = merging.create(name)
    merging.merge_checkpoints(paths["base"], experts, method, tmp_path / "merged")
    expected = merging.merge_state_dicts(
        states["base"], {task: states[task] for task in experts}, method
    )
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in merged)


def test_a_plan_counts_its_bytes(models):
    _, paths = models
    found = planning.plan(paths["base"], {task: paths[task] for task in ("one", "two")})
    files = [paths["base"] / "weights.npz", paths["one"], paths["two"]]
    assert not found.problems and found.bytes == sum(file.stat().st_size for file in files)

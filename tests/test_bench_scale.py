"""The cost model by hand, and the committed page is what the committed measurements give."""

from pathlib import Path

import pytest

from experiments.bench import command_scale as scale

RESULTS = Path(__file__).parents[1] / "results" / "bench"


def test_the_models_have_the_sizes_they_are_called_by():
    entries = {name: model.entries for name, (model, _) in scale.MODELS.items()}
    assert entries["70B, 8 experts"] == pytest.approx(70.6e9, rel=0.01)
    assert entries["400B mixture of 128, 3 experts"] == pytest.approx(400e9, rel=0.05)


def test_an_average_costs_its_bytes_by_hand():
    model = scale.Model(((2, 10, 20),), 100)
    machine = scale.Machine(flops=1e9, vectors=1e9, moved=1e6, disk=1e3, devices=2)
    found = scale.bill(model, 3, "average", machine)
    assert found.bytes == 5 * 500 * 2  # three experts and the base read, the merge written
    assert found.seconds_disk == found.bytes / 1e3
    assert found.seconds_computing == pytest.approx(2 * 4 * 200 * 11 / 1e6 / 2)
    assert found.seconds == found.seconds_disk


def test_twice_the_devices_halve_computing_and_nothing_else():
    model, T = scale.MODELS["70B, 8 experts"]
    one = scale.bill(model, T, "actmat", scale.GPU)
    two = scale.bill(model, T, "actmat", scale.GPU._replace(devices=2))
    assert two.seconds_computing == pytest.approx(one.seconds_computing / 2)
    assert (two.bytes, two.seconds_disk, two.memory) == (one.bytes, one.seconds_disk, one.memory)


def test_machines_that_share_a_merge_divide_computing_and_move_the_result_twice_more():
    model = scale.Model(((2, 10, 20),), 100)
    machine = scale.Machine(flops=1e9, vectors=1e9, moved=1e6, disk=1e3, devices=2)
    alone, four = (scale.shared(model, 3, "average", machine, n) for n in (1, 4))
    assert alone == scale.bill(model, 3, "average", machine)
    assert four.bytes == (5 + 2) * 500 * 2 and four.seconds_disk == four.bytes / 1e3
    assert four.seconds_computing == pytest.approx(alone.seconds_computing / 4)


def test_the_committed_page_is_what_the_measurements_give():
    assert (RESULTS / "scale.md").read_text() == scale.page(RESULTS)

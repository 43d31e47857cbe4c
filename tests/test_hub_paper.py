"""`python -m experiments.paper NAME` against the hub's stand-in: preflight, rows, printed table."""

import pytest

from experiments import suites
from tests.fixtures import hub_vision
from tests.fixtures.hub_vision import EIGHT


@pytest.fixture
def make(vision, tmp_path):
    """`experiments.paper` with some arguments: what it printed, or its error (exit code 2)."""

    def call(*arguments, code=0):
        own = [f"records={tmp_path}/records", f"output={tmp_path}/results"]
        own += ["suite.workers=0", "device=cpu"]
        suites._suite.cache_clear()  # as in a new process
        found, out, err = vision.run("experiments.paper", *arguments, *own)
        assert found == code, out + err
        return out if code == 0 else err

    call.records = tmp_path / "records"
    call.results = tmp_path / "results"
    return call


FEW = "selection.values=[0.3,1.0]"


def test_x(make, vision, tmp_path):
    hub_vision.download("actmat", tmp_path / "home/checkpoints", "ViT-B-16", EIGHT)
    import time

    t = time.process_time()
    print(make("vision8_vit_b_16_full", "--dry-run"))
    print(time.process_time() - t)
    t = time.process_time()
    print(make("vision8_vit_b_16_full", FEW))
    print(time.process_time() - t)
    t = time.process_time()
    print(make("vision8_vit_b_16_full", FEW))
    print(time.process_time() - t)
    assert 0

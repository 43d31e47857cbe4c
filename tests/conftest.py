"""Fixtures of several test files, and the stand-in of the hub for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.fixtures.hub import Hub, isolated

# The same examples each time: a failure is there again in the next run.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

# Before any test imports a library of the hub: these read the address once.
HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.url


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in of the hub, its requests counted from zero, with an empty HF_HOME and caches
    of our own; repositories that the test adds are gone afterwards."""
    from eval.vision import data

    isolated(monkeypatch, tmp_path / "home")
    data._load.cache_clear()
    before = dict(HUB.repositories)
    HUB.requests.clear()
    yield HUB
    HUB.repositories = before


@pytest.fixture
def vision(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub with everything that the vision suites fetch, and small models of their names."""
    import open_clip

    from experiments import suites
    from tests.fixtures import hub_vision, shrunk

    for name, configuration in shrunk.configurations().items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, configuration)
    hub_vision.fill(hub)
    suites._suite.cache_clear()
    return hub


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache for all that a test file trains, so that nothing is found or left behind."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("cache")
        patch.setenv("MODEL_MERGING_CACHE", str(root))
        yield root

"""Keys of records and of cached experts stay what they are: runs must find what others have made.

tests/suite_keys.json was written before the suites became one class. After a change that must give
other experts or statistics, and only then: `python -m tests.test_suite_keys`.
"""

import functools
import json
import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from eval import tiny, training
from eval.cache import cache_root, digest
from eval.language import benchmarks, checkpoints, embedded_lm, text
from eval.tiny.suites import TinyLM
from eval.vision import models
from eval.vision.data import ImageSet
from experiments import suites
from merging.errors import InputError
from tests.images import image_folder

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("suite_keys.json")
NAMES = sorted(path.stem for path in (ROOT / "configs/suite").glob("*.yaml"))
FAMILIES = ("finetuned", "ilharco", "fusionbench", "tall", "actmat")
VARIANTS = {
    "vision8": [["suite.model=ViT-L-14", f"suite/checkpoints={family}"] for family in FAMILIES],
    "vision20": [["suite/checkpoints=tall", "suite.protocol=paper"]],
    "language7_t5_base": [["suite.protocol=ours"], ["suite.recipes.full.steps=7"]],
    "olmo3_7b": [["suite.protocol=later"], ["suite.measured_through=expert"]],
    "tiny_text": [["suite.recipes.full.lr=1", "+suite.recipes.lora.warmup=0.2"]],
    "tiny_lm": [["+suite.recipes.lora.clip=null", "+suite.precision=bf16"]],
}
LINES = [[name, *line] for name in NAMES for line in [[], *VARIANTS.get(name, ())]]
SMALL = ["tiny_text", "tiny_lm", "tiny_t5_relu_tied", "vision"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    stubs(monkeypatch, tmp_path)


def stubs(patch, folder):
    """Small stand-ins for all that the suites would download, and an empty cache."""
    for place in ("CACHE", "CHECKPOINTS", "DATA"):
        patch.setenv(f"MODEL_MERGING_{place}", str(folder))
    labels = {
        corpus.source: list(corpus.labels)
        for name in ("embedded_text", "embedded_text14")
        for corpus in OmegaConf.load(ROOT / f"configs/suite/{name}.yaml").corpora.values()
    }
    for reader in text.READERS:
        patch.setitem(text.READERS, reader, lambda source: numbered(source, labels[source]))
    patch.setitem(text.ENCODERS, "all-MiniLM-L6-v2", tiny.encoder)
    patch.setitem(embedded_lm.DECODERS, "SmolLM2-135M-Instruct", TinyLM.decoders["tiny"])
    for file in (ROOT / "configs/lm_tasks/embedded").glob("*.yaml"):
        task = OmegaConf.create(file.read_text().replace("!function ", ""))
        source = task.dataset_kwargs.source
        patch.setitem(
            embedded_lm.SOURCES,
            source,
            functools.partial(numbered, source, list(task.doc_to_choice)),
        )
    embedded_lm.documents.cache_clear()
    patch.setattr(ImageSet, "identity", lambda self: {"path": Path(self.path).name, "commit": "c"})
    patch.setattr(ImageSet, "names", ["one", "other", "third"])
    patch.setattr(checkpoints, "local", lambda name: Path("/", *name.split("/")))
    patch.setattr(checkpoints, "digests", lambda name: {Path(name).name: "0" * 64})
    patch.setattr(checkpoints, "require_mergeable", lambda *_, **__: {})
    patch.setattr(checkpoints, "part", lambda name, files: written(folder / "config.json", "{}"))
    patch.setattr(checkpoints, "chat_template", lambda name: "{{ messages }}")
    patch.setattr(checkpoints.hub, "commit", lambda path: None)
    manager = benchmarks.task_manager
    patch.setattr(benchmarks, "task_manager", lambda own, **code: None if code else manager(own))
    for check in ("require_room", "require_resources"):
        patch.setattr(benchmarks, check, lambda *_: None)


def numbered(source, labels):
    return [(f"{source} number {i}", labels[i % len(labels)]) for i in range(1800)]


def written(path, content):
    path.write_text(content)
    return path.parent


def build(line):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = compose("experiment", [f"suite={line[0]}", *line[1:]])
    return suites.build(OmegaConf.to_container(composed, resolve=True)["suite"])


def identities(line):
    """Digests of what goes into the keys of a suite's records, by what they are asked for."""
    suite = build(line)
    found = {
        f"protocol, statistics={value}": digest(suite.backend.protocol_key(statistics=value))
        for value in (False, True)
    }
    for finetuning in ("full", "lora"):
        for seed in (0, 1):
            try:
                key = digest(suite.identity(finetuning=finetuning, seed=seed))
            except InputError as error:
                key = type(error).__name__
            found[f"{finetuning}, seed {seed}"] = key
    return found


@pytest.mark.usefixtures("offline")
def test_more_tasks_leave_the_experts_of_the_others_as_they_are():
    for finetuning in ("full", "lora"):
        few, many = (
            build([name]).identity(finetuning=finetuning, seed=0)["experts"]
            for name in ("embedded_text", "embedded_text14")
        )
        assert len(few) == 8 and len(many) == 14
        assert few.items() <= many.items()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_records_are_found_again(line):
    assert identities(line) == json.loads(GOLDEN.read_text())["identities"][" ".join(line)]


def colours(folder):
    """Two small image tasks behind a CLIP of random weights."""
    state = models.build("ViT-S-8-32px-quickgelu", seed=5).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "clip.safetensors")
    os.utime(folder / "clip.safetensors", (0, 0))
    recipe = {"lr": 1e-3, "batch_size": 8, "steps": 30, "warmup_steps": 3}
    pictures = {task: {"path": str(image_folder(folder / task))} for task in ("bright", "dim")}
    return {
        "kind": "vision",
        "name": "colours",
        "family": "random",
        "model": "ViT-S-8-32px",
        "clip": {"local": "clip.safetensors"},
        "datasets": pictures,
        "recipes": {"full": recipe, "lora": recipe | {"r": 2, "alpha": 4}},
    }


def entries(patch, folder, name):
    """Names in the cache of a small suite's experts and statistics; nothing is trained."""
    patch.setattr(training, "train", lambda *_, **__: None)
    suite = suites.build(colours(folder)) if name == "vision" else build([name])
    for finetuning in ("full", "lora"):
        own = {"finetuning": finetuning, "seed": 0}
        suite.multi_task(**own)
        for kind in ("covariance", "fisher"):
            suite.statistics(suite.tasks[0], kind, **own, batches=1, batch_size=2)
    kinds = ("experts", "statistics")
    return {k: sorted(p.name for p in (cache_root() / k).glob("[!.]*")) for k in kinds}


@pytest.mark.parametrize("name", SMALL)
def test_cached_experts_and_statistics_are_found_again(monkeypatch, tmp_path, name):
    if name == "vision":
        stubs(monkeypatch, tmp_path)
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path))
    assert entries(monkeypatch, tmp_path, name) == json.loads(GOLDEN.read_text())["entries"][name]


def main(folder):
    """Write the golden file."""
    made = {"identities": {}, "entries": {}}
    for part, names in (("identities", LINES), ("entries", SMALL)):
        for i, item in enumerate(names):
            with pytest.MonkeyPatch.context() as patch:
                own = folder / part / str(i)
                own.mkdir(parents=True)
                patch.setenv("MODEL_MERGING_CACHE", str(own))
                if part == "identities" or item == "vision":
                    stubs(patch, own)
                if part == "identities":
                    made[part][" ".join(item)] = identities(item)
                else:
                    made[part][item] = entries(patch, own, item)
    GOLDEN.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))

"""What is shipped works: the built wheel in an empty environment, the core without the extras."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [
    "transformers", "datasets", "lm_eval", "peft", "accelerate", "wandb", "open_clip", "sklearn",
    "torchvision", "pandas", "matplotlib", "psutil", "optuna", "submitit", "joblib", "PIL",
    "nbformat", "gguf", "skimage",
]  # fmt: skip


@pytest.fixture
def checkpoints(tmp_path):
    """A base and two experts: one linear layer and its bias."""
    for name, value in (("base", 0.0), ("one", 1.0), ("two", 3.0)):
        state = {"layer.weight": value * torch.eye(4), "layer.bias": torch.full((4,), value)}
        save_file(state, tmp_path / f"{name}.safetensors")
    return [
        *(f"base={tmp_path}/base.safetensors", "method=average", f"output={tmp_path}/merged"),
        *(f"experts.{name}={tmp_path}/{name}.safetensors" for name in ("one", "two")),
    ]


def without(packages, code, *arguments, cwd=ROOT):
    """Run code in a fresh process in which these packages cannot be imported."""
    script = f"import sys; sys.modules.update(dict.fromkeys({packages!r}));"
    script += f"sys.argv = ['command', *{list(arguments)!r}];" + code
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True)


def test_the_core_merges_without_any_extra(checkpoints, tmp_path):
    code = "from experiments.merge import main; main()"
    done = without(EXTRAS, code, *checkpoints)
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["layer.weight"], 2 * torch.eye(4))


@pytest.mark.parametrize(
    "method", [["method=average"], ["method=ties", "method.scope=layer", "split_qkv=false"]]
)
def test_a_merge_imports_nothing_that_it_does_not_need(checkpoints, tmp_path, method):
    """The budget of a start: modules, not seconds, as those depend on the machine. A model's
    library is not needed either where layers and all else are merged alike."""
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    code = (
        "from experiments.merge import main; main();"
        f"print([name for name in {EXTRAS!r} if name in sys.modules])"
    )
    done = without([], code, *(x for x in checkpoints if x != "method=average"), *method)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_imports_nothing_heavy():
    code = "from experiments.merge import main; main()"
    done = without([*EXTRAS, "torch", "numpy", "scipy", "hydra", "rich"], code, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Merge your own checkpoints.")


def test_every_extra_is_part_of_all():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    rest = [name for name in extras if name not in ("all", "test", "vllm")]  # vllm pins its own
    assert everything == f"model-merging[{','.join(rest)}]"


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_a_script_is_a_command(script):
    module, _, function = PROJECT["scripts"][script].partition(":")
    name = script.removeprefix("model-merging-")
    assert name in cli.COMMANDS and function == "main"
    assert module.removesuffix(".__main__") == f"experiments.{name}"


def test_the_wheel_merges_and_runs_in_an_empty_environment(checkpoints, tmp_path):
    """Packages come from this environment, the project from the wheel alone."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["MODEL_MERGING_CACHE"] = str(tmp_path / "cache")
    away, venv, source = tmp_path / "away", tmp_path / "venv", tmp_path / "source"
    away.mkdir()
    for name in ("merging", "eval", "experiments", "configs"):  # building leaves files in its tree
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def pip(*arguments):
        line = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
        line += ["--quiet", "--no-deps", "--no-index"]
        subprocess.run(line, check=True, cwd=away, env=environment)

    pip("wheel", "--no-build-isolation", f"--wheel-dir={tmp_path}", str(source))
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip(f"--python={venv}/bin/python", "install", str(wheel))
    packages = next((venv / "lib").glob("python*")) / "site-packages"
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(script, *arguments):
        return subprocess.run(
            [venv / "bin" / script, *arguments],
            cwd=away, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    done = run("model-merging-merge", *checkpoints)
    assert done.returncode == 0, done.stderr
    assert torch.equal(
        load_file(tmp_path / "merged" / "model.safetensors")["layer.weight"], 2 * torch.eye(4)
    )
    done = run("model-merging-run", "suite=tiny_text", "tasks=[animals]", "method=average")
    assert done.returncode == 0, done.stderr
    assert "normalised" in done.stdout
    assert len(list((away / "runs/records/tiny_text").glob("average-*.json"))) == 1
    where = "import experiments, merging; print(experiments.__file__, merging.__file__)"
    done = subprocess.run(
        [venv / "bin/python", "-c", where],
        cwd=away,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.count(str(packages)) == 2
    assert (packages / "merging" / "py.typed").exists()

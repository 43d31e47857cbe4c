"""The embedded language-model suite on a decoder of 20 thousand weights, through every method."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from chain import check_block_by_block, check_methods, dense_expert
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import merging
from eval import training
from eval.language import benchmarks, checkpoints, embedded_lm, judge
from eval.suite import Suite
from eval.tiny import models as tiny_lm
from eval.tiny.suites import documents
from experiments.commands import run
from experiments.measurement import measure, references
from experiments.report import frames
from experiments.settings import Experiment
from experiments.suites import build
from merging.errors import InputError

CONFIG = Path("configs/suite/tiny_lm.yaml")
pytestmark = pytest.mark.usefixtures("own_cache")


def built(config, **changes):
    return build(OmegaConf.to_container(OmegaConf.merge(config, changes), resolve=True))


@pytest.fixture(scope="module")
def suite() -> Suite:
    return built(OmegaConf.load(CONFIG))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(4, 20).reshape(2, 8)).logits


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_every_method_written_and_loaded_equals_a_merge_by_hand(suite, finetuning, tmp_path):
    own = {"finetuning": finetuning, "seed": 0}
    experts = {task: suite.expert(task, **own) for task in suite.tasks}
    check_methods(
        tiny_lm.model("llama"),
        experts,
        suite.layers(),
        lambda task, kind: suite.statistics(task, kind, **own, batches=2, batch_size=8),
        load,
        logits,
        tmp_path,
    )
    merged = load(tmp_path / "actmat")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    lm = judge.load_lm("hf", {"pretrained": str(tmp_path / "actmat")}, batch_size=20, device="cpu")
    benchmark = benchmarks.Benchmark("tiny_meals")
    from_disk = judge.judge(lm, "meals", benchmark, benchmarks.task_manager([benchmark])).scores
    in_memory = suite.evaluate(dict(merged.named_parameters()), "test", ["meals"])
    assert in_memory == from_disk


@pytest.mark.parametrize("name", ["actmat", "tsv_m"])
def test_a_merge_written_as_an_adapter_is_judged_as_the_dense_one(suite, name, tmp_path):
    base, method = tiny_lm.model("llama"), merging.create(name)
    experts = {task: suite.expert(task, finetuning="lora", seed=0) for task in suite.tasks}
    for form, extra in (("dense", checkpoints.companions(base)), ("adapter", None)):
        merging.merge_checkpoints(
            base, experts, method, tmp_path / form, layers=suite.layers(), form=form, extra=extra
        )
    adapted = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    expected = logits(load(tmp_path / "dense"))
    assert (logits(adapted) - expected).norm() < 1e-4 * expected.norm()
    benchmark = benchmarks.Benchmark("tiny_meals")
    dense, adapter = {"pretrained": str(tmp_path / "dense")}, {"peft": str(tmp_path / "adapter")}
    scores = [
        judge.judge(lm, "meals", benchmark, benchmarks.task_manager([benchmark])).scores
        for lm in (
            judge.load_lm("hf", given, batch_size=20, device="cpu")
            for given in (dense, {"pretrained": str(base)} | adapter)
        )
    ]
    assert scores[0] == scores[1]


def test_experts_learn_their_own_task_and_merging_keeps_some_of_it(suite):
    base = suite.base()
    start = suite.evaluate(base, "test")
    states = {
        task: training.expert_state(base, suite.expert(task, finetuning="full", seed=0))
        for task in suite.tasks
    }
    own = {task: suite.evaluate(states[task], "test", [task])[task] for task in suite.tasks}
    merged = merging.merge_state_dicts(
        base, states, merging.create("task_arithmetic", alpha=0.5), layers=suite.layers()
    )
    after = suite.evaluate(merged, "test")

    def mean(scores):
        return sum(score.accuracy for score in scores.values()) / len(scores)

    assert mean(own) > mean(start) + 0.1
    assert mean(after) > mean(start)


def test_training_asks_as_the_judge_does(suite):
    """The tokens of a training example are those lm-eval would score for its right answer."""
    task = suite.backend._loaded["tiny_meals"]
    task.config.test_split = "train"
    task.build_all_requests(limit=5)
    task.config.test_split = "test"
    asked = [instance.args for instance in task.instances]
    for example in suite.backend._examples["meals"][:5]:
        prompt = suite.backend._tokenizer.decode(example.tokens[: example.prompt])
        answer = suite.backend._tokenizer.decode(example.tokens[example.prompt :])
        assert (prompt, f" {answer}") in asked


def test_only_what_is_declared_to_move_moves(suite):
    base = suite.base()
    full = dense_expert(base, suite.expert("meals", finetuning="full", seed=0))
    lora = dense_expert(base, suite.expert("meals", finetuning="lora", seed=0))
    assert set(full) == set(base)
    moved = {name for name in base if not torch.equal(full[name], base[name])}
    assert moved == set(base) - {"model.embed_tokens.weight"}
    adapted = {name for name in base if not torch.equal(lora[name], base[name])}
    assert adapted == set(suite.layers())


def test_an_adapter_names_its_base_without_a_path(suite):
    folder = suite.expert("meals", finetuning="lora", seed=0)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


def test_second_moments_are_of_all_tokens_but_padding(suite):
    name = "model.layers.0.self_attn.q_proj.weight"
    own = {"finetuning": "full", "seed": 0, "batches": 2, "batch_size": 5}
    measured = load_file(suite.statistics("meals", "covariance", **own))[name]
    model = load(tiny_lm.model("llama"))
    expert = suite.expert("meals", finetuning="full", seed=0)
    model.load_state_dict(training.expert_state(suite.base(), expert), strict=False)
    examples = suite.backend._examples["meals"]
    sample = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:10]
    rows = []
    for i in sample:
        with torch.no_grad():
            embedded = model.model.embed_tokens(torch.tensor(examples[i].tokens))
            rows.append(model.model.layers[0].input_layernorm(embedded))
    z = torch.cat(rows).double()
    torch.testing.assert_close(measured.double(), z.T @ z / len(z), rtol=1e-4, atol=1e-6)


def test_fisher_covers_what_moved(suite):
    own = {"finetuning": "full", "seed": 0, "batches": 2, "batch_size": 4}
    fisher = load_file(suite.statistics("meals", "fisher", **own))
    base = suite.base()
    assert set(fisher) == set(base) - {"model.embed_tokens.weight"}
    assert all(fisher[name].shape == base[name].shape for name in fisher)
    assert all((tensor >= 0).all() for tensor in fisher.values())
    assert sum(tensor.sum().item() for tensor in fisher.values()) > 0


def test_a_model_of_all_tasks_and_moments_through_a_merged_one(suite):
    """What the rows multi_task and regmean_pp of a table need."""
    own = {"finetuning": "full", "seed": 0}
    states = {
        task: training.expert_state(suite.base(), suite.expert(task, **own)) for task in suite.tasks
    }
    together = training.expert_state(suite.base(), suite.multi_task(**own))
    alone = suite.evaluate(states["meals"], "test")
    scores = suite.evaluate(together, "test")
    assert scores["weather"].accuracy > alone["weather"].accuracy
    assert scores["animals"].accuracy > alone["animals"].accuracy
    check_block_by_block(suite, states, "meals", "model.layers.1.mlp.down_proj.weight")


def test_splits_share_no_text_and_never_change(suite):
    first = documents("meals", test=60, validation=40, train=120)
    documents.cache_clear()
    again = documents("meals", test=60, validation=40, train=120)
    texts = {split: own["text"] for split, own in first.items()}
    assert texts == {split: own["text"] for split, own in again.items()}
    assert {split: len(own) for split, own in texts.items()} == {
        "test": 60, "train": 120, "validation": 40,
    }  # fmt: skip
    every = [text for own in texts.values() for text in own]
    assert len(set(every)) == len(every)


def test_every_task_file_has_a_source_and_a_place_in_its_suite():
    config = OmegaConf.load("configs/suite/embedded_lm.yaml")
    files = sorted((benchmarks.LOCAL_TASKS / "embedded").glob("*.yaml"))
    found = {}
    for file in files:
        text = file.read_text().replace("!function ", "")
        task = yaml.safe_load(text)
        assert task["custom_dataset"] == "eval.language.embedded_lm.documents"
        assert task["dataset_kwargs"]["source"] in embedded_lm.SOURCES
        assert task["metadata"]["version"]
        found[file.stem] = task["task"]
    assert found == dict(config.lm_tasks)
    assert len(found) >= 4


def test_identity_tells_prompts_data_and_settings_apart(suite):
    own = suite.identity(finetuning="lora", seed=0)
    assert own == suite.identity(finetuning="lora", seed=0)
    assert own != suite.identity(finetuning="lora", seed=1)
    assert own != suite.identity(finetuning="full", seed=0)
    config = OmegaConf.load(CONFIG)
    config.recipes.lora.steps += 1
    assert built(config).identity(finetuning="lora", seed=0) != own


def test_samples_are_kept_in_a_folder_of_the_merge(tmp_path):
    suite = built(OmegaConf.load(CONFIG), samples=str(tmp_path))
    suite.evaluate(suite.base(), "validation", ["meals"], limit=7)
    (folder,) = (tmp_path / "tiny_lm").iterdir()
    samples = [
        json.loads(line)
        for line in gzip.decompress((folder / "meals.jsonl.gz").read_bytes()).splitlines()
    ]
    assert len(samples) == 7
    kept = {sample["doc"]["text"] for sample in samples}
    assert kept <= set(suite.backend._loaded["tiny_meals"].dataset["validation"]["text"])


def test_what_cannot_be_had_is_one_sentence(suite):
    with pytest.raises(InputError, match="no task 'meal'"):
        suite.expert("meal", finetuning="full", seed=0)
    with pytest.raises(InputError, match="no task 'meal'"):
        suite.evaluate(suite.base(), "test", ["meal"])
    with pytest.raises(InputError, match=r"has 120 training inputs, .* 10 x 32"):
        suite.statistics("meals", "covariance", finetuning="full", seed=0)
    state = suite.base() | {"model.norm.weight": torch.zeros(3)}
    with pytest.raises(
        InputError, match=r"'model\.norm\.weight' .* \(3,\), expected shape \(32,\)"
    ):
        suite.evaluate(state, "test")
    config = OmegaConf.load(CONFIG)
    with pytest.raises(InputError, match="unknown decoder 'SmolLM3'"):
        built(config, decoder="SmolLM3").base()
    with pytest.raises(InputError, match="no recipe for finetuning 'ia3'"):
        suite.expert("meals", finetuning="ia3", seed=0)
    with pytest.raises(InputError, match="lm-eval knows no task"):
        names = {"meals": "tiny_meal"}
        import lm_eval.tasks

        real = lm_eval.tasks.TaskManager
        with pytest.MonkeyPatch.context() as patch:  # 14,000 tasks take ten seconds
            patch.setattr(
                lm_eval.tasks,
                "TaskManager",
                lambda include_path, include_defaults=True: real(
                    include_path=include_path, include_defaults=False
                ),
            )
            built(config, lm_tasks=names).evaluate(suite.base(), "test")


def test_any_task_of_lm_eval_is_scored_beside_what_was_merged(suite, tmp_path, capsys):
    """The suite of two tasks has not heard of the third, which lm-eval knows by its file."""
    config = OmegaConf.load(CONFIG)
    del config.lm_tasks["meals"]
    settings = Experiment(
        OmegaConf.to_container(config), {"name": "average"}, {"name": "none"},
        heldout=["tiny_meals"], records=str(tmp_path), device="cpu",
    )  # fmt: skip
    record = measure(settings)
    assert record["key"]["heldout"] == ["tiny_meals"]
    assert set(record["scores"]) == {"animals", "weather"}
    experts = [suite.expert(t, finetuning="full", seed=0) for t in ("animals", "weather")]
    states = [training.expert_state(suite.base(), path) for path in experts]
    merged = {n: (states[0][n] + states[1][n]) / 2 for n in states[0]}
    expected = suite.evaluate(merged, "test", ["meals"])["meals"]
    assert record["heldout"]["tiny_meals"]["accuracy"] == expected.accuracy
    run.show(settings, record)
    assert "held out: tiny_meals" in capsys.readouterr().out
    rows = frames.summarise(frames.to_frame([record, *references(settings).values()]), "average")
    assert rows.set_index("row")["held out: tiny_meals"].notna().all()
    with pytest.raises(InputError, match="lm-eval knows no task 'tiny_meels'") as told:
        measure(replace(settings, heldout=["tiny_meels"]))
    assert "tasks of suite tiny_lm: animals, weather" in told.value.hint

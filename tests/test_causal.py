"""Published decoders: checks before a merge, shards, vocabularies, judging, streamed moments."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merging
from eval import statistics, streamed_statistics, training
from eval.cache import digest
from eval.language import checkpoints, examples, heldout
from eval.language.causal import CausalBackend
from eval.language.examples import IGNORED, Example
from eval.suite import Suite
from eval.tiny import models as tiny_lm
from experiments.suites import build
from merging.errors import InputError
from merging.triangles import pack, unpack

BENCHMARKS = {
    "animals": {"expert": "first", "task": "tiny_animals"},
    "meals": {"expert": "second", "task": "tiny_meals"},
}
pytestmark = pytest.mark.usefixtures("own_cache")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two experts in bf16, four shards each, with configuration and tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.model("llama"))
    for seed, name in enumerate(("base", "first", "second")):
        model = load(tiny_lm.model("llama")).to(torch.bfloat16)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter += 0.05 * seed * noise
        model.save_pretrained(root / name, max_shard_size="16KB")
        tokenizer.save_pretrained(root / name)
    return root


def suite(models, **changes) -> Suite:
    own = {
        "name": "decoders",
        "family": "random",
        "model": str(models / "base"),
        "experts": {name: str(models / name) for name in ("first", "second")},
        "benchmarks": BENCHMARKS,
        "batch_size": 20,
    }
    return Suite(CausalBackend(**own | changes))


@pytest.fixture
def copy(models, tmp_path):
    """The same checkpoints, to be damaged."""
    return shutil.copytree(models, tmp_path / "copy")


# --- examples of prompt and answer ----------------------------------------------------------------


def test_logits_are_those_that_predict_the_answers():
    model = load(tiny_lm.model("llama"))
    batch = examples.collate([Example([5, 6, 7, 8], 3), Example([9, 10, 11], 1)])
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 8], [IGNORED, 10, 11, IGNORED]]
    logits, tokens = examples.answer_logits(model, batch)
    assert tokens.tolist() == [[IGNORED, IGNORED, 8], [10, 11, IGNORED]]
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits[0] for ids in ([5, 6, 7, 8], [9, 10, 11])]
    torch.testing.assert_close(logits[0, 2], alone[0][2])
    torch.testing.assert_close(logits[1, :2], alone[1][:2])
    expected = [alone[0][2].log_softmax(-1)[8]]
    expected += [alone[1][i].log_softmax(-1)[t] for i, t in ((0, 10), (1, 11))]
    torch.testing.assert_close(examples.answer_loss(model, batch), -torch.stack(expected).mean())


# --- packed second moments ------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_a_packed_triangle_unpacks_to_the_same_matrix(d, seed):
    z = torch.randn(d + 2, d, generator=torch.Generator().manual_seed(seed))
    matrix = z.mT @ z
    matrix = (matrix + matrix.mT) / 2
    assert pack(matrix).shape == (d * (d + 1) // 2,)
    assert torch.equal(unpack(pack(matrix)), matrix)
    expected = matrix[torch.triu_indices(d, d).unbind()]
    assert torch.equal(pack(matrix), expected)  # the order in which merges unpack it


def test_a_length_that_is_no_triangle_is_refused():
    with pytest.raises(InputError, match="5 numbers are no upper triangle"):
        unpack(torch.zeros(5))


def batches():
    return [{"input_ids": torch.arange(4, 24).reshape(2, 10) + i} for i in range(3)]


@pytest.mark.parametrize("memory", [0, 20_000, 1 << 30])
def test_streamed_moments_equal_those_held_in_memory(tmp_path, memory):
    model = load(tiny_lm.model("llama"))
    layers = merging.linear_layers(model)
    path = tmp_path / "moments.safetensors"
    cost = streamed_statistics.collect(
        model, batches, layers, path, about={"task": "t"}, memory=memory
    )
    expected = statistics.second_moments(model, batches(), layers)
    found = load_file(path)
    assert set(found) == set(layers)
    for name in layers:
        torch.testing.assert_close(unpack(found[name]), expected[name])
    halves = sum(4 * d * (d + 1) // 2 for d in (len(expected[name]) for name in layers))
    assert halves <= cost.bytes <= halves + 4096
    assert cost.passes == {0: 14, 20_000: 8, 1 << 30: 1}[memory]  # q k | v o | gate up | down
    assert statistics.load(path, {"task": "t"}).keys() == layers.keys()


def test_an_interrupted_collection_goes_on_with_the_next_layers(tmp_path):
    model = load(tiny_lm.model("llama"))
    layers = merging.linear_layers(model)
    passes = []

    def interrupted():
        passes.append(len(passes))
        if len(passes) == 5:
            raise KeyboardInterrupt
        return batches()

    own = {"about": {"task": "t"}, "memory": 0}
    path = tmp_path / "moments.safetensors"
    with pytest.raises(KeyboardInterrupt):
        streamed_statistics.collect(model, interrupted, layers, path, **own)
    assert not path.exists()
    assert streamed_statistics.collect(model, batches, layers, path, **own).passes == 14 - 4
    whole = tmp_path / "whole.safetensors"
    streamed_statistics.collect(model, batches, layers, whole, **own)
    assert path.read_bytes() == whole.read_bytes()


def test_a_merge_reads_packed_moments_as_it_reads_full_ones(models, tmp_path):
    model = load(models / "base").float()
    layers = merging.linear_layers(model)
    full = statistics.second_moments(model, batches(), layers)
    experts = {name: models / name for name in ("first", "second")}
    merged = {}
    for kind, tensors in (
        ("full", {n: t.clone() for n, t in full.items()}),
        ("packed", {n: pack(t) for n, t in full.items()}),
    ):
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        files = dict.fromkeys(experts, tmp_path / f"{kind}.safetensors")
        merging.merge_checkpoints(
            models / "base",
            experts,
            merging.create("regmean"),
            tmp_path / kind,
            layers=layers,
            statistics=files,
        )
        shards = sorted((tmp_path / kind).glob("*.safetensors"))
        merged[kind] = {name: t for shard in shards for name, t in load_file(shard).items()}
    assert merged["full"].keys() == merged["packed"].keys()
    for name, tensor in merged["full"].items():
        assert torch.equal(tensor, merged["packed"][name])


# --- the suite ------------------------------------------------------------------------------------


def test_shards_in_shards_out_and_from_pretrained_loads_the_merge(models, tmp_path):
    own = suite(models)
    output = tmp_path / "merged"
    merging.merge_checkpoints(
        models / "base",
        {task: own.expert(task, finetuning="full", seed=0) for task in own.tasks},
        merging.create("average"),
        output,
        layers=own.layers(),
        extra=checkpoints.companions(models / "base"),
    )
    index = "model.safetensors.index.json"
    assert (
        json.loads((output / index).read_text())["weight_map"]
        == (json.loads((models / "base" / index).read_text())["weight_map"])
    )
    base, first, second = (load(models / name) for name in ("base", "first", "second"))
    with torch.no_grad():
        for name, weight in base.named_parameters():
            deltas = [
                dict(m.named_parameters())[name].float() - weight.float() for m in (first, second)
            ]
            weight.copy_((weight.float() + torch.stack(deltas).mean(0)).bfloat16())
    merged = load(output)
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    ids = torch.arange(4, 20).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, base(ids).logits)
    assert AutoTokenizer.from_pretrained(output).get_vocab()
    assert (output / "generation_config.json").exists()


def test_each_benchmark_is_scored_once_under_its_own_name(models, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    own = suite(models, samples=str(tmp_path / "samples"))
    scores = own.evaluate(own.base(), "test", limit=9)
    assert {column: score.count for column, score in scores.items()} == {"animals": 9, "meals": 9}
    assert set(own.evaluate(own.base(), "test", ["second"], limit=2)) == {"meals"}
    assert not list((tmp_path / "cache").glob("judged-*"))
    assert list((tmp_path / "samples" / "decoders").glob("*/animals.jsonl.gz"))
    in_memory = training.expert_state({}, tiny_lm.model("llama") / "model.safetensors")
    assert set(in_memory) == set(own.base())


def test_a_task_held_out_is_judged_as_a_benchmark_of_the_suite_would_be(models):
    own = suite(models)
    expected = suite(models, benchmarks={"b": {"expert": "first", "task": "tiny_meals"}})
    (score,) = expected.evaluate(models / "second", "test", ["first"], 30).values()
    assert heldout.evaluate(own, models / "second", ["tiny_meals"], 30) == {"tiny_meals": score}
    in_memory = {name: tensor for name, tensor in load(models / "second").state_dict().items()}
    in_memory.pop("lm_head.weight")
    found = heldout.evaluate(own, in_memory, ["tiny_meals"], 30)
    assert found["tiny_meals"].accuracy == score.accuracy


def test_identity_is_the_checkpoints_bytes(models, copy):
    def digests(root):
        return suite(root).identity(finetuning="full", seed=0)["experts"]

    assert digests(models) == digests(copy)
    shard = sorted((copy / "first").glob("*.safetensors"))[0]
    save_file({n: t + 1 for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert digests(models)["first"] != digests(copy)["first"]
    assert digests(models)["second"] == digests(copy)["second"]


def test_second_moments_are_streamed_from_texts_with_their_cost(models, tmp_path):
    texts = ["the cat", "a cow was in the rain", "we saw some honey", "dust and heat"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {"path": "json", "data_files": str(file), "split": "train", "field": "text"}
    own = suite(models, texts={"first": given}, moment_memory=0)
    sizes = {"finetuning": "full", "seed": 0, "batches": 2, "batch_size": 2}
    path = own.statistics("first", "covariance", **sizes)
    cost = json.loads((path.parent / "cost.json").read_text())
    assert cost["bytes"] == path.stat().st_size
    assert cost["passes"] == 14
    key = json.loads((path.parent / "key.json").read_text())["key"]
    assert key["texts"] == given
    assert path.parent.name == digest(key)
    assert cost["seconds"] > 0
    expert = load(models / "first")
    rows = []
    for text in texts:
        ids = torch.tensor(AutoTokenizer.from_pretrained(models / "base")(text)["input_ids"])
        with torch.no_grad():
            rows.append(expert.model.layers[0].input_layernorm(expert.model.embed_tokens(ids)))
    z = torch.cat(rows).double()
    name = "model.layers.0.self_attn.q_proj.weight"
    with safe_open(path, "pt") as found:
        moment = unpack(found.get_tensor(name))
    torch.testing.assert_close(moment.double(), z.T @ z / len(z), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="no texts for the second moments of 'second'"):
        own.statistics("second", "covariance", **sizes)
    with pytest.raises(InputError, match="are 4, 6 were asked for"):
        own.statistics("first", "covariance", **sizes | {"batches": 3})
    with pytest.raises(InputError, match="has no fisher statistics"):
        own.statistics("first", "fisher", **sizes)


def test_rows_of_a_larger_vocabulary_follow_the_named_rule(models, copy):
    expert = load(copy / "second")
    expert.resize_token_embeddings(expert.config.vocab_size + 8, mean_resizing=False)
    shutil.rmtree(copy / "second")
    expert.save_pretrained(copy / "second")
    with pytest.raises(InputError, match=r"'model\.embed_tokens\.weight'"):
        suite(copy).base()
    own = suite(copy, vocabulary="common_rows")
    base = own.base()
    states = {
        t: training.expert_state({}, own.expert(t, finetuning="full", seed=0)) for t in own.tasks
    }
    merged = merging.merge_state_dicts(
        base,
        states,
        merging.create("average"),
        layers=own.layers(),
        vocabulary=own.backend.vocabulary,
    )
    name = "model.embed_tokens.weight"
    rows = [states[task][name][: len(base[name])].float() for task in own.tasks]
    expected = base[name].float() + torch.stack([r - base[name].float() for r in rows]).mean(0)
    torch.testing.assert_close(merged[name], expected.bfloat16())


def test_a_run_records_every_column_and_averages_single_attempts(models, tmp_path):
    from experiments.measurement import measure
    from experiments.settings import Experiment

    sampled = {"attempts": 2, "k": [1, 2], "generation": {"do_sample": True}}
    config = {
        "kind": "causal",
        "name": "decoders",
        "family": "random",
        "model": str(models / "base"),
        "experts": {name: str(models / name) for name in ("first", "second")},
        "benchmarks": BENCHMARKS | {"animals": BENCHMARKS["animals"] | sampled},
        "batch_size": 20,
        "device": "cpu",
    }
    method, tracker = {"name": "actmat"}, {"name": "none"}
    record = measure(Experiment(config, method, tracker, limit=8, records=str(tmp_path)))
    scores = {column: score["accuracy"] for column, score in record["scores"].items()}
    assert set(scores) == {"animals", "animals@2", "meals"}
    assert scores["animals"] == scores["animals@2"]  # nothing is drawn in a choice
    assert record["mean"] == pytest.approx((scores["animals"] + scores["meals"]) / 2)
    assert record["key"]["tasks"] == ["first", "second"]


# --- bad input, told before any merging -----------------------------------------------------------


def refused(root, match, **changes):
    with pytest.raises(InputError, match=match) as error:
        suite(root, **changes).base()
    assert "\n" not in error.value.message


def test_a_missing_shard(copy):
    shard = sorted((copy / "first").glob("*.safetensors"))[1]
    shard.unlink()
    refused(copy, shard.name)


def test_an_index_that_names_an_absent_tensor(copy):
    index = copy / "second" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    shard = next(iter(told["weight_map"].values()))
    told["weight_map"]["model.layers.7.mlp.up_proj.weight"] = shard
    index.write_text(json.dumps(told))
    refused(copy, r"model\.layers\.7\.mlp\.up_proj\.weight")


def test_a_tokenizer_that_differs(copy):
    file = copy / "second" / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    file.write_text(json.dumps(told))
    refused(copy, r"tokenizer of expert 'second' .* token \d+ is '(cat|dog)', expected '(cat|dog)'")


def adapter(folder, base_name, width=32):
    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none",
        "base_model_name_or_path": base_name, "task_type": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{path}.lora_A.weight": torch.ones(2, width),
        f"{path}.lora_B.weight": torch.ones(32, 2),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return str(folder)


def test_an_adapter_of_another_base(models, tmp_path):
    wide = {"first": adapter(tmp_path / "wide", "owner/large", width=64)}
    refused(models, r"expert 'first' .*q_proj.* \[32, 64\]", experts=wide, benchmarks={})
    two = {
        "first": adapter(tmp_path / "one", "owner/base"),
        "second": adapter(tmp_path / "other", "owner/another"),
    }
    refused(models, "trained on different bases", experts=two, benchmarks={})
    with pytest.raises(InputError, match="adapter of owner/another, expected owner/base"):
        checkpoints.require_mergeable(
            models / "base",
            {"second": tmp_path / "other"},
            vocabulary="refuse",
            name="owner/base",
        )


def test_an_adapter_that_fits_is_an_expert(models, tmp_path):
    own = suite(models, experts={"first": adapter(tmp_path / "fits", "x")}, benchmarks={})
    path = own.expert("first", finetuning="lora", seed=0)
    state = training.expert_state(own.base(), path)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(state[name], own.base()[name] + 2)
    with pytest.raises(InputError, match="is published as lora"):
        own.expert("first", finetuning="full", seed=0)


def test_benchmarks_that_cannot_run(models, monkeypatch):
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(  # 14,000 tasks take ten seconds to read
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, include_defaults=True: real(
            include_path=include_path, include_defaults=False
        ),
    )
    refused(models, "knows no task 'aime31'", benchmarks={"aime31": {"expert": "first"}})
    refused(
        models,
        "benchmark 'animals' has no setting 'shots'",
        benchmarks={"animals": BENCHMARKS["animals"] | {"shots": 3}},
    )
    refused(
        models,
        "belongs to expert 'third'",
        benchmarks={"animals": {"expert": "third", "task": "tiny_animals"}},
    )


def test_a_chat_template_that_is_not_there(copy):
    for file in (copy / "base").glob("chat_template.jinja"):
        file.unlink()
    config = copy / "base" / "tokenizer_config.json"
    told = json.loads(config.read_text())
    told.pop("chat_template", None)
    config.write_text(json.dumps(told))
    refused(copy, "has no chat template", chat_template=True)


def test_names_that_lead_nowhere(models, hub):
    refused(models, "does not exist", model=str(models / "none"))
    name = "allenai/Olmo-3-1025-7B"
    refused(models, f"the hub has no repository {name}, or it is private", model=name)
    hub.model(name, models / "base", gated=True)
    refused(models, f"{name} is gated", model=name)
    with hub.offline():
        refused(models, f"{name} is not on this machine, and the hub .* no network", model=name)


def test_only_the_test_split_exists(models):
    own = suite(models)
    with pytest.raises(InputError, match="have no validation split"):
        own.evaluate(own.base(), "validation")
    with pytest.raises(InputError, match="no task 'third'"):
        own.expert("third", finetuning="full", seed=0)


@pytest.mark.parametrize(
    "name",
    ["olmo3_7b", *(f"mergebench_{m}" for m in ("llama_3b", "llama_8b", "gemma_2b", "gemma_9b"))],
)
def test_the_published_suites_are_as_published(name):
    made = build(
        OmegaConf.to_container(OmegaConf.load(f"configs/suite/{name}.yaml"), resolve=True)
    ).backend
    assert not made.allow_code_execution
    benchmarks = made._benchmarks
    assert {made._columns[column]["expert"] for column in benchmarks} == set(made.tasks)
    if name == "olmo3_7b":
        humaneval, aime, ifeval = (benchmarks[c] for c in ("humaneval", "aime25", "ifeval"))
        assert (humaneval.attempts, list(humaneval.k)) == (20, [1, 10])
        assert (aime.attempts, list(aime.k)) == (32, [1, 32])
        sampled = {"do_sample": True, "top_p": 0.95, "max_gen_toks": 15360}
        assert humaneval.generation == sampled | {"temperature": 0.8}
        assert aime.generation == sampled | {"temperature": 0.6}
        assert ifeval.generation == {"do_sample": False, "max_gen_toks": 2048}
        assert ifeval.metric == "prompt_level_loose_acc"
    else:
        assert len(made.tasks) == 5
        assert made.vocabulary == "common_rows"

"""OLMo and MergeBench from the hub to the printed table: protocols, templates, rooms, folders."""

import functools
import gzip
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from eval.language import benchmarks, causal, checkpoints, judge, olmo
from eval.language.benchmarks import Benchmark
from experiments import suites
from experiments.report import records
from experiments.suites import build
from merging.errors import InputError
from tests.fixtures import language

ROOT = Path(__file__).parents[1]
SHORT = "{do_sample: true, temperature: 1.0, top_p: 0.95, max_gen_toks: 4}"
QUICK = [
    "suite=olmo3_7b", "suite.allow_code_execution=true", "device=cpu",
    "suite.backend_options.max_length=256", "suite.backend_options.dtype=float32",
    *(f"+suite.benchmarks.{c}={{generation: {SHORT}, attempts: 3, k: [1, 2]}}"
      for c in ("humaneval", "humaneval_plus", "aime24", "aime25")),
    "+suite.benchmarks.ifeval={generation: {do_sample: false, max_gen_toks: 4}}",
]  # fmt: skip


@pytest.fixture
def stocked(hub, tmp_path, monkeypatch):
    import nltk

    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    checkpoints._tokenizer.cache_clear()
    language.add_olmo(hub, tmp_path / "sets")
    return hub


@pytest.fixture
def index(monkeypatch):
    """lm-eval's index of 14,000 tasks, which takes ten seconds to read, read once."""
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", _manager)


@functools.cache
def _manager(include_path, include_defaults=True):
    from lm_eval.tasks.manager import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def suite(**changes):
    config = OmegaConf.load("configs/suite/olmo3_7b.yaml")
    config.update({"allow_code_execution": True} | changes)
    return build(OmegaConf.to_container(config, resolve=True))


# --- what can be told before a download -----------------------------------------------------------


def test_room_for_a_prompt_is_checked_before_anything_is_fetched(stocked):
    stocked.requests.clear()
    with pytest.raises(
        InputError,
        match="'humaneval' may write 15360 tokens, which leaves no room "
        r"for a prompt in a context of 8192 \(suite.backend_options.max_length\)",
    ):
        suite(backend_options={"max_length": 8192}).backend.check(["math"])
    assert not stocked.requests
    with pytest.raises(InputError, match=r"in a context of 4096 \(the model's own\)"):
        suite(backend_options={}).backend.check(["math"])
    assert {request.file for request in stocked.requests if request.method == "GET"} <= {
        "config.json"
    }
    suite().backend.check(["math"])


def test_every_published_protocol_leaves_room_for_prompts(index, monkeypatch):
    monkeypatch.setattr(causal.CausalBackend, "_template", lambda self, column: None)
    monkeypatch.setattr(benchmarks, "require_resources", lambda benchmarks: None)
    for path in (
        *ROOT.glob("configs/suite/mergebench_*.yaml"),
        ROOT / "configs/suite/olmo3_7b.yaml",
    ):
        config = OmegaConf.load(path)
        config.allow_code_execution = True
        for protocol in config.get("protocols") or [None]:
            config.update({"protocol": protocol} if protocol else {})
            build(OmegaConf.to_container(config, resolve=True)).backend.check(list(config.experts))


def test_a_template_is_asked_of_the_named_tokenizer_without_its_weights(stocked):
    assert suite().backend._template("ifeval") == language.chat("rain")
    later = suite(protocol="later")
    assert (
        later.backend._template("ifeval")
        == later.backend._template("humaneval")
        == language.chat("honey")
    )
    assert later.backend._template("aime24") == language.chat("rain")
    assert suite(protocol="ours").backend._template("ifeval") is None
    assert not any("safetensors" in file for _, file in stocked.downloads)
    with pytest.raises(
        InputError, match="tokenizer of allenai/Olmo-3-1025-7B has no chat"
    ) as error:
        suite(protocol="ours", chat_template=True).backend._template("ifeval")
    assert "suite.tokenizer=OWNER/NAME" in error.value.hint


def test_an_unknown_protocol_is_refused():
    with pytest.raises(Exception, match="protocol is 'papr', expected one of: paper, later, ours"):
        suite(protocol="papr")


def test_ifeval_without_its_sentences_is_refused(stocked, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *args, **given: False)
    with pytest.raises(InputError, match="IFEval counts sentences with NLTK's punkt_tab"):
        suite().backend.check(["if"])


def test_a_checkpoint_is_known_before_it_is_fetched_and_without_a_network(stocked):
    name = "allenai/Olmo-3-1025-7B"
    stated = checkpoints.digests(name), checkpoints.size(name)
    assert not any("safetensors" in file for _, file in stocked.downloads)
    folder = checkpoints.local(name)
    assert stated == (checkpoints.file_digests(folder), checkpoints.size(str(folder)))
    with stocked.offline():
        assert (checkpoints.digests(name), checkpoints.size(name)) == stated


# --- keys -----------------------------------------------------------------------------------------


def test_whatever_decides_a_figure_is_in_the_key():
    known = suite().backend.protocol_key()
    changes = [
        {"protocol": "later"},
        {"protocol": "ours"},
        {"backend": "vllm"},
        {"backend_options": {"dtype": "float32", "max_length": 16384}},
        {"tokenizer": "allenai/Olmo-3-7B-RL-Zero-Code"},
        {"chat_template": "allenai/Olmo-3-7B-RL-Zero-IF"},
        {"benchmarks": {"ifeval": {"metric": "inst_level_loose_acc"}}},
        {"benchmarks": {"ifeval": {"generation": {"max_gen_toks": 8}}}},
        {"benchmarks": {"aime24": {"attempts": 64}}},
        {"benchmarks": {"aime24": {"fewshot": 1}}},
        {"benchmarks": {"mbpp": {"expert": "code"}}},
        {"vocabulary": "common_rows"},
        {"metric": "other"},
    ]
    keys = [known, *(suite(**change).backend.protocol_key() for change in changes)]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    measured = [{}, {"max_tokens": 8}, {"texts": {"if": {"split": "test"}}},
                {"measured_through": "expert"}]  # fmt: skip
    keys = [suite(**change).backend.protocol_key(statistics=True) for change in measured]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert len({json.dumps(suite(**change).backend.protocol_key()) for change in measured}) == 1


# --- parts ----------------------------------------------------------------------------------------


def test_answers_are_read_flexibly():
    doc = {"answer": "073"}
    right = ["\\boxed{73}", "so \\boxed{12} no, \\boxed{073}.", "The answer is 73, I think: 5 left",
             "Answer: $73$ since 1 + 1 = 2", "... which gives 73."]  # fmt: skip
    assert [olmo.matched(doc, [text])["exact_match_flex"] for text in right] == [1] * 5
    wrong = ["73 or \\boxed{12}", "", "none", "\\boxed{7 3 }x 12"]
    assert [olmo.matched(doc, [text])["exact_match_flex"] for text in wrong[:3]] == [0] * 3
    assert [olmo.year(language.aime(i)) for i in range(4)] == ["2024", "2025", "2024", "2023"]
    assert olmo.year({"url": "https://x/2025_AIME_II_Problems/Problem_1"}) == "2025"


def test_a_program_is_the_beginning_and_the_answer_up_to_the_fence():
    (own,) = olmo.programs([["def f():\n    return 1\n```\nbye", "    return 2"]],
                           [{"prompt": "def f():\n"}])  # fmt: skip
    assert own == ["def f():\n\ndef f():\n    return 1\n", "def f():\n\n    return 2"]


def test_a_batch_is_as_large_as_memory_allows():
    config = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32,
              "vocab_size": 100_000, "num_key_value_heads": 8}  # fmt: skip
    row = (
        16384 * 32 * 2 * 8 * 128 * 2 + 2 * 4 * 1024 * 100_000
    )  # 2.1 GB of keys and values, .8 of logits
    sizes = {"context": 16384, "weights": 15 * 10**9}
    assert judge.rows_that_fit(config, free=15 * 10**9 + 10 * row, **sizes) == 8
    assert judge.rows_that_fit(config, free=10**9, **sizes) == 1
    assert judge.rows_that_fit(config, free=10**13, **sizes) == 64


def test_prompts_that_would_be_cut_are_an_error(stocked):
    lm = judge.load_lm("hf", {"pretrained": str(language.decoder(0, None)), "max_length": 12},
                       batch_size=2, device="cpu")  # fmt: skip
    benchmark = Benchmark("olmo_aime24", generation={"max_gen_toks": 8})
    with pytest.raises(
        InputError,
        match="prompts of benchmark 'aime24' do not fit into a context of "
        "12 tokens beside the longest answer",
    ):
        judge.judge(lm, "aime24", benchmark, benchmarks.task_manager([benchmark]))


def test_all_attempts_are_asked_for_in_one_call(stocked):
    lm = judge.load_lm("hf", {"pretrained": str(language.decoder(0, None)), "max_length": 256},
                       batch_size=8, device="cpu")  # fmt: skip
    calls, ask = [], lm.generate_until
    lm.generate_until = lambda requests, **given: (
        calls.append(len(requests)) or ask(requests, **given)
    )
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4}
    benchmark = Benchmark("olmo_aime24", attempts=4, k=(1, 2), generation=sampled)
    found = judge.judge(lm, "aime24", benchmark, benchmarks.task_manager([benchmark]))
    assert calls == [4 * 6]  # six problems of 2024
    answers = {}
    for sample in found.samples:
        answers.setdefault(sample["doc_id"], []).append(sample["filtered_resps"][0])
    assert {len(own) for own in answers.values()} == {4}
    assert any(len(set(own)) > 1 for own in answers.values())
    assert found.sources["datasets/allenai/aime-2021-2025"] == (
        stocked.repositories["datasets", "allenai/aime-2021-2025"].commit
    )


# --- the command ----------------------------------------------------------------------------------


def kept(tmp_path, column):
    """The prompts of a benchmark, over all models that were judged."""
    files = (tmp_path / "samples").rglob(f"{column}.jsonl.gz")
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    return [json.loads(line)["arguments"] for line in lines]


def test_the_command_prints_the_table_and_another_protocol_is_another_record(
    stocked, tmp_path, monkeypatch
):
    line = [*QUICK, f"records={tmp_path}/records", f"suite.samples={tmp_path}/samples"]
    held = []
    monkeypatch.setattr(causal.CausalBackend, "base", lambda self: held.append(1))
    code, out, err = stocked.run("experiments.run", *line, "method=average")
    assert code == 0, err
    for column in ("humaneval", "humaneval@2", "humaneval_plus", "ifeval", "aime24", "aime25@2"):
        assert column in out
    assert not held  # no state dict of a whole model was ever made
    assert not list((tmp_path / "home/merging").glob("judged-*"))
    weights = {file for (_, file), count in stocked.downloads.items() if count > 1}
    assert not weights
    record = records.load(next((tmp_path / "records/olmo3_7b").glob("average-*.json")))
    assert record["key"]["protocol"]["name"] == "paper"
    assert record["sources"]["allenai/Olmo-3-1025-7B"]
    assert record["sources"]["datasets/HuggingFaceH4/ifeval"]
    assert record["scores"]["aime24"]["count"] == 6
    assert "rain" in str(kept(tmp_path, "ifeval")[0])
    assert str(kept(tmp_path, "humaneval")[0]).count("```python") == 1
    stocked.requests.clear()
    code, again, _ = stocked.run("experiments.run", *line, "method=average")
    assert (code, again) == (0, out)
    assert not stocked.downloads
    code, out, err = stocked.run("experiments.run", *line, "method=average", "protocol=later",
                                 "tasks=[if]")  # fmt: skip
    assert code == 0, err
    found = [records.load(p) for p in (tmp_path / "records/olmo3_7b").glob("average-*.json")]
    assert {r["key"]["protocol"]["name"] for r in found} == {"paper", "later"}
    prompts = {str(arguments) for arguments in kept(tmp_path, "ifeval")}
    assert any("<s> honey the" in prompt for prompt in prompts)


def test_regmean_reads_the_papers_prompts_through_the_base(stocked, tmp_path):
    line = [*QUICK, f"records={tmp_path}/records", "suite.samples=null", "method=regmean",
            "tasks=[if]", "statistics.batches=2", "statistics.batch_size=4"]  # fmt: skip
    code, out, err = stocked.run("experiments.run", *line)
    assert code == 0, err
    assert "regmean" in out
    record = records.load(next((tmp_path / "records/olmo3_7b").glob("regmean-*.json")))
    told = record["key"]["protocol"]["statistics"]
    assert (told["in"], told["tokens"]) == ("base", 256)
    assert told["texts"]["if"]["path"] == "allenai/Dolci-RL-Zero-IF-7B"
    assert record["sources"]["datasets/allenai/Dolci-RL-Zero-IF-7B"]


def test_without_permission_to_run_code_nothing_is_fetched(stocked, tmp_path):
    stocked.requests.clear()
    code, _, err = stocked.run("experiments.run", "suite=olmo3_7b", "method=average",
                               f"records={tmp_path}")  # fmt: skip
    assert code == 2
    assert "executes code that the model wrote" in err
    assert not stocked.requests


GENERATED = {"ifeval": "instruction", "gsm8k": "math", "humaneval_plus": "coding",
             "mbpp_plus": "coding"}  # fmt: skip


@pytest.mark.parametrize("name", ["llama_8b", "llama_3b", "gemma_2b", "gemma_9b"])
def test_mergebench_prints_its_columns(name, stocked, index, tmp_path, monkeypatch):
    """All columns of the first, the mathematical one of the others."""
    language.add_mergebench(stocked, tmp_path / "more")
    monkeypatch.setenv("HF_TOKEN", stocked.token)
    for repository in stocked.repositories.values():
        repository.gated = False
    line = [f"suite=mergebench_{name}", f"records={tmp_path}/records", "device=cpu", "limit=2",
            "suite.allow_code_execution=true", f"suite.samples={tmp_path}/samples",
            "suite.backend_options={dtype: float32, max_length: 2048}"]  # fmt: skip
    line += [f"+suite.benchmarks.{c}.generation={{max_gen_toks: 4}}" for c in GENERATED]
    line += [] if name == "llama_8b" else ["tasks=[math]"]
    code, out, err = stocked.run("experiments.run", *line, "method=average")
    assert code == 0, err
    columns = ["gsm8k", "mean"]
    if name == "llama_8b":
        columns += [*GENERATED, "arc_fr", "arc_es", "arc_de", "arc_ru", "toxigen"]
    assert all(column in out for column in columns)
    assert max(stocked.downloads.values()) == 1
    stocked.requests.clear()
    assert stocked.run("experiments.run", *line, "method=average")[:2] == (0, out)
    assert not stocked.downloads


def test_a_gated_base_is_one_sentence(stocked, index, tmp_path):
    language.add_mergebench(stocked, tmp_path / "more")
    line = ["suite=mergebench_gemma_2b", "suite.allow_code_execution=true", "method=average"]
    code, _, err = stocked.run("experiments.run", *line, f"records={tmp_path}/records")
    assert code == 2
    assert "google/gemma-2-2b-it is gated: its licence has to be accepted" in err
    assert not any("safetensors" in file for _, file in stocked.downloads)


def test_mergebench_is_judged_by_each_models_own_folder(stocked, tmp_path):
    for seed, name in enumerate(("instruction", "math", "multilingual", "coding", "safety"), 1):
        hub_name = f"MergeBench/Llama-3.2-3B-Instruct_{name}"
        stocked.model(hub_name, language.decoder(seed, language.chat(name)))
    stocked.model("meta-llama/Llama-3.2-3B-Instruct", language.decoder(0, language.chat("base")))
    line = ["suite=mergebench_llama_3b", f"records={tmp_path}/records", "device=cpu",
            f"suite.samples={tmp_path}/samples", "suite.chat_template=true",
            "suite.backend_options={dtype: float32, max_length: 256}",
            "~suite.benchmarks",
            "+suite.benchmarks.ifeval={expert: instruction, task: olmo_ifeval, "
            "generation: {max_gen_toks: 4}}",
            "+suite.benchmarks.animals={expert: math, task: tiny_animals}"]  # fmt: skip
    code, out, err = stocked.run("experiments.run", *line, "method=actmat",
                                 "tasks=[instruction,math]", "limit=3")  # fmt: skip
    assert code == 0, err
    assert "ifeval" in out and "animals" in out
    prompts = " ".join(str(arguments) for arguments in kept(tmp_path, "ifeval"))
    assert "<s> instruction the" in prompts  # the expert, with its own template
    assert "<s> base the" in prompts  # the base and the merge


def test_the_papers_table_is_one_command(stocked, tmp_path):
    """All five benchmarks, one attempt each; and the rows are known without the checkpoints."""
    own = [argument for argument in QUICK if not argument.startswith(("suite=", "device="))]
    own = [argument.replace("attempts: 3, k: [1, 2]", "attempts: 1, k: [1]") for argument in own]
    line = ["olmo3_7b", f"records={tmp_path}/records", f"output={tmp_path}/results", "device=cpu",
            "suite.samples=null", "statistics.batches=1", "statistics.batch_size=4",
            *own]  # fmt: skip
    roomy = ["paper.cost.gpu_gb=0", "paper.cost.memory_gb=0"]
    code, out, err = stocked.run("experiments.paper", *line, *roomy, "--dry-run")
    assert code == 0, err
    assert "allenai/Olmo-3-7B-RL-Zero-Math" in out
    assert "to do  regmean" in out
    assert re.search(r"data aime24, aime25 +│ allenai/aime-2021-2025 +│ 1 ", out)
    assert re.search(r"data inputs math +│ allenai/Dolci-RL-Zero-Math-7B +│ 1 ", out)
    assert not any(file.endswith((".safetensors", ".parquet")) for _, file in stocked.downloads)
    code, out, err = stocked.run("experiments.paper", *line, *roomy)
    assert code == 0, err
    assert "difference" in out
    table = pd.read_csv(tmp_path / "results/paper/olmo3_7b.csv")
    for row in ("actmat", "regmean", "tsv_m", "task_arithmetic (alpha=0.4)", "experts"):
        ours = table[table.method.str.startswith(row) & table.ours.notna()]
        columns = {"humaneval", "humaneval_plus", "ifeval", "aime24", "aime25", "mean"}
        assert set(ours.task) == columns, row
    assert max(stocked.downloads.values()) == 1
    for removed in (False, True):
        if removed:  # 60 GB that are no longer needed
            shutil.rmtree(tmp_path / "home/hub")
        stocked.requests.clear()
        suites._suite.cache_clear()  # as in a new process
        checkpoints._tokenizer.cache_clear()
        code, out, err = stocked.run("experiments.paper", *line, *roomy)
        assert code == 0, err
        assert "difference" in out
        assert "to do" not in out
        assert not any(file.endswith((".safetensors", ".parquet")) for _, file in stocked.downloads)
        assert removed or not stocked.downloads

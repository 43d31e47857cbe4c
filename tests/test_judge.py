"""lm-eval as the judge: what is refused before any work, what is counted, what is kept."""

import gzip
import json
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.language import benchmarks, judge
from eval.language.benchmarks import Benchmark
from eval.tiny import models as tiny_lm
from merging.errors import InputError

GENERATION = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 1, "until": []}
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def lm():
    arguments = {"pretrained": str(tiny_lm.model("llama"))}
    return judge.load_lm("hf", arguments, batch_size=8, device="cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Local tasks of every kind: choices, generation, execution of code, a group, a tag."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": word, "label": "yes"} for word in ("cat", "dog", "cow", "rain", "sun")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"""
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: {folder / "rows.jsonl"} }} }}
test_split: test
doc_to_text: "Question: {{{{text}}}} Answer:"
doc_to_target: "{{{{label}}}}"
metadata: {{ version: 7.0 }}
"""
    exact = "output_type: generate_until\nmetric_list: [{metric: exact_match}]\n"
    files = {
        "choose": "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "write": exact,
        "run": exact + "unsafe_code: true\n",
    }
    for name, own in files.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\ntag: everything\n{data}{own}")
    (folder / "both.yaml").write_text("group: both\ntask: [choose, run]\n")
    return folder


def manager(tasks, *names, **options):
    return benchmarks.task_manager([Benchmark(name) for name in names], local=tasks, **options)


def test_an_unknown_task_is_named_with_what_is_close(tasks, monkeypatch):
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    fast = lambda include_path, include_defaults=True: real(  # noqa: E731
        include_path=include_path, include_defaults=False
    )
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", fast)  # 14,000 tasks take ten seconds
    with pytest.raises(InputError, match="lm-eval knows no task 'chose'") as error:
        manager(tasks, "choose", "chose")
    assert "choose" in error.value.hint


@pytest.mark.parametrize("name", ["run", "both"])
def test_generated_code_runs_only_when_it_was_allowed(tasks, name):
    with pytest.raises(InputError, match="task 'run' executes code that the model wrote") as error:
        manager(tasks, name)
    assert "allow_code_execution" in error.value.hint
    assert name in manager(tasks, name, allow_code_execution=True).all_tasks


def test_lm_evals_own_code_tasks_are_marked(tasks):
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent
    for file in ("humaneval/humaneval", "humaneval/humaneval_plus", "mbpp/mbpp", "mbpp/mbpp_plus"):
        assert load_yaml(folder / f"{file}.yaml", resolve_func=False)["unsafe_code"] is True


def test_a_tag_is_refused_by_naming_its_tasks(tasks):
    with pytest.raises(InputError, match="'everything' is a tag") as error:
        manager(tasks, "everything")
    assert "choose, run, write" in error.value.hint


def test_backends_are_lm_evals(tmp_path):
    with pytest.raises(InputError, match="knows no backend 'hff'") as error:
        judge.load_lm("hff", {}, batch_size=1, device="cpu")
    assert "vllm" in error.value.hint
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(InputError, match="needs the package 'vllm'"):
            judge.load_lm("vllm", {"pretrained": str(tmp_path)}, batch_size=1, device="cpu")


@pytest.mark.parametrize("broken", [{"attempts": 2, "k": (1, 4)}, {"k": (2,)}, {"attempts": 2}])
def test_a_protocol_that_cannot_be_is_refused(broken):
    with pytest.raises(InputError, match="benchmark 'aime24'"):
        Benchmark("aime24", **broken)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert math.isclose(judge.pass_at_k(n, c, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12)


def test_choices_are_ranked_by_the_models_own_log_likelihood(lm, tasks):
    found = judge.judge(lm, "column", Benchmark("choose"), manager(tasks, "choose"))
    right = 0
    for word in ("cat", "dog", "cow", "rain", "sun"):
        ids = lm.tokenizer(f"Question: {word} Answer:", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = lm.model(ids).logits[0, -1]
        yes, no = (lm.tokenizer(answer)["input_ids"][0] for answer in ("yes", "no"))
        right += bool(logits[yes] >= logits[no])
    assert found.scores.keys() == {"column"}
    assert found.scores["column"][:3] == (right / 5, 5, right in (0, 5))
    assert found.about["versions"] == {"choose": 7.0}
    assert found.about["metric"] == "acc,none"
    assert len(found.samples) == 5


def test_limit_metric_and_their_errors(lm, tasks):
    own = manager(tasks, "choose")
    found = judge.judge(lm, "c", Benchmark("choose", metric="acc_norm"), own, limit=3)
    assert found.scores["c"].count == 3
    assert found.about["metric"] == "acc_norm,none"
    with pytest.raises(InputError, match="has no metric 'f1'") as error:
        judge.judge(lm, "c", Benchmark("choose", metric="f1"), own, limit=1)
    assert "acc,none; acc_norm,none" in error.value.hint


def test_attempts_are_lm_evals_own_with_other_seeds(lm, tasks):
    """pass@1 and pass@k recomputed from the answers that were kept."""
    benchmark = Benchmark("write", attempts=4, k=(1, 2, 4), generation=GENERATION)
    found = judge.judge(lm, "w", benchmark, manager(tasks, "write"))
    answers = {}
    for sample in found.samples:
        answers.setdefault(sample["doc_id"], []).append(sample["filtered_resps"][0])
    assert {len(tries) for tries in answers.values()} == {4}
    assert len({text for tries in answers.values() for text in tries}) > 1
    correct = [sum(text == "yes" for text in tries) for tries in answers.values()]
    for column, k in {"w": 1, "w@2": 2, "w@4": 4}.items():
        expected = sum(judge.pass_at_k(4, c, k) for c in correct) / 5
        assert found.scores[column].accuracy == pytest.approx(expected)
    again = judge.judge(lm, "w", benchmark, manager(tasks, "write"))
    assert again.scores == found.scores


def test_a_constant_answer_is_flagged(tasks):
    arguments = {"pretrained": str(tiny_lm.model("llama"))}
    dull = judge.load_lm("hf", arguments, batch_size=8, device="cpu")
    with torch.no_grad():
        for parameter in dull.model.parameters():
            parameter.zero_()
    for name in ("choose", "write"):
        benchmark = Benchmark(name, generation={"max_gen_toks": 2} if name == "write" else {})
        own = manager(tasks, name)
        assert judge.judge(dull, name, benchmark, own).scores[name].constant
        assert not judge.judge(dull, name, benchmark, own, limit=1).scores[name].constant


def test_the_chat_template_changes_the_prompt_and_the_hash(lm, tasks):
    own = manager(tasks, "choose")
    plain = judge.judge(lm, "c", Benchmark("choose"), own)
    chat = judge.judge(lm, "c", Benchmark("choose", chat_template=True), own)
    prompt = chat.samples[0]["arguments"][0][0]
    assert prompt.startswith("<s> Question:")
    assert "</s>" in prompt
    assert chat.about["task_hash"] != plain.about["task_hash"]


def test_scores_versions_and_every_sample_are_kept(lm, tasks, tmp_path):
    found = judge.judge(lm, "c", Benchmark("choose"), manager(tasks, "choose"))
    judge.keep({"c": found}, tmp_path)
    summary = json.loads((tmp_path / "c.json").read_text())
    assert summary["scores"]["c"]["accuracy"] == found.scores["c"].accuracy
    assert summary["about"]["versions"] == {"choose": 7.0}
    samples = [
        json.loads(line)
        for line in gzip.decompress((tmp_path / "c.jsonl.gz").read_bytes()).splitlines()
    ]
    assert [sample["doc"]["text"] for sample in samples] == ["cat", "dog", "cow", "rain", "sun"]


def test_a_fingerprint_is_of_names_and_bytes():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    same = dict(reversed(state.items()))
    assert judge.fingerprint(state) == judge.fingerprint(same)
    assert judge.fingerprint(state) != judge.fingerprint(state | {"a": torch.arange(4.0) + 1})


def test_permission_to_run_code_ends_with_the_evaluation(lm, tasks, monkeypatch):
    import os

    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with judge._code_execution(True):
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    benchmark = Benchmark("run", generation={"max_gen_toks": 1})
    own = manager(tasks, "run", allow_code_execution=True)
    with pytest.raises(ValueError, match="marked as unsafe"):
        judge.judge(lm, "r", benchmark, own)  # the second lock: lm-eval's own
    assert judge.judge(lm, "r", benchmark, own, allow_code_execution=True).scores["r"].count == 5

"""The seven T5 tasks from the hub to the printed table, under the paper's protocol and ours."""

import random
import sys
import types
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from eval.language import prompts, promptsource, questions, ranking
from eval.language.questions import Example
from eval.language.seq2seq import Seq2SeqBackend
from eval.suite import Suite
from eval.tiny import models as tiny_lm
from experiments.report import records
from experiments.suites import build
from merging.errors import InputError
from tests.fixtures import language

SIX = ["qasc", "wiki_qa", "quartz", "paws", "winogrande", "wsc"]
QUICK = ["suite.recipes.full.steps=2", "suite.recipes.full.batch_size=8",
         "suite.recipes.full.accumulate=1", "suite.recipes.full.validate_every=1",
         "suite.precision=fp32", "suite.max_tokens=24", "device=cpu"]  # fmt: skip


@pytest.fixture
def stocked(hub, tmp_path):
    language.add_language7(hub, tmp_path / "sets")
    return hub


def suite(**changes) -> Suite:
    config = OmegaConf.load("configs/suite/language7_t5_base.yaml")
    config.update({"precision": "fp32", "max_tokens": 24} | changes)
    return build(OmegaConf.to_container(config, resolve=True))


# --- data -----------------------------------------------------------------------------------------


def test_only_the_data_of_the_tasks_in_question_is_read(stocked):
    own = suite(tasks=["qasc"])
    assert len(own.backend._splits("qasc")["train"]) == 40
    asked = {request.repository for request in stocked.requests}
    assert asked == {"allenai/qasc", "google-t5/t5-base"}
    commit = stocked.repositories["datasets", "allenai/qasc"].commit
    assert own.backend.sources()["datasets/allenai/qasc"] == commit
    assert own.backend.sources()["google-t5/t5-base"]


def test_story_cloze_is_refused_before_anything_is_asked_of_the_hub(stocked):
    stocked.requests.clear()
    with pytest.raises(InputError, match="Story Cloze has to be asked for") as error:
        suite().backend.check(["story_cloze"])
    assert "suite.data.story_cloze=FOLDER" in error.value.hint
    assert "tasks=[qasc,wiki_qa,quartz,paws,winogrande,wsc]" in error.value.hint
    assert not stocked.requests


@pytest.mark.parametrize("names", ["theirs", "published"])
def test_story_cloze_is_read_from_csv_files(stocked, tmp_path, names):
    folder = language.cloze_folder(tmp_path / "cloze")
    if names == "published":
        columns = {v: k for k, v in questions.CLOZE_COLUMNS.items()}
        for split, name in (("validation", "val"), ("test", "test")):
            old = folder / f"cloze_{split}_2016.csv"
            text = old.read_text()
            for ours, theirs in columns.items():
                text = text.replace(ours, theirs, 1)
            (folder / f"cloze_test_{name}__spring2016 - cloze_test_ALL_{name}.csv").write_text(text)
            old.unlink()
    own = suite(tasks=["story_cloze"], data={"story_cloze": str(folder)})
    splits = own.backend._splits("story_cloze")
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 40, "validation": 32, "test": 12,
    }  # fmt: skip
    other = [language.cloze(i) for i in range(44)]
    random.Random(42).shuffle(other)
    assert [e.answer for e in splits["test"]] == [
        row["answer_right_ending"] - 1 for row in other[32:]
    ]


def test_a_folder_has_some_tasks_and_the_hub_the_others(stocked, tmp_path):
    language.cloze_folder(tmp_path / "data" / "story_cloze")
    own = suite(tasks=["story_cloze", "wsc"], data=str(tmp_path / "data"))
    assert len(own.backend._splits("story_cloze")["test"]) == 12
    assert len(own.backend._splits("wsc")["test"]) == 12
    with pytest.raises(InputError, match=r"suite\.data\.wsc is /none, which is no folder"):
        suite(tasks=["wsc"], data={"wsc": "/none"}).backend._splits("wsc")


@pytest.mark.parametrize("task", SIX)
def test_the_papers_subsets_are_cut_as_its_code_cuts_them(stocked, task):
    splits = suite(tasks=[task]).backend._splits(task)
    read = prompts.TASKS[task].read
    held = prompts.TASKS[task].held_out
    if held:
        labelled = language.rows(task, held)
        random.Random(42).shuffle(labelled)
        parts = {"validation": labelled[:32], "test": labelled[32:]}
    else:
        parts = {split: language.rows(task, split) for split in ("validation", "test")}
    parts["train"] = language.rows(task, "train")
    for split, own in parts.items():
        assert [e.answer for e in splits[split]] == [read(row).answer for row in own], split


def test_our_protocol_tests_on_all_that_is_published(stocked):
    own = suite(tasks=["wsc", "quartz"], protocol="ours", validation=10)
    sizes = {t: {s: len(e) for s, e in own.backend._splits(t).items()} for t in own.tasks}
    assert sizes["wsc"] == {"train": 30, "validation": 10, "test": 44}
    assert sizes["quartz"] == {"train": 30, "validation": 10, "test": 12}


def test_questions_are_tokenised_once(stocked, monkeypatch):
    first = suite(tasks=["wsc"]).backend._splits("wsc")
    stocked.requests.clear()
    monkeypatch.setattr(Seq2SeqBackend, "_tokens", None)
    assert suite(tasks=["wsc"]).backend._splits("wsc") == first
    assert not stocked.downloads


# --- prompts and scores ---------------------------------------------------------------------------


def test_the_papers_prompts_come_from_template_files(stocked, tmp_path):
    templates = language.templates_folder(tmp_path / "templates")
    own = suite(tasks=SIX, templates=str(templates))
    asked, _ = own.backend._questions("wiki_qa").asked()
    assert asked["test"][1] == ("where is the rain is near the honey?", ["No", "Yes"], 1)
    asked, _ = own.backend._questions("qasc").asked()
    assert asked["train"][3][1:] == (list(language.WORDS), 3)
    told = own.backend.protocol_key()["prompts"]["wsc"]
    assert (told["of"], told["name"]) == ("promptsource", "does the pronoun refer to")
    for task in SIX:  # every template renders with the published columns
        own.backend._questions(task).asked()


def test_without_template_files_our_words_ask_and_the_record_says_so(stocked):
    own = suite(tasks=["wiki_qa"])
    asked, _ = own.backend._questions("wiki_qa").asked()
    assert asked["test"][0][1] == ["No", "Yes"]
    assert {q[0].partition(":")[0] for q in asked["train"]} == {
        "Question"
    }  # the first prompt alone
    assert own.backend.protocol_key()["prompts"]["wiki_qa"]["of"] == "this repository"


def test_templates_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"suite\.templates is /none, which is no folder"):
        promptsource.folder("/none")
    with pytest.raises(InputError, match="cannot be read"):
        promptsource.load(tmp_path, "qasc", "x")
    made = language.templates_folder(tmp_path / "t")
    with pytest.raises(InputError, match="no template 'other'") as error:
        promptsource.load(made, "qasc", "other")
    assert "qa_with_separated_facts_1" in error.value.hint
    path = made / "qasc" / "templates.yaml"
    path.write_text(path.read_text() + "bad: !!python/object/apply:os.system [echo]\n")
    promptsource.load.cache_clear()
    with pytest.raises(InputError, match="cannot be read"):
        promptsource.load(made, "qasc", "qa_with_separated_facts_1")


def test_a_template_cannot_leave_its_sandbox():
    with pytest.raises(InputError, match="does not fit"):
        promptsource.Template("t", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "a ||| b").ask(
            {}
        )


def test_the_papers_score_is_the_sum_and_ours_the_mean():
    model, differ = seq2seq_model(), 0
    for token in range(4, 12):
        choices = [[token, 3], [token, token + 1, token, token, 3], [9, 10, 3]]
        example, sums = Example([5, 6, token, 3], choices, 0), []
        for choice in choices:
            with torch.no_grad():
                out = model(torch.tensor([example.prompt]), labels=torch.tensor([choice])).logits[0]
            sums.append(out.double().log_softmax(-1)[range(len(choice)), choice].sum().item())
        means = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        best = [max(range(3), key=scores.__getitem__) for scores in (sums, means)]
        found = [ranking.rank(model, [example], mean=mean).item() for mean in (False, True)]
        assert found == best
        differ += best[0] != best[1]
    assert differ


def seq2seq_model():
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(tiny_lm.model("t5_relu_tied")).eval()


# --- experts --------------------------------------------------------------------------------------


class T5Wrapper(nn.Module):
    """As the ACTMat authors pickle a model: the transformer inside, its tokenizer beside it."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        self.max_seq_len = 128


@pytest.fixture
def theirs(monkeypatch):
    """Their module, gone again when the pickle is read."""
    module = types.ModuleType("src.language.modeling")
    package = {n: types.ModuleType(n) for n in ("src", "src.language")}
    for name, made in (package | {"src.language.modeling": module}).items():
        monkeypatch.setitem(sys.modules, name, made)
    module.T5Wrapper = T5Wrapper
    monkeypatch.setattr(T5Wrapper, "__module__", "src.language.modeling")


def pickled(path: Path, shift: float) -> str:
    model = T5Wrapper(seq2seq_model())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift
    path.parent.mkdir(parents=True)
    torch.save(model, path)
    return str(path)


def test_the_authors_pickled_experts_are_merged(stocked, theirs, tmp_path):
    given = {t: pickled(tmp_path / t / "finetuned.pt", s) for t, s in (("qasc", 0.1), ("wsc", 0.3))}
    own = suite(tasks=["qasc", "wsc"], experts=given)
    found = load_file(own.expert("wsc", finetuning="full", seed=0))
    assert found.keys() == own.base().keys()
    for name, tensor in own.base().items():
        torch.testing.assert_close(found[name], tensor + 0.3)
    known = own.identity(finetuning="full", seed=0)
    assert known == suite(tasks=["qasc", "wsc"], experts=given).identity(finetuning="full", seed=0)
    pickled(tmp_path / "other" / "wsc" / "finetuned.pt", 0.2)
    (tmp_path / "other" / "wsc" / "finetuned.pt").replace(given["wsc"])
    assert suite(tasks=["qasc", "wsc"], experts=given).identity(finetuning="full", seed=0) != known


def test_an_expert_of_another_model_is_one_line(stocked, tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "other.safetensors")
    own = suite(tasks=["qasc"], experts={"qasc": str(tmp_path / "other.safetensors")})
    with pytest.raises(InputError, match="is no expert of suite 'language7_t5_base'") as error:
        own.expert("qasc", finetuning="full", seed=0)
    assert len(error.value.message) < 300


# --- the protocol ---------------------------------------------------------------------------------


def test_whatever_decides_a_figure_is_in_the_key(stocked, tmp_path):
    known = suite(tasks=["qasc", "wsc"]).backend.protocol_key()
    local = tmp_path / "local"
    language.dataset_folder(local, {"train": language.rows("wsc", "train")})
    templates = language.templates_folder(tmp_path / "templates")
    changes = {
        "protocol": {"protocol": "ours"},
        "data": {"data": {"wsc": str(local)}},
        "revision": {"data": {"wsc": "aps/super_glue@v2"}},
        "templates": {"templates": str(templates)},
        "precision": {"precision": "bf16"},
        "length": {"max_tokens": 8},
        "test": {"test": 3},
        "metric": {"metric": "f1"},
    }
    keys = {name: suite(tasks=["qasc", "wsc"], **change).backend.protocol_key() for name, change in
            changes.items()}  # fmt: skip
    ours = suite(tasks=["qasc", "wsc"], protocol="ours", template=1).backend.protocol_key()
    different = [known, *keys.values(), ours]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_the_paper_merges_every_matrix_and_averages_the_rest(stocked):
    layers = suite(tasks=["qasc"]).layers()
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert bias in layers
    assert bias in suite(tasks=["qasc"]).unmeasured
    assert suite(tasks=["qasc"]).backend.rest == "average"
    ours = suite(tasks=["qasc"], protocol="ours")
    assert bias not in ours.layers()
    assert (ours.backend.rest, ours.unmeasured) == (None, frozenset())


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_then_does_nothing_but_print(stocked, tmp_path):
    cloze = language.cloze_folder(tmp_path / "cloze")
    line = ["suite=language7_t5_base", f"records={tmp_path}/records", *QUICK,
            f"suite.data.story_cloze={cloze}"]  # fmt: skip
    for method in ("actmat", "regmean"):
        extra = ["statistics.batches=2", "statistics.batch_size=4"]
        code, out, err = stocked.run("experiments.run", *line, f"method={method}", *extra)
        assert code == 0, err
        assert all(task in out for task in (*SIX, "story_cloze", "mean")), out
    assert max(stocked.downloads.values()) == 1
    record = records.load(next((tmp_path / "records/language7_t5_base").glob("actmat-*.json")))
    assert record["key"]["protocol"]["name"] == "paper"
    assert record["scores"]["wsc"]["count"] == 12
    assert record["sources"]["datasets/allenai/qasc"]
    stocked.requests.clear()
    before = sorted((tmp_path / "records").rglob("*.json"))
    code, again, _ = stocked.run("experiments.run", *line, f"method={method}", *extra)
    assert (code, again) == (0, out)
    assert sorted((tmp_path / "records").rglob("*.json")) == before
    assert not stocked.downloads
    code, _, err = stocked.run("experiments.run", *line, "method=actmat", "protocol=ours",
                               "tasks=[qasc]", "suite.validation=8")  # fmt: skip
    assert code == 0, err
    names = {records.load(p)["key"]["protocol"]["name"] for p in
             (tmp_path / "records/language7_t5_base").glob("actmat-*.json")}  # fmt: skip
    assert names == {"paper", "ours"}


def test_the_command_without_story_cloze(stocked, tmp_path):
    line = ["suite=language7_t5_large", f"records={tmp_path}/records", *QUICK, "method=average"]
    code, out, err = stocked.run("experiments.run", *line)
    assert code == 2
    assert "Story Cloze has to be asked for" in err
    code, out, err = stocked.run("experiments.run", *line, "tasks=[quartz,wsc]", "finetuning=lora",
                                 "suite.recipes.lora.steps=2", "suite.recipes.lora.batch_size=8",
                                 "suite.recipes.lora.accumulate=1")  # fmt: skip
    assert code == 0, err
    assert "quartz" in out

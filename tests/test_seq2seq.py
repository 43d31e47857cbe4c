"""T5: prompts, rank classification, statistics, and the whole way through every method."""

import json
from dataclasses import replace

import pytest
import torch
from chain import check_block_by_block, check_methods
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from eval import training
from eval.language import benchmarks, judge, prompts, ranking
from eval.language.examples import IGNORED
from eval.language.questions import Example
from eval.suite import Suite
from eval.tiny import models as tiny_lm
from experiments.suites import build
from merging.errors import InputError

KINDS = ["t5_gated_untied", "t5_relu_tied"]
pytestmark = pytest.mark.usefixtures("own_cache")


def built(config, **changes):
    return build(OmegaConf.to_container(OmegaConf.merge(config, changes), resolve=True))


@pytest.fixture(scope="module", params=KINDS)
def suite(request) -> Suite:
    config = OmegaConf.load(f"configs/suite/tiny_{request.param}.yaml")
    return built(config)


def load(folder):
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def logits(model):
    ids = torch.arange(4, 16).reshape(2, 6)
    with torch.no_grad():
        return model(input_ids=ids, labels=torch.tensor([[5, 3], [9, 3]])).logits


def test_each_published_row_becomes_a_question_with_its_right_answer():
    choices = {"text": ["sand", "rain", "fire"], "label": ["A", "B", "C"]}
    story = {f"input_sentence_{i}": f"S{i}." for i in range(1, 5)}
    rows = {
        "qasc": {
            "question": "What?", "choices": choices, "answerKey": "B", "fact1": "a", "fact2": "b.",
        },
        "wiki_qa": {"question": "who", "answer": "He did.", "label": 1},
        "quartz": {"question": "Which?", "para": "P.", "choices": choices, "answerKey": "C"},
        "paws": {"sentence1": "A", "sentence2": "B", "label": 0},
        "story_cloze": {
            **story, "sentence_quiz1": "X", "sentence_quiz2": "Y", "answer_right_ending": 2,
        },
        "winogrande": {"sentence": "The _ ran.", "option1": "dog", "option2": "cat", "answer": "1"},
        "wsc": {"text": "T", "span1_text": "Mark", "span2_text": "he", "label": 1},
    }  # fmt: skip
    right = {
        "qasc": "rain", "wiki_qa": "yes", "quartz": "fire", "paws": "no", "story_cloze": "Y",
        "winogrande": "dog", "wsc": "yes",
    }  # fmt: skip
    assert set(rows) == set(prompts.TASKS)
    for name, task in prompts.TASKS.items():
        asked = [prompts.ask(task.read(rows[name]), template) for template in task.templates]
        assert {choices[answer] for _, choices, answer in asked} == {right[name]}
        assert len({prompt for prompt, _, _ in asked}) == len(task.templates) == 2
        assert all("{" not in prompt for prompt, _, _ in asked)


def test_rank_takes_the_highest_mean_log_probability_over_an_answers_tokens(suite):
    model = load(tiny_lm.model(suite.backend.model.removeprefix("tiny_")))
    examples = [
        Example([5, 6, 7, 3], [[8, 3], [9, 10, 11, 3], [12, 3]], 0),
        Example([13, 3], [[8, 9, 3], [10, 3]], 1),
    ]
    expected = []
    for example in examples:
        means = []
        for choice in example.choices:
            with torch.no_grad():
                out = model(torch.tensor([example.prompt]), labels=torch.tensor([choice])).logits[0]
            logp = out.double().log_softmax(-1)
            means.append(sum(logp[i, token].item() for i, token in enumerate(choice)) / len(choice))
        expected.append(max(range(len(means)), key=means.__getitem__))
    assert ranking.rank(model, examples).tolist() == expected


def test_training_loss_ignores_padding(suite):
    model = load(tiny_lm.model(suite.backend.model.removeprefix("tiny_")))
    short, long = Example([5, 3], [[8, 3]], 0), Example([6, 7, 8, 9, 3], [[9, 10, 3]], 0)
    alone = [ranking.loss(model, ranking.training_batch([e], "cpu")).item() for e in (short, long)]
    together = ranking.loss(model, ranking.training_batch([short, long], "cpu")).item()
    assert together == pytest.approx((2 * alone[0] + 3 * alone[1]) / 5, rel=1e-5)


def test_token_mask_follows_what_each_layer_is_given():
    batch = ranking.training_batch(
        [Example([5, 3], [[8, 3]], 0), Example([6, 7, 3], [[9, 9, 3]], 0)], "cpu"
    )
    prompt = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    answer = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    assert torch.equal(batch["labels"] != IGNORED, answer)
    block = "decoder.block.0.layer.1.EncDecAttention"
    for name, expected in {
        "encoder.block.0.layer.0.SelfAttention.q.weight": prompt,
        f"{block}.q.weight": answer,
        f"{block}.k.weight": prompt,
        f"{block}.v.weight": prompt,
        f"{block}.o.weight": answer,
    }.items():
        assert torch.equal(ranking.token_mask(batch, name), expected), name


def test_second_moments_leave_padding_out(suite):
    """Every sentence through the model alone, without padding, summed in float64."""
    task, name = "meals", "decoder.block.1.layer.1.EncDecAttention.k.weight"
    path = suite.statistics(task, "covariance", finetuning="full", seed=0, batches=2, batch_size=5)
    measured = load_file(path)[name]
    model = load(tiny_lm.model(suite.backend.model.removeprefix("tiny_")))
    expert = suite.expert(task, finetuning="full", seed=0)
    model.load_state_dict(training.expert_state(suite.base(), expert), strict=False)
    examples = suite.backend._splits(task)["train"]
    numbers = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:10]
    rows = []
    for i in numbers:
        with torch.no_grad():
            rows.append(
                model.get_encoder()(torch.tensor([examples[i].prompt])).last_hidden_state[0]
            )
    z = torch.cat(rows).double()
    torch.testing.assert_close(measured.double(), z.T @ z / len(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "finetuning"),
    [("t5_gated_untied", "full"), ("t5_relu_tied", "full"), ("t5_relu_tied", "lora")],
)
def test_every_method_written_and_loaded_equals_a_merge_by_hand(kind, finetuning, tmp_path):
    suite = built(OmegaConf.load(f"configs/suite/tiny_{kind}.yaml"))
    own = {"finetuning": finetuning, "seed": 0}
    experts = {task: suite.expert(task, **own) for task in suite.tasks}
    folder = tiny_lm.model(kind)
    check_methods(
        folder,
        experts,
        suite.layers(),
        lambda task, kind: suite.statistics(task, kind, **own, batches=2, batch_size=8),
        load,
        logits,
        tmp_path,
    )
    merged = load(tmp_path / "actmat")
    for embedding in (merged.encoder.embed_tokens, merged.decoder.embed_tokens):
        assert embedding.weight is merged.shared.weight
    assert (merged.lm_head.weight is merged.shared.weight) == (kind == "t5_relu_tied")
    if finetuning == "full":
        average = sum(training.expert_state({}, p)["shared.weight"] for p in experts.values()) / 3
        torch.testing.assert_close(merged.shared.weight.detach(), average)


def test_a_model_of_all_tasks_and_moments_through_a_merged_one(suite):
    """What the rows multi_task and regmean_pp of a table need."""
    own = {"finetuning": "full", "seed": 0}
    states = {
        task: training.expert_state(suite.base(), suite.expert(task, **own)) for task in suite.tasks
    }
    together = training.expert_state(suite.base(), suite.multi_task(**own))
    assert all((together[name] != tensor).any() for name, tensor in suite.base().items())
    check_block_by_block(suite, states, "meals", "decoder.block.1.layer.1.EncDecAttention.k.weight")


def test_a_merge_is_judged_by_lm_eval(suite):
    folder = tiny_lm.model(suite.backend.model.removeprefix("tiny_"))
    model = load(folder)
    lm = judge.load_lm("hf", {"pretrained": str(folder)}, batch_size=8, device="cpu")
    benchmark = benchmarks.Benchmark("tiny_meals")
    found = judge.judge(lm, "meals", benchmark, benchmarks.task_manager([benchmark]), limit=20)
    assert found.scores["meals"].count == 20
    assert 0 <= found.scores["meals"].accuracy <= 1
    for sample in found.samples[:3]:  # lm-eval's log-likelihoods are the model's own
        tokens = lm.tokenizer(sample["arguments"][0][0])["input_ids"]
        answer = lm.tokenizer(sample["arguments"][0][1])["input_ids"]
        with torch.no_grad():
            out = model(torch.tensor([tokens]), labels=torch.tensor([answer])).logits[0]
        logp = out.log_softmax(-1)[range(len(answer)), answer].sum().item()
        assert float(sample["resps"][0][0][0]) == pytest.approx(logp, abs=1e-3)


def test_experts_learn_and_evaluation_flags_constant_answers(suite):
    base = suite.base()
    scores = suite.evaluate(base, "test", limit=30)
    assert {score.count for score in scores.values()} == {30}
    flat = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    assert all(score.constant for score in suite.evaluate(flat, "test", limit=10).values())


def test_splits_are_disjoint_and_fixed(suite):
    again = Suite(replace(suite.backend))
    for task in suite.tasks:
        splits = suite.backend._splits(task)
        assert splits == again.backend._splits(task)
        assert len(splits["validation"]) == 50
        assert len(splits["train"]) + len(splits["validation"]) == 200


def test_local_data_is_read_from_a_folder_per_task(tmp_path):
    folder = tmp_path / "paws"
    folder.mkdir()
    for split, count in (("train", 6), ("test", 4)):
        rows = [
            {"sentence1": f"rain {i}", "sentence2": "sun", "label": i % 2} for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = OmegaConf.load("configs/suite/tiny_t5_relu_tied.yaml")
    config.update(tasks=["paws"], data=str(tmp_path), validation=2)
    splits = built(config).backend._splits("paws")
    assert {split: len(own) for split, own in splits.items()} == {
        "train": 4, "validation": 2, "test": 4,
    }  # fmt: skip
    assert [example.answer for example in splits["test"]] == [0, 1, 0, 1]
    assert all(len(example.prompt) <= 16 for example in splits["test"])


def test_what_cannot_be_had_is_one_sentence(tmp_path):
    config = OmegaConf.load("configs/suite/tiny_t5_relu_tied.yaml")
    config.update(tasks=["paws"], data=str(tmp_path))
    (tmp_path / "paws").mkdir()
    with pytest.raises(InputError, match="data of task 'paws' cannot be loaded"):
        built(config).backend._splits("paws")
    config.update(tasks=["pawz"])
    with pytest.raises(InputError, match="unknown task 'pawz'"):
        built(config).backend._splits("pawz")
    config.update(model=str(tmp_path / "none"))
    with pytest.raises(InputError, match="does not exist"):
        built(config).base()
    suite = built(OmegaConf.load("configs/suite/tiny_t5_relu_tied.yaml"))
    with pytest.raises(InputError, match="no task 'wether'"):
        suite.expert("wether", finetuning="full", seed=0)
    with pytest.raises(InputError, match=r"has 150 training inputs, .* 10 x 32"):
        suite.statistics("meals", "covariance", finetuning="full", seed=0)
    state = suite.base()
    del state["shared.weight"]
    with pytest.raises(InputError, match=r"'shared\.weight' .* is nothing, expected shape"):
        suite.evaluate(state, "test")

"""The text suite on a made-up encoder, and the readers of its real data on made-up archives."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file

from eval import statistics, tiny
from eval.backend import unpacked
from eval.cache import digest
from eval.data import bigbench
from eval.data.packages import Package
from eval.language import corpora
from eval.recipes import batch_order
from eval.suite import Suite
from eval.tiny.suites import TinyText
from eval.training import expert_state
from experiments.suites import build
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.method.registry import OUTPUTS

CONFIGS = Path(__file__).parents[1] / "configs" / "suite"
FULL = {"finetuning": "full", "seed": 0}
LORA = {"finetuning": "lora", "seed": 0}


def config(**changes):
    suite = OmegaConf.load(CONFIGS / "tiny_text.yaml")
    return OmegaConf.merge(
        suite, {"recipes": {"full": {"epochs": 4}, "lora": {"epochs": 4}}}, changes
    )


def built(config, **changes):
    return build(OmegaConf.to_container(OmegaConf.merge(config, changes), resolve=True))


@pytest.fixture(scope="module")
def suite(own_cache) -> Suite:
    return built(config())


def naive_accuracy(suite, state, task, split):
    """One sentence at a time, in float64, nothing shared with the suite but model and tokenizer."""
    model = suite.backend.fresh().eval().double()
    model.load_state_dict(state)
    base = suite.backend.fresh().eval().double()

    def embedding(model, sentence):
        ids = suite.backend._tokenizer.encode(sentence).ids
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return F.normalize(hidden.mean(0), dim=0)

    labels = suite.backend.corpora[task]["labels"]
    head = {label: embedding(base, description) for label, description in labels.items()}
    pairs = suite.backend._texts[task][split]
    right = 0
    for sentence, label in pairs:
        z = embedding(model, sentence)
        right += max(head, key=lambda x: head[x] @ z) == label
    return right / len(pairs)


def test_the_splits_are_disjoint_and_independent_of_training(suite):
    for task in suite.tasks:
        parts = suite.backend._texts[task]
        texts = {split: {x for x, _ in pairs} for split, pairs in parts.items()}
        assert {split: len(x) for split, x in texts.items()} == {
            split: len(pairs) for split, pairs in parts.items()
        }
        assert len(texts["test"]) == 100 and len(texts["validation"]) == 50
        assert not texts["test"] & (texts["train"] | texts["validation"])
        assert not texts["validation"] & texts["train"]
    other = built(config(train=20, recipes={"full": {"lr": 1.0}}))
    for task in suite.tasks:
        for split in ("test", "validation"):
            assert other.backend._texts[task][split] == suite.backend._texts[task][split]


def test_a_text_tested_anywhere_is_learnt_nowhere(own_cache, monkeypatch):
    pairs = [(f"the cat number {i}", "pets" if i % 2 else "farm") for i in range(300)]
    spelt = [(f"The  CAT number {i} ", label) for i, (_, label) in enumerate(pairs)]
    monkeypatch.setitem(
        TinyText.readers, "tiny", lambda source: {"a": pairs, "b": pairs + spelt}[source]
    )
    labels = {"pets": "cat", "farm": "cow"}
    corpora = {t: {"reader": "tiny", "source": t, "labels": labels} for t in "ab"}
    suite = built(
        OmegaConf.merge({k: v for k, v in config().items() if k != "corpora"}, {"corpora": corpora})
    )
    parts = suite.backend._texts
    canonical = {
        (task, split): {" ".join(x.lower().split()) for x, _ in pairs}
        for task, splits in parts.items()
        for split, pairs in splits.items()
    }
    tested = canonical["a", "test"] | canonical["b", "test"]
    for task in "ab":
        assert not tested & canonical[task, "train"]
        assert not tested & canonical[task, "validation"]


def test_an_additional_task_gives_way_to_the_others(own_cache, monkeypatch):
    pairs = [(f"the cat number {i}", "pets" if i % 2 else "farm") for i in range(300)]
    more = [(f"a dog number {i}", label) for i, (_, label) in enumerate(pairs)]
    monkeypatch.setitem(
        TinyText.readers, "tiny", lambda source: {"a": pairs, "b": pairs[:90] + more}[source]
    )
    labels = {"pets": "cat", "farm": "cow"}
    corpora = {t: {"reader": "tiny", "source": t, "labels": labels} for t in "ab"}
    whole = {k: v for k, v in config().items() if k != "corpora"}
    alone = built(OmegaConf.merge(whole, {"corpora": {"a": corpora["a"]}})).backend
    both = built(OmegaConf.merge(whole, {"corpora": corpora, "additional": ["b"]})).backend
    assert both._texts["a"] == alone._texts["a"]
    assert {x for part in both._texts["b"].values() for x, _ in part} <= {x for x, _ in more}
    plain = built(OmegaConf.merge(whole, {"corpora": corpora})).backend
    assert plain._texts["a"] != alone._texts["a"]
    with pytest.raises(InputError, match="additional of suite 'tiny_text' names an unknown task"):
        built(OmegaConf.merge(whole, {"corpora": corpora, "additional": ["c"]}))


def test_evaluation_equals_one_sentence_at_a_time(suite):
    state = suite.base()
    generator = torch.Generator().manual_seed(1)
    state = {
        n: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) for n, t in state.items()
    }
    for split, count in (("test", 100), ("validation", 50)):
        scores = suite.evaluate(state, split)
        assert list(scores) == list(suite.tasks)
        for task, score in scores.items():
            assert score[:2] == (naive_accuracy(suite, state, task, split), count)
            assert unpacked(score.correct, count).mean() == score.accuracy


def test_evaluation_takes_some_tasks_some_examples_and_any_precision(suite):
    base = suite.base()
    everything = suite.evaluate(base, "test")
    assert suite.evaluate(base, "test", ["meals"]) == {"meals": everything["meals"]}
    few = suite.evaluate(base, "test", limit=7)["meals"]
    assert few.count == 7
    right = [unpacked(score.correct, 7).tolist() for score in (few, everything["meals"])]
    assert right[0] == right[1]  # the same examples, in order
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    assert abs(suite.evaluate(half, "test")["meals"].accuracy - everything["meals"].accuracy) < 0.1
    assert suite.evaluate(base, "test") == everything


def test_a_constant_predictor_is_flagged(suite):
    state = {name: torch.zeros_like(tensor) for name, tensor in suite.base().items()}
    assert all(score.constant for score in suite.evaluate(state, "test").values())


def test_base_is_a_copy_and_layers_are_the_encoders(suite):
    suite.base()["embeddings.word_embeddings.weight"].zero_()
    assert suite.base()["embeddings.word_embeddings.weight"].any()
    layers = suite.layers()
    assert len(layers) == 12  # 2 blocks of query, key, value, output and two dense layers
    assert set(layers) <= set(suite.base())


def test_full_fine_tuning_moves_the_encoder_only_and_helps(suite):
    base, scores = suite.base(), suite.evaluate(suite.base(), "test")
    gains = []
    for task in suite.tasks:
        path = suite.expert(task, **FULL)
        state = load_file(path)
        assert set(state) == set(base)
        moved = {name for name in base if not torch.equal(base[name], state[name])}
        assert moved and all(name.startswith("encoder.") for name in moved)
        gains.append(suite.evaluate(state, "test", [task])[task].accuracy - scores[task].accuracy)
    assert sum(gains) / len(gains) > 0.05


def test_an_expert_is_trained_once_and_again_to_the_same_bytes(suite, tmp_path, monkeypatch):
    path = suite.expert("meals", **FULL)
    first = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Suite, "_finetune", lambda *args: pytest.fail("trained twice"))
        assert built(config()).expert("meals", **FULL) == path
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path))
    torch.manual_seed(123)
    assert built(config()).expert("meals", **FULL).read_bytes() == first
    assert built(config()).expert("meals", finetuning="full", seed=1).read_bytes() != first


def test_lora_experts_are_adapters_of_every_encoder_layer(suite):
    folder = suite.expert("meals", **LORA)
    adapter = open_checkpoint(folder)
    assert set(adapter.keys()) == set(suite.layers())
    assert all(adapter.factors(name)[0].shape[0] == 4 for name in adapter.keys())
    state = expert_state(suite.base(), folder)
    gain = [suite.evaluate(s, "test", ["meals"])["meals"].accuracy for s in (suite.base(), state)]
    assert gain[1] > gain[0]


def starts(suite, task):
    """The random A of every layer before the first step."""
    model = suite.training([task], finetuning="lora", seed=0).model
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_A" in n])


def test_adapters_start_from_one_random_matrix_or_each_from_its_own(suite):
    own = built(config(name="own", adapter_seeds="independent"))
    assert torch.equal(starts(suite, "meals"), starts(suite, "weather"))
    assert not torch.isclose(starts(own, "meals"), starts(own, "weather")).any()
    assert torch.equal(starts(own, "meals"), starts(own, "meals"))
    names = [s.identity(**LORA)["experts"] for s in (suite, own)]
    assert all(names[0][task] != names[1][task] for task in suite.tasks)
    # experts fine-tuned in full have no A, and are the same
    assert suite.identity(**FULL)["experts"] == own.identity(**FULL)["experts"]
    with pytest.raises(InputError, match="adapter_seeds"):
        built(config(adapter_seeds="all"))


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_one_expert_may_be_larger_than_it_was_trained(suite, kind):
    larger, base = built(config(name="larger", scales={"meals": 3.0})), suite.base()
    paths = [s.expert("meals", **kind) for s in (suite, larger)]
    assert paths[1].is_dir() == paths[0].is_dir()  # still a checkpoint, or an adapter
    once, thrice = (expert_state(base, path) for path in paths)
    for name in suite.layers():
        moved = once[name] - base[name]
        torch.testing.assert_close(thrice[name] - base[name], 3 * moved, rtol=1e-3, atol=1e-6)
    assert larger.expert("weather", **kind) == suite.expert("weather", **kind)
    names = [s.identity(**kind)["experts"] for s in (suite, larger)]
    assert {t for t in suite.tasks if names[0][t] != names[1][t]} == {"meals"}
    with pytest.raises(InputError, match="unknown task .meal."):
        built(config(scales={"meal": 3.0}))


def test_identity_names_all_that_decides_the_experts(suite):
    known = digest(suite.identity(**FULL))
    assert digest(built(config()).identity(**FULL)) == known
    assert digest(built(config(name="other")).identity(**FULL)) != known
    changes = [
        {"train": 100},
        {"split_seed": 1},
        {"max_tokens": 12},
        {"logit_scale": 10.0},
        {"recipes": {"full": {"lr": 1e-5}}},
        {"corpora": {"meals": {"labels": {"sweet": "sugar"}}}},
    ]
    for change in changes:
        assert digest(built(config(**change)).identity(**FULL)) != known, change
    assert digest(suite.identity(finetuning="full", seed=1)) != known
    assert digest(suite.identity(**LORA)) != known
    assert digest(built(config(recipes={"lora": {"lr": 1.0}})).identity(**FULL)) == known


@pytest.mark.parametrize("settings", [FULL, LORA])
@pytest.mark.parametrize("tokens", ["sentence", "all"])
def test_moments_are_those_of_the_experts_own_inputs(suite, settings, tokens):
    suite = built(config(moment_tokens=tokens))
    path = suite.statistics("weather", "covariance", batches=3, batch_size=8, **settings)
    about = statistics.about(suite, "weather", "covariance", **settings)
    found = statistics.load(path, about)
    assert set(found) == set(suite.layers())

    model = suite.backend.fresh().eval()
    model.load_state_dict(expert_state(suite.base(), suite.expert("weather", **settings)))
    inputs = {"query": [], "output.dense": []}
    model.encoder.layer[1].attention.self.query.register_forward_pre_hook(
        lambda m, args: inputs["query"].append(args[0].detach())
    )
    model.encoder.layer[1].output.dense.register_forward_pre_hook(
        lambda m, args: inputs["output.dense"].append(args[0].detach())
    )
    rows = {name: [] for name in inputs}
    for ids, mask, _ in suite.backend.sample("weather", 24, 8):
        model(input_ids=ids, attention_mask=mask)
        for name, seen in inputs.items():
            z = seen.pop().double()
            rows[name].append(z[mask] if tokens == "sentence" else z.flatten(0, 1))
    for name, leaf in (("query", "attention.self.query"), ("output.dense", "output.dense")):
        z = torch.cat(rows[name])
        expected = z.T @ z / len(z)
        actual = found[f"encoder.layer.1.{leaf}.weight"].double()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", ["sampled", "true"])
def test_fisher_covers_the_encoder_and_is_reproducible(suite, tmp_path, monkeypatch, labels):
    suite = built(config(fisher_labels=labels))
    settings = {"batches": 2, "batch_size": 4} | FULL
    path = suite.statistics("meals", "fisher", **settings)
    found = load_file(path)
    base = suite.base()
    assert set(found) == {name for name in base if name.startswith("encoder.")}
    assert all(found[name].shape == base[name].shape for name in found)
    assert all((f >= 0).all() and f.isfinite().all() for f in found.values())
    first = path.read_bytes()
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path))
    assert (
        built(config(fisher_labels=labels)).statistics("meals", "fisher", **settings).read_bytes()
        == first
    )


def test_both_factors_are_measured_over_the_same_tokens(suite):
    own = {"finetuning": "full", "seed": 0, "batches": 4, "batch_size": 16}
    task = suite.tasks[0]
    inputs = load_file(suite.statistics(task, "covariance", **own))
    both = load_file(suite.statistics(task, "kfac", **own))
    assert set(both) == {name + end for name in suite.layers() for end in ("", OUTPUTS)}
    for name, moment in inputs.items():
        torch.testing.assert_close(both[name], moment, rtol=1e-3, atol=1e-5)
        G = both[name + OUTPUTS]
        assert len(G) == len(suite.base()[name]) and torch.equal(G, G.mT) and G.trace() > 0


def test_statistics_of_another_expert_are_refused(suite):
    path = suite.statistics("meals", "covariance", batches=1, batch_size=4, **FULL)
    for task, settings in (("weather", FULL), ("meals", LORA), ("meals", FULL | {"seed": 1})):
        with pytest.raises(InputError, match=path.name):
            statistics.load(path, statistics.about(suite, task, "covariance", **settings))


def test_more_inputs_than_there_are_is_refused(suite):
    with pytest.raises(InputError, match="150 training inputs"):
        suite.statistics("meals", "covariance", batches=10, batch_size=32, **FULL)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder": "bert-giant"}, "unknown encoder 'bert-giant'"),
        ({"recipes": {"full": {"learning_rate": 1}}}, "has no 'learning_rate'"),
        ({"corpora": {"meals": {"reader": "csv"}}}, "task 'meals'.*expected a reader"),
        ({"corpora": {"meals": {"colour": "red"}}}, "task 'meals'"),
    ],
)
def test_a_bad_config_is_refused_before_any_work(change, message):
    with pytest.raises(Exception, match=message) as caught:
        built(config(**change))
    assert isinstance(caught.value.__cause__ or caught.value, InputError)


def test_bad_requests_are_refused(suite):
    with pytest.raises(InputError, match="no task 'cars'"):
        suite.evaluate(suite.base(), "test", ["cars"])
    with pytest.raises(InputError, match="no task 'cars'"):
        suite.expert("cars", **FULL)
    with pytest.raises(InputError, match="no recipe for finetuning 'half'"):
        suite.expert("meals", finetuning="half", seed=0)
    state = suite.base()
    state.pop("encoder.layer.0.output.dense.bias")
    with pytest.raises(
        InputError, match=r"'encoder\.layer\.0\.output\.dense\.bias'.*shape \(32,\)"
    ):
        suite.evaluate(state, "test")
    mislabelled = built(config(corpora={"meals": {"labels": {"bitter": "coffee"}}}))
    with pytest.raises(InputError, match=r"\['bitter', 'salty', 'sweet'\].*\['salty', 'sweet'\]"):
        mislabelled.evaluate(suite.base(), "test", ["meals"])


@pytest.mark.parametrize("epochs", [1, 3])
def test_batches_cover_every_example_once_an_epoch(epochs):
    tokens = [[0] * (1 + i * 7 % 13) for i in range(100)]
    order = batch_order(tokens, 8, epochs, seed=0)
    seen = torch.cat(order)
    assert torch.equal(seen.bincount(), torch.full((100,), epochs))
    assert all(
        torch.equal(a, b) for a, b in zip(order, batch_order(tokens, 8, epochs, 0), strict=True)
    )
    padded = sum(len(b) * max(len(tokens[i]) for i in b) for b in order)
    plain = sum(
        len(b) * max(len(tokens[i]) for i in b) for b in torch.randperm(100).repeat(epochs).split(8)
    )
    assert padded < plain


def test_tiny_sentences_are_the_same_everywhere():
    pairs = tiny.sentences("animals")
    assert len(pairs) == 300
    for sentence, label in pairs:
        assert any(word in sentence.split() for word in tiny.TOPICS["animals"][label].split())
    assert pairs == tiny.sentences("animals")


# --- the readers of the real data ---------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Folders as the packages' members would lie there; returns a writer of files in them."""
    monkeypatch.setattr(Package, "folder", lambda package: tmp_path)

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def test_ratings_become_signs(packages):
    lines = (
        "1\t2.3\tA fine film\r\n2\t-0.5\tdull\r\n3\t0.49\tso so\r\n4\t-0.2\tmeh\r\n5\t0.5\tok\r\n"
    )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("hutto_ICWSM_2014/films_GroundTruth.txt")
        info.size = len(lines)
        tar.addfile(info, io.BytesIO(lines.encode()))
    packages(corpora.HUTTO, gzip.compress(buffer.getvalue()))
    assert corpora.rated("films") == [
        ("A fine film", "positive"),
        ("dull", "negative"),
        ("ok", "positive"),
    ]


def test_opinions_take_the_marked_label(packages):
    examples = [
        {"input": "Clean.", "target_scores": {"positive": 1, "negative": 0, "neutral": 0}},
        {"input": "A bed.", "target_scores": {"positive": 0, "negative": 0, "neutral": 1}},
    ]
    packages(
        f"{bigbench.TASKS}/multiemo/inns_sentence_en/task.json",
        json.dumps({"examples": examples}).encode(),
    )
    assert corpora.opinions("inns") == [("Clean.", "positive"), ("A bed.", "neutral")]


def test_a_line_counts_in_one_language_alone(packages):
    for code in ("de", "es"):
        scores = {"positive": 1, "negative": 0}
        examples = [{"input": f"{code} {n}", "target_scores": scores} for n in range(4)]
        name = f"{bigbench.TASKS}/multiemo/inns_sentence_{code}/task.json"
        packages(name, json.dumps({"examples": examples}).encode())
    pairs = [("de 0", "de"), ("de 2", "de"), ("es 1", "es"), ("es 3", "es")]
    assert corpora.languages("inns/de es") == pairs
    assert corpora.foreign_opinions("inns/es")[3] == ("es 3", "positive")


def test_documents_leave_out_retweets_addresses_and_what_remains_empty(packages):
    columns = "Is retweet\tAuthor\tContent\nd\td\tstring\n\tclass\tmeta\n"
    lines = (
        'False\tann\t"Read ""it"": https://t.co/x now"\nTrue\tann\tHers\nFalse\tbob\thttps://t.co'
    )
    packages(f"{corpora.TABLES}/election-tweets-2016.tab", (columns + lines).encode())
    assert corpora.documents("candidates") == [('Read "it": now', "ann")]


def test_questions_keep_the_nine_commonest_types(packages):
    kinds = [f"Kind{i}." for i in range(11)]
    examples = [
        {"input": f"{kind} {n}?", "target": [kind, "Other."]}
        for i, kind in enumerate(kinds)
        for n in range(20 - i)
    ]
    packages(f"{bigbench.TASKS}/typing/task.json", json.dumps({"examples": examples}).encode())
    pairs = corpora.questions("typing")
    assert {label for _, label in pairs} == {f"kind{i}" for i in range(9)}
    assert len(pairs) == sum(20 - i for i in range(9))
    assert pairs[0] == ("Kind0. 0?", "kind0")


def test_the_embedded_suite_is_what_its_config_says():
    suite = built(OmegaConf.load(CONFIGS / "embedded_text.yaml")).backend
    assert suite.tasks == (
        "movie", "amazon", "tweets", "nyt", "hotels", "medicine", "products", "question_typing",
    )  # fmt: skip
    assert [len(corpus["labels"]) for corpus in suite.corpora.values()] == [
        2,
        2,
        2,
        2,
        4,
        4,
        4,
        9,
    ]
    assert (suite.test, suite.validation, suite.train, suite.max_tokens) == (600, 300, 2000, 40)
    assert suite.logit_scale == 20
    assert suite.recipes["lora"]["r"] == suite.recipes["lora"]["alpha"] == 16

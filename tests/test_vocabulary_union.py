"""vocabulary=union: rows told by their tokens, against a plain computation, loaded back."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from experiments import cli
from experiments.merge import main
from merging import InputError, create, merge_checkpoints, merge_state_dicts
from merging.formats.vocabulary import Tokenizer as Read
from merging.formats.vocabulary import unite
from merging.formats.writer import write_adapter

TEXT = ["the cat sat on the mat", "the dog and the cat ran", "a mat for a dog"] * 3
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bpe(text=TEXT, size=280):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
        ),
    )
    return tokenizer


def with_tokens(tokenizer, *added):
    """A copy that has more tokens of its own, special ones."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([AddedToken(token, special=True) for token in added])
    return copy


def model_of(rows, tie, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tie, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save(folder, tokenizer, rows, tie=False, seed=0):
    """A model folder as its users save it; its state."""
    model = model_of(rows, tie, seed)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def plain(name, base, experts, union):
    """The table's rows by token: new ones the mean of those that have them, the others base plus
    the mean difference, 0 for an expert that lacks the token. {task: (state, {token: number})}"""
    (state, own), rows = base, {}
    for token, number in union.items():
        theirs = [s[name][t[token]] for s, t in experts.values() if token in t]
        if token in own:
            W0 = state[name][own[token]]
            rows[number] = W0 + sum(row - W0 for row in theirs) / len(experts)
        else:
            rows[number] = sum(theirs) / len(theirs)
    return rows


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("padding", [0, 8])
def test_experts_that_added_tokens(tmp_path, monkeypatch, capsys, tie, padding):
    tokenizer = bpe()
    n = tokenizer.get_vocab_size()
    first, second = (
        with_tokens(tokenizer, "<a>", "<think>"),
        with_tokens(tokenizer, "<think>", "<b>"),
    )
    base = save(tmp_path / "base", tokenizer, n + padding, tie)
    a = save(tmp_path / "a", first, max(n + 2, n + padding), tie, 1)
    b = save(tmp_path / "b", second, n + 2, tie, 2)  # cut to its tokens
    line = [
        f"base={tmp_path / 'base'}",
        f"experts.a={tmp_path / 'a'}",
        f"experts.b={tmp_path / 'b'}",
    ]
    line += ["method=average", "vocabulary=union", f"output={tmp_path / 'out'}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["merge", *line])
    monkeypatch.setenv(cli.TRACEBACK, "0")
    main()
    rows = max(n + padding, n + 3)
    told = capsys.readouterr().out
    assert f"{n + 3} tokens in {rows} rows, new are 3: '<a>', '<think>' of a; '<b>' of b" in told

    union = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = {token: union.convert_tokens_to_ids(token) for token in ("<a>", "<think>", "<b>")}
    assert ours == {"<a>": n, "<think>": n + 1, "<b>": n + 2}
    assert union("the cat<b><think>")["input_ids"] == [
        *tokenizer.encode("the cat").ids, n + 2, n + 1,
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == rows
    assert model.config.tie_word_embeddings == tie
    found = {EMBED: model.get_input_embeddings().weight, HEAD: model.get_output_embeddings().weight}
    experts = {"a": (a, first.get_vocab()), "b": (b, second.get_vocab())}
    for name in (EMBED,) if tie else (EMBED, HEAD):
        expected = plain(name, (base, tokenizer.get_vocab()), experts, union.get_vocab())
        assert sorted(expected) == list(range(n + 3))
        for number, row in expected.items():
            torch.testing.assert_close(found[name][number], row)
        torch.testing.assert_close(found[name][n + 3 :], base[name][n + 3 :])  # padding stays
    if tie:
        assert torch.equal(found[EMBED], found[HEAD])


def extended(tokenizer, *merges):
    """A BPE tokenizer that merges more: ("a", "b") pairs, each to a token of its own."""
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
        content["model"]["merges"].append([left, right])
    return Tokenizer.from_str(json.dumps(content))


def test_a_vocabulary_that_grew_and_another_order_of_tokens(tmp_path):
    tokenizer = with_tokens(bpe(), "<pad>")  # an added token in the base, in the way of new ones
    content = json.loads(tokenizer.to_str())
    plainer = bpe()
    grown = with_tokens(extended(plainer, ("Q", "Z"), ("QZ", "X")), "<pad>")
    n, m = tokenizer.get_vocab_size(), grown.get_vocab_size()
    base, a = save(tmp_path / "base", tokenizer, n), save(tmp_path / "a", grown, m, seed=1)
    report = merge_checkpoints(
        tmp_path / "base", {"a": tmp_path / "a"}, create("average"), tmp_path / "out",
        vocabulary="union",
    )  # fmt: skip
    assert "'QZ', 'QZX' of a" in report.notes[0]
    union = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert union.get_vocab() == tokenizer.get_vocab() | {"QZ": n, "QZX": n + 1}
    assert union.tokenize("the QZX<pad>") == grown.encode("the QZX<pad>").tokens
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # its config was written too
    for name in (EMBED, HEAD):
        expected = plain(
            name, (base, tokenizer.get_vocab()), {"a": (a, grown.get_vocab())}, union.get_vocab()
        )
        for number, row in expected.items():
            torch.testing.assert_close(model.state_dict()[name][number], row)
    assert content["model"]["merges"] == json.loads(plainer.to_str())["model"]["merges"]


def test_an_expert_of_weight_0_brings_no_token_and_methods_see_shared_rows(tmp_path):
    tokenizer = bpe()
    n = tokenizer.get_vocab_size()
    base = save(tmp_path / "base", tokenizer, n)
    for i, task in enumerate("ab"):
        save(tmp_path / task, with_tokens(tokenizer, f"<{task}>"), n + 1, seed=i + 1)
    paths = {task: tmp_path / task for task in "ab"}
    options = {"vocabulary": "union", "weights": {"a": 0, "b": -0.5}}
    merge_checkpoints(tmp_path / "base", paths, create("ties", k=1.0), tmp_path / "o", **options)
    found, b = (load_file(tmp_path / x / "model.safetensors")[EMBED] for x in "ob")
    torch.testing.assert_close(found[:n], base[EMBED] - 0.5 * (b[:n] - base[EMBED]))
    torch.testing.assert_close(found[n:], b[n:])  # a row of its own is no difference to weigh


def test_adapters_that_saved_their_embedding_and_rows_in_the_padding(tmp_path):
    tokenizer = bpe()
    n = tokenizer.get_vocab_size()
    base = save(tmp_path / "base", tokenizer, n + 4)
    query = "model.layers.0.self_attn.q_proj.weight"
    pair = (torch.ones(1, 8), torch.ones(8, 1))
    table = torch.randn(n + 1, 8, generator=torch.Generator().manual_seed(3))
    write_adapter(
        tmp_path / "a", {query: pair}, {"modules_to_save": ["embed_tokens"]}, dense={EMBED: table}
    )
    with_tokens(tokenizer, "<a>").save(str(tmp_path / "a" / "tokenizer.json"))
    write_adapter(tmp_path / "b", {query: pair}, {})  # its token is a row of the base's padding
    with_tokens(tokenizer, "<b>").save(str(tmp_path / "b" / "tokenizer.json"))
    paths = {task: tmp_path / task for task in "ab"}
    merge_checkpoints(
        tmp_path / "base", paths, create("average"), tmp_path / "o", vocabulary="union"
    )
    found = load_file(tmp_path / "o" / "model.safetensors")
    mean = (base[EMBED][:n] + table[:n]) / 2
    rows = torch.cat([mean, table[n:], base[EMBED][n : n + 1], base[EMBED][n + 2 :]])
    torch.testing.assert_close(found[EMBED], rows)
    torch.testing.assert_close(found[query], base[query] + 1)


def test_a_word_piece_vocabulary_and_the_biases_of_its_head(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    orders = {"base": words, "a": [*words[:5], "dog", *words[5:]]}  # another numbering
    states = {}
    for i, (task, order) in enumerate(orders.items()):
        tokenizer = Tokenizer(
            models.WordPiece({w: n for n, w in enumerate(order)}, unk_token="[UNK]")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        torch.manual_seed(i)
        config = BertConfig(
            vocab_size=len(order), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=12, max_position_embeddings=16,
        )  # fmt: skip
        model = BertForMaskedLM(config)
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(tmp_path / task)
        tokenizer.save(str(tmp_path / task / "tokenizer.json"))
        states[task] = load_file(tmp_path / task / "model.safetensors")
    merge_checkpoints(
        tmp_path / "base", {"a": tmp_path / "a"}, create("average"), tmp_path / "o",
        vocabulary="union",
    )  # fmt: skip
    merged = BertForMaskedLM.from_pretrained(tmp_path / "o")
    order = [orders["a"].index(word) for word in [*words, "dog"]]
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        torch.testing.assert_close(merged.state_dict()[name], states["a"][name][order])


def unigram(pieces):
    return Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], unk_id=0))


def swapped(tokenizer):
    content = json.loads(tokenizer.to_str())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    return Tokenizer.from_str(json.dumps(content))


def lower_case(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


PIECES = [("a", -1.0), ("b", -2.0)]


def read(tokenizer, folder):
    return Read(folder, json.loads(tokenizer.to_str()))


@pytest.mark.parametrize(
    "base, expert, told",
    [
        (bpe, lambda: bpe(["completely other words, xylophones"] * 3), "conflicting BPE merges"),
        (bpe, lambda: bpe(size=270), "in the base and nothing in the expert"),
        (bpe, lambda: swapped(bpe()), "number 1 is .* in the base and .* in the expert"),
        (bpe, lambda: lower_case(bpe()), "have another normalizer"),
        (lambda: unigram(PIECES), lambda: unigram([*PIECES, ("c", -3.0)]), "no common scale"),
        (bpe, lambda: unigram(PIECES), "have another pre_tokenizer"),
    ],
)
def test_tokenizers_that_have_no_union_are_refused(tmp_path, base, expert, told):
    with pytest.raises(InputError, match=told):
        unite(read(base(), tmp_path), {"math": read(expert(), tmp_path / "x")})


def test_two_experts_that_extend_the_merges(tmp_path):
    base = read(bpe(), tmp_path)

    def united(*pairs):
        made = {
            task: read(extended(bpe(), *own), tmp_path)
            for task, own in zip("ab", pairs, strict=True)
        }
        return unite(base, made)

    union = united([("Q", "Z"), ("J", "K")], [("V", "W"), ("J", "K")])
    library = Tokenizer.from_str(json.dumps(union.content))
    assert library.encode("QZVWJK").tokens == ["QZ", "VW", "JK"]
    with pytest.raises(InputError, match="'Z' \\+ 'X' and 'Q' \\+ 'Z' take the same piece"):
        united([("Q", "Z")], [("Z", "X")])
    with pytest.raises(InputError, match="the same BPE merges in another order"):
        united([("Q", "Z"), ("J", "K")], [("J", "K"), ("Q", "Z")])


def test_added_tokens_of_a_unigram_model_are_united(tmp_path):
    own, other = unigram(PIECES), with_tokens(unigram(PIECES), "<x>")
    read = [Read(tmp_path, json.loads(tokenizer.to_str())) for tokenizer in (own, other)]
    union = unite(read[0], {"math": read[1]})
    assert Tokenizer.from_str(json.dumps(union.content)).encode("ab<x>").ids == [1, 2, 3]


def test_what_has_no_tokenizer_or_too_few_rows_is_refused(tmp_path):
    tokenizer = bpe()
    n = tokenizer.get_vocab_size()
    save(tmp_path / "base", tokenizer, n)
    save(tmp_path / "short", with_tokens(tokenizer, "<a>", "<b>"), n + 1)
    save(tmp_path / "bare", with_tokens(tokenizer, "<a>"), n + 1)
    (tmp_path / "bare" / "tokenizer.json").unlink()
    average = create("average")

    def merged(expert, output="o", base="base", **options):
        merge_checkpoints(
            tmp_path / base, {"a": tmp_path / expert}, average, tmp_path / output,
            vocabulary="union", **options,
        )  # fmt: skip

    for given, told in [
        (("short",), "has a token 281, .* has 281 rows"),
        (("bare",), "has 281 rows .* the base 280, and no tokenizer.json"),
        (("base", "o", "bare"), "merges tokenizers, .* has no tokenizer.json"),
        (("base", "o.safetensors"), "writes a tokenizer beside the weights"),
    ]:
        with pytest.raises(InputError, match=told):
            merged(*given)
    with pytest.raises(InputError, match="makes a whole model"):
        merged("base", form="adapter")
    state = {EMBED: torch.ones(3, 2)}
    with pytest.raises(InputError, match="the base has no tokenizer.json"):
        merge_state_dicts(state, {"a": state}, average, vocabulary="union")
    (tmp_path / "bare" / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}}')
    with pytest.raises(InputError, match="is no tokenizer of the tokenizers library"):
        merged("bare")
    assert not (tmp_path / "o").exists()


def test_the_union_is_written_wherever_the_base_numbers_tokens(tmp_path):
    """An older tokenizer_config.json and added_tokens.json, which readers look at as well."""
    tokenizer = bpe()
    n = tokenizer.get_vocab_size()
    save(tmp_path / "base", tokenizer, n)
    save(tmp_path / "a", with_tokens(tokenizer, "<a>"), n + 1)
    config = tmp_path / "base" / "tokenizer_config.json"
    old = json.loads(config.read_text()) | {"added_tokens_decoder": {"0": {"content": "<s>"}}}
    config.write_text(json.dumps(old))
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    merge_checkpoints(
        tmp_path / "base", {"a": tmp_path / "a"}, create("average"), tmp_path / "o",
        vocabulary="union",
    )  # fmt: skip
    decoder = json.loads((tmp_path / "o" / "tokenizer_config.json").read_text())
    assert decoder["added_tokens_decoder"][str(n)]["content"] == "<a>"
    assert decoder["added_tokens_decoder"][str(n)]["special"] is True
    assert json.loads((tmp_path / "o" / "added_tokens.json").read_text()) == {"<a>": n}
    save_file({EMBED: torch.ones(2, 2)}, tmp_path / "lone.safetensors")
    with pytest.raises(InputError, match="refuse, common_rows, union"):
        merge_checkpoints(
            tmp_path / "base", {"a": tmp_path / "a"}, create("average"), tmp_path / "o2",
            vocabulary="all",
        )  # fmt: skip

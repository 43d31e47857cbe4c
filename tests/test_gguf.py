"""GGUF files are read as transformers reads them, tensor by tensor."""

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from experiments import merge as command
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from tests.fixtures.commands import called

gguf = pytest.importorskip("gguf")
SIZES = {"hidden": 64, "inner": 96, "heads": 4, "groups": 2, "words": 40}


def written(path, seed=0, kind="Q8_0"):
    """A small llama as llama.cpp stores it."""
    hidden, inner, words = SIZES["hidden"], SIZES["inner"], SIZES["words"]
    keys = hidden // SIZES["heads"] * SIZES["groups"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["groups"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    writer.add_token_list([f"w{i}" for i in range(words)])
    shapes = {
        "token_embd.weight": (words, hidden), "output.weight": (words, hidden),
        "output_norm.weight": (hidden,), "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,), "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (keys, hidden), "blk.0.attn_v.weight": (keys, hidden),
        "blk.0.attn_output.weight": (hidden, hidden), "blk.0.ffn_gate.weight": (inner, hidden),
        "blk.0.ffn_up.weight": (inner, hidden), "blk.0.ffn_down.weight": (hidden, inner),
    }  # fmt: skip
    generator = numpy.random.default_rng(seed)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(numpy.float32)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            type_ = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F32"])
def test_tensors_are_those_that_transformers_loads(tmp_path, kind):
    path = written(tmp_path / "model.gguf", kind=kind)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    source = open_checkpoint(path)
    assert set(source.keys()) == set(expected)
    assert source.quantised == ("" if kind == "F32" else f"GGUF {kind}")
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name), tensor.float()), name
        assert torch.equal(source.read(name, slice(3, 7)), tensor.float()[3:7]), name


def test_a_merge_into_a_gguf_file_loads(tmp_path, monkeypatch, capsys):
    base, a = written(tmp_path / "base.gguf"), written(tmp_path / "a.gguf", seed=1)
    line = ["merge", f"base={base}", f"experts.a={a}", f"output={tmp_path}/out", "method=average"]
    for more, code in (([], 2), (["dtype=float32"], 0)):
        status, _, err = called(monkeypatch, capsys, command.main, *line, "device=cpu", *more)
        assert status == code, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expert = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf").state_dict()
    for name, tensor in expert.items():
        torch.testing.assert_close(merged[name], tensor.float())
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == merged.keys()


def test_a_dense_base_and_an_expert_in_gguf(tmp_path):
    import merging

    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).state_dict()
    expert = open_checkpoint(written(tmp_path / "a.gguf"))
    merged = merging.merge_state_dicts(base, {"a": expert}, merging.create("average"))
    torch.testing.assert_close(merged["lm_head.weight"], expert.read("lm_head.weight"))
    assert "is quantised (GGUF Q8_0)" in merged.report.notes[0]


def test_files_that_are_none(tmp_path):
    path = tmp_path / "x.gguf"
    for content in (b"", b"GGUF", b"GGUF" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.gguf is no GGUF file"):
            open_checkpoint(path)
    whole = written(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"x\.gguf"):
        open_checkpoint(path)

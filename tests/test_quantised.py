"""Quantised weights are read as the numbers they stand for, or refused; never as codes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint

FP8 = torch.float8_e4m3fn
BELOW = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
NF4 = torch.tensor((*BELOW, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(folder, tensors, settings=None):
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if settings:
        (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return open_checkpoint(folder)


def check(source, name, values):
    """The tensor, and every window of its rows."""
    assert source.shape(name) == tuple(values.shape)
    assert source.dtype(name) == torch.float32
    assert torch.equal(source.read(name), values)
    for rows in (slice(0, 1), slice(1, len(values)), slice(3, 4), slice(0, len(values))):
        assert torch.equal(source.read(name, rows), values[rows]), rows


def by_entry(shape, value):
    return torch.tensor([[value(i, j) for j in range(shape[1])] for i in range(shape[0])])


@pytest.mark.parametrize("name", ["w.weight", "w.experts.gate_up_proj"])
def test_fp8_in_blocks(tmp_path, name):
    codes, scale = draw(40, 21).to(FP8), draw(3, 2).abs()
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    source = saved(tmp_path, {name: codes, f"{name}_scale_inv": scale}, settings)
    plain = by_entry(codes.shape, lambda i, j: codes.float()[i, j] * scale[i // 16, j // 16])
    check(source, name, plain)
    assert source.keys() == [name] and source.quantised == "FP8 with scales"


def test_fp8_in_blocks_of_128_without_a_config(tmp_path):
    codes, scale = draw(200, 140).to(FP8), draw(2, 2).abs()
    source = saved(tmp_path, {"w.weight": codes, "w.weight_scale_inv": scale})
    plain = by_entry(codes.shape, lambda i, j: codes.float()[i, j] * scale[i // 128, j // 128])
    check(source, "w.weight", plain)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (5,)])
@pytest.mark.parametrize("scale_name", ["w.weight_scale", "w.scale_weight"])
def test_fp8_with_one_scale_a_tensor_or_a_row(tmp_path, shape, scale_name):
    codes, scale = draw(5, 4).to(FP8), draw(*shape).abs()
    beside = {"w.input_scale": torch.ones(()), "scaled_fp8": torch.zeros(2).to(FP8)}
    norm = {"norm.weight": torch.ones(4)}
    source = saved(tmp_path, {"w.weight": codes, scale_name: scale} | beside | norm)
    check(source, "w.weight", codes.float() * scale.reshape(-1, 1))
    assert sorted(source.keys()) == ["norm.weight", "w.weight"]


def test_fp8_of_fused_experts(tmp_path):
    codes, scale = draw(4, 32, 48).to(FP8), draw(4, 2, 3).abs()
    source = saved(
        tmp_path,
        {"mlp.experts.down_proj": codes, "mlp.experts.down_proj_scale_inv": scale},
        {"weight_block_size": [16, 16]},
    )
    spread = scale.repeat_interleave(16, 1).repeat_interleave(16, 2)
    check(source, "mlp.experts.down_proj", codes.float() * spread)


def test_int8_with_scales_and_zero_points(tmp_path):
    codes = (40 * draw(5, 4)).to(torch.int8)
    scale, zero = draw(5, 1).abs(), (9 * draw(5, 1, seed=1)).to(torch.int8)
    tensors = {"w.weight": codes, "w.weight_scale": scale, "w.weight_zero_point": zero}
    check(saved(tmp_path, tensors), "w.weight", (codes.float() - zero.float()) * scale)


def test_fp8_of_one_value_a_number_is_what_it_is(tmp_path):
    values = draw(3, 4).to(FP8)
    source = saved(tmp_path, {"w.weight": values})
    assert source.dtype("w.weight") == FP8 and source.quantised == ""


def pack(codes):
    return (codes[::2] * 16 + codes[1::2]).to(torch.uint8).reshape(-1, 1)


def nf4(weight, block=64, nested=False):
    """What bitsandbytes saves of a weight, by its documentation."""
    flat = weight.reshape(-1, block)
    absmax = flat.abs().amax(1)
    codes = (flat / absmax[:, None]).reshape(-1, 1).sub(NF4).abs().argmin(1)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16"}
    state["shape"] = list(weight.shape)
    parts = {"w.weight": pack(codes), "w.weight.quant_map": NF4, "w.weight.absmax": absmax}
    if nested:
        table = torch.linspace(-1, 1, 256)
        offset = float(absmax.mean())
        outer = (absmax - offset).reshape(-1, 4).abs().amax(1)
        inner = (absmax - offset).reshape(-1, 4) / outer[:, None]
        indices = inner.reshape(-1, 1).sub(table).abs().argmin(1)
        absmax = table[indices] * outer.repeat_interleave(4) + torch.tensor(offset)
        parts["w.weight.absmax"] = indices.to(torch.uint8)
        parts |= {"w.weight.nested_absmax": outer, "w.weight.nested_quant_map": table}
        state |= {"nested_blocksize": 4, "nested_offset": offset, "nested_dtype": "float32"}
    data = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts["w.weight.quant_state.bitsandbytes__nf4"] = data
    return parts, (NF4[codes].reshape(-1, block) * absmax[:, None]).reshape(weight.shape)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_4_bits(tmp_path, nested):
    parts, values = nf4(draw(16, 64), nested=nested)
    source = saved(tmp_path, parts, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    check(source, "w.weight", values)
    assert source.keys() == ["w.weight"] and source.quantised == "bitsandbytes in 4 bits"


def test_bitsandbytes_rows_that_share_blocks(tmp_path):
    parts, values = nf4(draw(8, 24), block=64)
    check(saved(tmp_path, parts), "w.weight", values)


def test_bitsandbytes_in_8_bits(tmp_path):
    weight = draw(5, 4)
    scale = weight.abs().amax(1)
    codes = (weight / scale[:, None] * 127).round().to(torch.int8)
    form = torch.zeros((), dtype=torch.uint8)
    source = saved(tmp_path, {"w.weight": codes, "w.SCB": scale, "w.weight_format": form})
    assert source.keys() == ["w.weight"]
    torch.testing.assert_close(source.read("w.weight"), codes.float() * scale[:, None] / 127)
    torch.testing.assert_close(source.read("w.weight"), weight, atol=0.02, rtol=0)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 6, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 134, (3, 6, 2), generator=generator, dtype=torch.uint8)
    name = "mlp.experts.gate_up_proj"
    source = saved(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales})
    check_whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert source.keys() == [name] and source.shape(name) == (3, 64, 6)
    assert torch.equal(source.read(name), check_whole)
    assert torch.equal(source.read(name, slice(1, 3)), check_whole[1:3])
    # by hand: code 7 is 6, code 15 is -6, the shared exponent 128 doubles
    blocks[0, 0, 0, 0], scales[0, 0, 0] = 0xF7, 128
    source = saved(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales})
    assert source.read(name)[0, :2, 0].tolist() == [12, -12]


def test_weights_and_scales_in_different_shards(tmp_path):
    codes, scale = draw(4, 4).to(FP8), torch.tensor(2.0)
    for file, tensors in {"1": {"w.weight": codes}, "2": {"w.weight_scale": scale}}.items():
        save_file(tensors, tmp_path / f"{file}.safetensors")
    index = {"w.weight": "1.safetensors", "w.weight_scale": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(open_checkpoint(tmp_path).read("w.weight"), 2 * codes.float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w.qweight": torch.ones(2, 2).int(), "w.scales": torch.ones(2)}, "GPTQ or AWQ"),
        ({"w.weight_packed": torch.ones(2, 2).int()}, "compressed-tensors"),
        ({"w.W_q": torch.ones(2, 2).to(torch.uint8)}, "HQQ"),
        ({"w.weight": torch.ones(2, 2).to(torch.int8)}, "without the scales"),
        ({"w.weight": torch.ones(2, 2).to(torch.uint8), "w.absmax": torch.ones(1)}, "without"),
        ({"w.weight": torch.ones(9, 9).to(FP8), "w.weight_scale": torch.ones(4, 2)}, "not fit"),
        ({"w.weight": torch.ones(2, 2).to(torch.int8), "w.SCB": torch.ones(3)}, "one scale for"),
        ({"w_blocks": torch.ones(2, 2), "w_scales": torch.ones(2, 2)}, "in MXFP4"),
    ],
)
def test_what_has_no_rule_is_refused(tmp_path, tensors, message):
    with pytest.raises(InputError, match=message) as caught:
        saved(tmp_path, tensors)
    assert str(tmp_path) in caught.value.message


def test_descriptions_that_describe_nothing(tmp_path):
    parts, _ = nf4(draw(16, 64))
    state = "w.weight.quant_state.bitsandbytes__nf4"
    for content in (b"\x00\x01", b"[]", b"{}", b'{"shape": [2, 2], "blocksize": 64}'):
        broken = parts | {state: torch.tensor(list(content), dtype=torch.uint8)}
        with pytest.raises(InputError, match="w.weight"):
            saved(tmp_path, broken)

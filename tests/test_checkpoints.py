"""Every checkpoint format gives the tensors that were saved; bad ones name what is wrong."""

import json
import math
import os
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from merging.errors import InputError
from merging.formats.checkpoints import Adapter, StateDict, open_checkpoint
from merging.formats.checks import check_finite, problems
from merging.formats.fit import fit
from merging.formats.slots import MAPPED_BYTES, Strided

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def bits(tensor):
    """Comparable whatever the dtype, NaN included."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(source, expected):
    assert set(source.keys()) == set(expected)
    for name, tensor in expected.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        read = source.read(name)
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(bits(read), bits(tensor)), name
        if tensor.ndim and len(tensor) > 2:
            assert torch.equal(bits(source.read(name, slice(1, 3))), bits(tensor[1:3])), name


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    state = {
        f"layer.{str(dtype).removeprefix('torch.')}": torch.randint(
            0, 2, (5, 3), generator=generator
        ).to(dtype)
        for dtype in DTYPES
    }
    return state | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "one": torch.ones(1)}


def write_header(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def shard(folder, shards, suffix="safetensors", save=save_file):
    """A sharded checkpoint: {file number: tensors}."""
    name = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    weight_map = {}
    for number, tensors in shards.items():
        file = f"{name}-{number:05}-of-{len(shards):05}.{suffix}"
        save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = folder / f"{name}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


# --- reading --------------------------------------------------------------------------------------


def test_safetensors_of_every_dtype(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same(open_checkpoint(path), tensors)


def test_keys_come_in_file_order(tmp_path):
    header = {"a": entry(8, 12), "b": entry(0, 8), "__metadata__": {"format": "pt"}}
    write_header(tmp_path / "x.safetensors", header, bytes(12))
    assert open_checkpoint(tmp_path / "x.safetensors").keys() == ["b", "a"]


def test_unaligned_tensors_are_read(tmp_path):
    """Other writers do not pad: here float data starts at an odd byte, small and mapped."""
    for numel in (3, MAPPED_BYTES):
        values = torch.arange(numel, dtype=torch.float32)
        header = {"flag": entry(0, 1, [1], "U8"), "w": entry(1, 1 + 4 * numel)}
        data = b"\x07" + values.numpy().tobytes()
        path = write_header(tmp_path / "x.safetensors", header, data)
        assert torch.equal(open_checkpoint(path).read("w"), values)


def test_large_tensors_are_mapped_and_rows_cost_rows(tmp_path):
    weight = torch.randn(4096, 512)
    save_file({"w": weight}, tmp_path / "x.safetensors")
    source = open_checkpoint(tmp_path / "x.safetensors")
    for start, stop in ((0, 1), (100, 1500), (4090, 4096), (3, 3)):
        assert torch.equal(source.read("w", slice(start, stop)), weight[start:stop])
    assert source.bytes_read == (1 + 1400 + 6) * 512 * 4
    rows = source.read("w", slice(0, 2048))
    source.close()
    rows.zero_()  # a private copy: valid after close, and the file does not change
    assert torch.equal(open_checkpoint(tmp_path / "x.safetensors").read("w"), weight)


def test_more_tensors_alive_than_file_descriptors(tmp_path):
    resource = pytest.importorskip("resource")
    save_file(
        {f"w{i}": torch.full((1 << 18,), float(i)) for i in range(8)}, tmp_path / "x.safetensors"
    )
    source = open_checkpoint(tmp_path / "x.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    alive = [source.read(f"w{i % 8}") for i in range(400)]
    assert len(os.listdir("/proc/self/fd")) < 350 and limits[0] >= 350
    assert [t[5].item() for t in alive] == [float(i % 8) for i in range(400)]


def test_a_header_of_terabytes_is_read_without_the_data(tmp_path):
    """Offsets of more than 32 bits; the file is sparse."""
    numel = 3 * 10**9
    header = {"a": entry(0, 4 * numel), "b": entry(4 * numel, 4 * numel + 8)}
    path = write_header(tmp_path / "x.safetensors", header)
    with open(path, "r+b") as file:
        file.truncate(file.seek(0, 2) + 4 * numel + 8)
        file.seek(-8, 2)
        file.write(torch.tensor([1.0, 2.0]).numpy().tobytes())
    source = open_checkpoint(path)
    assert source.shape("a") == (numel,)
    assert source.read("b").tolist() == [1, 2]
    assert source.read("a", slice(numel - 3, numel)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_checkpoints(tmp_path, suffix):
    parts = {1: {"a": torch.randn(3), "b": torch.randn(4, 2)}, 2: {"c": torch.randn(2)}}
    save = save_file if suffix == "safetensors" else torch.save
    index = shard(tmp_path, parts, suffix, save)
    for path in (tmp_path, index):
        source = open_checkpoint(path)
        assert_same(source, parts[1] | parts[2])
        assert source.file("c").name.endswith(f"-00002-of-00002.{suffix}")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_torch_files(tmp_path, legacy, protocol, tensors):
    base = torch.randn(6, 6)
    state = {**tensors, "transposed": base.T, "strided": base[::2, 1:4], "offset": base[2:]}
    if legacy:  # the old format has no storage types for these
        state = {k: v for k, v in state.items() if "uint16" not in k and "uint32" not in k}
        state = {k: v for k, v in state.items() if "uint64" not in k and "float8" not in k}
    torch.save(
        state,
        tmp_path / "x.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    assert_same(open_checkpoint(tmp_path / "x.pt"), state)
    assert_same(open_checkpoint(tmp_path), state)


def test_old_torch_views_are_resolved(tmp_path):
    """The old format stores one storage for several views, each with its own offset."""
    whole = torch.arange(12.0)
    state = OrderedDict(a=whole[:4], b=whole[4:].view(4, 2), c=whole[4:].view(4, 2).T)
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_same(open_checkpoint(tmp_path / "x.pth"), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_wrapped_state_dicts(tmp_path, wrapper):
    state = nn.Linear(3, 2).state_dict()
    saved = {
        wrapper: {f"module.{k}": v for k, v in state.items()},
        "epoch": 3,
        "optimizer": {"lr": 1},
    }
    torch.save(saved, tmp_path / "x.pt")
    assert_same(open_checkpoint(tmp_path / "x.pt"), state)


def test_tied_tensors_are_found(tmp_path):
    embedding = torch.randn(5, 3)
    state = {"embed": embedding, "body": torch.randn(2), "head": embedding, "part": embedding[:2]}
    torch.save(state, tmp_path / "x.pt")
    for source in (StateDict(state), open_checkpoint(tmp_path / "x.pt")):
        assert source.tied == {"head": "embed"}
        assert_same(source, state)


def test_state_dicts_in_memory(tensors):
    source = StateDict(tensors)
    assert_same(source, tensors)
    assert "scalar" in source and "absent" not in source
    assert StateDict({"w": nn.Parameter(torch.ones(4))}).read("w").requires_grad is False
    with pytest.raises(InputError, match="'epoch' is a int"):
        StateDict({"epoch": 3})


# --- files that are wrong -------------------------------------------------------------------------

BAD_HEADERS = {
    "empty": (b"", b"", 0, "not valid JSON"),
    "longer than file": (b"{}", b"", 1000, "header should have 1000 bytes"),
    "enormous": (b"{}", b"", 2**63, "header should have"),
    "not JSON": (b"{nope", b"", None, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not valid JSON"),
    "lone surrogate": (b'{"\\ud800": 1}', b"", None, "not valid JSON"),
    "deep": (b"[" * 50_000 + b"]" * 50_000, b"", None, "not valid JSON"),
    "list": (b"[]", b"", None, "holds a JSON list"),
    "no tensors": (b"{}", b"", None, "holds no tensors"),
    "twice": (b'{"w": 1, "w": 1}', b"", None, "a key appears twice"),
    "no dtype": ({"w": {"shape": [1]}}, b"", None, "'w' should have a dtype"),
    "dtype": ({"w": entry(0, 4, dtype="F4")}, bytes(4), None, "'w' has the unsupported dtype 'F4'"),
    "negative": ({"w": entry(0, 4, [-1])}, bytes(4), None, "'w' has an impossible shape"),
    "bool": ({"w": entry(0, 4, [True])}, bytes(4), None, "'w' has an impossible shape"),
    "overflow": ({"w": entry(0, 4, [2**40, 2**40])}, bytes(4), None, "'w' has an impossible shape"),
    "size": ({"w": entry(0, 8, [3])}, bytes(8), None, "'w' has 8 bytes, its shape .* need 12"),
    "truncated": ({"w": entry(0, 8)}, bytes(5), None, "truncated: tensor 'w' ends at byte"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None, "'b' overlaps 'a'"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), None, "'b' leaves a hole after 'a'"),
    "rest": ({"a": entry(0, 4)}, bytes(9), None, "5 bytes after its last tensor"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_safetensors(tmp_path, name):
    header, data, length, message = BAD_HEADERS[name]
    path = write_header(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(path)
    assert "x.safetensors" in caught.value.message


def test_bad_indexes(tmp_path):
    def reopen(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        index = shard(folder, {1: {"a": torch.ones(1)}, 2: {"b": torch.ones(2)}})
        content = json.loads(index.read_text())
        content = change(folder, content["weight_map"]) or content
        index.write_text(json.dumps(content))
        with pytest.raises(InputError) as caught:
            open_checkpoint(folder)
        return caught.value.message

    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert "shard 'other' of tensor 'a' is missing" in reopen(lambda _, m: m.update(a="other"))
    for outside in ("../x", "/etc/passwd", "sub/x", "..", "", 3, None, "a\0b"):
        message = reopen(lambda _, m, outside=outside: m.update(a=outside))
        assert "tensor 'a'" in message and ("same folder" in message or "missing" in message)
    message = reopen(lambda _, m: m.update(c=first))
    assert f"places tensor 'c' in {first}, which does not hold it" in message
    assert f"does not list tensor 'b' of {second}" in reopen(
        lambda _, m: m.pop("b") and m.update(c=second)
    )
    message = reopen(lambda f, _: save_file({"a": torch.ones(1), "b": torch.ones(2)}, f / second))
    assert f"tensor 'a' is in {first} and {second}" in message
    assert "no weight_map" in reopen(lambda _, __: {"weight_map": []})
    assert "index.json" in reopen(lambda _, m: m.update(a="model.safetensors.index.json"))
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "model-1.safetensors")
    (tmp_path / "pipe" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}'
    )
    with pytest.raises(InputError, match="is not a file"):
        open_checkpoint(tmp_path / "pipe")


def test_an_index_of_many_gigabytes(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.touch()
    os.truncate(path, 10**10)
    with pytest.raises(InputError, match="expected a small JSON file"):
        open_checkpoint(tmp_path)


def test_folders_and_paths(tmp_path):
    with pytest.raises(InputError, match="absent does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        open_checkpoint(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="exactly one weight file, it has: none"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="it has: a.safetensors, b.safetensors"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    assert open_checkpoint(tmp_path).read("w").item() == 0
    (tmp_path / "adapter_config.json").write_text("{}")  # left behind by merging an adapter
    assert open_checkpoint(tmp_path).read("w").item() == 0
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_under_the_reader(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(4)}, path)
    source = open_checkpoint(path)
    before = source.stamp()
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match="x.safetensors changed while it was being read"):
        source.read("w")
    with open(path, "rb") as file, pytest.raises(InputError, match="ends before byte 1000"):
        Strided(path, torch.uint8, (10,), (1,), 990).load(lambda _: file.fileno())
    save_file({"w": torch.ones(4)}, path)
    assert open_checkpoint(path).stamp() != before
    assert "w" in open_checkpoint(path) and "v" not in open_checkpoint(path)
    with pytest.raises(ValueError, match="steps of 1"):
        open_checkpoint(path).read("w", slice(0, 4, 2))


# --- checks ---------------------------------------------------------------------------------------


def test_one_report_lists_every_problem():
    base = StateDict({"a": torch.ones(2), "b": torch.ones(3, 2), "embed": torch.ones(9, 2)}, "BASE")
    expert = StateDict(
        {"a": torch.ones(2).long(), "embed": torch.ones(8, 2), "c": torch.ones(1)}, "X"
    )
    other = StateDict({"a": torch.ones(2), "b": torch.ones(2, 3), "embed": torch.ones(9, 2)}, "Y")
    fitted = fit(base, {"math": expert, "code": other})
    told = problems(base, fitted)
    vocabulary = "a vocabulary of 8, the base's has 9 (vocabulary=common_rows merges the rows that"
    assert told == [
        "expert 'math' (X): tensor 'b' of BASE is missing",
        "expert 'math' (X): tensor 'c' is not in BASE",
        "expert 'math' (X): tensor 'a' is torch.int64, the base's torch.float32",
        f"expert 'math' (X): tensor 'embed' has {vocabulary} both have, "
        "vocabulary=union those of every token)",
        "expert 'code' (Y): tensor 'b' has shape [2, 3], the base's has [3, 2]",
    ]
    assert problems(base, fit(base, {"math": expert}), common_rows=True) == [
        t for t in told[:4] if "vocab" not in t
    ]
    assert problems(base, fit(base, {"same": base})) == []


def test_dropped_tied_copies_are_no_problem():
    embedding = torch.ones(4, 2)
    tied = StateDict({"embed": embedding, "head": embedding})
    reverse = StateDict({"head": embedding, "embed": embedding})
    alone = StateDict({"embed": embedding})
    assert problems(tied, fit(tied, {"x": alone})) == []
    assert problems(alone, fit(alone, {"x": tied, "y": reverse})) == []
    # the base merges tied tensors under their first name, which the expert must have
    assert problems(tied, fit(tied, {"x": StateDict({"head": embedding})})) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(dtype, value):
    tensor = torch.ones(3, 4)
    check_finite(tensor.to(dtype), "w", "FILE")
    tensor[2, 1] = value
    with pytest.raises(InputError, match=r"FILE: tensor 'w' has 1 values .* first at \[2, 1\]"):
        check_finite(tensor.to(dtype), "w", "FILE")


def test_finiteness_concerns_floats_only():
    check_finite(torch.ones(2, dtype=torch.int64), "ids", "FILE")
    check_finite(torch.empty(0, 3), "empty", "FILE")


# --- adapters -------------------------------------------------------------------------------------

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "org/base"}


def write_adapter_files(folder, config=CONFIG, tensors=None, module="layer.0.query"):
    folder.mkdir(exist_ok=True)
    if tensors is None:
        prefix = f"base_model.model.{module}"
        tensors = {
            f"{prefix}.lora_A.weight": torch.arange(10.0).view(2, 5),
            f"{prefix}.lora_B.weight": torch.arange(6.0).view(3, 2),
        }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapter_names_shapes_and_scale(tmp_path):
    adapter = open_checkpoint(write_adapter_files(tmp_path))
    assert isinstance(adapter, Adapter)
    assert adapter.keys() == ["layer.0.query.weight"] and "layer.0.query.weight" in adapter
    assert adapter.shape("layer.0.query.weight") == (3, 5)
    assert adapter.rank("layer.0.query.weight") == 2
    A, B, scale = adapter.factors("layer.0.query.weight")
    assert scale == 8 / 2
    assert torch.equal(B @ A, torch.arange(6.0).view(3, 2) @ torch.arange(10.0).view(2, 5))
    assert adapter.base_name == "org/base" and adapter.dense == {} and not adapter.transposed
    assert adapter.bytes_read == 64
    adapter.close()
    twice = open_checkpoint(write_adapter_files(tmp_path, CONFIG | {"lora_alpha": 16}))
    assert twice.stamp() != adapter.stamp()


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        ({"use_rslora": True}, 8 / math.sqrt(2)),
        ({"alpha_pattern": {"query": 3}}, 3 / 2),
        ({"alpha_pattern": {"key": 3, "^layer.0.query": 5}}, 5 / 2),
        ({"alpha_pattern": {r"layer\.\d+\.(key|query)": 1, "query": 7}}, 1 / 2),
        ({"alpha_pattern": {"uery": 3}}, 8 / 2),
        ({"r": 64, "rank_pattern": {"query": 2}}, 8 / 2),
        ({"init_lora_weights": "gaussian", "use_dora": False, "lora_dropout": 0.1}, 8 / 2),
    ],
)
def test_adapter_scales(tmp_path, change, scale):
    adapter = open_checkpoint(write_adapter_files(tmp_path, CONFIG | change))
    assert adapter.factors("layer.0.query.weight")[2] == pytest.approx(scale, abs=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "'IA3' adapter, only LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 4}, "has rank 2, the config says 4"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern should map"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "no module name or simple regex"),
        ({"alpha_pattern": {"(a|a)(a|a)(a|a)": 1}}, "no module name or simple regex"),
        ({"alpha_pattern": {"a(": 1}}, "is invalid"),
    ],
)
def test_adapters_that_cannot_be_represented(tmp_path, change, message):
    with pytest.raises(InputError) as caught:
        open_checkpoint(write_adapter_files(tmp_path, CONFIG | change))
    assert message in caught.value.message and str(tmp_path) in caught.value.message


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q.lora_A.weight": (2, 5)}, "'q.weight' should have one factor A, one B"),
        (
            {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (3, 4)},
            "expected (r, d_in) and (d_out, r)",
        ),
        ({"q.lora_A.weight": (2, 5, 1, 1), "q.lora_B.weight": (3, 2, 3, 3)}, "expected (r, d_in)"),
        ({"q.lora_embedding_A": (2, 5)}, "should have one factor A, one B"),
        ({"q.lora_A.weight": (2, 5), "q.lora_magnitude_vector": (3,)}, "one factor A, one B"),
        ({"q.lora_A.weight": (2, 5), "q.lora_B.bias": (3,)}, "not a LoRA factor"),
        ({"q.lora_A.a.weight": (2, 5), "q.lora_A.b.weight": (2, 5)}, "holds 2 LoRA adapters"),
        ({"q.weight": (2, 5)}, "holds 0 LoRA adapters"),
        (
            {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (3, 2), "q.weight": (3, 5)},
            "nothing else",
        ),
        ({"q.lora_A.weight": (2, 5), "h.base_layer.bias": (3,), "h.bias": (3,)}, "'h.bias' twice"),
    ],
)
def test_bad_adapter_weights(tmp_path, shapes, message):
    tensors = {f"base_model.model.{k}": torch.ones(shape) for k, shape in shapes.items()}
    with pytest.raises(InputError) as caught:
        open_checkpoint(write_adapter_files(tmp_path, tensors=tensors))
    assert message in caught.value.message


def test_factors_of_integers(tmp_path):
    tensors = {f"q.lora_{which}.weight": torch.ones(2, 2, dtype=torch.int16) for which in "AB"}
    with pytest.raises(InputError, match=r"factors of 'q.weight' are not floating point"):
        open_checkpoint(write_adapter_files(tmp_path, tensors=tensors))


def test_adapter_targets_are_checked_against_the_base(tmp_path):
    adapter = open_checkpoint(write_adapter_files(tmp_path / "a"))
    assert adapter.problems(StateDict({"layer.0.query.weight": torch.ones(3, 5)})) == []
    base = StateDict({"layer.0.query.weight": torch.ones(5, 3), "w": torch.ones(1)}, "BASE")
    assert adapter.problems(base) == [
        "tensor 'layer.0.query.weight' has shape [3, 5], the base's has [5, 3]"
    ]
    assert adapter.problems(StateDict({"w": torch.ones(1)}, "BASE")) == [
        "the target 'layer.0.query.weight' is not in BASE"
    ]
    conv1d = open_checkpoint(write_adapter_files(tmp_path / "b", CONFIG | {"fan_in_fan_out": True}))
    assert conv1d.transposed and conv1d.shape("layer.0.query.weight") == (5, 3)
    assert conv1d.problems(base) == []


def test_adapters_of_different_bases(tmp_path):
    base = StateDict({"layer.0.query.weight": torch.ones(3, 5)})
    a = open_checkpoint(write_adapter_files(tmp_path / "a"))
    b = CONFIG | {"base_model_name_or_path": "org/other"}
    b = open_checkpoint(write_adapter_files(tmp_path / "b", b))
    local = CONFIG | {"base_model_name_or_path": "/data/checkpoints/base"}
    local = open_checkpoint(write_adapter_files(tmp_path / "c", local))
    assert problems(base, {"x": a, "y": local}) == []
    assert problems(base, {"x": a, "y": b}) == [
        "the adapters were trained on different bases: 'x' on org/base, 'y' on org/other (if they "
        "are one model, name it alike in their adapter_config.json)"
    ]
    mirror = CONFIG | {"base_model_name_or_path": "mirror/base-bnb-4bit"}
    mirror = open_checkpoint(write_adapter_files(tmp_path / "d", mirror))
    assert problems(base, {"x": a, "y": mirror}) == []


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.attn = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.fc(self.attn(x, x, x, need_weights=False)[0]))


def trained_peft(module, **settings):
    """A PEFT model whose adapter weights are random, as after training."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(module, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    return model


def test_what_peft_saves_is_what_peft_merges(tmp_path):
    """Linear, packed attention and its output, modules_to_save, patterns, rsLoRA: base + s B A."""
    module = Block()
    base = {k: v.clone() for k, v in module.state_dict().items()}
    model = trained_peft(
        module,
        r=2,
        lora_alpha=3,
        target_modules=["fc", "attn"],
        modules_to_save=["head"],
        rank_pattern={"fc": 4},
        alpha_pattern={"attn": 5},
        use_rslora=True,
    )
    x = torch.randn(5, 1, 8)
    expected = model(x)  # up to 1e3 in size, where factors of normal entries multiply
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    saved = load_file(tmp_path / "safe/adapter_model.safetensors")
    torch.save(saved, tmp_path / "bin/adapter_model.bin")
    shutil.copy(tmp_path / "safe/adapter_config.json", tmp_path / "bin")
    for folder in (tmp_path / "safe", tmp_path / "bin"):
        adapter = open_checkpoint(folder)
        assert set(adapter.keys()) == {"fc.weight", "attn.in_proj_weight", "attn.out_proj.weight"}
        assert set(adapter.dense) == {"head.weight", "head.bias"}
        assert adapter.problems(StateDict(base)) == []
        state = base | adapter.dense | {n: base[n] + adapter.delta(n) for n in adapter.keys()}
        merged = Block()
        merged.load_state_dict(state)
        assert (merged(x) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("version", "factor"), [(None, 2), ("0.21.2", 2), ("0.22.0", 1)])
def test_attention_outputs_follow_the_version_of_peft(tmp_path, version, factor):
    tensors = {
        f"base_model.model.attn{part}.lora_{which}.weight": torch.ones(shape)
        for part in ("", ".base_layer.out_proj")
        for which, shape in (("A", (2, 4)), ("B", (4 if part else 12, 2)))
    }
    config = CONFIG | {"peft_version": version, "alpha_pattern": {"attn": 6}}
    adapter = open_checkpoint(write_adapter_files(tmp_path, config, tensors))
    assert adapter.shape("attn.in_proj_weight") == (12, 4)
    assert adapter.factors("attn.in_proj_weight")[2] == 6 / 2
    assert adapter.factors("attn.out_proj.weight")[2] == factor * 6 / 2


def test_peft_on_conv1d_is_transposed(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module = nn.Sequential(conv1d(6, 6), conv1d(4, 6))
    base = {k: v.clone() for k, v in module.state_dict().items()}
    model = trained_peft(module, r=2, target_modules=["0", "1"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path)
    adapter = open_checkpoint(tmp_path)
    assert adapter.transposed and adapter.shape("1.weight") == (6, 4)
    assert adapter.problems(StateDict(base)) == []
    model.merge_and_unload()
    for name in ("0.weight", "1.weight"):
        merged = module.get_submodule(name[0]).weight.data
        torch.testing.assert_close(base[name] + adapter.delta(name), merged)

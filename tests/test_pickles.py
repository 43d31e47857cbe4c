"""Pickled checkpoints: modules give their state dict, and nothing in a file is ever run."""

import array
import builtins
import collections
import ctypes
import datetime
import decimal
import functools
import inspect
import io
import logging
import operator
import os
import pathlib
import pickle
import random
import re
import runpy
import shutil
import subprocess
import typing
import uuid
import zipfile
import zoneinfo

import numpy
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.formats.pickles import pickled_slots


class Slots:
    """State that pickles as a pair, arguments of __new__ by name."""

    __slots__ = ("__dict__", "side")

    def __new__(cls, *, side=0):
        new = super().__new__(cls)
        new.side, new.other = side, 1
        return new

    def __getnewargs_ex__(self):
        return (), {"side": self.side}


class Marked(torch.Tensor):
    """A subclass of Tensor."""


class Scaled(nn.Linear):
    """A class of the saving side: with state of its own and code that must not run on reading."""

    def __init__(self):
        super().__init__(4, 3)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("dropped", torch.zeros(2), persistent=False)
        self.register_parameter("absent", None)
        self.activation = torch.nn.functional.gelu
        self.options = {"norm": functools.partial(nn.LayerNorm, eps=1e-6), ("a", 1): [None, 2.5]}
        self.mode, self.steps, self.slots = torch.float16, range(3), Slots()
        self.register_buffer("marked", torch.ones(2).as_subclass(Marked))
        self.forward_hook = self.forward

    def __setstate__(self, state):
        raise AssertionError("code of the checkpoint was run")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Scaled(), nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2)])
        self.free = nn.Parameter(torch.randn(2, 5))
        self.free.note = "an attribute makes torch pickle the parameter differently"
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
        self.table = nn.ParameterDict({"x": nn.Parameter(torch.zeros(1))})
        self.shared = self.blocks[0]
        self.nothing = None
        self.register_module("hole", None)


def save(value, path, legacy=False, protocol=2):
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_module_gives_its_state_dict(tmp_path, legacy, protocol):
    module = Encoder()
    source = open_checkpoint(save(module, tmp_path / "x.pt", legacy, protocol))
    state = module.state_dict()
    assert set(source.keys()) == set(state)
    for name, tensor in state.items():
        assert torch.equal(source.read(name), tensor) and source.dtype(name) == tensor.dtype
    assert source.tied["shared.weight"] == "blocks.0.weight"


def test_the_oldest_protocols(tmp_path):
    """They make objects by copyreg._reconstructor; torch no longer writes them, but reads them."""
    program = b"ccopy_reg\n_reconstructor\n(cmodels\nNet\nc__builtin__\nobject\nNtR(dS'a'\nI1\nsb."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", program)
    with pytest.raises(InputError, match="holds a models.Net, expected a state dict"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_wrapped_and_parallel_module(tmp_path):
    module = nn.Sequential(nn.Linear(2, 3))
    wrapped = nn.Module()
    wrapped.module = module  # as DistributedDataParallel does
    path = save({"model": wrapped, "args": os.path.sep, "epoch": 3}, tmp_path / "x.pt")
    assert set(open_checkpoint(path).keys()) == {"0.weight", "0.bias"}


def test_the_encoders_that_vision_papers_publish(tmp_path):
    """An object that holds an open_clip model and its preprocessing, saved whole."""
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.model.CLIPVisionCfg(
        layers=2, width=32, patch_size=14, image_size=28, head_width=16
    )
    text = open_clip.model.CLIPTextCfg(context_length=8, vocab_size=20, width=16, heads=2, layers=1)
    encoder = nn.Module()
    encoder.model = open_clip.CLIP(8, vision, text)
    encoder.train_preprocess = open_clip.image_transform(28, is_train=True)
    encoder.val_preprocess = open_clip.image_transform(28, is_train=False)
    encoder.cache_dir = tmp_path
    for legacy in (False, True):
        source = open_checkpoint(save(encoder, tmp_path / "x.pt", legacy))
        state = encoder.state_dict()
        assert set(source.keys()) == set(state)
        assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())


# --- hostile files --------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.value = function, args

    def __reduce__(self):
        return self.value


def hostile(canary):
    """Ways in which a pickle can act; each one would create the file `canary`."""
    touch = f"touch {canary}"
    write = f"open({str(canary)!r}, 'w')"
    return {
        "os.system": Call(os.system, touch),
        "subprocess.Popen": Call(subprocess.Popen, ["sh", "-c", touch]),
        "builtins.eval": Call(eval, write),
        "builtins.exec": Call(exec, write),
        "builtins.open": Call(open, str(canary), "w"),
        "builtins.__import__": Call(builtins.__import__, "antigravity"),
        "shutil.copy": Call(shutil.copy, __file__, str(canary)),
        "operator": Call(operator.methodcaller("touch"), canary),
        "os.mkdir": Call(os.mkdir, str(canary)),
        "torch.save": Call(torch.save, {}, str(canary)),
        "torch.load": Call(torch.load, str(canary)),
        "numpy.save": Call(numpy.save, str(canary), [1]),
        "torch.hub": Call(torch.hub.load_state_dict_from_url, "https://127.0.0.1/x"),
        "runpy": Call(runpy.run_path, str(canary)),
        "logging": Call(logging.FileHandler, str(canary)),
        "ctypes": Call(ctypes.CDLL, str(canary)),
    }


@pytest.mark.parametrize("name", hostile("x"))
@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_of_a_function_is_refused_and_not_made(tmp_path, name, legacy):
    canary = tmp_path / "canary"
    weights = nn.Linear(2, 2).state_dict()
    attack = hostile(canary)[name]
    for value in (attack, weights | {"x": attack}, {"state_dict": weights, "x": [attack]}):
        path = save(value, tmp_path / "x.pt", legacy)
        with pytest.raises(
            InputError, match="which no checkpoint needs; nothing was run"
        ) as caught:
            open_checkpoint(path)
        assert "x.pt asks for" in caught.value.message
        assert not canary.exists()


def test_plain_pickles_are_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    for name, attack in hostile(canary).items():
        (tmp_path / "x.bin").write_bytes(pickle.dumps({"w": attack}))
        with pytest.raises(InputError, match="nothing was run"):
            open_checkpoint(tmp_path / "x.bin")
        assert not canary.exists(), name
    for value in ({"w": 1}, nn.Linear(1, 1).state_dict(), [1, 2], b"x"):
        (tmp_path / "x.bin").write_bytes(pickle.dumps(value))
        with pytest.raises(InputError):
            open_checkpoint(tmp_path / "x.bin")


def test_opcodes_written_by_hand(tmp_path):
    """Instructions that no well-meant pickle has, and ways to take memory or time at a word."""
    canary = tmp_path / "canary"
    deep = b"(" + b"(" * 200_000 + b"t" * 200_000 + b"t."
    doubled = b"\x80\x02]q\x00" + b"".join(
        b"(h" + bytes([i]) + b"h" + bytes([i]) + b"tq" + bytes([i + 1]) for i in range(60)
    )
    cases = {
        "INST": f"(S'touch {canary}'\nios\nsystem\n.".encode(),
        "OBJ": b"(cos\nsystem\nS'touch x'\no.",
        "GLOBAL of builtins": b"c__builtin__\neval\n.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        "EXT": b"\x80\x02\x82\x01.",
        "BYTEARRAY8": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "BINUNICODE8": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        "BINBYTES8": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
        "FRAME": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.",
        "LONG_BINPUT": b"\x80\x02Nr\xff\xff\xff\xff.",
        "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "decimal": b"I" + b"9" * 10_000 + b"\n.",
        "deep": deep,
        "key of doubled tuples": doubled + b"0}h\x3cNs.",
        "set of doubled tuples": doubled + b"0\x8f(h\x3c\x90.",
        "PERSID": b"Pstorage\n.",
        "BINPERSID": b"\x80\x02]Q.",
        "BUILD of a class": b"ctorch\nTensor\n}b.",
        "REDUCE of a list": b"](tR.",
        "memo": b"\x80\x02h\x09.",
        "empty stack": b".",
        "no end": b"\x80\x02}",
        "unknown opcode": b"\xff.",
    }
    for name, program in cases.items():
        for path in (tmp_path / "plain.pt", tmp_path / "zipped.pt"):
            path.write_bytes(program)
            if path.name == "zipped.pt":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("x/data.pkl", program)
            with pytest.raises(InputError):
                pickled_slots(path)
            assert not canary.exists(), name


def test_a_part_that_is_no_module(tmp_path):
    module = nn.Sequential(nn.Linear(1, 1))
    module._modules["odd"] = collections.Counter()
    with pytest.raises(InputError, match="odd is a collections.Counter, expected a module"):
        open_checkpoint(save(module, tmp_path / "x.pt"))


def test_modules_without_end(tmp_path):
    loop = nn.Module()
    loop.self = loop
    diamond = nn.Module()
    for _ in range(60):  # 2^60 paths to the innermost module
        outer = nn.Module()
        outer.a, outer.b = diamond, diamond
        diamond = outer
    for module in (loop, diamond):
        with pytest.raises(InputError, match="nested without end"):
            open_checkpoint(save(module, tmp_path / "x.pt"))


# --- honest files ---------------------------------------------------------------------------------


def settings():
    """What training frameworks keep beside the weights."""
    from omegaconf import OmegaConf

    return {
        "omegaconf": OmegaConf.create({"lr": 1e-3, "layers": [1, 2], "name": "x", "none": None}),
        "path": pathlib.Path("/data"),
        "uuid": uuid.uuid4(),
        "decimal": decimal.Decimal("0.1"),
        "zone": zoneinfo.ZoneInfo("UTC"),
        "date": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
        "type": typing.Any,
        "alias": list[int],
        "pattern": re.compile("a+"),
        "logger": logging.getLogger("x"),
        "empty": inspect.Parameter.empty,
        "array": array.array("d", [1.0]),
        "random": random.Random(0),
        "generator": numpy.random.default_rng(0),
        "buffer": io.BytesIO(b"x"),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_settings_of_training_frameworks_are_no_attack(tmp_path, protocol):
    weights = nn.Linear(2, 2).state_dict()
    for name, value in settings().items():
        torch.save(
            {"state_dict": weights, "hyper_parameters": {"x": value}},
            tmp_path / "x.ckpt",
            pickle_protocol=protocol,
        )
        source = open_checkpoint(tmp_path / "x.ckpt")
        assert torch.equal(source.read("weight"), weights["weight"]), name


def test_paths_of_newer_pythons(tmp_path):
    path = save({"state_dict": {"w": torch.ones(2)}, "p": pathlib.Path("/data")}, tmp_path / "x.pt")
    rewrite(
        path,
        lambda records: records.update(
            {n: c.replace(b"cpathlib\n", b"cpathlib._local\n") for n, c in records.items()}
        ),
    )
    assert open_checkpoint(path).read("w").tolist() == [1, 1]


@pytest.mark.parametrize("key", ["ema", "params", "net", "teacher", "whatever"])
def test_a_state_dict_under_any_key_that_is_the_only_one(tmp_path, key):
    state = {"w": torch.ones(2)}
    beside = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 0.1}}
    for value in ({key: state}, {key: state} | beside, {key: {"shadow": state, "decay": 0.9}}):
        assert open_checkpoint(save(value, tmp_path / "x.pt")).keys() == ["w"]


def test_several_state_dicts_and_none_of_them_the_model(tmp_path):
    state = {"w": torch.ones(2)}
    path = save({"teacher": state, "student": state, "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds 2 state dicts: 'student', 'teacher'"):
        open_checkpoint(path)
    path = save({"model": state, "ema": {"w": torch.zeros(2)}}, tmp_path / "x.pt")
    assert open_checkpoint(path).read("w").tolist() == [1, 1]


def test_extra_state_of_modules_is_left_out(tmp_path):
    state = {"w": torch.ones(2), "layer._extra_state": io.BytesIO(b"x"), "_extra_state": None}
    assert open_checkpoint(save(state, tmp_path / "x.pt")).keys() == ["w"]


class Distributed:
    """Pickles as a torch.distributed.tensor.DTensor of a size does, with this rank's part."""

    def __init__(self, size, local):
        self.size, self.local = size, local

    def __reduce__(self):
        wrapped = (DTensor, torch.float32, self.size, (2, 1), 0, torch.strided, "cpu", False)
        rebuild = torch._utils._rebuild_wrapper_subclass
        return torch._tensor._rebuild_from_type_v2, (
            rebuild, DTensor, wrapped, {"_local_tensor": self.local}
        )  # fmt: skip


def test_distributed_tensors_are_read_where_the_file_has_all_of_them(tmp_path):
    whole = torch.arange(6.0).reshape(3, 2)
    path = save({"w": Distributed((3, 2), whole)}, tmp_path / "x.pt")
    assert torch.equal(open_checkpoint(path).read("w"), whole)
    path = save({"w": Distributed((9, 2), whole)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="'w' is a part of a distributed tensor"):
        open_checkpoint(path)


# --- files that are wrong but mean no harm --------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "holds a tensor, expected a state dict"),
        ([torch.ones(2)], "holds a list"),
        ({}, "holds no tensors"),
        ({"w": torch.ones(2), "epoch": 3}, "entry 'epoch' is a int"),
        ({"w": torch.ones(2), 5: torch.ones(1)}, "entry of a int as its name"),
        ({"w": torch.ones(3).to_sparse()}, "_rebuild_sparse_tensor, expected a dense tensor"),
        ({"w": torch.ones(1).expand(9)}, "'w' repeats its data"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated"),
        ({"w": collections.Counter(a=1)}, "entry 'w' is a collections.Counter"),
        ({"w": torch.empty(2, device="meta")}, "expected a dense tensor"),
    ],
)
def test_what_is_no_state_dict(tmp_path, value, message):
    with pytest.raises(InputError) as caught:
        open_checkpoint(save(value, tmp_path / "x.pt"))
    assert message in caught.value.message


def test_storages_without_a_name(tmp_path):
    parts = [0x1950A86A20F9469CFC6C, 1001, {}, {}, [((1,), 2)]]
    (tmp_path / "x.pt").write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(InputError, match="a storage without a name"):
        open_checkpoint(tmp_path / "x.pt")


class Part:
    """Pickles as a tensor of two floats in a storage of four, of which it names a view."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (..., 0, (2,), (1,), False, None)


class ViewPickler(pickle.Pickler):
    def persistent_id(self, value):
        view = "view", self.start, 2
        return ("storage", torch.FloatStorage, "0", "cpu", 4, view) if value is ... else None


@pytest.mark.parametrize("start", [0, 2, 3, -1])
def test_views_in_files_of_the_oldest_torch(tmp_path, start):
    path = tmp_path / "x.pt"
    with open(path, "wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {}):
            pickle.dump(part, file, 2)
        pickler = ViewPickler(file, 2)
        pickler.start = start
        pickler.dump({"w": Part()})
        pickle.dump(["0"], file, 2)
        file.write((4).to_bytes(8, "little") + numpy.arange(4, dtype="f4").tobytes())
    if start in (0, 2):
        assert open_checkpoint(path).read("w").tolist() == [start, start + 1]
        return
    with pytest.raises(InputError, match="a view outside its storage"):
        open_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files(tmp_path, legacy):
    content = save(Encoder(), tmp_path / "x.pt", legacy).read_bytes()
    for length in (0, 1, 4, 100, len(content) // 2, len(content) - 30):
        (tmp_path / "x.pt").write_bytes(content[:length])
        with pytest.raises(InputError, match="x.pt"):
            open_checkpoint(tmp_path / "x.pt")


def test_archives_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "x.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(InputError, match="TorchScript"):
        open_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(InputError, match="no checkpoint written by torch.save"):
        open_checkpoint(path)


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """The archive again, its records changed by `change(records)`."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_records_are_checked(tmp_path):
    def reopen(change=lambda records: None, **options):
        path = save({"w": torch.ones(64)}, tmp_path / "x.pt")
        rewrite(path, change, **options)
        with pytest.raises(InputError) as caught:
            open_checkpoint(path)
        return caught.value.message

    assert "compressed" in reopen(compression=zipfile.ZIP_DEFLATED)
    assert "big-endian" in reopen(lambda r: r.update({"x/byteorder": b"big"}))
    assert "'w' lies outside the data" in reopen(lambda r: r.update({"x/data/0": bytes(8)}))
    assert "'w' lies outside the data" in reopen(lambda r: r.pop("x/data/0"))
    assert "no checkpoint" in reopen(lambda r: r.update({"y/data.pkl": b"N."}))

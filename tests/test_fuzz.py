"""Thousands of damaged and hostile files: each is read rightly or refused in one sentence.

Every case runs with a clock (no hang), a limit on memory (no allocation at a file's word), an
audit of what the interpreter does (nothing run, nothing written) and a canary file.
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from merging.errors import InputError
from merging.formats.checkpoints import Adapter, StateDict, open_checkpoint
from merging.formats.checks import problems

CASES = 600  # of each kind
SECONDS = 10.0  # for one file; most take a millisecond
MEMORY = 1 << 30  # bytes above what the process has already

WEIRD = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"),
    "", ".", "..", "../x", "/etc/passwd", "a\0b", "F32", "BF16", "F4", "I64", "LORA", "x" * 5000,
    [], [[]], [0], [1, 2, 3], [-1, 4], [2**62, 2**62], [0, 2**63], {}, {"a": {}}, [None] * 100,
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "(a+)+$", ".*.*.*x", "(((",
]  # fmt: skip

FORBIDDEN = {
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect",
    "os.mkdir", "os.remove", "os.rename", "os.truncate", "shutil.copyfile", "ctypes.dlopen",
    "pickle.find_class", "code.__new__", "import",
}  # fmt: skip
seen = []
watching = False


def audit(event, args):
    """Notes what reading a file must never cause."""
    if not watching:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    codec = event == "import" and args[0].startswith("encodings.")  # of names in zip archives
    if writes or (event in FORBIDDEN and not codec):
        seen.append((event, args))


sys.addaudithook(audit)


class Hang(BaseException):
    """Not an Exception, so that nothing on the way can swallow it."""


def ring(*_):
    raise Hang


@contextmanager
def guarded():
    """Limits of time and memory around many cases."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def outcome(path):
    """The tensors of a file, or the InputError; anything else fails the test."""
    global watching
    watching = True
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        source = open_checkpoint(path)
        if isinstance(source, Adapter):
            source.problems(BASE)
            problems(BASE, {"a": source})
            return {name: source.delta(name) for name in source.keys()} | source.dense
        return {name: source.read(name).contiguous() for name in source.keys()}
    except InputError as error:
        assert "MemoryError" not in error.message, error.message
        assert error.message.isprintable() and len(error.message) < 20_000
        return error
    finally:
        watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def folder():
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        yield Path(name)
    assert not seen


BASE = StateDict({"layer.q.weight": torch.ones(3, 5)})
STATE = {
    "layer.q.weight": torch.linspace(-1, 1, 30).view(6, 5),
    "layer.q.bias": torch.linspace(0, 3, 6).bfloat16(),
    "ids": torch.arange(4),
    "mask": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "scale": torch.tensor(1.5),
}


# --- mutations ------------------------------------------------------------------------------------


def mutate_bytes(data, chance, fragments=(b"",)):
    """1 to 4 small accidents: flipped, lost, doubled, overwritten and inserted bytes."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        length = chance.choice((1, 1, 2, 4, 8, 100))
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at : at + length] = chance.randbytes(length)
            case 4:
                data[at:at] = chance.choice(fragments)
            case 5 if chance.random() < 0.3:
                del data[at:]
    return bytes(data)


def mutate_json(value, chance):
    """The value with one key, entry or leaf replaced, removed or added, somewhere inside."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        value, key = dict(value), chance.choice(list(value))
        match chance.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[str(chance.choice(WEIRD))] = value.pop(key)
            case 2:
                value[str(chance.choice(WEIRD))] = chance.choice(WEIRD)
            case _:
                value[key] = mutate_json(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], mutate_json(value[at], chance), *value[at + 1 :]]
    if type(value) is int and chance.random() < 0.5:
        return value + chance.choice((-8, -4, -1, 1, 4, 8, 1000))
    return chance.choice(WEIRD)


def mutate_header(data, chance):
    """A safetensors file whose header changed but still fits its length."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(json.loads(data[8 : 8 + length]), chance)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


# --- the files ------------------------------------------------------------------------------------


def test_safetensors(folder):
    chance, read = random.Random(1), 0
    save_file(STATE, folder / "good.safetensors")
    good = (folder / "good.safetensors").read_bytes()
    path = folder / "x.safetensors"
    with guarded():
        for case in range(2 * CASES):
            mutate = (mutate_header, mutate_bytes)[case % 2]
            path.write_bytes(mutate(good, chance))
            result = outcome(path)
            if isinstance(result, InputError):
                continue
            read += 1  # the library must agree on what was accepted
            with safe_open(path, "pt") as library:
                assert set(library.keys()) == set(result)
                for name, tensor in result.items():
                    other = library.get_tensor(name)
                    assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
                    bits = tensor.reshape(-1).view(torch.uint8)
                    assert torch.equal(other.reshape(-1).view(torch.uint8), bits)
    assert CASES / 10 < read < 2 * CASES - CASES / 10


def test_what_the_library_accepts_is_accepted(folder):
    chance, path = random.Random(2), folder / "x.safetensors"
    save_file(STATE, path)
    good, accepted = path.read_bytes(), 0
    for _ in range(CASES):
        path.write_bytes(mutate_header(good, chance))
        try:
            with safe_open(path, "pt") as library:
                names = set(library.keys())
        except (SafetensorError, OSError):
            continue
        result = outcome(path)
        if isinstance(result, InputError):  # the library tells of these only when asked to read
            assert any(
                w in result.message for w in ("unsupported dtype", "holds no", "should have")
            )
        else:
            accepted += 1
            assert set(result) == names
    assert accepted > CASES / 20


def test_indexes(folder):
    chance, read = random.Random(3), 0
    weight_map = {}
    for number, names in enumerate((list(STATE)[:3], list(STATE)[3:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: STATE[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    path = folder / "model.safetensors.index.json"
    with guarded():
        for case in range(CASES):
            text = json.dumps(mutate_json(index, chance) if case % 3 else index).encode()
            path.write_bytes(text if case % 3 else mutate_bytes(text, chance))
            result = outcome(chance.choice((folder, path)))
            if not isinstance(result, InputError):
                read += 1
                assert set(result) == set(STATE)
    assert 0 < read < CASES


def test_adapters(folder):
    chance, read = random.Random(4), 0
    prefix = "base_model.model.layer"
    tensors = {
        f"{prefix}.q.lora_A.weight": torch.ones(2, 5),
        f"{prefix}.q.lora_B.weight": torch.ones(3, 2),
        f"{prefix}.attn.base_layer.out_proj.lora_A.weight": torch.ones(2, 4),
        f"{prefix}.attn.base_layer.out_proj.lora_B.weight": torch.ones(4, 2),
        f"{prefix}.head.weight": torch.ones(2, 2),
    }
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q": 2}, "bias": "none",
        "alpha_pattern": {"layer.q": 3, r".*attn\.out": 5}, "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "init_lora_weights": True, "base_model_name_or_path": "org/base",
        "target_modules": ["q", "attn"], "modules_to_save": ["head"], "peft_version": "0.18.0",
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    with guarded():
        for case in range(CASES):
            text, data = json.dumps(config).encode(), weights
            match case % 3:
                case 0:
                    text = json.dumps(mutate_json(config, chance)).encode()
                case 1:
                    text = mutate_bytes(text, chance)
                case 2:
                    data = chance.choice((mutate_header, mutate_bytes))(weights, chance)
            (folder / "adapter_config.json").write_bytes(text)
            (folder / "adapter_model.safetensors").write_bytes(data)
            read += not isinstance(outcome(folder), InputError)
    assert CASES / 20 < read < CASES


class Canary:
    """Pickles as a call that leaves a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def programs(canary):
    """Pieces of pickle that act, loop, repeat or ask for memory, to be put anywhere."""
    name = str(canary).encode()
    return [
        b"cposix\nmkdir\n(S'" + name + b"'\ntR",
        b"(S'" + name + b"'\niposix\nmkdir\n",
        b"c__builtin__\neval\n(S'__import__(\"os\").mkdir(\"" + name + b"\")'\ntR",
        b"cnumpy\nsave\n(S'" + name + b"'\nItR",
        b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nFloatStorage\nI0\n(I9\nt(I1\ntI0\nNtR",
        b"\x96" + (2**40).to_bytes(8, "little"),
        b"\x8b\xff\xff\xff\x7f",
        b"\x8d" + (2**40).to_bytes(8, "little"),
        b"r\xff\xff\xff\xff",
        b"h\x00h\x00\x86q\x00" * 50,
        b"(" * 100 + b"t" * 100,
        b"c__main__\nX\n)\x81}b",
        b"ccollections\nOrderedDict\n)R",
        b"]\x94}\x94u", b"0", b"1", b"2", b"Q", b".", b"a", b"e", b"s", b"u", b"b", b"R", b"\x81",
    ]  # fmt: skip


def pickled_examples(folder):
    """(content, whether a zip) of a state dict, a wrapped one, a module and hostile ones."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1))
    attack = Canary(folder / "canary")
    values = [STATE, {"state_dict": STATE, "epoch": 1}, module, {**STATE, "x": attack}, attack]
    for legacy in (False, True):
        for value in values:
            torch.save(value, folder / "x.pt", _use_new_zipfile_serialization=not legacy)
            yield (folder / "x.pt").read_bytes(), not legacy


@pytest.mark.parametrize("whole", [False, True], ids=["programs", "files"])
def test_pickles(folder, whole):
    """Accidents anywhere in the file, or in the program alone, within an intact archive."""
    chance, read = random.Random(5 + whole), 0
    examples = list(pickled_examples(folder))
    fragments, path = programs(folder / "canary"), folder / "x.pt"
    for case in range(2 * CASES):
        data, zipped = examples[case % len(examples)]
        if zipped and not whole:
            path.write_bytes(data)
            with zipfile.ZipFile(path) as archive:
                records = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in records.items():
                    program = name.endswith("data.pkl")
                    archive.writestr(
                        name, mutate_bytes(content, chance, fragments) if program else content
                    )
        else:
            path.write_bytes(mutate_bytes(data, chance, fragments))
        with guarded():
            result = outcome(path)
        read += not isinstance(result, InputError)
        assert not (folder / "canary").exists()
    assert CASES / 20 < read < 2 * CASES - CASES / 20


def test_the_guards_notice(folder, monkeypatch):
    """The audit, the clock and the memory limit are not there for show."""

    def misbehave(path):
        os.mkdir(path)
        with pytest.raises(MemoryError):
            bytearray(4 * MEMORY)
        while True:
            pass

    monkeypatch.setattr(sys.modules[__name__], "open_checkpoint", misbehave)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.2)
    with guarded(), pytest.raises(Hang):
        outcome(folder / "x")
    assert [event for event, _ in seen] == ["os.mkdir"]
    seen.clear()

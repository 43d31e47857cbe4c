"""Adapters merged in their own rank give what dense merging gives, and can stay adapters."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from merging import (
    InputError,
    Layer,
    create,
    linear_layers,
    merge_checkpoints,
    merge_state_dicts,
    methods,
)
from merging.factors import Factors, factorise, in_joint_basis, merge_factors
from merging.formats.checkpoints import open_checkpoint
from merging.formats.writer import write_adapter
from merging.method.registry import OUTPUTS

RANK, T, D_OUT, D_IN = 3, 4, 20, 30


def factors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(RANK, D_IN, generator=g), torch.randn(D_OUT, RANK, generator=g), 0.5 + i
        )
        for i in range(T)
    ]


def test_the_joint_basis_holds_every_delta():
    given = factors()
    M, Q = in_joint_basis(given)
    assert M.shape == (T, D_OUT, T * RANK) and Q.shape == (D_IN, T * RANK)
    assert torch.allclose(Q.T @ Q, torch.eye(T * RANK), atol=1e-5)
    for narrow, f in zip(M, given, strict=True):
        assert torch.allclose(narrow @ Q.T, f.dense(), atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["actmat", "actmat_centred", "wudi_closed", "swudi", "aswudi", "ridge", "oas", "ledoit_wolf",
     "anchored", "tsv_m", "iso_c", "iso_cts", "mirror", "symmetric", "sylvester", "sided", "pico",
     "cart", "rank_rule"],
)  # fmt: skip
def test_narrow_and_dense_agree(name):
    method = create(name)
    assert method.row_space
    given = factors()
    dense = method(torch.stack([f.dense() for f in given]))
    narrow = merge_factors(given, method).dense()
    assert (narrow - dense).norm() / dense.norm() < 1e-4


@pytest.mark.parametrize("name", ["actmat", "oas", "tsv_m"])
def test_blocks_of_rows_are_merged_one_by_one(name):
    given, method = factors(), create(name)
    blocks = torch.stack([f.dense() for f in given]).chunk(2, 1)
    dense = torch.cat([method(block) for block in blocks])
    assert (
        merge_factors(given, method, Layer(parts=2)).dense() - dense
    ).norm() < 1e-4 * dense.norm()


def test_an_anchor_that_looks_at_single_entries_needs_the_layers_own_basis():
    assert create("anchored").row_space
    assert not create("anchored", anchor="ties").row_space


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_a_matrix_of_low_rank_is_found_to_be_one(shape):
    g = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, 5)
    delta = torch.randn(shape[0], 5, generator=g) * scales @ torch.randn(5, shape[1], generator=g)
    found = factorise(delta, 5)
    assert found.A.shape == (5, shape[1]) and found.B.shape == (shape[0], 5)
    assert (found.dense() - delta).norm() < 1e-6 * delta.norm()
    assert factorise(delta, 4) is None
    assert torch.equal(factorise(0 * delta, 5).dense(), 0 * delta)


@pytest.mark.parametrize("name", ["actmat", "tsv_m"])
def test_an_adapter_that_leaves_a_layer_alone_moved_it_by_nothing(adapters, name):
    base = adapters["base"].state_dict()
    opened = {task: open_checkpoint(path) for task, path in adapters["experts"].items()}
    dense = {t: base | {n: base[n] + a.delta(n) for n in a.keys()} for t, a in opened.items()}
    layers = ["second.weight"]
    own = merge_state_dicts(base, opened, create(name), layers=layers)["second.weight"]
    expected = merge_state_dicts(base, dense, create(name), layers=layers)["second.weight"]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


# --- adapters out ---------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(30, 20), nn.Linear(20, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


CONFIG = {"base_model_name_or_path": "owner/net", "modules_to_save": ["head"], "task_type": None}
INPUTS = torch.linspace(-1, 1, 120).reshape(4, 30)


@pytest.fixture
def adapters(tmp_path):
    """A net and two adapters: of ranks 3 and 2, one without the second layer, one with a head."""
    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors")

    def pair(d_out, d_in, r):
        return 0.3 * torch.randn(r, d_in), 0.3 * torch.randn(d_out, r)

    head = {"head.weight": torch.randn(3, 16), "head.bias": torch.randn(3)}
    both = {"first.weight": pair(20, 30, 3), "second.weight": pair(16, 20, 3)}
    write_adapter(tmp_path / "both", both, CONFIG, dense=head)
    write_adapter(tmp_path / "one", {"first.weight": pair(20, 30, 2)}, CONFIG)
    return {"base": net, "experts": {task: tmp_path / task for task in ("both", "one")}}


def moments(net):
    """Second moments of each layer's input, by task and of full rank."""
    g = torch.Generator().manual_seed(1)
    shapes = {name: net.get_parameter(name).shape for name in linear_layers(net)}
    widths = {name: d_in for name, (_, d_in) in shapes.items()}
    widths |= {name + OUTPUTS: d_out for name, (d_out, _) in shapes.items()}

    def moment(d):
        z = torch.randn(50, d, generator=g)
        return z.mT @ z / 50

    return {task: {name: moment(d) for name, d in widths.items()} for task in ("both", "one")}


def merge(adapters, method, output, form, **options):
    base = output.parent / "base.safetensors"
    return merge_checkpoints(
        base, adapters["experts"], method, output, layers=adapters["base"], form=form, **options
    )


TOO_HIGH = {
    "breadcrumbs", "breadcrumbs_ties", "consensus", "consensus_ta", "consensus_ties", "dare",
    "dare_ties", "data_free_fisher", "della", "della_linear", "fisher", "iso_merger",
    "kfac_regmean", "pcb", "ram", "sce", "ties", "wudi",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(methods()) - TOO_HIGH))
def test_a_merge_written_as_an_adapter_is_the_dense_merge(adapters, tmp_path, name):
    method = create(name)
    options = {"statistics": moments(adapters["base"])} if method.needs else {}
    merge(adapters, method, tmp_path / "dense.safetensors", "dense", **options)
    merge(adapters, method, tmp_path / "adapter", "adapter", **options)
    written = open_checkpoint(tmp_path / "adapter")
    assert {n: written.rank(n) for n in written.keys()} == {"first.weight": 5, "second.weight": 3}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^second": 3}
    assert config["base_model_name_or_path"] == "owner/net"
    dense = Net()
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    expected = dense(INPUTS)
    adapted = peft.PeftModel.from_pretrained(adapters["base"], tmp_path / "adapter")(INPUTS)
    assert (adapted - expected).norm() < 1e-4 * expected.norm()


def test_an_adapter_needs_no_weights_of_the_base(adapters, tmp_path):
    report = merge(adapters, create("actmat"), tmp_path / "adapter", "adapter")
    head = 4 * (3 * 16 + 3)
    factors = 4 * (3 * (30 + 20) + 3 * (20 + 16) + 2 * (30 + 20))
    # the base's head, and the expert's once as it is opened
    assert report.bytes_read == head + factors
    assert report.rules["first.weight"] == "actmat"
    assert report.rules["head.weight"] == "average"
    assert report.rules["first.bias"] == "base"


@pytest.mark.parametrize("name", sorted(TOO_HIGH))
def test_what_no_adapter_holds_is_refused(adapters, tmp_path, name):
    method = create(name)
    fishers = {n: torch.ones_like(p) for n, p in adapters["base"].state_dict().items()}
    options = {"statistics": dict.fromkeys(("both", "one"), fishers)} if method.needs else {}
    if method.needs == "kfac":
        options = {"statistics": moments(adapters["base"])}
    layers_alone = {"consensus", "kfac_regmean", "wudi"}  # what is no layer is averaged, or kept
    told = "makes a difference of 'first" if name in layers_alone else "changes single entries"
    told = "needs the base's values" if name == "iso_merger" else told
    with pytest.raises(InputError, match=f"method '{name}' {told}") as error:
        merge(adapters, method, tmp_path / "adapter", "adapter", **options)
    assert error.value.hint.endswith("form=dense")
    assert not (tmp_path / "adapter").exists()


def test_what_cannot_be_an_adapter_is_one_sentence(adapters, tmp_path):
    actmat, output = create("actmat"), tmp_path / "adapter"

    def refused(match, experts, output=output, form="adapter"):
        with pytest.raises(InputError, match=match) as error:
            merge(adapters | {"experts": experts}, actmat, output, form)
        assert "\n" not in error.value.message

    experts = adapters["experts"]
    refused("'whole' .* is a dense checkpoint", experts | {"whole": tmp_path / "base.safetensors"})
    refused("form is 'sparse', expected one of: dense, adapter", experts, form="sparse")
    refused("an adapter is a folder", experts, output=tmp_path / "adapter.safetensors")
    refused("which it would replace", experts, output=tmp_path / "both")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "file").touch()
    refused("exists already", experts, output=tmp_path / "notes")
    factors = {"first.weight": (torch.ones(1, 30), torch.ones(20, 1))}
    turned = {"first.weight": (torch.ones(1, 20), torch.ones(30, 1))}
    write_adapter(tmp_path / "turned", turned, CONFIG | {"fan_in_fan_out": True})
    refused(
        r"'turned' .* is \[30, 20\]|shape \[30, 20\]", experts | {"turned": tmp_path / "turned"}
    )
    bias = {"first.bias": torch.zeros(20)}
    write_adapter(tmp_path / "biased", factors, CONFIG, dense=bias)
    refused("trained 'first.bias'", experts | {"biased": tmp_path / "biased"})


class Block(nn.Module):
    """Two of GPT-2's layers, which store (d_in, d_out); the first packs q, k and v."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(24, 8), Conv1D(8, 24)

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_attn(x)))


@pytest.mark.parametrize("name", ["actmat", "tsv_m", "regmean"])
def test_transposed_and_packed_layers_on_several_devices(tmp_path, name):
    torch.manual_seed(0)
    block, experts = Block(), {}
    save_file(block.state_dict(), tmp_path / "base.safetensors")
    for task in ("a", "b"):
        factors = {
            "c_attn.weight": (torch.randn(2, 8), torch.randn(24, 2)),
            "c_proj.weight": (torch.randn(2, 24), torch.randn(8, 2)),
        }
        experts[task] = tmp_path / task
        write_adapter(experts[task], factors, {"fan_in_fan_out": True})
    moment = {"c_attn.weight": torch.eye(8), "c_proj.weight": torch.eye(24)}
    options = {"layers": block, "statistics": {"a": moment, "b": moment}}
    for form, devices in (("dense", "cpu"), ("adapter", ["cpu", "cpu"])):
        output = tmp_path / f"{form}{'.safetensors' * (form == 'dense')}"
        merge_checkpoints(
            tmp_path / "base.safetensors",
            experts,
            create(name),
            output,
            device=devices,
            form=form,
            **options,
        )
    dense = Block()
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    x = torch.randn(4, 8)
    adapted = peft.PeftModel.from_pretrained(block, tmp_path / "adapter")
    torch.testing.assert_close(adapted(x), dense(x), rtol=1e-4, atol=1e-4)

"""Both Kronecker factors: by hand, their limits, through the engine, and measured in a model."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import merging
from eval import kfac
from merging import InputError, Layer
from merging.method.registry import OUTPUTS
from tests.test_method_properties import stack, statistics


def test_diagonal_moments_weigh_entry_by_entry():
    """Entry (i, j): sum_t g_ti c_tj D_tij / sum_t g_ti c_tj."""
    D = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]).double()
    g, c = torch.tensor([[2.0, 1], [1, 3]]).double(), torch.tensor([[3.0, 1], [4, 5]]).double()
    w = g[:, :, None] * c[:, None]
    moments = {"gradients": torch.diag_embed(g), "covariances": torch.diag_embed(c)}
    merged = merging.create("kfac_regmean", damping=0.0)(D, **moments)
    assert_close(merged, (w * D).sum(0) / w.sum(0))
    assert_close(merged[0, 0].item(), (6 * 1 + 4 * 5) / 10)
    outputs = merging.create("regmean_outputs")(D, **moments)
    assert_close(outputs, (g[:, :, None] * D).sum(0) / g.sum(0)[:, None])


def test_kfac_without_data_by_hand():
    D = torch.stack([torch.diag(torch.tensor(x).double()) for x in ([1.0, 3.0], [2.0, 0.0])])
    merged = merging.create("kfac", damping=0.0)(D)
    assert_close(merged, torch.diag(torch.tensor([(1 + 2**5) / (1 + 2**4), 3]).double()))
    even = merging.create("kfac", damping=0.0, task_weight="inverse_norm")(D)
    weights = [1 / 100, 16 / 16]  # d^4 / |D|^4
    assert_close(even[0, 0].item(), (weights[0] + 2 * weights[1]) / sum(weights))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_with_one_side_the_identity_it_is_regmean_or_its_mirror(shape):
    D = stack(3, shape).double()
    measured = statistics(D)
    G, C = measured["gradients"], measured["covariances"]
    method = merging.create("kfac_regmean", damping=0.0)
    found = method(D, gradients=torch.eye(len(D[0])).expand_as(G), covariances=C)
    assert_close(found, merging.create("regmean")(D, covariances=C), rtol=1e-5, atol=1e-8)
    found = method(D, gradients=G, covariances=torch.eye(D.shape[2]).expand_as(C))
    mirror = merging.create("regmean_outputs")(D, gradients=G)
    assert_close(found, mirror, rtol=1e-5, atol=1e-8)
    transposed = merging.create("regmean")(D.mT, covariances=G)
    assert_close(mirror, transposed.mT, rtol=1e-7, atol=1e-9)


def test_the_engine_hands_each_block_its_own_outputs():
    """Packed q, k, v: blocks of rows, and of the gradients' moment on either side."""
    base = {"qkv": torch.zeros(6, 4)}
    D = stack(2, (6, 4))
    measured = statistics(D)
    experts = {t: {"qkv": D[i]} for i, t in enumerate("ab")}
    files = {
        t: {"qkv": measured["covariances"][i], "qkv" + OUTPUTS: measured["gradients"][i]}
        for i, t in enumerate("ab")
    }
    method = merging.create("kfac_regmean")
    merged = merging.merge_state_dicts(
        base, experts, method, layers={"qkv": Layer(3)}, statistics=files
    )
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        own = {
            "covariances": measured["covariances"],
            "gradients": measured["gradients"][:, rows, rows],
        }
        assert_close(merged["qkv"][rows], method(D[:, rows], **own))
    del files["b"]["qkv" + OUTPUTS]
    with pytest.raises(InputError, match="kfac statistics of task 'b' lack 'qkv@outputs'"):
        merging.merge_state_dicts(base, experts, method, layers={"qkv": Layer(3)}, statistics=files)


def test_factors_are_those_of_every_tokens_own_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).train()
    x, labels = torch.randn(5, 6, 3), torch.randint(2, (5,))
    keep = torch.rand(5, 6) > 0.3

    def loss(model, batch):
        logits = (model(x[batch]) * keep[batch][..., None]).sum(1)
        return nn.functional.cross_entropy(logits, labels[batch], reduction="sum")

    batches = torch.arange(5).split(2)
    found = kfac.factors(
        model, batches, ["0.weight", "2.weight"], loss, mask=lambda batch, name: keep[batch]
    )
    hidden = model[1](model[0](x)).detach()
    out = model[2](hidden).detach().requires_grad_()
    value = nn.functional.cross_entropy((out * keep[..., None]).sum(1), labels, reduction="sum")
    (g,) = torch.autograd.grad(value, out)
    for z, gradient, name in (
        (x, (g @ model[2].weight) * (1 - hidden**2), "0.weight"),
        (hidden, g, "2.weight"),
    ):
        z, gradient = z[keep], gradient[keep]
        assert_close(found[name], z.mT @ z / len(z))
        assert_close(found[name + OUTPUTS], gradient.mT @ gradient / len(z))
    assert model.training and all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match=r"no gradient ever reached layer '2.weight'"):
        kfac.factors(model, [x], ["0.weight", "2.weight"], lambda model, z: model[0](z).sum())


def test_factors_of_a_convolution_are_those_of_its_patches_and_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.Tanh())
    x, target = torch.randn(5, 6, 7, 5), torch.randn(5, 4, 4, 3)
    found = kfac.factors(
        model, [x[:2], x[2:]], ["0.weight"], lambda m, b: (m(b) - target[: len(b)]).square().sum()
    )
    z, gradients = [], []
    for image, aim in zip(x, torch.cat([target[:2], target[:3]]), strict=True):
        out = torch.tanh(model[0](image[None])[0]).detach()
        slope = 2 * (out - aim) * (1 - out**2)
        padded = nn.functional.pad(image, (1, 1, 1, 1))
        for i in range(4):
            for j in range(3):
                z.append(padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten())
                gradients.append(slope[:, i, j])
    z, gradients = torch.stack(z), torch.stack(gradients)
    assert_close(found["0.weight"], z.mT @ z / len(z))
    assert_close(found["0.weight" + OUTPUTS], gradients.mT @ gradients / len(z))


def test_labels_are_drawn_from_the_model_itself():
    logits = torch.tensor([[0.0, 50.0], [50.0, 0.0], [0.0, 0.0]], requires_grad=True)
    value = kfac.drawn(logits, torch.Generator().manual_seed(0))
    assert value.item() == pytest.approx(0.6931, abs=1e-3)  # two certain ones, and log 2

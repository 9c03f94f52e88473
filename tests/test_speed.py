"""Layers as a device likes them give the numbers they had."""

import copy

import pytest
import torch
from comparing import error, normals
from torch import nn

from minibooth.dreambooth import speed

CPU = torch.device("cpu")


def suited(layers: nn.Module, dtype: torch.dtype):
    """A copy, with the same weights under the same names."""
    for seed, p in enumerate(layers.parameters()):
        p.data = normals(*p.shape, seed=seed)
    ours = copy.deepcopy(layers)
    speed.suit(ours, CPU, dtype)
    assert ours.state_dict().keys() == layers.state_dict().keys()
    return ours


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("how, side", [
    ((8, 24, 1), 6), ((8, 24, 1, 1, 0, 1, 1, False), 5), ((400, 300, 3, 1, 1), 2), ((500, 300, 3, 2, 1), 5),
    ((8, 8, 3, 1, 1), 6),
])  # fmt: skip
def test_a_convolution_as_a_product_has_its_numbers(how, side, batch, monkeypatch):
    """With 1x1, without a bias, with more weights than places, strided from an odd side; and as it was."""
    layer = nn.Conv2d(*how)
    ours = suited(layer, torch.float32)
    x = normals(batch, how[0], side, side).requires_grad_()
    expected = layer(x)
    with monkeypatch.context() as patch:
        if how[0] != how[1]:
            patch.setattr(nn.Conv2d, "forward", None)
        y = ours(x)
    assert y.is_contiguous()
    found, wanted = (
        [output.detach(), *torch.autograd.grad(output, [x, *kind.parameters()], expected.detach())]
        for output, kind in ((y, ours), (expected, layer))
    )
    assert max(error(*pair) for pair in zip(found, wanted, strict=True)) < 1e-5


def test_norms_stay_in_their_inputs_precision():
    """Under autocast, which would do them in fp32, and to bf16's three digits in its numbers; in fp32 nothing changes."""
    norms = nn.ModuleDict({"group": nn.GroupNorm(4, 16), "layer": nn.LayerNorm(8)})
    ours = suited(norms, torch.bfloat16)
    x = normals(2, 16, 4, 8)
    for name in norms:
        assert torch.equal(ours[name](x), norms[name](x))
        with torch.autocast("cpu", torch.bfloat16):
            found = ours[name](x.bfloat16())
        assert found.dtype == torch.bfloat16
        expected = norms[name](x.bfloat16().float())
        assert error(found.float(), expected) < 2**-7
        for y in (found.float(), expected):
            y.square().sum().backward()
        for p, theirs in zip(ours[name].parameters(), norms[name].parameters(), strict=True):
            assert p.grad.dtype == torch.float32 and error(p.grad, theirs.grad) < 2**-5


def test_layers_change_only_where_that_was_seen_to_pay():
    for device, dtype, changed in (("cpu", "float32", [True, False]), ("cpu", "bfloat16", [False, True]),
                                   ("cuda", "float32", [False, False]), ("cuda", "bfloat16", [False, True])):  # fmt: skip
        layers = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1)])
        speed.suit(layers, torch.device(device), getattr(torch, dtype))
        assert [type(layer).__module__ == speed.__name__ for layer in layers] == changed

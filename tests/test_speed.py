"""Layers as a device likes them give the numbers they had."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from comparing import error, normals
from small_run import small, tiny, trainer
from torch import nn

import minibooth
from minibooth import generate
from minibooth.dreambooth import speed
from minibooth.dreambooth.settings import Settings
from minibooth.models import lora
from minibooth.models.blocks import Attention

attend = F.scaled_dot_product_attention
CPU = torch.device("cpu")


@pytest.fixture
def bf16_emulated(monkeypatch):
    """As on a CPU without units for it."""
    monkeypatch.setattr(speed, "emulated", lambda dtype: dtype == torch.bfloat16)


def suited(layers: nn.Module, dtype: torch.dtype):
    """A copy, with the same weights under the same names."""
    for seed, p in enumerate(layers.parameters()):
        p.data = normals(*p.shape, seed=seed).to(p.dtype)
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
            patch.setattr(F, "conv2d", None)
        y = ours(x)
    assert y.is_contiguous()
    found, wanted = (
        [output.detach(), *torch.autograd.grad(output, [x, *kind.parameters()], expected.detach())]
        for output, kind in ((y, ours), (expected, layer))
    )
    assert max(error(*pair) for pair in zip(found, wanted, strict=True)) < 1e-5


@pytest.mark.parametrize("how, side", [((8, 24, 1), 6), ((400, 300, 3, 1, 1), 2), ((8, 8, 3, 1, 1), 6)])
def test_in_fp32_drawing_changes_no_bit(how, side):
    layer = nn.Conv2d(*how)
    ours, x = suited(layer, torch.float32), normals(2, how[0], side, side)
    speed.suit(ours, CPU, torch.float32)  # a second time changes nothing more
    with torch.no_grad():
        assert torch.equal(ours(x), layer(x))


LAYERS = {  # and the shape of what goes in
    "linear": (lambda: nn.Linear(96, 80), (2, 3, 96)),
    "without a bias": (lambda: nn.Linear(96, 80, bias=False), (5, 96)),
    "1x1": (lambda: nn.Conv2d(96, 80, 1), (2, 96, 4, 4)),
    "more weights than places": (lambda: nn.Conv2d(400, 300, 3, 2, 1), (1, 400, 5, 5)),
    "more places than weights": (lambda: nn.Conv2d(24, 16, 3, 1, 1), (2, 24, 6, 6)),
}


def results(layer, x, grad):
    """What a layer makes of x, under autocast if that is in bf16, and the gradients of x and of what trains."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad.to(y.dtype))]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_without_units_for_bf16_sums_are_in_fp32(name, weights, bf16_emulated):
    """Of bf16 numbers and of weights as they are: nothing but what comes out is rounded."""
    make, shape = LAYERS[name]
    layer = make().to(weights)
    ours, plain, x = suited(layer, torch.bfloat16), layer.float(), normals(*shape).bfloat16()
    grad = normals(*plain(x.float()).shape).bfloat16()
    (y, *found), (expected, *wanted) = results(ours, x, grad), results(plain, x.float(), grad)
    assert y.dtype == torch.bfloat16
    assert (y == expected.bfloat16()).float().mean() > 0.99  # a sum in another order can lie beyond the middle
    for one, other in zip(found, wanted, strict=True):
        assert error(one.float(), other.to(one.dtype).float()) < (1e-5 if one.dtype == torch.float32 else 2**-7)
    assert [one.dtype for one in found] == [torch.bfloat16, *(p.dtype for p in ours.parameters())]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_for_the_backward_pass_no_more_is_kept_than_it_needs(name, frozen, bf16_emulated):
    """What came in, in bf16, where weights train; and the weights themselves."""
    make, shape = LAYERS[name]
    layer, kept = suited(make().bfloat16(), torch.bfloat16).requires_grad_(not frozen), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(normals(*shape).bfloat16().requires_grad_())
    others = [x for x in kept if x.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr()]
    assert {x.dtype for x in kept} == {torch.bfloat16} and len(kept) - len(others) == 1 and len(others) == (not frozen)


@pytest.mark.parametrize(
    "make, shape", [(lambda: nn.Linear(96, 80), (5, 96)), (lambda: nn.Conv2d(24, 16, 3, 1, 1), (2, 24, 6, 6))]
)
def test_a_lora_works_beside_a_layer_in_fp32(make, shape, bf16_emulated):
    network = nn.ModuleDict({"up_blocks": nn.ModuleDict({"a": make()})}).bfloat16()
    lora.attach(network, lora.fresh(network, "all", 4, 4.0, 0.0, torch.Generator().manual_seed(0)), torch.float32)
    ours, plain = (x["up_blocks"]["a"].requires_grad_(False) for x in (suited(network, torch.bfloat16), network.float()))
    assert isinstance(ours, lora.LoRA)
    for layer in (ours, plain):
        layer.adapters.requires_grad_()
    x = normals(*shape).bfloat16()
    grad = normals(*plain(x.float()).shape).bfloat16()
    found, wanted = results(ours, x, grad), results(plain, x.float(), grad)
    for one, other in zip(found, wanted, strict=True):
        assert error(one.float(), other) < 2**-6


def test_attention_without_units_for_bf16_is_in_fp32(bf16_emulated, monkeypatch):
    plain = Attention(32, 4)
    ours, seen = suited(plain, torch.bfloat16), []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **how: seen.append(q.dtype) or attend(q, k, v, **how)
    )
    x = normals(2, 6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x.bfloat16())
    assert seen == [torch.float32] and y.dtype == torch.bfloat16
    assert error(y.float(), plain(x)) < 2**-6


def test_emulated_is_what_the_processor_does_not_name(monkeypatch):
    for able, lacking in (
        (["amx_bf16"], ["float16"]), (["bf16"], ["float16"]), (["avx512_bf16", "avx512_fp16"], ["float16"]),
        (["amx_bf16", "amx_fp16"], []), (["avx512_f"], ["bfloat16", "float16"]),
    ):  # fmt: skip
        told = {"cpu_name": "bf16", "amx_bf16": False, "amx_fp16": False} | dict.fromkeys(able, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told)
        speed.emulated.cache_clear()
        assert [name for name in ("float32", "bfloat16", "float16") if speed.emulated(getattr(torch, name))] == lacking
    speed.emulated.cache_clear()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["1x1", "more weights than places", "more places than weights"])
def test_with_units_for_bf16_a_convolution_is_a_product_in_bf16(name, weights, monkeypatch):
    """As exact as PyTorch's own, in value and gradients: no sum is taken in bf16."""
    monkeypatch.setattr(speed, "emulated", lambda dtype: False)
    make, shape = LAYERS[name]
    layer, x = make().to(weights), normals(*shape).bfloat16()
    ours, exact = suited(layer, torch.bfloat16), make().double()
    exact.load_state_dict({key: p.bfloat16() for key, p in layer.state_dict().items()})
    grad = normals(*layer(x.to(weights)).shape).bfloat16()
    found, theirs, wanted = results(ours, x, grad), results(layer, x, grad), results(exact, x.double(), grad.double())
    assert [each.dtype for each in found] == [each.dtype for each in theirs]
    for one, other, truth in zip(found, theirs, wanted, strict=True):
        assert (one - truth).norm() < 1.5 * (other - truth).norm() + 1e-6 * truth.norm()


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


def test_layers_change_only_where_that_was_seen_to_pay(monkeypatch):
    for device, dtype, slow, changed in (
        ("cpu", "float32", False, [True, False, False]),
        ("cpu", "bfloat16", True, [True, True, True]), ("cpu", "bfloat16", False, [True, False, True]),
        ("cuda", "float32", False, [False, False, True]), ("cuda", "bfloat16", True, [False, False, True]),
    ):  # fmt: skip
        monkeypatch.setattr(speed, "emulated", lambda dtype, slow=slow: slow)
        layers = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.Linear(1, 1), nn.GroupNorm(1, 1)])
        speed.suit(layers, torch.device(device), getattr(torch, dtype))
        assert [type(layer).__module__ == speed.__name__ for layer in layers] == changed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("choice", ["on", "auto", "off"])
def test_class_pictures_are_drawn_as_the_device_and_the_flag_have_it(choice, device, monkeypatch):
    """Compiled where that is asked for; by a GPU with channels last and, unless that is refused, as one graph."""
    compiled, pipe = [], minibooth.load(tiny())
    forward = pipe.unet.forward
    monkeypatch.setattr(speed, "compiler", lambda kind: True)
    monkeypatch.setattr(speed, "compile_layers", compiled.append)
    monkeypatch.setattr(speed, "Graph", lambda function: ("graph", function))
    speed.draw_faster(pipe, Settings(compile=choice), torch.device(device))
    assert compiled == [pipe.unet] * (choice == "on")
    assert pipe.unet.forward == (("graph", forward) if device == "cuda" and choice != "off" else forward)
    for layer in (pipe.unet.conv_in, pipe.vae.decoder.conv_in):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) == (device == "cuda")


def test_all_networks_that_train_or_draw_are_suited(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "suit", lambda network, device, dtype: seen.append((type(network).__name__, dtype)))
    of_class = dict(with_prior_preservation=True, class_prompt="a dog", num_class_images=1)
    trainer(small(tmp_path, **of_class), torch.bfloat16).prepare()
    generate.main(
        ["--prompt", "a dog", "--model", str(tiny()), "--output_dir", str(tmp_path / "drawn"), "--steps=1", "--device=cpu"]
    )
    drawing, all_three = ["UNet", "VAE"], ["CLIPText", "UNet", "VAE"]
    wanted = [*((name, torch.float32) for name in drawing), *((name, torch.bfloat16) for name in all_three)]
    assert Counter(seen) == Counter([*wanted, *((name, torch.float32) for name in all_three)])

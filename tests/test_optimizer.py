"""AdamW gives torch's numbers, or what is near in fewer bits: in slices, in the backward pass, through a checkpoint alike."""

import gc
import weakref

import pytest
import torch
from comparing import differing
from safetensors.torch import load_file, save_file
from torch import nn

from minibooth.dreambooth import optimizer as module
from minibooth.dreambooth.optimizer import (
    BLOCK,
    SIGNED,
    AdamW,
    code,
    decoded,
    encode,
    moments,
    norm,
    random_bits,
    restore,
    update,
)
from minibooth.errors import UserError

KINDS = {
    "plain": (torch.float32, False),
    "8 bits": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "both": (torch.bfloat16, True),
}
HOW = ((0.9, 0.99), 1e-8, 0.1)  # betas, epsilon, decay


def networks(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Parameters of 20,480, 4,096 (both fit for 8 bits), 5,120 + 80 (not whole blocks) and 64 elements."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"unet": nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 320)), "text_encoder": nn.Linear(65, 80)}
        return {name: network.to(dtype) for name, network in parts.items()}


def parameters(modules: dict[str, nn.Module]) -> list[nn.Parameter]:
    return [parameter for network in modules.values() for parameter in network.parameters()]


def adamw(modules: dict[str, nn.Module], eight_bit: bool = False, seed: int = 0, max_norm: float = 0.0) -> AdamW:
    groups = [{"params": list(network.parameters()), "lr": 0.01 * (1 + i)} for i, network in enumerate(modules.values())]
    return AdamW(groups, *HOW, eight_bit, seed, max_norm)


def walk(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 65, generator=torch.Generator().manual_seed(step))
        inputs = {"unet": x[:, :64], "text_encoder": x}
        outputs = (network(inputs[name].to(next(network.parameters()).dtype)) for name, network in modules.items())
        sum(y.square().mean() for y in outputs).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {str(i): parameter.detach().clone() for i, parameter in enumerate(parameters(modules))}


def walked(kind: str, steps: int = 8, seed: int = 0, in_backward: bool = False) -> dict[str, torch.Tensor]:
    """The weights and the moments after some steps."""
    dtype, eight_bit = KINDS[kind]
    modules = networks(dtype)
    optimizer = adamw(modules, eight_bit, seed)
    if in_backward:
        optimizer.step_in_backward()
    walk(modules, optimizer, range(steps))
    return weights(modules) | moments(optimizer, modules)


# ---- the numbers


def test_fifty_steps_are_those_of_torch():
    """By torch's fused kernel, and by `update`."""
    modules, theirs = networks(), networks()
    walk(modules, adamw(modules), range(50))
    groups = [{"params": list(network.parameters()), "lr": 0.01 * (1 + i)} for i, network in enumerate(theirs.values())]
    walk(theirs, torch.optim.AdamW(groups, 0.0, *HOW, foreach=False), range(50))
    for ours, expected in zip(parameters(modules), parameters(theirs), strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-6)

    p = nn.Parameter(torch.randn(500, generator=torch.Generator().manual_seed(0)))
    ours, m, v = p.detach().clone(), torch.zeros(500), torch.zeros(500)
    optimizer = torch.optim.AdamW([p], 0.01, *HOW, foreach=False)
    for step in range(1, 51):
        p.grad = torch.randn(500, generator=torch.Generator().manual_seed(step))
        update(ours, p.grad, (m,), (v,), None, torch.tensor(float(step)), 0.01, 0.1, 0.9, 0.99, 1e-8, 0)
        optimizer.step()
    assert torch.allclose(ours, p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped_as_one_vector(kind):
    """As torch's clip_grad_norm_ does it beforehand; those that are short enough are left as they are, to the bit."""
    (dtype, eight_bit), found = KINDS[kind], []
    for max_norm, before in ((0.1, 0.0), (0.0, 0.1), (1e3, 0.0), (0.0, 0.0)):
        modules = networks(dtype)
        optimizer = adamw(modules, eight_bit, max_norm=max_norm)
        for step in range(4):  # of other lengths, so that AdamW sees the difference
            for p, seed in zip(parameters(modules), range(6), strict=True):
                p.grad = (10.0**-step * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
            if before:
                torch.nn.utils.clip_grad_norm_(parameters(modules), before)
            optimizer.step()
        found.append(weights(modules) | moments(optimizer, modules))
    clipped, expected, short, plain = found
    assert not differing(short, plain)
    for name in weights(modules):
        way, start = expected[name].float() - plain[name].float(), expected[name].float()
        assert (clipped[name].float() - start).norm() < (1e-4 if kind == "plain" else 0.1) * way.norm()


def test_a_norm_is_right_to_seven_digits():
    """Where PyTorch's is not; and in fp32, of gradients in bf16."""
    for shapes, dtype in (([(1 << 12, 1 << 12), (3,)], torch.float32), ([(320, 64, 3, 3), (320,)], torch.bfloat16)):
        gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) for shape in shapes]
        exact = torch.cat([x.double().flatten() for x in gradients]).norm()
        assert abs(norm(gradients) / exact - 1) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_stay_close_to_those_of_torch(kind):
    expected, found = walked("plain", 20), walked(kind, 20)
    begun = weights(networks())
    for name, start in begun.items():
        way = expected[name] - start
        assert (found[name].float() - expected[name]).norm() < 0.15 * way.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_slices_and_the_backward_pass_change_no_bit(kind, monkeypatch):
    whole = walked(kind)
    assert not differing(walked(kind, in_backward=True), whole)
    monkeypatch.setitem(module.SLICE, "cpu", BLOCK)
    assert not differing(walked(kind), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [BLOCK, 1 << 18])
def test_how_a_weight_lies_changes_no_bit(size, kind, monkeypatch):
    """With channels last, as a GPU takes them, and updated in four slices or in one."""
    monkeypatch.setitem(module.SLICE, "cpu", size)
    (dtype, eight_bit), found = KINDS[kind], []
    for form in (torch.contiguous_format, torch.channels_last):
        start, *gradients = torch.randn(4, 256, 32, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        p = nn.Parameter(start.to(memory_format=form))
        optimizer = AdamW([{"params": [p], "lr": 0.01}], *HOW, eight_bit)
        for gradient in gradients:
            p.grad = gradient.to(memory_format=form)
            optimizer.step()
        assert p.is_contiguous(memory_format=form)
        found.append({"weight": p.detach()} | optimizer.state[p])
    assert not differing(*found) and not torch.equal(p, start)


def test_in_the_backward_pass_gradients_are_never_all_there(monkeypatch):
    modules, counts = networks(), []
    optimizer, advance = adamw(modules), AdamW.advance
    optimizer.step_in_backward()

    def counted(self, *args):
        counts.append(sum(p.grad is not None for p in parameters(modules)))
        advance(self, *args)

    monkeypatch.setattr(AdamW, "advance", counted)
    walk(modules, optimizer, range(1))
    assert counts == [1] * 6 + [0, 0]  # of six parameters, and `step`'s two groups


def test_an_optimizer_in_the_backward_pass_goes_with_its_parameters():
    """So that the paper's second step has the memory of the first."""
    modules = networks()
    optimizer = adamw(modules)
    optimizer.step_in_backward()
    left = [weakref.ref(x) for x in (optimizer, *parameters(modules))]
    del optimizer, modules
    gc.collect()
    assert not any(each() is not None for each in left)


# ---- eight bits


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_dynamic_quantisation(signed):
    """As bitsandbytes' create_dynamic_map has them, but for the 0 of the unsigned ones."""
    levels, codes = code(signed)
    positive = levels[levels > 0]
    assert len(levels) == (256 if signed else 255) and len(codes) == 1 << 16
    assert torch.equal(levels, levels.sort().values) and levels[-1] == 1
    assert positive[:3].tolist() == pytest.approx([5.5e-7, 3.25e-6, 7.75e-6] if signed else [3.25e-7, 7.75e-7, 2.125e-6])
    if signed:
        assert torch.equal(levels[:127], -positive[:-1].flip(0)) and levels[127] == 0
    kept = codes[(levels.view(torch.int32) >> 16) & 0xFFFF]
    assert torch.equal(levels[kept.long()], levels)


@pytest.mark.parametrize("signed", [True, False])
def test_a_quantised_moment_comes_back_close(signed):
    """Within half the distance of two levels, and what the lower half of its bits says: 1/256 of itself."""
    levels, codes = code(signed)
    x = torch.randn(64 * BLOCK, generator=torch.Generator().manual_seed(0)) * 10.0 ** -torch.linspace(0, 9, 64 * BLOCK)
    x[: 2 * BLOCK] = 0
    x = x if signed else x.square()
    x = x.view(64, BLOCK)
    values, scales, largest = torch.empty(x.shape, dtype=torch.uint8), torch.empty(64), x.abs().amax(1)
    encode(x.clone(), values, scales, levels, codes)
    found = decoded(values, scales, levels, codes)
    assert torch.equal(scales, largest)
    assert (found[:2] == 0).all()
    relative = x[2:] / largest[2:, None]
    gap = torch.diff(levels, append=torch.ones(1)).maximum(torch.diff(levels, prepend=levels[:1]))
    bound = gap[values[2:].long()] / 2 + relative.abs() / 256 + 4e-7
    assert ((found[2:] / largest[2:, None] - relative).abs() <= bound).all()
    assert (found - x).norm() < 0.02 * x.norm()


def test_small_gradients_beside_large_ones_do_not_jump():
    """As they would if the second moment were 0 while the first is not."""
    longest = {}
    for eight_bit in (False, True):
        p, rng = nn.Parameter(torch.zeros(16, BLOCK)), torch.Generator().manual_seed(0)
        optimizer = AdamW([{"params": [p], "lr": 1e-3}], (0.9, 0.999), 1e-12, 0.0, eight_bit)
        for _ in range(50):
            p.grad, before = (
                10 ** -torch.linspace(0, 5, BLOCK) * (1 + torch.randn(16, BLOCK, generator=rng) / 2),
                p.detach().clone(),
            )
            optimizer.step()
            longest[eight_bit] = max(longest.get(eight_bit, 0.0), (p - before).abs().max().item())
    assert longest[True] < 3 * longest[False]


def test_moments_in_eight_bits_take_two_bytes():
    """Of parameters in whole blocks of a fair size; others keep theirs in fp32."""
    modules = networks()
    optimizer = adamw(modules, eight_bit=True)
    walk(modules, optimizer, range(1))
    for p in parameters(modules):
        state = optimizer.state[p]
        quantised = p.numel() in (4096, 20480)
        assert {state[name].dtype for name in SIGNED} == {torch.uint8 if quantised else torch.float32}
        size = sum(tensor.nbytes for name, tensor in state.items() if name != "step")
        assert size == (2 + 8 / BLOCK if quantised else 8) * p.numel()


# ---- bf16


@pytest.mark.parametrize("x", [0.7123, -3.0e-5, 1.0039, 12345.6, 0.5, 0.0])
def test_rounding_is_right_in_the_mean(x):
    """Each value becomes one of its two neighbours, or stays what it is."""
    n, g, v = 1 << 18, torch.full((1 << 18,), -1.0 if x > 0 else 1.0), torch.zeros(1 << 18)
    p = torch.zeros(n, dtype=torch.bfloat16)
    how = None, torch.tensor(1.0), abs(x), 0.0, 0.0, 0.0, 0.0  # without memory, a step is the rate
    update(p, g, (v.clone(),), (v,), *how, key=3)
    found = sorted(p.unique().tolist())
    assert found == [x] or len(found) == 2 and found[0] < x < found[1]
    gap = found[-1] - found[0]
    assert gap <= abs(x) / 128 and p.double().mean().item() == pytest.approx(
        x, abs=5 * gap / 2 / n**0.5 + gap / 2**16 + 1e-9 * abs(x)
    )


def test_steps_too_small_for_bf16_add_up():
    """1 - 1e-4 is 1 in bf16."""
    p = nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    optimizer = AdamW([{"params": [p], "lr": 1e-4}], (0.9, 0.999), 1e-8, 0.0)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert 1 - p.double().mean().item() == pytest.approx(50e-4, rel=0.02)


def test_random_bits_are_even_and_depend_on_key_and_place():
    like = torch.empty(1 << 20)
    one, next_to_it, other = (random_bits(like, key) for key in (5, 6, 12345678))
    assert torch.equal(one[1000:], random_bits(like[1000:], 1005))
    for bits in (one, other, one ^ next_to_it, one ^ other):
        counts = torch.bincount(bits >> 8, minlength=256), torch.bincount(bits & 255, minlength=256)
        assert all(len(c) == 256 and ((c - 4096.0) ** 2 / 4096).sum() < 400 for c in counts)  # chi square, 255 degrees


def test_random_bits_are_those_of_triple32():
    """In whole numbers of Python, up to the last multiplication."""

    def hashed(x: int) -> int:
        for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
            x = (x ^ x >> shift) * factor % 2**32
        return x >> 16

    for key in (0, 123456789, -7):
        assert random_bits(torch.empty(4, 25), key).flatten().tolist() == [hashed((key + i) % 2**32) for i in range(100)]


def test_rounding_depends_on_the_seed():
    assert differing(walked("bf16", seed=1), walked("bf16", seed=2))
    assert not differing(walked("8 bits", seed=1), walked("8 bits", seed=2))


# ---- compiled


def test_an_update_is_one_graph_for_all_steps():
    """What torch.compile makes of it has no break, and is not made anew for another step, rate or slice."""
    parameters = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    ours, eager = (AdamW([p], *HOW, eight_bit=True) for p in parameters)
    graphs = []
    ours.kernel = torch.compile(update, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=True)
    for step in range(5):
        for p, optimizer in zip(parameters, (ours, eager), strict=True):
            p.grad = torch.randn(4096, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizer.step()
    assert len(graphs) == 1
    assert torch.equal(*parameters)


# ---- the moments, through a file and back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_restored_optimizer_continues_bit_for_bit(stop, kind, tmp_path):
    dtype, eight_bit = KINDS[kind]
    modules = networks(dtype)
    optimizer = adamw(modules, eight_bit)
    walk(modules, optimizer, range(stop))
    save_file(moments(optimizer, modules), tmp_path / "optimizer.safetensors")

    again = networks(dtype)
    for name, network in again.items():
        network.load_state_dict(modules[name].state_dict())
    fresh = adamw(again, eight_bit)
    restore(fresh, again, load_file(tmp_path / "optimizer.safetensors"))
    walk(again, fresh, range(stop, 8))
    assert not differing(weights(again) | moments(fresh, again), walked(kind))


def test_moments_are_named_after_their_parameters():
    modules = networks()
    optimizer = adamw(modules)
    assert not any(value.any() for value in moments(optimizer, modules).values())
    walk(modules, optimizer, range(2))
    saved = moments(optimizer, modules)
    names = [f"{part}.{name}" for part, module in modules.items() for name, _ in module.named_parameters()]
    assert saved.keys() == {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert saved["unet.0.weight.step"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_restored_moments_are_copies(kind):
    """Mapped from the checkpoint's file, they would change it, or change with it."""
    dtype, eight_bit = KINDS[kind]
    modules = networks(dtype)
    optimizer = adamw(modules, eight_bit)
    walk(modules, optimizer, range(2))
    saved = {name: value.clone() for name, value in moments(optimizer, modules).items()}
    as_saved = {name: value.clone() for name, value in saved.items()}
    restore(optimizer, modules, saved)
    walk(modules, optimizer, range(3))
    assert not differing(saved, as_saved)


def test_a_parameter_without_a_gradient_stays_as_it_is():
    modules = networks()
    unused = modules | {"unused": nn.Linear(2, 2)}
    optimizer, before = adamw(unused), weights({"unused": unused["unused"]})
    walk(modules, optimizer, range(2))
    saved = moments(optimizer, unused)
    assert not any(value.any() for name, value in saved.items() if name.startswith("unused"))
    assert not differing(weights({"unused": unused["unused"]}), before)


@pytest.mark.parametrize("change", [lambda x: {}, lambda x: {"unet.0.weight.exp_avg": torch.zeros(1)}])
def test_moments_of_another_run_are_refused(change):
    modules = networks()
    saved = moments(adamw(modules), modules)
    with pytest.raises(UserError, match=r"does not hold this run's unet\.0\.weight\.\w+: go on from another"):
        restore(adamw(modules), modules, change(saved) and saved | change(saved))

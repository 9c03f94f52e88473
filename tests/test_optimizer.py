"""Learning rates are diffusers', and a checkpoint holds all of AdamW's state."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minibooth.dreambooth.optimizer import SCHEDULES, learning_rate, moments, restore

STEPS, PEAK = 40, 3e-4
SHAPES = {
    "no warm-up": (0, 1, 1.0),
    "warm-up": (7, 1, 1.0),
    "cycles": (5, 3, 1.0),
    "power": (5, 1, 2.5),
    "all": (39, 2, 0.5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_those_of_diffusers(name, shape):
    get_scheduler = pytest.importorskip("diffusers.optimization").get_scheduler
    warmup, cycles, power = SHAPES[shape]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = get_scheduler(name, optimizer, None, warmup, STEPS, cycles, power)
    for step in range(STEPS):
        rate = learning_rate(name, PEAK, step, STEPS, warmup, cycles, power)
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_climbs_evenly_to_the_peak(name):
    rates = [learning_rate(name, PEAK, step, STEPS, warmup=10) for step in range(STEPS)]
    climb = [1.0] * 10 if name == "constant" else [step / 10 for step in range(10)]
    assert rates[:10] == pytest.approx([PEAK * factor for factor in climb])
    assert rates[10] == pytest.approx(PEAK)
    assert max(rates) == pytest.approx(PEAK)


def test_a_rate_of_zero_stays_zero():
    assert {learning_rate(name, 0.0, step, STEPS, 3) for name in SCHEDULES for step in range(STEPS)} == {0.0}


# ---- the moments, through a file and back


def networks() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"unet": nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), "text_encoder": nn.Linear(5, 2)}


def adamw(modules: dict[str, nn.Module]) -> torch.optim.AdamW:
    groups = [{"params": list(module.parameters()), "lr": 0.01 * (1 + i)} for i, module in enumerate(modules.values())]
    return torch.optim.AdamW(groups, weight_decay=0.1, fused=True)


def walk(modules: dict[str, nn.Module], optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        sum(module(x).square().mean() for module in modules.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(modules: dict[str, nn.Module]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for module in modules.values() for parameter in module.parameters()]


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_restored_optimizer_continues_bit_for_bit(stop, tmp_path):
    modules = networks()
    optimizer = adamw(modules)
    walk(modules, optimizer, range(stop))
    save_file(moments(optimizer, modules), tmp_path / "optimizer.safetensors")
    kept = weights(modules)
    walk(modules, optimizer, range(stop, 8))

    again = networks()
    for parameter, value in zip((p for m in again.values() for p in m.parameters()), kept, strict=True):
        parameter.data.copy_(value)
    fresh = adamw(again)
    restore(fresh, again, load_file(tmp_path / "optimizer.safetensors"))
    walk(again, fresh, range(stop, 8))
    assert all(map(torch.equal, weights(again), weights(modules)))


def test_moments_are_named_after_their_parameters():
    modules = networks()
    optimizer = adamw(modules)
    assert moments(optimizer, modules) == {}
    walk(modules, optimizer, range(2))
    saved = moments(optimizer, modules)
    names = [f"{part}.{name}" for part, module in modules.items() for name, _ in module.named_parameters()]
    assert saved.keys() == {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert saved["unet.0.weight.step"] == 2


def test_restored_moments_are_copies():
    """Mapped from the checkpoint's file, they would change it, or change with it."""
    modules = networks()
    optimizer = adamw(modules)
    walk(modules, optimizer, range(2))
    saved = {name: value.clone() for name, value in moments(optimizer, modules).items()}
    as_saved = {name: value.clone() for name, value in saved.items()}
    restore(optimizer, modules, saved)
    walk(modules, optimizer, range(3))
    assert same(saved, as_saved)


def test_a_parameter_without_a_gradient_has_no_moments_and_needs_none():
    modules = networks() | {"unused": nn.Linear(2, 2)}
    optimizer = adamw(modules)
    walk({name: modules[name] for name in ("unet", "text_encoder")}, optimizer, range(2))
    saved = moments(optimizer, modules)
    assert not [name for name in saved if name.startswith("unused")]
    fresh = adamw(modules)
    restore(fresh, modules, saved)
    assert same(moments(fresh, modules), saved)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

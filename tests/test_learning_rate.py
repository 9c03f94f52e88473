"""Learning rates are diffusers'."""

import pytest
import torch
from torch import nn

from minibooth.dreambooth.learning_rate import SCHEDULES, learning_rate

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

"""The course of the learning rate: the schedules that train_dreambooth.py names, as diffusers' get_scheduler has them."""

import math
from collections.abc import Callable

POLYNOMIAL_END = 1e-7  # the learning rate that "polynomial" ends at, as in diffusers

# The factor on the learning rate at `progress` (0 to 1) from the end of warm-up to the end of training.
SCHEDULES: dict[str, Callable[[float, int, float, float], float]] = {
    "constant": lambda progress, cycles, power, end: 1.0,
    "constant_with_warmup": lambda progress, cycles, power, end: 1.0,
    "linear": lambda progress, cycles, power, end: 1 - progress,
    "cosine": lambda progress, cycles, power, end: (1 + math.cos(math.pi * progress)) / 2,
    "cosine_with_restarts": lambda progress, cycles, power, end: (1 + math.cos(math.pi * (cycles * progress % 1))) / 2,
    "polynomial": lambda progress, cycles, power, end: (1 - end) * (1 - progress) ** power + end,
}


def learning_rate(name: str, peak: float, step: int, steps: int, warmup: int, cycles: int = 1, power: float = 1.0) -> float:
    """The rate of step 0 .. steps - 1: a linear warm-up from 0 (but for "constant"), then that course of SCHEDULES."""
    if step < warmup and name != "constant":
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * SCHEDULES[name](progress, cycles, power, min(1.0, POLYNOMIAL_END / peak) if peak else 0.0)

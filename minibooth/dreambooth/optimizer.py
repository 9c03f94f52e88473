"""AdamW (Loshchilov & Hutter 2019), the course of its learning rate, and what of it a checkpoint must hold."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

POLYNOMIAL_END = 1e-7  # the learning rate that "polynomial" ends at, as in diffusers

# The factor on the learning rate at `progress` (0 to 1) from the end of warm-up to the end of training.
Course = Callable[[float, int, float, float], float]
SCHEDULES: dict[str, Course] = {
    "constant": lambda progress, cycles, power, end: 1.0,
    "constant_with_warmup": lambda progress, cycles, power, end: 1.0,
    "linear": lambda progress, cycles, power, end: 1 - progress,
    "cosine": lambda progress, cycles, power, end: (1 + math.cos(math.pi * progress)) / 2,
    "cosine_with_restarts": lambda progress, cycles, power, end: (1 + math.cos(math.pi * (cycles * progress % 1))) / 2,
    "polynomial": lambda progress, cycles, power, end: (1 - end) * (1 - progress) ** power + end,
}


def learning_rate(name: str, peak: float, step: int, steps: int, warmup: int, cycles: int = 1, power: float = 1.0) -> float:
    """The rate of step 0 .. steps - 1: a linear warm-up from 0 (but for "constant"), then the named course."""
    if step < warmup and name != "constant":
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * SCHEDULES[name](progress, cycles, power, POLYNOMIAL_END / peak if peak else 0.0)


def moments(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """AdamW's state as named tensors, "unet.conv_in.weight.exp_avg" and so on; empty before the first step."""
    return {
        f"{part}.{name}.{key}": value
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module], saved: Mapping[str, Tensor]) -> None:
    """Put back what `moments` gave, each tensor where its parameter is; a parameter without a gradient has none."""
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{part}.{name}.{key}" in saved]
            for key in keys:
                optimizer.state[parameter][key] = saved[f"{part}.{name}.{key}"].to(parameter.device).clone()

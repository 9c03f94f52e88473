"""Samplers: from noise to a sample, as generators over a function. No state, no callbacks; to stop early, stop asking.

Every one is `sampler(predict, x, scheduler, steps, noise)` and yields x after each step. `predict(x, t)` is the network
with prompt and guidance inside; `noise()` gives normals shaped like x and is called once per random step. The numbers
are those of diffusers' scheduler of that name, also where it departs from the paper, which a comment then says. Whichever
solver a file was saved with, a sampler is what its name says.

    ddpm      Ho et al. 2020 (arXiv 2006.11239) eq. 7         ancestral
    ddim      Song et al. 2021 (arXiv 2010.02502) eq. 12      deterministic at eta 0, ancestral at eta 1
    pndm      Liu et al. 2022 (arXiv 2202.09778) sec. 3       ddim along a mean of predictions ("PLMS")
    euler     Karras et al. 2022 (arXiv 2206.00364) alg. 1    without its second-order correction
    euler_a   the same, ancestral, as in k-diffusion
    dpmpp_2m  Lu et al. 2022 (arXiv 2211.01095) alg. 2        DPM-Solver++ of second order, multistep

Letters: a, the scheduler's alphas_cumprod at some time, a Python float; e, unit noise; t, s, a step's ends; B, batch.
x is sqrt(a) x0 + sqrt(1 - a) e, what the network sees; in euler and euler_a x0 + sigma e, which is that over sqrt(a).
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minibooth.diffusion.noise import Generators, gaussian
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.errors import UserError

Predict = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]
States = Iterator[Tensor]  # x after each step

TINY = 2.0**-24  # stands for a = 0 where a sampler divides by it
# Adams-Bashforth: weights of the latest predictions, newest first, by how many there are.
MULTISTEP = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def _sigmas(scheduler: DDPMScheduler) -> list[float]:
    """Every timestep's sigma, the noise beside an x0 of scale 1."""
    return [math.sqrt(1 / (a or TINY) - 1) for a in scheduler.alphas_cumprod.tolist()]


def _karras(high: float, low: float, steps: int, levels: Sequence[float]) -> tuple[list[float], list[float]]:
    """Karras et al. 2022 eq. 5, rho 7: times and sigmas from `high` to `low`, dense where there is little noise."""
    sigmas = np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    return np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels))).tolist(), sigmas.tolist()


def _ask(predict: Predict, x: Tensor, t: float) -> Tensor:
    """The network's prediction for x at t, an int or a float that all of the batch shares, in x's dtype."""
    kind = torch.float32 if isinstance(t, float) else torch.int64
    return predict(x, torch.full((len(x),), t, device=x.device, dtype=kind)).to(x.dtype)


def _split(x: Tensor, output: Tensor, a: float, scheduler: DDPMScheduler) -> tuple[Tensor, Tensor]:
    """The x0 and the noise that x consists of, if the network is right."""
    signal, scale = math.sqrt(a), math.sqrt(1 - a)
    if scheduler.prediction_type == "v_prediction":
        return signal * x - scale * output, signal * output + scale * x
    if a == 0:
        raise UserError("at zero SNR an epsilon prediction tells nothing of x0: such a schedule needs v_prediction")
    return (x - scale * output) / signal, output


def ddpm(predict: Predict, x: Tensor, scheduler: DDPMScheduler, steps: int, noise: Noise) -> States:
    """Ancestral sampling: each step draws from q(x_s | x_t, x0) at the predicted x0."""
    a = scheduler.alphas_cumprod.tolist()
    times = scheduler.timesteps(steps).tolist()
    for t, s in zip(times, [*times[1:], None], strict=True):
        a_t, a_s = a[t], 1.0 if s is None else a[s]
        x0, _ = _split(x, _ask(predict, x, t), a_t, scheduler)
        beta = 1 - a_t / a_s
        x = math.sqrt(1 - beta) * (1 - a_s) / (1 - a_t) * x
        x = x + math.sqrt(a_s) * beta / (1 - a_t) * x0.clamp(-scheduler.clip, scheduler.clip)
        if t > 0:
            variance = beta if scheduler.variance_type == "fixed_large" else beta * (1 - a_s) / (1 - a_t)
            x = x + math.sqrt(variance) * noise()
        yield x


def ddim(predict: Predict, x: Tensor, scheduler: DDPMScheduler, steps: int, noise: Noise, eta: float = 0.0) -> States:
    """Deterministic at eta 0; at eta 1 as random as ddpm."""
    a = scheduler.alphas_cumprod.tolist()
    for t in scheduler.timesteps(steps).tolist():
        # A fixed stride, as in diffusers: not the next t where steps do not divide T, nor ever for linspace.
        s = t - scheduler.num_train_timesteps // steps
        a_t, a_s = a[t], a[s] if s >= 0 else scheduler.final_alpha_cumprod
        x0, e = _split(x, _ask(predict, x, t), a_t, scheduler)
        variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        x = math.sqrt(a_s) * x0.clamp(-scheduler.clip, scheduler.clip) + math.sqrt(1 - a_s - variance) * e
        if eta:
            x = x + math.sqrt(variance) * noise()
        yield x


def pndm(predict: Predict, x: Tensor, scheduler: DDPMScheduler, steps: int, noise: Noise) -> States:
    """Ddim's step along a mean of the last four predictions; the first is taken twice, so it yields steps + 1 times.

    As diffusers does with skip_prk_steps, which all published files have, whether or not this one does.
    """
    a = scheduler.alphas_cumprod.tolist()
    if a[-1] == 0:
        raise UserError("pndm cannot start from zero terminal SNR; take another sampler, such as ddim")
    times, stride = scheduler.timesteps(steps).tolist(), scheduler.num_train_timesteps // steps

    def step(x: Tensor, output: Tensor, t: int, s: int) -> Tensor:
        a_s = a[s] if s >= 0 else scheduler.final_alpha_cumprod
        x0, e = _split(x, output, a[t], scheduler)
        return math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * e

    start, outputs = x, [_ask(predict, x, times[0])]
    x = step(start, outputs[0], times[0], times[0] - stride)
    yield x
    for t in times[1:2]:  # Heun's second half: from the start again, with the mean of both ends
        x = step(start, (_ask(predict, x, t) + outputs[0]) / 2, t + stride, t)
        yield x
    for t in times[1:]:
        outputs = [_ask(predict, x, t), *outputs[:3]]
        weighted = [w * output for w, output in zip(MULTISTEP[len(outputs)], outputs, strict=True)]
        x = step(x, torch.stack(weighted).sum(0), t, t - stride)
        yield x


def euler(predict: Predict, x: Tensor, scheduler: DDPMScheduler, steps: int, noise: Noise, ancestral: bool = False) -> States:
    """Euler's method for dx/dsigma = (x - x0) / sigma; yields x0 + sigma e, of which the last is x0.

    Ancestral: each step goes past its mark, and fresh noise brings x back up to it.
    """
    levels = _sigmas(scheduler)
    times = scheduler.times(steps).float().tolist()  # float32, as the network sees it
    sigmas = np.interp(times, np.arange(len(levels)), levels).tolist()
    if scheduler.use_karras_sigmas and not ancestral:
        times, sigmas = _karras(sigmas[0], sigmas[-1], steps, levels)
    sigmas.append(0.0)
    # The exact scale is sqrt(1 + sigma^2); diffusers leaves the 1 out where the schedule starts at its end.
    x = x * (math.hypot(1, sigmas[0]) if scheduler.timestep_spacing == "leading" else sigmas[0])
    for t, sigma, end in zip(times, sigmas, sigmas[1:], strict=False):
        a = 1 / (1 + sigma**2)
        seen = x * math.sqrt(a)
        x0, _ = _split(seen, _ask(predict, seen, t), a, scheduler)
        ratio = end / sigma
        x = x0 + (x - x0) * (ratio**2 if ancestral else ratio)  # ancestral: further down, to end * ratio
        if ancestral:
            x = x + end * math.sqrt(1 - ratio**2) * noise()
        yield x


def dpmpp_2m(predict: Predict, x: Tensor, scheduler: DDPMScheduler, steps: int, noise: Noise) -> States:
    """Takes x0 as it is half a step on in lambda = -log sigma, extrapolated from the last two; first order at both ends."""
    levels = _sigmas(scheduler)
    # The grid has one point more, the clean end, except that trailing leaves it out by itself.
    points = steps if scheduler.timestep_spacing == "trailing" else steps + 1
    times = scheduler.timesteps(points).tolist()[:steps]
    sigmas = [levels[t] for t in times]
    if scheduler.use_karras_sigmas:
        between, sigmas = _karras(levels[-1], levels[0], steps, levels)
        times = [round(t) for t in between]  # diffusers does not with squaredcos_cap_v2, which no Stable Diffusion has
    previous, h_previous = None, 0.0
    for t, sigma, end in zip(times, sigmas, [*sigmas[1:], 0.0], strict=True):
        a_t, a_s = 1 / (1 + sigma**2), 1 / (1 + end**2)
        x0, _ = _split(x, _ask(predict, x, t), a_t, scheduler)
        ratio = end / sigma
        h = -math.log(ratio) if ratio else math.inf
        target = x0 if previous is None or not end else x0 + (x0 - previous) * h / (2 * h_previous)
        x = math.sqrt((1 - a_s) / (1 - a_t)) * x + math.sqrt(a_s) * (1 - ratio) * target
        previous, h_previous = x0, h
        yield x


SAMPLERS: dict[str, Callable[..., States]] = {
    "ddpm": ddpm, "ddim": ddim, "pndm": pndm, "euler": euler,
    "euler_a": functools.partial(euler, ancestral=True), "dpmpp_2m": dpmpp_2m,
}  # fmt: skip

# What a schedule's file means that does not say it: as in diffusers, some samplers spread their steps from end to end.
USUAL: dict[str, dict[str, Any]] = dict.fromkeys(SAMPLERS, {"timestep_spacing": "leading", "set_alpha_to_one": True})
USUAL |= dict.fromkeys(("euler", "euler_a", "dpmpp_2m"), {"timestep_spacing": "linspace"})
USUAL["pndm"] = {"timestep_spacing": "leading", "set_alpha_to_one": False}


def calls(sampler: str, steps: int) -> int:
    """How many times `sampler` asks the network, and yields: steps, or one more for pndm."""
    return steps + (sampler == "pndm" and steps > 1)


def trajectory(
    predict: Predict, x: Tensor, scheduler: DDPMScheduler, steps: int, sampler: str = "ddim", generator: Generators = None,
    eta: float = 0.0,
) -> States:  # fmt: skip
    """x after each of the sampler's steps; `sample` says what goes in and what is refused."""
    if sampler not in SAMPLERS:
        raise UserError(f"no sampler is named {sampler!r}; there are {', '.join(SAMPLERS)}")
    if eta and (sampler != "ddim" or not 0 < eta <= 1):
        raise UserError(f"eta={eta}: ddim's is from 0 to 1, and other samplers have none")
    if USUAL[sampler].keys() - scheduler.config.keys():
        scheduler = DDPMScheduler.from_config(USUAL[sampler] | scheduler.config)

    def noise() -> Tensor:
        return gaussian(x.shape, generator).to(x)

    return SAMPLERS[sampler](predict, x, scheduler, steps, noise, **({"eta": eta} if eta else {}))


def sample(
    predict: Predict, x: Tensor, scheduler: DDPMScheduler, steps: int, sampler: str = "ddim", generator: Generators = None,
    eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """The sample that the starting noise x, [B, ...] of unit variance, leads to; in its shape and dtype, on its device.

    predict(x, t): what the network predicts, epsilon or v as `scheduler.prediction_type` says, from x scaled for it and
    t [B]: int64, or float32 in euler and euler_a, where linspace makes it fractional. Its result is cast to x's dtype,
    so float32 noise and a half-precision network go together. steps: 1 to the schedule's length, placed by the
    scheduler's `timestep_spacing`, or by USUAL where its file leaves that out. generator, where noise is drawn: None,
    one, or one per sample (see `gaussian`). eta: ddim's, from 0 to 1. Raises UserError for an unknown sampler and for
    what the sampler cannot do.
    """
    return deque(trajectory(predict, x, scheduler, steps, sampler, generator, eta), maxlen=1).pop()

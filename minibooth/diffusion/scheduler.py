"""The noise schedule: how much of a picture is left at each timestep, and what the network is asked to predict there.

The forward process of Ho et al. 2020 (arXiv 2006.11239) in closed form, eq. 4, with a_t = prod_{s<=t} (1 - beta_s):

    x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise        SNR(t) = a_t / (1 - a_t)

The network predicts the noise ("epsilon") or the velocity of Salimans & Ho 2022 (arXiv 2202.00512, appendix D),
v = sqrt(a_t) noise - sqrt(1 - a_t) x0. A scheduler_config.json of any class will do: all describe this one process, and
differ in the sampler they were saved from and in the defaults of the keys they leave out.

Shapes: B batch; T `num_train_timesteps`; x0 and noise [B, ...]; t LongTensor [B] in 0 .. T-1, on any device, or one number.
"""

import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from minibooth.errors import UserError

# The keys that are read, with the defaults of diffusers' DDPMScheduler.
DEFAULTS: dict[str, Any] = dict(
    num_train_timesteps=1000, beta_schedule="linear", beta_start=0.0001, beta_end=0.02, trained_betas=None,
    rescale_betas_zero_snr=False, prediction_type="epsilon", timestep_spacing="leading", steps_offset=0,
    set_alpha_to_one=True, clip_sample=True, clip_sample_range=1.0, variance_type="fixed_small", use_karras_sigmas=False,
)  # fmt: skip
# By class, where others' defaults differ.
_SIGMAS = dict(clip_sample=False, timestep_spacing="linspace")
CLASSES: dict[str, dict[str, Any]] = {
    "DDPM": {}, "DDIM": {}, "PNDM": dict(clip_sample=False, set_alpha_to_one=False),
    **dict.fromkeys(("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "DPMSolverMultistep",
                     "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"), _SIGMAS),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"),
                    _SIGMAS | dict(beta_start=0.00085, beta_end=0.012)),
}  # fmt: skip
# Parameters of what is off, and which solver another sampler is to be: here its name says that.
IGNORED = frozenset({
    "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "skip_prk_steps", "predict_x0",
    "lower_order_final", "euler_at_final", "noise_sampler_seed", "tensor_format", "algorithm_type", "solver_type",
    "solver_order",
})  # fmt: skip


def _cosine(start: float, end: float, T: int) -> Tensor:
    """Nichol & Dhariwal 2021 (arXiv 2102.09672) eq. 17; start and end play no part."""
    a = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - a[1:] / a[:-1]).clamp(max=0.999).float()


BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": lambda start, end, T: torch.linspace(start, end, T, dtype=torch.float32),
    "scaled_linear": lambda start, end, T: BETAS["linear"](start**0.5, end**0.5, T) ** 2,  # LDM's own files call it "linear"
    "squaredcos_cap_v2": _cosine,
}


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Lin et al. 2023 (arXiv 2305.08891) alg. 1: sqrt(a) is shifted to end at zero and scaled to start where it did."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    a = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - a / torch.cat([a.new_ones(1), a[:-1]])


# Timesteps from T, the number of steps n, `steps_offset` and i = 0 .. n - 1, float64. In trailing the stride is not -T / n:
# its last bit decides how halves round, and this is numpy's arange.
SPACINGS: dict[str, Callable[[int, int, int, Tensor], Tensor]] = {
    "leading": lambda T, n, offset, i: i.flip(0) * (T // n) + offset,
    "trailing": lambda T, n, offset, i: (T + i * ((T - T / n) - T)).round() - 1,
    "linspace": lambda T, n, offset, i: (i.flip(0) * ((T - 1) / max(n - 1, 1))).clamp(max=T - 1),
}
# What a key may say, be it read or not. A key that stands in no table must say nothing (false, null, 0, empty).
CHOICES: dict[str, Collection[Any]] = dict(
    beta_schedule=BETAS, timestep_spacing=SPACINGS, prediction_type=("epsilon", "v_prediction"),
    variance_type=("fixed_small", "fixed_small_log", "fixed_large"), final_sigmas_type=("zero",),
    interpolation_type=("linear",), timestep_type=("discrete",), lambda_min_clipped=(-math.inf,), predict_epsilon=(True,),
)  # fmt: skip


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    """A value for every key of DEFAULTS; UserError for what would otherwise go wrong in silence."""
    name = str(config.get("_class_name", "DDPMScheduler"))
    if name.removesuffix("Scheduler") not in CLASSES:
        raise UserError(f"_class_name={name!r} is not supported; supported: {', '.join(CLASSES)}")
    given = {key: value for key, value in config.items() if value is not None}
    for key, value in given.items():
        if key in CHOICES and value not in [*CHOICES[key]]:
            raise UserError(f"{key}={value!r} is not supported; supported: {', '.join(map(str, CHOICES[key]))}")
        if value and key not in {*DEFAULTS, *CHOICES, *IGNORED} and not key.startswith("_"):
            raise UserError(f"{key}={value!r} is not supported; turn it off or remove it")
    return DEFAULTS | CLASSES[name.removesuffix("Scheduler")] | {key: given[key] for key in DEFAULTS if key in given}


class DDPMScheduler:
    """One model's noise schedule, as its scheduler_config.json describes it; the samplers walk along it.

    config: the file's content, untouched. alphas_cumprod: a_t, float32 [T], on the device of its last use.
    final_alpha_cumprod: what ddim and pndm take for a_t before the first timestep, 1 or a_0. clip: the bound on ddpm's
    and ddim's x0, infinite for latents. prediction_type, timestep_spacing, steps_offset, variance_type, use_karras_sigmas
    (of euler and dpmpp_2m): as in the file.
    Raises UserError, with the key, for a setting that would change results and is not implemented.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        values = _read(config)
        self.num_train_timesteps: int = values["num_train_timesteps"]
        self.prediction_type: str = values["prediction_type"]
        self.timestep_spacing: str = values["timestep_spacing"]
        self.steps_offset = operator.index(values["steps_offset"])
        self.variance_type: str = values["variance_type"]
        self.use_karras_sigmas = bool(values["use_karras_sigmas"])
        self.clip: float = float(values["clip_sample_range"]) if values["clip_sample"] else math.inf

        if values["trained_betas"] is not None:
            betas = torch.tensor(values["trained_betas"], dtype=torch.float32)
        else:
            betas = BETAS[values["beta_schedule"]](values["beta_start"], values["beta_end"], self.num_train_timesteps)
        if values["rescale_betas_zero_snr"]:
            betas = _zero_terminal_snr(betas)
        self.alphas_cumprod = a = torch.cumprod(1 - betas, 0)
        if betas.shape != (max(self.num_train_timesteps, 1),) or not (a.diff(prepend=a.new_ones(1)) < 0).all() or a[-1] < 0:
            numbers = "num_train_timesteps numbers between 0 and 1 that leave something of a picture at all but the last"
            raise UserError(f"beta_start to beta_end, or trained_betas, are not {numbers}")
        self.final_alpha_cumprod: float = 1.0 if values["set_alpha_to_one"] else self.alphas_cumprod[0].item()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The scheduler that a scheduler_config.json's content describes, whichever class wrote it."""
        return cls(config)

    def _at(self, t: Tensor | int, device: torch.device) -> Tensor:
        self.alphas_cumprod = self.alphas_cumprod.to(device)  # kept there: a copy every step would stall the device
        return self.alphas_cumprod[torch.as_tensor(t, device=device)]

    def _scales(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t) as [B, 1, ...] in x0's dtype."""
        a = self._at(t, x0.device).reshape(-1, *(1,) * (x0.dim() - 1))
        return a.sqrt().to(x0.dtype), (1 - a).sqrt().to(x0.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, in x0's dtype and on its device (Ho et al. 2020, eq. 4)."""
        signal, scale = self._scales(x0, t)
        return signal * x0 + scale * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v_t = dx/dphi at the angle phi whose cosine is sqrt(a_t) (Salimans & Ho 2022), in x0's dtype."""
        signal, scale = self._scales(x0, t)
        return signal * noise - scale * x0

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say of x_t: the noise or the velocity."""
        return noise if self.prediction_type == "epsilon" else self.velocity(x0, noise, t)

    def snr(self, t: Tensor) -> Tensor:
        """a_t / (1 - a_t), float32 [B]: zero, never nan, at the end of a schedule rescaled to zero terminal SNR."""
        a = self._at(t, torch.as_tensor(t).device)
        return a / (1 - a)

    def times(self, steps: int) -> Tensor:
        """Where a sampler of `steps` steps evaluates the network, float64 [steps], falling; fractional for linspace.

        Raises UserError if the schedule has no room for so many.
        """
        T = self.num_train_timesteps
        if not 1 <= steps <= T:
            raise UserError(f"cannot place {steps} steps on a schedule of {T} timesteps: take 1 to {T}")
        times = SPACINGS[self.timestep_spacing](T, steps, self.steps_offset, torch.arange(steps, dtype=torch.float64))
        if not 0 <= times[-1] <= times[0] <= T - 1:
            raise UserError(f"{steps} steps with steps_offset={self.steps_offset} leave timesteps 0 to {T - 1}: take others")
        return times

    def timesteps(self, steps: int) -> Tensor:
        """`times`, rounded: LongTensor [steps], falling."""
        return self.times(steps).round().long()

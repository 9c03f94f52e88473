"""The samplers: laws that hold for any of them, and diffusers' trajectories step by step."""

import math

import pytest
import torch
from comparing import normals

from minibooth.diffusion.noise import gaussian, generator
from minibooth.diffusion.samplers import SAMPLERS, calls, sample, trajectory
from minibooth.diffusion.scheduler import SPACINGS, DDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with a newer numpy

STOCHASTIC = {"ddpm": {}, "euler_a": {}, "ddim": {"eta": 0.7}}
REFERENCES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def config(prediction="epsilon", spacing="leading", **changes):
    """Stable Diffusion's schedule with every key written out, so that no class's defaults play a part."""
    return {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "skip_prk_steps": True,
        **changes,
    }


ZERO_SNR = config("v_prediction", "trailing", rescale_betas_zero_snr=True)


def toy(x, t):
    """A smooth nonlinear function of x and t, bounded like a network's prediction."""
    mix = torch.randn(x[0].numel(), x[0].numel(), generator=torch.Generator().manual_seed(1)) / x[0].numel() ** 0.5
    drift = torch.sin(t.to(x.dtype) / 150)[:, None]
    return (torch.tanh(x.flatten(1) @ mix.to(x) + drift) + 0.3 * drift).view_as(x)


def reference(name, settings, steps, x, **options):
    """diffusers' trajectory from x, in the loop of its pipelines: predictions of `toy`, one generator for the noise."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, REFERENCES[name]).from_config(settings)
    scheduler.set_timesteps(steps)
    x, points = x * scheduler.init_noise_sigma, []
    if name in STOCHASTIC:
        options["generator"] = generator(7)
    for t in scheduler.timesteps:
        output = toy(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample
        points.append(x)
    return torch.stack(points)


def parity(name, settings, steps, **options):
    """The largest difference along the whole trajectory, step by step, relative to that step's largest value."""
    x = normals(2, 4, 4, 4)
    theirs = reference(name, settings, steps, x, **options)
    scheduler = DDPMScheduler.from_config(settings)
    ours = torch.stack(list(trajectory(toy, x, scheduler, steps, name, generator(7), **options)))
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    return ((ours - theirs).abs().flatten(1).amax(1) / theirs.abs().flatten(1).amax(1)).max().item()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30, 48, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectory_is_diffusers(name, prediction, spacing, steps):
    assert parity(name, config(prediction, spacing), steps) < 1e-5


@pytest.mark.parametrize("changes", [
    {"set_alpha_to_one": True}, {"steps_offset": 0}, {"clip_sample": True, "clip_sample_range": 0.5},
    {"variance_type": "fixed_large"}, {"variance_type": "fixed_small_log"},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, {"beta_schedule": "squaredcos_cap_v2"},
])  # fmt: skip
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_setting_is_diffusers(name, changes):
    settings = config("v_prediction", **changes)
    if name == "dpmpp_2m":
        settings.pop("variance_type", None)  # diffusers' class of that sampler reads another meaning into the key
    assert parity(name, settings, 10) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_karras_sigmas_are_diffusers(name, prediction, spacing, steps):
    assert parity(name, config(prediction, spacing, use_karras_sigmas=True), steps) < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_what_its_name_says_whichever_solver_the_file_was_saved_with(name):
    saved = dict(algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun")
    x, two = normals(2, 4), [DDPMScheduler.from_config(config() | more) for more in ({}, saved)]
    first, second = (sample(toy, x, each, 5, name, generator(0)) for each in two)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "writer"), [("pndm", "DDIMScheduler"), ("ddim", "PNDMScheduler")])
def test_a_last_alpha_that_the_file_leaves_out_is_the_samplers_own(name, writer):
    """Pndm's is the first of the schedule, ddim's 1, whichever class wrote the file."""
    settings = {key: value for key, value in config().items() if key != "set_alpha_to_one"} | {"_class_name": writer}
    assert parity(name, settings, 10) < 1e-5


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_diffusers(eta):
    assert parity("ddim", config(), 20, eta=eta) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])
def test_zero_terminal_snr_is_diffusers(name, steps):
    # Euler starts at sigma 4096; diffusers subtracts float32 of that size, which costs it up to 4096 * 2^-23 = 5e-4.
    assert parity(name, ZERO_SNR, steps) < (5e-4 if name.startswith("euler") else 1e-5)


def gaussian_denoiser(scheduler, mean, std):
    """What a perfect network says when pictures are N(mean, std^2): the expected noise, or v, given x_t."""

    def predict(x, t):
        a = scheduler.alphas_cumprod.to(x)[t.long()][:, None]
        e = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
        x0 = mean + a.sqrt() * std**2 * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
        return e if scheduler.prediction_type == "epsilon" else a.sqrt() * e - (1 - a).sqrt() * x0

    return predict


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "options"), [(name, {}) for name in SAMPLERS] + [("ddim", {"eta": 1.0})])
def test_exact_denoiser_of_a_gaussian_returns_that_gaussian(name, options, prediction):
    mean, std, samples = 0.8, 0.5, 20_000
    scheduler = DDPMScheduler.from_config(config(prediction, "trailing", set_alpha_to_one=True))
    a = scheduler.alphas_cumprod[-1].item()
    z = normals(samples, 1).double()
    # Start from the exact marginal, which is not quite N(0, 1), with no sampling error in its two moments.
    start = a**0.5 * mean + (a * std**2 + 1 - a) ** 0.5 * (z - z.mean()) / z.std()
    for steps in (50, 250):  # they divide 1000: where they do not, diffusers' ddim and pndm drift, and ours with them
        x = sample(gaussian_denoiser(scheduler, mean, std), start, scheduler, steps, name, generator(0), **options)
        # Three standard errors, 1 / sqrt(samples) of the mean and 1 / sqrt(2 samples) of the deviation, and the
        # discretisation, which for every sampler vanishes at least as 1 / steps.
        assert abs(x.mean() - mean) / std < 0.021 + 1 / steps
        assert abs(x.std() / std - 1) < 0.015 + 6 / steps


@pytest.mark.parametrize("settings", [config(), config(spacing="trailing"), ZERO_SNR])
@pytest.mark.parametrize("name", SAMPLERS)
def test_who_knows_the_picture_returns_the_picture(name, settings):
    if name == "pndm" and settings is ZERO_SNR:
        pytest.skip("refused, see test_what_cannot_be_done_is_refused")
    scheduler = DDPMScheduler.from_config(settings | {"set_alpha_to_one": True})
    picture, x = normals(2, 3, 8, seed=5).double()
    # euler and dpmpp_2m take 2^-24 for a = 0, so their x is the picture's off by 2^-12
    tolerance = 1e-3 if settings is ZERO_SNR else 1e-6
    for steps in (1, 2, 10):
        last = sample(gaussian_denoiser(scheduler, picture, 0.0), x, scheduler, steps, name, generator(0))
        assert torch.allclose(last, picture, atol=tolerance)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_at_eta_one_is_ddpm(steps):
    """Song et al. 2021, section 4.1; where both take the same steps: leading spacing, and steps that divide T."""
    scheduler = DDPMScheduler.from_config(config(set_alpha_to_one=True))
    x = normals(2, 4, 4, 4).double()
    ddpm = torch.stack(list(trajectory(toy, x, scheduler, steps, "ddpm", generator(0))))
    ddim = torch.stack(list(trajectory(toy, x, scheduler, steps, "ddim", generator(0), eta=1.0)))
    assert torch.allclose(ddpm, ddim, atol=1e-9)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_sample_does_not_depend_on_its_batch(name):
    def run(x, generators):
        return sample(lambda x, t: torch.tanh(x), x, scheduler, 10, name, generators, **STOCHASTIC[name])

    scheduler, x = DDPMScheduler.from_config(config()), normals(3, 4, 4, 4)
    together = run(x, [generator(0, i) for i in range(3)])
    for i in range(3):
        assert torch.equal(run(x[i : i + 1], [generator(0, i)])[0], together[i])
        assert torch.equal(run(x[i : i + 1], generator(0, i))[0], together[i])
    assert not torch.equal(run(x, [generator(1, i) for i in range(3)]), together)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_counts_predictions_and_what_is_yielded(name, steps):
    seen = []

    def predict(x, t):
        seen.append(t)
        return torch.tanh(x).bfloat16()

    scheduler, x = DDPMScheduler.from_config(config(spacing="linspace")), normals(2, 4, 4, 4)
    start = x.clone()
    points = list(trajectory(predict, x, scheduler, steps, name))
    assert len(points) == len(seen) == calls(name, steps)
    assert all(t.shape == (2,) and t.dtype == (torch.float32 if "euler" in name else torch.int64) for t in seen)
    assert all(point.dtype == x.dtype and point.shape == x.shape for point in points)
    assert torch.equal(x, start)  # the caller's noise is left alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_is_computed_in_the_dtype_of_its_noise_whatever_the_networks(name, dtype):
    def run(predicted):
        def predict(x, t):
            return torch.tanh(x).bfloat16().to(predicted)

        return sample(predict, x, scheduler, 10, name, generator(0), **STOCHASTIC.get(name, {}))

    scheduler, x = DDPMScheduler.from_config(config()), normals(2, 4, 4, 4).to(dtype)
    assert run(torch.bfloat16).dtype == dtype
    assert torch.equal(run(torch.bfloat16), run(torch.float64))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_steps_is_finite(name, spacing):
    scheduler = DDPMScheduler.from_config(config("v_prediction", spacing, num_train_timesteps=40))
    for steps in range(1, 39):
        assert sample(lambda x, t: x, normals(1, 1), scheduler, steps, name).isfinite().all()


def test_zero_terminal_snr_has_no_nan():
    scheduler = DDPMScheduler.from_config(ZERO_SNR)
    for name in set(SAMPLERS) - {"pndm"}:
        for steps in (1, 2, 10, 1000 if name == "ddim" else 50):
            assert sample(lambda x, t: torch.tanh(x), normals(1, 4), scheduler, steps, name).isfinite().all()


@pytest.mark.parametrize(("settings", "arguments", "message"), [
    ({}, {"sampler": "heun"}, "no sampler is named 'heun'; there are ddpm, ddim, pndm, euler, euler_a, dpmpp_2m"),
    ({}, {"sampler": "euler", "eta": 0.5}, "eta=0.5: ddim's"),
    ({}, {"sampler": "ddim", "eta": 2.0}, "eta=2.0: ddim's"),
    ({}, {"sampler": "ddpm", "generator": [generator(0)]}, "1 generators for a batch of 2"),
    ({}, {"steps": 0}, "0 steps"),
    ({}, {"steps": 1001}, "take 1 to 1000"),
    ({}, {"steps": 1000}, "steps_offset=1 leave timesteps 0 to 999"),
    ({"steps_offset": -1}, {}, "steps_offset=-1 leave timesteps 0 to 999"),
    (ZERO_SNR, {"sampler": "pndm"}, "pndm cannot start from zero terminal SNR"),
    (ZERO_SNR | {"prediction_type": "epsilon"}, {}, "at zero SNR an epsilon prediction"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(settings, arguments, message):
    scheduler = DDPMScheduler.from_config(config() | settings)
    with pytest.raises(ValueError, match=message):
        sample(lambda x, t: x, normals(2, 4), scheduler, **{"steps": 10, **arguments})


def test_generators_depend_on_every_part_of_their_key():
    keys = [(0,), (1,), (0, 1), (0, "1"), (0, 1, 2), (0, 12), (0, 2, 1), (0, "a", "b"), (0, "ab"), (0, "a/b"), (-1,)]
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)
    assert generator(0, "noise", 3).initial_seed() == 918245775  # the same in every process and version
    with pytest.raises(TypeError, match="0.5"):
        generator(0, 0.5)


def test_gaussian_draws_standard_normals_one_generator_a_sample():
    full = gaussian((2, 3, 5), generator(0))
    assert torch.equal(full, torch.randn(2, 3, 5, generator=generator(0)))
    assert torch.equal(gaussian((2, 3, 5), [generator(0, i) for i in range(2)])[1:], gaussian((1, 3, 5), generator(0, 1)))
    many = gaussian((100_000,), generator(0))
    assert math.isclose(many.mean(), 0, abs_tol=0.02)
    assert math.isclose(many.std(), 1, abs_tol=0.02)

"""The noise schedule: its laws, what a scheduler_config.json may say, and diffusers' numbers."""

import importlib.util
import inspect
import json

import pytest
import torch

from minibooth.diffusion.noise import gaussian, generator
from minibooth.diffusion.samplers import sample
from minibooth.diffusion.scheduler import BETAS, CLASSES, DEFAULTS, SPACINGS, DDPMScheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

# As published: SD 1, SD 2, XL and the x4 upscaler with the schedule of its low-resolution picture.
PUBLISHED = [
    """{"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012, "beta_start": 0.00085,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
    "steps_offset": 1, "trained_betas": null, "clip_sample": false}""",
    """{"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012, "beta_start": 0.00085,
    "beta_schedule": "scaled_linear", "clip_sample": false, "num_train_timesteps": 1000, "skip_prk_steps": true,
    "prediction_type": "v_prediction", "set_alpha_to_one": false, "steps_offset": 1, "trained_betas": null}""",
    """{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": false,
    "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": null,
    "use_karras_sigmas": false}""",
    """{"_class_name": "DDPMScheduler", "_diffusers_version": "0.10.0.dev0", "beta_end": 0.02, "beta_start": 0.0001,
    "beta_schedule": "scaled_linear", "clip_sample": true, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "trained_betas": null, "variance_type": "fixed_small"}""",
    """{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "dynamic_thresholding_ratio": 0.995, "solver_order": 2,
    "euler_at_final": false, "final_sigmas_type": "zero", "lambda_min_clipped": -Infinity, "lower_order_final": true,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": false,
    "skip_prk_steps": true, "solver_type": "midpoint", "steps_offset": 1, "thresholding": false, "variance_type": null,
    "timestep_spacing": "leading", "trained_betas": null, "use_karras_sigmas": false, "use_lu_lambdas": false}""",
]  # fmt: skip


def batch(dtype=torch.float32, size=6, seed=0):
    """x0 and noise [B, 4, 3, 2], and t [B] with both ends of the schedule among them."""
    random = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, size, 4, 3, 2, generator=random).to(dtype)
    return x0, noise, torch.cat([torch.tensor([0, 999]), torch.randint(1000, (size - 2,), generator=random)])


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_target_and_noisy_picture_give_the_picture_back(prediction, zero_snr):
    settings = SD | {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    scheduler = DDPMScheduler.from_config(settings)
    x0, noise, t = batch(torch.float64)
    a = scheduler.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
    x, target = scheduler.add_noise(x0, noise, t), scheduler.target(x0, noise, t)
    if prediction == "epsilon":
        assert torch.allclose(x - (1 - a).sqrt() * target, a.sqrt() * x0, atol=1e-6)
    else:
        assert torch.allclose(a.sqrt() * x - (1 - a).sqrt() * target, x0, atol=1e-6)
        assert torch.allclose(a.sqrt() * target + (1 - a).sqrt() * x, noise, atol=1e-6)


def test_noisy_pictures_keep_unit_variance():
    scheduler = DDPMScheduler.from_config(SD)
    x0, noise = torch.randn(2, 1000, 400, generator=torch.Generator().manual_seed(0))
    x = scheduler.add_noise(x0, noise, torch.arange(1000))
    assert abs(x.std() - 1) < 0.01  # 400,000 numbers: a standard error of 0.001


def test_snr_falls_from_clean_to_noise():
    t = torch.arange(1000)
    snr = DDPMScheduler.from_config(SD).snr(t)
    assert snr.shape == t.shape
    assert snr.dtype == torch.float32
    assert (snr.diff() < 0).all()
    assert snr[0] > 1000
    assert 0 < snr[-1] < 0.01


def test_zero_terminal_snr():
    scheduler = DDPMScheduler.from_config(SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    snr = scheduler.snr(torch.arange(1000))
    assert snr[-1] == 0
    assert snr.isfinite().all()
    assert (snr.diff() < 0).all()
    assert torch.isclose(snr[0], DDPMScheduler.from_config(SD).snr(torch.tensor([0]))[0], rtol=1e-4)
    x0, noise, _ = batch()
    last = torch.full((len(x0),), 999)
    assert torch.equal(scheduler.add_noise(x0, noise, last), noise)
    assert torch.equal(scheduler.target(x0, noise, last), -x0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_dtype_of_the_picture(dtype):
    scheduler = DDPMScheduler.from_config(SD)
    x0, noise, t = batch(dtype)
    exact = scheduler.add_noise(x0.double(), noise.double(), t)
    for result in (scheduler.add_noise(x0, noise, t), scheduler.velocity(x0, noise, t), scheduler.target(x0, noise, t)):
        assert result.dtype == dtype
    assert torch.allclose(scheduler.add_noise(x0, noise, t).double(), exact, atol=8 * torch.finfo(dtype).eps)


def test_a_time_may_be_a_number():
    scheduler, x = DDPMScheduler.from_config({}), torch.randn(1, 4, 2, 2)
    t = torch.tensor([7])
    for function in (scheduler.add_noise, scheduler.velocity):
        assert torch.equal(function(x, 2 * x, 7), function(x, 2 * x, t))
    assert scheduler.snr(7) == scheduler.snr(t)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tables_follow_the_input():
    scheduler = DDPMScheduler.from_config(SD)
    x0, noise, t = batch()
    here = scheduler.add_noise(x0, noise, t), scheduler.velocity(x0, noise, t), scheduler.snr(t)
    x0, noise = x0.cuda(), noise.cuda()
    for times in (t.cuda(), t):
        assert torch.allclose(scheduler.add_noise(x0, noise, times).cpu(), here[0], atol=1e-6)
        assert torch.allclose(scheduler.velocity(x0, noise, times).cpu(), here[1], atol=1e-6)
        assert torch.allclose(scheduler.snr(times).cpu(), here[2])


@pytest.mark.parametrize("text", PUBLISHED, ids=["sd1", "sd2", "xl", "x4", "dpm"])
def test_published_files_are_read_and_kept(text, diffusers):
    config = json.loads(text)
    scheduler = DDPMScheduler.from_config(config)
    assert scheduler.config == json.loads(text)
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    torch.testing.assert_close(scheduler.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6, atol=0)
    for key in ("prediction_type", "timestep_spacing", "steps_offset"):
        assert getattr(scheduler, key) == getattr(theirs.config, key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_changes_neither_schedule_nor_noise(dtype):
    def both():
        schedules = [DDPMScheduler({"beta_schedule": name, "rescale_betas_zero_snr": True}).alphas_cumprod for name in BETAS]
        noise = gaussian((2, 3), generator(0)), gaussian((2, 3), [generator(0), generator(1)])
        return *schedules, *noise, sample(lambda x, t: x * t[:, None] / 999, noise[0], DDPMScheduler(SD), 3, "euler")

    expected = both()
    torch.set_default_dtype(dtype)
    try:
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(both(), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_file_may_leave_everything_out():
    scheduler = DDPMScheduler.from_config({})
    assert scheduler.config == {}
    assert (scheduler.prediction_type, scheduler.clip, scheduler.final_alpha_cumprod) == ("epsilon", 1.0, 1.0)
    latent = DDPMScheduler.from_config({"_class_name": "PNDMScheduler"})
    assert (latent.clip, latent.final_alpha_cumprod) == (float("inf"), latent.alphas_cumprod[0].item())
    assert DDPMScheduler.from_config({"_class_name": "UniPCMultistepScheduler"}).timestep_spacing == "linspace"


@pytest.mark.parametrize(("settings", "message"), [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name='FlowMatchEulerDiscreteScheduler' is not"),
    ({"prediction_type": "sample"}, "prediction_type='sample' is not supported; supported: epsilon, v_prediction"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' is not supported; supported: linear, scaled_linear, squared"),
    ({"timestep_spacing": "log"}, "timestep_spacing='log' is not supported; supported: leading, trailing, linspace"),
    ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
    ({"thresholding": True}, "thresholding=True is not supported"),
    ({"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
    ({"sigma_max": 700.0}, "sigma_max=700.0"),
    ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
    ({"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
    ({"lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
    ({"never_heard_of": 1}, "never_heard_of=1"),
    ({"_class_name": 7}, "_class_name='7' is not supported"),
    ({"_class_name": None}, "_class_name='None' is not supported"),
    ({"beta_schedule": ["linear"]}, r"beta_schedule=\['linear'\] is not supported"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas, are not num_train_timesteps numbers"),
    ({"trained_betas": [[0.1], [0.2]], "num_train_timesteps": 2}, "are not num_train_timesteps numbers"),
    ({"num_train_timesteps": 0}, "are not num_train_timesteps numbers"),
    ({"beta_start": 0}, "between 0 and 1"),
    ({"beta_start": -0.1, "beta_schedule": "linear"}, "between 0 and 1"),
    ({"beta_end": 1.1}, "between 0 and 1"),
    ({"beta_end": 1.1, "rescale_betas_zero_snr": True}, "between 0 and 1"),
    ({"beta_end": float("nan")}, "between 0 and 1"),
    ({"beta_start": 1}, "leave something of a picture"),
    ({"beta_start": 0.5, "beta_end": 0.6}, "leave something of a picture"),  # less than a float can say
])  # fmt: skip
def test_what_would_change_results_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler.from_config(SD | settings)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_the_class(name, diffusers):
    scheduler = getattr(diffusers, f"{name}Scheduler")
    if lacking := [each for each in getattr(scheduler, "_backends", ()) if not importlib.util.find_spec(each)]:
        pytest.skip(f"diffusers has no {name}Scheduler where {lacking[0]} is not installed")  # a stand-in, without defaults
    parameters = inspect.signature(scheduler.__init__).parameters
    assert "num_train_timesteps" in parameters
    theirs = {key: value.default for key, value in parameters.items() if key in DEFAULTS}
    ours = DEFAULTS | CLASSES[name]
    for key, value in theirs.items():
        assert ours[key] == (DEFAULTS[key] if value is None else value), key
    if "clip_sample" not in theirs:
        assert not ours["clip_sample"]
    DDPMScheduler.from_config({key: value.default for key, value in parameters.items() if key not in ("self", "kwargs")})


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", BETAS)
def test_numbers_are_diffusers(schedule, prediction, zero_snr, diffusers):
    settings = SD | {"beta_schedule": schedule, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    ours, theirs = DDPMScheduler.from_config(settings), diffusers.DDPMScheduler.from_config(settings)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6, atol=1e-12)
    x0, noise, t = batch(size=64)
    torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=1e-6, atol=1e-6)


def test_trained_betas_are_diffusers(diffusers):
    settings = {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3}
    ours, theirs = DDPMScheduler.from_config(settings), diffusers.DDPMScheduler.from_config(settings)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_diffusers(spacing, diffusers):
    settings = SD | {"timestep_spacing": spacing, "steps_offset": 1}
    ours, theirs = DDPMScheduler.from_config(settings), diffusers.DDIMScheduler.from_config(settings)
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        # Where 1000 / steps rounds down, numpy's arange adds one timestep too many, -1; ours are as many as asked.
        extra = spacing == "trailing" and theirs.timesteps[-1] == -1
        assert torch.equal(ours.timesteps(steps), theirs.timesteps[:-1] if extra else theirs.timesteps)

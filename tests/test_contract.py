"""What other programs rely on: names, arguments, defaults and shapes that stay."""

import inspect

import pytest
import torch

import minibooth
from minibooth.diffusion.pipeline import Pipeline
from minibooth.diffusion.super_resolution import StableDiffusionUpscale
from minibooth.diffusion.text_to_image import StableDiffusion, StableDiffusionXL

ARGUMENTS = {
    minibooth.load: "source, dtype=torch.float32, device='cpu', variant=None, prediction_type=None",
    minibooth.sample: "predict, x, scheduler, steps, sampler='ddim', generator=None, eta=0.0",
    minibooth.dreambooth_loss: "prediction, target, timesteps, scheduler, prior_loss_weight=None, snr_gamma=None",
    minibooth.DDPMScheduler.from_config: "config",
    minibooth.DDPMScheduler.add_noise: "self, x0, noise, t",
    minibooth.DDPMScheduler.velocity: "self, x0, noise, t",
    StableDiffusion.generate: "self, prompts, negative_prompts=None, height=None, width=None, steps=50, guidance_scale=7.5, "
    "sampler=None, seed=None, latents=None",
    StableDiffusionUpscale.generate: "self, prompts, images, noise_level=20, negative_prompts=None, steps=75, "
    "guidance_scale=9.0, sampler=None, seed=None",
    Pipeline.load_lora: "self, path, weight=1.0",
    Pipeline.save: "self, path",
}


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__qualname__)
def test_arguments_and_their_defaults_stay(function):
    """Others may follow."""
    parameters = inspect.signature(function).parameters.values()
    found = [x.name if x.default is x.empty else f"{x.name}={x.default!r}" for x in parameters]
    wanted = ARGUMENTS[function].split(", ")
    assert found[: len(wanted)] == wanted


def test_the_samplers_that_no_argument_means():
    assert [each.sampler for each in (StableDiffusion, StableDiffusionXL, StableDiffusionUpscale)] == ["ddim", "euler", "ddim"]


@pytest.mark.parametrize("prior_loss_weight", [None, 1.0])
def test_the_loss_names_its_parts(prior_loss_weight):
    x, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    losses = minibooth.dreambooth_loss(x + 1, x, t, minibooth.DDPMScheduler.from_config({}), prior_loss_weight)
    prior = 0.0 if prior_loss_weight is None else 1.0
    assert losses == {"loss": 1.0 + prior, "subject": 1.0, "prior": prior}


@torch.no_grad()
def test_a_pipeline(sd1):
    pipe = minibooth.load(sd1)
    ids = pipe.tokenizer(["a photo of sks dog", "a cat"])
    assert ids.shape == (2, 77) and ids.dtype == torch.long
    context = pipe.encode_prompts(["a photo of sks dog", "a cat"])
    assert torch.equal(context, pipe.text_encoder(ids)) and context.shape[:2] == (2, 77)
    posterior = pipe.vae.encode(torch.zeros(2, 3, 64, 48))
    assert posterior.mean.shape == posterior.std.shape == posterior.sample(torch.Generator()).shape == (2, 4, 8, 6)
    assert pipe.vae.decode(posterior.mean).shape == (2, 3, 64, 48) and pipe.vae.scaling_factor == 0.18215
    assert pipe.unet(posterior.mean, torch.tensor([1, 999]), context).shape == (2, 4, 8, 6)
    t, x0, noise = torch.tensor([1, 999]), posterior.mean, torch.randn(2, 4, 8, 6)
    assert isinstance(pipe.scheduler, minibooth.DDPMScheduler) and pipe.scheduler.prediction_type == "epsilon"
    assert pipe.scheduler.add_noise(x0, noise, t).shape == pipe.scheduler.velocity(x0, noise, t).shape == x0.shape
    assert pipe.scheduler.snr(t).shape == (2,)
    (picture,) = pipe.generate(["a cat"], steps=1, latents=noise[:1])
    assert picture.size == (48, 64)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_a_string_is_one_prompt(model, request):
    pipe = minibooth.load(request.getfixturevalue(model))
    one, same = (pipe.encode_prompts(prompt) for prompt in ("a cat", ["a cat"]))
    assert isinstance(one, tuple) == (model == "sdxl")
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))

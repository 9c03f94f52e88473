"""What other programs rely on: names, arguments and shapes that stay."""

import inspect

import torch

import minibooth


def arguments(function) -> list[str]:
    return [*inspect.signature(function).parameters]


def test_the_front_door():
    assert arguments(minibooth.load)[:5] == ["source", "dtype", "device", "variant", "prediction_type"]
    assert arguments(minibooth.sample) == ["predict", "x", "scheduler", "steps", "sampler", "generator", "eta"]
    expected = ["prediction", "target", "timesteps", "scheduler", "prior_loss_weight", "snr_gamma"]
    assert arguments(minibooth.dreambooth_loss) == expected


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
    assert pipe.scheduler.prediction_type == "epsilon" and pipe.scheduler.snr(t).shape == (2,)
    assert pipe.scheduler.add_noise(x0, noise, t).shape == pipe.scheduler.velocity(x0, noise, t).shape == x0.shape
    expected = ["prompts", "negative_prompts", "height", "width", "steps", "guidance_scale", "sampler", "seed", "latents"]
    assert arguments(pipe.generate) == expected
    (picture,) = pipe.generate(["a cat"], steps=1, latents=noise[:1])
    assert picture.size == (48, 64)

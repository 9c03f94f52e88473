"""Pictures are those of diffusers' pipeline, and a seed means one picture whatever is drawn beside it."""

import json
import warnings

import numpy as np
import pytest
import torch
from comparing import difference, normals, pixels, reference
from conftest import edit_json, write_json

import minibooth
from minibooth.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
PROMPTS, NEGATIVES = ["a photo of sks dog", "a cat"], ["", "dog"]
SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # not PNDM's key, and True where it is missing
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),  # linspace, since the folders do not name a spacing
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}


def test_pictures_are_decoded_one_by_one(sd1, monkeypatch):
    """Several at once take more memory than the UNet."""
    pipe, seen = minibooth.load(sd1), []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda latents: seen.append(len(latents)) or decode(latents))
    assert len(pipe.generate(PROMPTS, steps=1, height=64, width=64)) == 2 and seen == [1, 1]


@pytest.fixture(scope="module")
def ours(checkpoint):
    return minibooth.load(checkpoint)


@pytest.fixture(scope="module")
def pipe(sd1):
    return minibooth.load(sd1)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return reference(checkpoint)


def as_diffusers(theirs, sampler, prompts, negatives, height, width, steps, guidance_scale, **start):
    import diffusers

    name, changes = SAMPLERS[sampler]
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config, **changes)
    options = dict(height=height, width=width, num_inference_steps=steps, guidance_scale=guidance_scale)
    return theirs(prompts, negative_prompt=negatives, **options, **start).images


# ---- the reference's pictures


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance, height, width", [(7.5, 64, 72), (1.5, 40, 40), (1.0, 48, 40)])
def test_pictures_from_the_same_noise_are_those_of_diffusers(ours, theirs, sampler, guidance, height, width):
    latents = normals(2, 4, height // 8, width // 8)
    drawn = ours.generate(PROMPTS, NEGATIVES, height, width, 4, guidance, sampler, latents=latents)
    expected = as_diffusers(theirs, sampler, PROMPTS, NEGATIVES, height, width, 4, guidance, latents=latents.clone())
    assert difference(drawn, expected) <= 2


def test_a_seed_means_what_it_means_in_diffusers(ours, theirs):
    generators = [torch.Generator().manual_seed(seed) for seed in (41, 42)]
    expected = as_diffusers(theirs, "ddim", PROMPTS, NEGATIVES, 64, 64, 2, 7.5, generator=generators)
    assert difference(ours.generate(PROMPTS, NEGATIVES, 64, 64, 2, seed=41), expected) <= 2


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
@pytest.mark.parametrize("said", [{}, {"clip_sample": True, "steps_offset": 0}], ids=["nothing", "what is wrong"])
def test_what_the_first_schedules_got_wrong_is_mended_as_diffusers_does(sd1, copy_of, sampler, said):
    folder = copy_of(sd1)
    path, name = folder / "scheduler" / "scheduler_config.json", SAMPLERS[sampler][0]
    kept = {key: x for key, x in json.loads(path.read_text()).items() if key not in ("clip_sample", "steps_offset")}
    write_json(path, kept | said | {"_class_name": name})
    edit_json(folder / "model_index.json", scheduler=["diffusers", name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that they are mended
        theirs = reference(folder)
    latents = normals(1, 4, 8, 8)
    drawn = minibooth.load(folder).generate("a cat", steps=4, sampler=sampler, latents=latents)
    assert difference(drawn, theirs("a cat", num_inference_steps=4, latents=latents.clone()).images) <= 2


# ---- laws


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "ddpm"])
def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(ours, sampler):
    prompts = [*PROMPTS, "sks"]
    together = ours.generate(prompts, height=64, width=64, steps=3, sampler=sampler, seed=7)
    alone = [
        ours.generate(prompt, height=64, width=64, steps=3, sampler=sampler, seed=7 + i)[0] for i, prompt in enumerate(prompts)
    ]
    assert difference(together, alone) <= 1
    assert difference(together[:1], together[1:2]) > 20


def test_the_size_is_the_models_own_unless_it_is_given(sd1, sd2, pipe, copy_of):
    assert pipe.generate("a dog", steps=1)[0].size == (64, 64)
    assert minibooth.load(sd2).generate("a dog", steps=1)[0].size == (96, 96)
    assert pipe.generate("a dog", height=32, width=48, steps=1)[0].size == (48, 32)
    assert pipe.generate("a dog", height=32, steps=1)[0].size == (64, 32)
    wide = copy_of(sd1)
    edit_json(wide / "unet" / "config.json", sample_size=[4, 6])
    assert minibooth.load(wide).generate("a dog", steps=1)[0].size == (48, 32)


@pytest.mark.parametrize("size", [{"height": 60}, {"width": 4}, {"height": 0}, {"width": -8}, {"height": 64.5}])
def test_a_size_that_cannot_be_drawn_is_refused(pipe, size):
    with pytest.raises(UserError, match="divisible by 8"):
        pipe.generate("a dog", steps=1, **size)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"negative_prompts": ["a"] * 3}, "3 negative prompts for 2 prompts"),
        ({"sampler": "plms"}, "plms"),
        ({"steps": 0}, "0 steps"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "do not fit 2 pictures of 4 channels"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, "do not fit 2 pictures of 4 channels"),
        ({"latents": torch.zeros(2, 4)}, "do not fit 2 pictures of 4 channels"),
        ({"latents": torch.zeros(2, 4, 8, 8, 1)}, "do not fit 2 pictures of 4 channels"),
        ({"prompts": []}, "0 pictures"),
        ({"seed": -1}, "from seed -1"),
        ({"seed": 2**64}, "0 to 2.64 - 1"),
        ({"seed": 2**64 - 1}, "2 pictures from seed 18446744073709551615"),  # of which the second has none
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"prompts": ["a \udcff", ""]}, "no valid text"),
    ],
)
def test_what_does_not_go_together_is_refused(pipe, options, reason):
    with pytest.raises(UserError, match=reason):
        pipe.generate(**({"prompts": PROMPTS, "steps": 1} | options))


def test_noise_of_any_precision_is_taken_away_in_fp32(pipe):
    noise = normals(1, 4, 8, 8).bfloat16()
    drawn = (pipe.generate("a dog", steps=4, latents=latents) for latents in (noise, noise.float()))
    assert difference(*drawn) == 0


def test_the_last_seed_there_is(pipe):
    assert len(pipe.generate(PROMPTS, steps=1, seed=2**64 - 2)) == 2


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_network_that_overflows_draws_no_black_pictures(sd1, value):
    broken = minibooth.load(sd1)
    broken.unet.conv_out.bias.data.fill_(value)
    with pytest.raises(UserError, match="not finite"):
        broken.generate("a dog", steps=2)


def test_only_guidance_heeds_the_negative_prompt(pipe):
    def draw(scale, negative):
        return pipe.generate("a dog", negative, steps=2, guidance_scale=scale, seed=0)

    assert difference(draw(1, "a cat"), draw(1, "photo")) == 0
    assert difference(draw(4, "a cat"), draw(4, "photo")) > 2
    assert difference(draw(4, None), draw(4, "")) == 0
    assert difference(draw(4, ""), draw(8, "")) > 2


@pytest.mark.parametrize("seed", [3, None])
def test_the_global_random_state_is_neither_used_nor_changed(pipe, seed):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = pipe.generate("a dog", steps=2, sampler="euler_a", seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    again = pipe.generate("a dog", steps=2, sampler="euler_a", seed=seed)
    assert (difference(first, again) == 0) == (seed is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_about_the_same_picture(ours, checkpoint, dtype):
    half = minibooth.load(checkpoint, dtype=dtype)
    drawn = [pipe.generate("a dog", height=64, width=64, steps=2, seed=0) for pipe in (ours, half)]
    assert np.abs(pixels(drawn[0]) - pixels(drawn[1])).mean() < (0.5 if dtype == torch.float16 else 4)

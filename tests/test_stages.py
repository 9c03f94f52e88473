"""Super-resolution trains by LatentUpscaleDiffusion's recipe on the pictures' own detail, in the same loop as text-to-image."""

import json

import diffusers
import numpy as np
import pytest
import torch
from comparing import differing, reference, weights
from PIL import Image
from small_run import flags, metrics, photographs, run, small, tiny, train, trainer, with_class

import minibooth
from minibooth.diffusion.images import to_tensor
from minibooth.dreambooth import stages
from minibooth.errors import UserError

pytestmark = pytest.mark.usefixtures("few_drawing_steps")


@pytest.fixture
def settings(x4, tmp_path):
    """settings(**changes): a run of the x4 upscaler on crops of 32 pixels."""
    return lambda **changes: small(tmp_path, x4, **(dict(resolution=32) | changes))


def test_the_checkpoint_says_which_step_it_is(settings, tmp_path):
    assert trainer(settings()).stage.name == "super_resolution"
    assert trainer(small(tmp_path)).stage.name == "text_to_image"
    with pytest.raises(UserError, match="--stage text_to_image"):
        trainer(settings(stage="text_to_image"))
    with pytest.raises(UserError, match="--stage super_resolution"):
        trainer(small(tmp_path, stage="super_resolution"))


def test_a_resolution_that_fits_neither_model_nor_photographs_is_noted(settings, tmp_path):
    """The small model is for 64 pixels, its photographs have 48 x 40."""
    for resolution, words in ((40, []), (64, ["smaller than --resolution 64"]), (32, ["is far from the 64 px"])):
        found = [*trainer(small(tmp_path, resolution=resolution)).stage.warnings()]
        assert len(found) == len(words) and all(said in line for said, line in zip(words, found, strict=True))
    assert not [*trainer(settings(resolution=16)).stage.warnings()]


@pytest.mark.parametrize("flip, filter", [(False, "lanczos"), (True, "nearest")])
def test_a_pair_is_a_crop_at_full_detail_and_the_same_shrunk(flip, filter, settings):
    job = trainer(settings(random_flip=flip, image_interpolation_mode=filter, crops_per_image=20))
    whole = [to_tensor(Image.open(path)) for path in job.sets[0].pictures]
    corners = set()
    for number in range(20):
        square, low = job.sets[0].load_crop(0, number)
        assert square.shape == (3, 32, 32) and low.shape == (1, 3, 8, 8)
        views = {
            (y, x, mirrored): (part.flip(2) if mirrored else part)
            for y in range(9) for x in range(17) for mirrored in (False, True)
            for part in [whole[0][:, y : y + 32, x : x + 32]]
        }  # fmt: skip
        (corner,) = (where for where, view in views.items() if torch.equal(view, square))
        corners.add(corner)
        levels = ((square + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        small_one = Image.fromarray(levels).resize((8, 8), Image.Resampling[filter.upper()])
        assert torch.equal(low[0], to_tensor(small_one))
    assert len(corners) > 10 and {mirrored for *_, mirrored in corners} == ({False, True} if flip else {False})


def test_levels_are_drawn_evenly_for_every_sample_and_0_is_nearly_clean(settings):
    job = trainer(settings(noise_levels=(3, 7)))
    low = torch.zeros(1, 3, 8, 8)
    levels = [int(job.stage.conditioning(low, torch.Generator().manual_seed(i))[1]) for i in range(500)]
    assert all(60 < levels.count(level) < 140 for level in range(3, 8)) and set(levels) == set(range(3, 8))
    noised, level = trainer(settings()).stage.conditioning(low, torch.Generator().manual_seed(0))
    assert level.tolist() == [0] and 0.005 < noised.std() < 0.015


@pytest.mark.parametrize("prior", [False, True])
def test_the_loss_is_that_of_the_published_recipe(prior, settings, x4, tmp_path):
    changes = with_class(tmp_path) | dict(class_prompt="a dog") if prior else {}
    job = trainer(settings(noise_levels=(0, 349), prior_loss_weight=0.7, **changes))
    job.prepare()
    theirs = reference(x4)
    betas = theirs.scheduler.config
    schedule = diffusers.DDPMScheduler.from_config(betas, prediction_type="v_prediction")
    samples = [job.sample(latents, n) for latents in job.sets for n in (2, 3)]
    x0, noise, t, low, level = (torch.cat(column) for column in zip(*samples, strict=True))
    assert len(level.unique()) > 1 and len(t.unique()) > 1
    ids = theirs.tokenizer(job.prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        context = theirs.text_encoder(ids)[0].repeat_interleave(2, dim=0)
        seen = torch.cat([schedule.add_noise(x0, noise, t), low], dim=1)
        answer = theirs.unet(seen, t, context, class_labels=level).sample
        errors = (answer - schedule.get_velocity(x0, noise, t)).square().mean(dim=(1, 2, 3))
        ours = job.losses(*job.batch(1))
    subject, prior_loss = errors[:2].mean(), errors[2:].mean() if prior else torch.tensor(0.0)
    assert ours["subject"].item() == pytest.approx(subject.item(), rel=1e-5)
    assert ours["loss"].item() == pytest.approx((subject + 0.7 * prior_loss).item(), rel=1e-5)


def test_the_small_picture_is_noised_by_its_own_schedule(settings, x4):
    job = trainer(settings(noise_levels=(200, 200)))
    low = torch.rand(1, 3, 8, 8) * 2 - 1
    noised, level = job.stage.conditioning(low, torch.Generator().manual_seed(5))
    theirs = diffusers.DDPMScheduler.from_pretrained(x4, subfolder="low_res_scheduler")
    share = theirs.alphas_cumprod[level]
    noise = (noised - share.sqrt() * low) / (1 - share).sqrt()
    rng = torch.Generator().manual_seed(5)
    torch.randint(200, 201, (1,), generator=rng)
    torch.testing.assert_close(noise, torch.randn(low.shape, generator=rng), rtol=1e-4, atol=1e-4)


def test_a_resumed_run_ends_in_the_same_bits(settings, tmp_path):
    how = dict(noise_levels=(0, 349), checkpointing_steps=3)
    whole = train(settings(output_dir=str(tmp_path / "whole"), **how))
    part = settings(output_dir=str(tmp_path / "part"), max_train_steps=3, **how)
    train(part)
    (tmp_path / "part" / "model_index.json").unlink()
    train(settings(output_dir=str(tmp_path / "part"), resume_from_checkpoint="latest", **how))
    assert not differing(weights(whole), weights(tmp_path / "part"))
    assert metrics(whole) == metrics(tmp_path / "part")


def test_grids_show_low_drawn_and_truth_before_and_after(settings, x4, tmp_path):
    """What is drawn takes the lowest of the levels."""
    how = dict(validation_prompt="a photo of sks dog", num_validation_images=2, validation_guidance_scale=5.0)
    folder = train(settings(noise_levels=(70, 90), **how))
    sheet, both = (Image.open(folder / "samples" / f"{name}.png") for name in ("step-0", "before-after"))
    assert sheet.size == (3 * 32 + 2 * 4, 2 * 32 + 4) and both.size == (2 * sheet.width + 4, sheet.height)
    middle = Image.open(photographs(tmp_path / "photographs") / "0.png").crop((8, 4, 40, 36))
    assert np.array_equal(np.asarray(sheet)[:32, 72:], np.asarray(middle))
    low, how = middle.resize((8, 8), Image.Resampling.LANCZOS), stages.VALIDATION
    (drawn,) = minibooth.load(x4).generate("a photo of sks dog", low, 70, guidance_scale=5.0, seed=7, **how)
    assert np.abs(np.asarray(sheet, int)[:32, 36:68] - np.asarray(drawn, int)).max() <= 1


def test_both_steps_in_one_command(x4, tmp_path, capsys):
    changes = dict(upscaler=str(x4), validation_prompt="a photo of sks dog | a dog", seed=None)
    words = flags(small(tmp_path, resolution=40, max_train_steps=2, **changes))
    assert run(words) == 0
    assert f"--upscaler {tmp_path / 'output' / 'upscaler'}" in capsys.readouterr().out
    for folder, before in ((tmp_path / "output", tiny()), (tmp_path / "output" / "upscaler", x4)):
        assert type(reference(folder)) is type(reference(before))
        assert {name.split("/")[0] for name in differing(weights(folder), weights(before))} == {"unet"}
        assert (folder / "samples" / "before-after.png").is_file()
    seeds = {json.loads((place / "run.json").read_text())["settings"]["seed"] for place in (folder, folder.parent)}
    assert len(seeds) == 1 and None not in seeds  # the command in run.json repeats both
    later = (folder / "run.json").read_text().replace(f'"seed": {seeds.pop()}', '"seed": 7')  # as earlier versions drew two
    (folder / "run.json").write_text(later)
    assert run([*words, "--resume_from_checkpoint=latest"]) == 0
    assert capsys.readouterr().out.count("nothing is left to do") == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(resolution=48), r"0\.png has 48 x 40 pixels.*48 x 48.*--resolution"),
        (dict(noise_levels=(7, 3)), "--noise_levels 7 3"),
        (dict(upscaler="x4"), "is an upscaler already: leave out --upscaler"),
        (dict(noise_levels=(0, 351)), "from 0 to 350"),
        (dict(with_prior_preservation=True, class_prompt="a dog", num_class_images=3), "put 3 more into --class_data_dir"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, says, settings):
    with pytest.raises(UserError, match=says):
        trainer(settings(**changes))


def test_an_upscaler_that_is_none_is_known_before_the_first_step(tmp_path, capsys):
    assert run(flags(small(tmp_path, upscaler=str(tiny())))) == 2
    assert "--stage super_resolution" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()

"""The embedded model truly draws: prompts show in its pictures, training teaches it the subject, saving keeps all of it."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import reference
from PIL import Image
from pretrain_clip import draw, family, triples
from pretrain_x4 import shrunk
from pretraining import psnr, to_batch
from small_run import metrics, run, train, trainer
from world import SUBJECTS, Scene

import minibooth
from minibooth import evaluate, generate
from minibooth.dreambooth import stages
from minibooth.dreambooth.metrics import Encoder, cosines
from minibooth.dreambooth.settings import Settings
from minibooth.train import EMBEDDED, WEIGHTS, parse

CLIP = WEIGHTS / "tiny-clip"


@pytest.fixture(scope="module")
def eyes():
    return Encoder(CLIP)


@pytest.fixture(scope="module")
def pipe():
    return minibooth.load(WEIGHTS / "tiny")


def levels(pictures) -> np.ndarray:
    """Mean colour of each picture, [B, 3]."""
    return np.stack([np.asarray(picture, float).mean((0, 1)) for picture in pictures])


def settings(folder: Path, **changes) -> Settings:
    """The default run, shortened."""
    short = dict(max_train_steps=30, num_class_images=4, validation_prompt=None, output_dir=str(folder))
    return Settings(**(EMBEDDED | short | changes))


def test_places_and_colours_of_the_prompt_show(pipe):
    def drawn(prompt):
        return levels(pipe.generate([prompt] * 4, steps=12, guidance_scale=4.0, seed=3))

    night, snow, desert = (drawn(f"a photo of a cat {place}") for place in ("at night", "in the snow", "in the desert"))
    assert night.mean(1).max() + 40 < snow.mean(1).min()
    assert (desert[:, 0] - desert[:, 2]).min() > 40 > (snow[:, 0] - snow[:, 2]).max()
    red, blue = (drawn(f"a photo of a {colour} house in a meadow") for colour in ("red", "blue"))
    assert red[:, 0].mean() > blue[:, 0].mean() + 5 and blue[:, 2].mean() > red[:, 2].mean() + 5


def test_diffusers_opens_it_and_draws_the_same(pipe):
    theirs = reference(WEIGHTS / "tiny")
    assert theirs.tokenizer.tokenize("a zwx robot") == ["a</w>", "zwx</w>", "robot</w>"]
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    prompts = ["a photo of a red robot on the beach", "a photo of a cup in a room"]
    expected = theirs(prompts, num_inference_steps=10, guidance_scale=4.0, generator=seeds).images
    got = pipe.generate(prompts, steps=10, guidance_scale=4.0, seed=5)
    for one, other in zip(got, expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 2


def test_training_lowers_the_loss_on_the_subject_and_what_was_saved_draws_the_same(tmp_path):
    def loss(job):
        with torch.no_grad():
            return np.mean([job.losses(*job.batch(batch))["subject"].item() for batch in range(1000, 1008)])

    how = dict(
        validation_prompt="a photo of a zwx robot", num_validation_images=1, validation_guidance_scale=3.0, crops_per_image=0
    )
    before = trainer(settings(tmp_path / "never", **how))
    before.prepare()
    job = trainer(settings(tmp_path / "run", **how))
    job.train()
    assert loss(job) < 0.95 * loss(before)
    drawing = dict(steps=25, sampler="dpmpp_2m", guidance_scale=3.0, height=64, width=64, seed=0)
    saved = minibooth.load(tmp_path / "run").generate("a photo of a zwx robot", **drawing)[0]
    kept = Image.open(tmp_path / "run" / "samples" / "step-30.png")
    difference = np.abs(np.asarray(kept, int) - np.asarray(saved, int))
    assert difference.mean() < 2  # files are in fp16


@pytest.mark.parametrize("rank", [0, 2])
def test_no_arguments_mean_the_embedded_run_and_what_it_says_at_the_end_draws(rank, tmp_path, capsys):
    """So does --rank, with what makes a LoRA learn here."""
    assert parse([]).pretrained_model_name_or_path == str(WEIGHTS / "tiny")
    output = tmp_path / "a run"
    short = ["--max_train_steps=2", "--num_class_images=2", "--num_validation_images=1", f"--output_dir={output}"]
    assert run(["--device=cpu", f"--rank={rank}", "--noise_levels", "3", "9", *short]) == 0
    for step in (output, output / "upscaler"):
        assert (step / "samples" / "before-after.png").is_file()
        assert (step / ("pytorch_lora_weights.safetensors" if rank else "model_index.json")).is_file()
        told = json.loads((step / "run.json").read_text())["settings"]
        assert told["instance_prompt"] == "a photo of a zwx robot" and told["with_prior_preservation"] == (step == output)
        assert (told["lora_targets"], told["learning_rate"] == 3e-3) == (("all", True) if rank else ("attention", False))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("draw with it:"))
    assert words[:3] == ["python", "-m", "minibooth.generate"]
    assert "--guidance_scale 4 --upscaler_guidance_scale 1 --noise_level 3" in " ".join(words)
    generate.main([*words[3:], "--steps=1", "--device=cpu", f"--output_dir={tmp_path / 'drawn'}"])
    with Image.open(tmp_path / "drawn" / "0000.png") as picture:
        assert picture.size == (256, 256)


def test_weights_stay_small():
    for folder, most in ((WEIGHTS, 40e6), (WEIGHTS / "tiny", 20e6), (WEIGHTS / "tiny-x4", 14e6), (CLIP, 4e6)):
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= most


# ---- the embedded upscaler


def test_the_upscaler_is_two_decibels_nearer_to_scenes_it_never_saw_than_bicubic_and_at_edges_nearer_still():
    scenes = [Scene.random(np.random.default_rng([34, i])) for i in range(3)]
    drawn = np.stack([scene.draw(256) for scene in scenes])
    low, truth = [Image.fromarray(each) for each in shrunk(drawn)], to_batch(drawn)
    how = dict(noise_level=0, steps=10, guidance_scale=1.0, seed=0)
    made = minibooth.load(WEIGHTS / "tiny-x4").generate([scene.caption() for scene in scenes], low, **how)
    bicubic = [each.resize((256, 256), Image.Resampling.BICUBIC) for each in low]
    ours, usual = (to_batch(np.stack([*map(np.asarray, pictures)])) for pictures in (made, bicubic))
    assert psnr(ours, truth) > psnr(usual, truth) + 2
    edges = [(x - truth).diff(dim=3).square().mean().sqrt() for x in (ours, usual)]
    assert edges[0] < 0.75 * edges[1]


def test_diffusers_opens_the_upscaler_and_draws_the_same():
    theirs = reference(WEIGHTS / "tiny-x4")
    low = Image.fromarray(Scene.random(np.random.default_rng(35)).draw(64))
    how = dict(num_inference_steps=4, guidance_scale=3.0, noise_level=10, generator=torch.Generator().manual_seed(6))
    expected = theirs("a photo of a robot", low, **how).images[0]
    got = minibooth.load(WEIGHTS / "tiny-x4").generate("a photo of a robot", low, 10, steps=4, guidance_scale=3.0, seed=6)[0]
    assert np.abs(np.asarray(got, int) - np.asarray(expected, int)).max() <= 2


# ---- the embedded eye


def test_the_eye_is_trained_on_other_characters_each_twice_in_the_same_two_places():
    theirs = {part for mark in SUBJECTS.values() for part in (mark.badge, mark.odd)}
    for scenes in map(family, range(40)):
        assert not any(scene.marks or (mark and {mark.badge, mark.odd} & theirs) for scene, mark in scenes)
        assert len({(scene.kind, scene.place) for scene, _ in scenes}) == 2
        for (one, mark), (other, same) in zip(scenes[::2], scenes[1::2], strict=True):
            assert mark is same and (one.colour, one.pattern) == (other.colour, other.pattern) and one.place != other.place


def test_the_eye_knows_subjects_it_never_saw(eyes):
    anchor, same, there, here = (eyes.images(draw(column)) for column in zip(*triples(25), strict=True))
    near, far, close = (torch.cosine_similarity(anchor, each) for each in (same, there, here))
    assert (near > far).float().mean() >= 0.95 and (near > close).float().mean() >= 0.9


def test_the_eye_knows_captions_from_shuffled_ones(eyes):
    scenes = [Scene.random(np.random.default_rng([33, i])) for i in range(100)]
    fit = cosines(eyes.images(draw(scenes)), eyes.texts([scene.caption() for scene in scenes]))
    assert (fit.diagonal()[:, None] >= fit).float().mean() >= 0.97


def test_transformers_opens_the_eye_and_sees_the_same(eyes):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.CLIPModel.from_pretrained(
        CLIP, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values())
    words, see = transformers.CLIPTokenizer.from_pretrained(CLIP), transformers.CLIPImageProcessorPil.from_pretrained(CLIP)
    prompts, pictures = ["a photo of a zwx robot", "a red cup on the moon"], draw(triples(1)[0])
    with torch.no_grad():
        ids = words(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        texts = model.get_text_features(ids).pooler_output
        images = model.get_image_features(see(pictures, return_tensors="pt")["pixel_values"]).pooler_output
    assert torch.allclose(eyes.texts(prompts), texts, atol=1e-5) and torch.allclose(eyes.images(pictures), images, atol=1e-5)


def test_the_embedded_run_is_watched_and_its_model_is_evaluated_without_another_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(stages.VALIDATION, "steps", 2)
    watched = dict(validation_prompt="a photo of a zwx robot", num_validation_images=2, with_prior_preservation=False)
    model = train(settings(tmp_path / "run", max_train_steps=1, **watched))
    seen = [line for line in metrics(model) if "loss" not in line]
    assert [line.keys() for line in seen] == [{"step", "subject_similarity", "class_drift", "class_diversity"}] * 2
    few = ["--steps", "1", "--num_images", "1", "--num_class_images", "1", "--device", "cpu"]
    evaluate.main(["--model", str(model), "--output_dir", str(tmp_path / "out"), *few])
    results = json.loads((tmp_path / "out" / "robot" / "results.json").read_text())
    assert results["figures"].keys() == {"CLIP-I", "CLIP-T", "PRES"} and len(results["prompts"]) == 25
    assert "paper" not in capsys.readouterr().out

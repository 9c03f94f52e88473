"""Stable Diffusion XL: diffusers' numbers and pictures, what it is told of sizes, and DreamBooth on it."""

import json

import numpy as np
import pytest
import torch
from comparing import difference, differing, error, gradients, normals, pixels, reference, weights, worst_error
from conftest import edit_json, write_json
from PIL import Image
from safetensors.torch import load_file, save_file
from single_files import file
from small_run import metrics, small, train, trainer, with_class

import minibooth
from minibooth import generate

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers"),
    pytest.mark.usefixtures("few_drawing_steps"),
]
PROMPTS, NEGATIVES = ["a photo of sks dog", "a cat! " * 40], ["", "dog"]
TEXTS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def ours(sdxl):
    return minibooth.load(sdxl)


@pytest.fixture(scope="module")
def theirs(sdxl):
    return reference(sdxl, add_watermarker=False)


@pytest.fixture
def condition(ours):
    """Context, pooled and sizes of two prompts; the sizes of two crops."""
    context, pooled, _ = ours.encode_prompts(PROMPTS)
    return context.detach(), pooled.detach(), torch.tensor([[96, 96, 0, 0, 96, 96], [3000, 2000, 7, 311, 64, 96]])


# ---- the reference's numbers


@torch.no_grad()
def test_prompts_are_encoded_as_diffusers_does(ours, theirs):
    expected = theirs.encode_prompt(PROMPTS, negative_prompt=NEGATIVES, device="cpu")
    context, pooled, _ = ours.encode_prompts(PROMPTS)
    negative_context, negative_pooled, _ = ours.unconditional(NEGATIVES)
    for mine, wanted in zip((context, negative_context, pooled, negative_pooled), expected, strict=True):
        assert error(mine, wanted) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("end", [2, 5])
def test_what_is_pooled_is_at_the_end_token(sdxl, copy_of, end):
    """Its first, as the folder numbers it; where that is 2, the largest, as transformers has it of old files."""
    folder = copy_of(sdxl)
    edit_json(folder / "text_encoder_2" / "config.json", eos_token_id=end)
    theirs = pytest.importorskip("transformers").CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    ids = torch.tensor([[9, 30, 5, 7, 5, 40, 3], [9, 5, 60, 7, 2, 2, 2]])
    assert error(minibooth.load(folder).text_encoder_2.states_and_pooled(ids)[1], theirs(ids).text_embeds) <= 1e-5


@torch.no_grad()
def test_without_a_negative_prompt_guidance_leads_away_from_zeros(ours, theirs):
    _, context, _, pooled = theirs.encode_prompt(PROMPTS[:1], device="cpu")
    mine = ours.unconditional(None)
    assert torch.equal(mine[0], context) and torch.equal(mine[1], pooled)
    assert not context.any() and not pooled.any()


@torch.no_grad()
def test_no_zeros_where_the_folder_says_so_and_only_there(sdxl, copy_of):
    folder = copy_of(sdxl)
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    pipe = minibooth.load(folder)
    mine, encoded = pipe.unconditional(None), pipe.encode_prompts([""])
    assert all(torch.equal(a, b) for a, b in zip(mine, encoded, strict=True))
    index = json.loads((sdxl / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    write_json(folder / "model_index.json", index)
    assert not any(x.any() for x in minibooth.load(folder).unconditional(None)[:2])


@pytest.mark.parametrize("height, width", [(8, 8), (12, 20)])
def test_unet_gives_the_numbers_of_diffusers(ours, theirs, condition, height, width):
    x, t = normals(2, 4, height, width), torch.tensor([999, 17])
    context, pooled, sizes = condition
    with torch.no_grad():
        expected = theirs.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
        assert error(ours.unet(x, t, *condition), expected) <= 1e-5


def test_unet_gradients_are_those_of_diffusers(ours, theirs, condition):
    x, t, target = normals(2, 4, 8, 12), torch.tensor([3, 801]), normals(2, 4, 8, 12, seed=1)
    context, pooled, sizes = condition
    added = {"text_embeds": pooled, "time_ids": sizes}
    mine = gradients(ours.unet, ours.unet(x, t, *condition), target)
    output = theirs.unet(x, t, context, added_cond_kwargs=added).sample
    worst = worst_error(mine, gradients(theirs.unet, output, target))
    assert worst[0] <= 1e-4, worst


@torch.no_grad()
def test_vae_gives_the_numbers_of_diffusers(ours, theirs):
    images = normals(2, 3, 64, 96).tanh()
    assert error(ours.vae.encode(images).mean, theirs.vae.encode(images).latent_dist.mean) <= 1e-5
    assert error(ours.vae.decode(normals(1, 4, 8, 8)), theirs.vae.decode(normals(1, 4, 8, 8)).sample) <= 1e-5
    assert ours.vae.scaling_factor == 0.13025


# ---- the reference's pictures


@pytest.mark.parametrize("negatives", [None, "", NEGATIVES], ids=["none", "empty", "given"])
@pytest.mark.parametrize("guidance, height, width", [(5.0, 96, 96), (5.0, 64, 72), (1.0, 48, 40)])
def test_pictures_are_those_of_diffusers(ours, theirs, negatives, guidance, height, width):
    latents = normals(2, 4, height // 8, width // 8)
    drawn = ours.generate(PROMPTS, negatives, height, width, 4, guidance, latents=latents)
    theirs_negatives = [negatives] * 2 if isinstance(negatives, str) else negatives
    options = dict(height=height, width=width, num_inference_steps=4, guidance_scale=guidance, latents=latents.clone())
    assert difference(drawn, theirs(PROMPTS, negative_prompt=theirs_negatives, **options).images) <= 2


def test_euler_is_the_default_and_a_seed_means_what_it_means_in_diffusers(ours, theirs):
    generators = [torch.Generator().manual_seed(seed) for seed in (41, 42)]
    options = dict(height=64, width=64, num_inference_steps=3, guidance_scale=7.5, generator=generators)
    drawn = ours.generate(PROMPTS, height=64, width=64, steps=3, seed=41)
    assert difference(drawn, theirs(PROMPTS, **options).images) <= 2
    assert difference(drawn, ours.generate(PROMPTS, height=64, width=64, steps=3, seed=41, sampler="euler")) == 0
    assert difference(drawn, ours.generate(PROMPTS, height=64, width=64, steps=3, seed=41, sampler="ddim")) > 2


def test_the_command_draws_with_euler_too_and_away_from_zeros(ours, sdxl, tmp_path):
    words = ["--model", str(sdxl), "--prompt", "a dog", "--steps", "2", "--seed", "3", "--output_dir", str(tmp_path)]
    generate.main([*words, "--device=cpu", "--guidance_scale=5"])
    with Image.open(tmp_path / "0000.png") as picture:
        assert picture.info["sampler"] == "euler"
        away = [ours.generate("a dog", negative, steps=2, guidance_scale=5, seed=3) for negative in (None, "")]
        assert difference([picture], away[0]) == 0 < difference([picture], away[1])


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["context", "pooled", "sizes"])
def test_the_unet_heeds_all_it_is_told(ours, condition, changed):
    others = [ours.encode_prompts(["a cat", "dog"])[0], ours.encode_prompts(["a cat", "dog"])[1], condition[2] + 200]
    mixed = [others[i] if i == changed else each for i, each in enumerate(condition)]
    with torch.no_grad():
        before, after = (ours.unet(normals(2, 4, 8, 8), 500, *told) for told in (condition, mixed))
    assert (after - before).std() > 0.02 * before.std()


# ---- training


@pytest.mark.parametrize("texts", [False, True], ids=["unet", "text encoders too"])
def test_dreambooth_trains_what_it_should_and_resumes_in_the_same_bits(texts, sdxl, tmp_path):
    changes = dict(max_train_steps=4, checkpointing_steps=2, train_text_encoder=texts, validation_prompt="a sks dog")
    changes |= dict(validation_steps=2, num_validation_images=1) | with_class(tmp_path)
    output = train(small(tmp_path, sdxl, **changes))
    before, after = weights(sdxl), weights(output)
    assert {name.split("/")[0] for name in differing(after, before)} == {"unet", *(TEXTS if texts else ())}
    assert all(np.isfinite(line["loss"]) for line in metrics(output))
    resumed = small(tmp_path, sdxl, **changes, output_dir=str(tmp_path / "resumed"))
    (tmp_path / "resumed").mkdir()
    (output / "checkpoint-2").rename(tmp_path / "resumed" / "checkpoint-2")
    resumed.resume_from_checkpoint = "latest"
    assert not differing(weights(train(resumed)), after)


def test_in_fp16_a_vae_that_overflows_stays_in_fp32(sdxl, copy_of, tmp_path):
    """XL's does, between its weights; force_upcast says so."""
    model = copy_of(sdxl)
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    loud = {f"{half}.mid_block.resnets.0.conv2.weight": 2e5 for half in ("encoder", "decoder")}
    tensors = {name: (x * loud.get(name, 1)).clamp(-6e4, 6e4) for name, x in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    run = trainer(small(tmp_path, model, max_train_steps=1, validation_prompt="a dog", num_validation_images=1), torch.float16)
    run.train()
    assert {p.dtype for p in run.pipe.vae.parameters()} == {torch.float32}
    assert np.isfinite(metrics(tmp_path / "output")[0]["loss"])
    assert not minibooth.load(model, dtype=torch.float16).vae.half().decode(torch.zeros(1, 4, 8, 8).half()).isfinite().all()


def test_in_fp16_the_vae_is_what_its_configuration_says(sdxl, copy_of):
    folder = copy_of(sdxl)
    for overflows, dtype in ((True, torch.float32), (False, torch.float16)):
        edit_json(folder / "vae" / "config.json", force_upcast=overflows)
        pipe = minibooth.load(folder, dtype=torch.float16)
        assert {x.dtype for x in pipe.vae.parameters()} == {dtype}
        assert pipe.dtype == torch.float16


def test_recomputing_block_by_block_changes_no_bit(sdxl, tmp_path):
    """Each block of a deep transformer computes as it passes, when its transformer's turn comes, and at its own."""
    left = []
    for times, recompute in ((1, False), (3, True)):
        run = trainer(small(tmp_path, sdxl, gradient_checkpointing=recompute, output_dir=str(tmp_path / str(times))))
        run.prepare()
        (deep, *_), calls = (part for part in run.pipe.unet.modules() if len(getattr(part, "transformer_blocks", ())) > 1), []
        deep.transformer_blocks[0].attn1.register_forward_hook(lambda *given, calls=calls: calls.append(given))
        run.set_learning_rates(0)
        run.step(0)
        assert len(calls) == times
        left.append(run.pipe.unet.state_dict())
    assert not differing(*left)


@pytest.mark.parametrize("center", [False, True])
def test_each_picture_is_told_its_own_sizes_and_crop(center, sdxl, tmp_path):
    run = trainer(small(tmp_path, sdxl, center_crop=center))  # photographs of 48 x 40, crops of 64
    run.prepare()
    seen = torch.cat([run.sample(run.sets[0], n)[3] for n in range(12)])
    assert {tuple(row) for row in seen[:, [0, 1]].tolist()} == {(40, 48)}
    assert {tuple(row) for row in seen[:, [4, 5]].tolist()} == {(64, 64)}
    top, left = seen[:, 2], seen[:, 3]
    assert not top.any()
    assert set(left.tolist()) == {6} if center else len(set(left.tolist())) > 2 and left.max() <= 76 - 64

    told = []
    forward = run.pipe.unet.forward
    run.pipe.unet.forward = lambda *inputs: told.append(inputs[-1]) or forward(*inputs)
    run.losses(*run.batch(0))
    assert torch.equal(told[0], seen[:2])


def test_the_loss_is_that_of_diffusers_unet_told_the_same(sdxl, theirs, tmp_path):
    run = trainer(small(tmp_path, sdxl))
    run.prepare()
    x0, noise, t, sizes = (torch.cat(column) for column in zip(*(run.sample(run.sets[0], n) for n in range(2)), strict=True))
    with torch.no_grad():
        context, _, pooled, _ = theirs.encode_prompt(["a photo of sks dog"] * 2, device="cpu")
        added = {"text_embeds": pooled, "time_ids": sizes}
        prediction = theirs.unet(run.pipe.scheduler.add_noise(x0, noise, t), t, context, added_cond_kwargs=added).sample
    expected = (prediction - noise).square().mean().item()
    assert run.losses(*run.batch(0))["loss"].item() == pytest.approx(expected, rel=1e-5)


# ---- single files, in and out


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_training_goes_from_a_single_file_to_a_single_file(kind, tmp_path):
    output = train(small(tmp_path, file(kind), output_format="single", max_train_steps=2))
    before, after = load_file(file(kind)), load_file(output / "output.safetensors")
    assert {name: x.shape for name, x in after.items()} == {name: x.shape for name, x in before.items()}
    assert {name.split(".")[0] for name in differing(after, before)} == {"model"}
    assert not (output / "model_index.json").exists()
    drawn = minibooth.load(output / "output.safetensors").generate("a dog", height=64, width=64, steps=1, seed=0)
    assert pixels(drawn).std() > 10

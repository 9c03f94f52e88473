"""The x4-upscaler: diffusers' numbers and pictures, tiles without seams, and `python -m minibooth.upscale`."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import difference, error, gradients, normals, pixels, reference, worst_error
from conftest import edit_json
from PIL import Image
from safetensors.torch import load_file, save_file

import minibooth
from minibooth import command, generate, upscale
from minibooth.diffusion import super_resolution
from minibooth.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")
PROMPTS, NEGATIVES = ["a photo of sks dog", "a cat"], ["", "dog"]


def picture(width, height, seed=0):
    """Smooth patches of colour, with some grain."""
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(patches) * 0.9 + rng.integers(0, 25, (height, width, 3))).astype(np.uint8))


@pytest.fixture(scope="module")
def ours(x4):
    return minibooth.load(x4)


@pytest.fixture(scope="module")
def theirs(x4):
    return reference(x4)


# ---- the reference's numbers


@torch.no_grad()
def test_prompts_are_encoded_as_diffusers_does(ours, theirs):
    expected = theirs.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=NEGATIVES)
    for mine, wanted in zip((PROMPTS, NEGATIVES), expected, strict=True):
        assert error(ours.encode_prompts(mine), wanted) <= 1e-5


@pytest.mark.parametrize("height, width", [(8, 8), (12, 20), (7, 13)])
def test_unet_and_its_gradients_are_those_of_diffusers(ours, theirs, height, width):
    x, t, level = normals(2, 7, height, width), torch.tensor([999, 17]), torch.tensor([20, 349])
    context, target = normals(2, 77, 32, seed=1), normals(2, 4, height, width, seed=2)
    mine, output = ours.unet(x, t, context, level), theirs.unet(x, t, context, class_labels=level).sample
    assert error(mine, output) <= 1e-5
    worst = worst_error(gradients(ours.unet, mine, target), gradients(theirs.unet, output, target))
    assert worst[0] <= 1e-4, worst


@torch.no_grad()
def test_vae_gives_the_numbers_of_diffusers(ours, theirs):
    images = normals(2, 3, 32, 48).tanh()
    assert error(ours.vae.encode(images).mean, theirs.vae.encode(images).latent_dist.mean) <= 1e-5
    assert error(ours.vae.decode(normals(1, 4, 8, 8)), theirs.vae.decode(normals(1, 4, 8, 8)).sample) <= 1e-5
    assert (ours.vae.scaling_factor, ours.factor) == (0.08333, 4)


def test_pictures_are_noised_as_diffusers_does(ours, theirs):
    low, noise, level = normals(3, 3, 8, 8), normals(3, 3, 8, 8, seed=1), torch.tensor([0, 20, 350])
    expected = theirs.low_res_scheduler.add_noise(low, noise, level)
    assert error(ours.low_res_scheduler.add_noise(low, noise, level), expected) <= 1e-6
    variance = 1 - ours.low_res_scheduler.alphas_cumprod[[0, 8, 20]]
    assert variance.tolist() == pytest.approx([1e-4, 1e-3, 2.7e-3], rel=0.1)


@torch.no_grad()
def test_the_level_tells_the_unet_something(ours):
    x, context = normals(2, 7, 8, 8), normals(2, 77, 32, seed=1)
    both = ours.unet(x, 500, context, torch.tensor([20, 200]))
    assert torch.allclose(both[:1], ours.unet(x[:1], 500, context[:1], 20), atol=1e-5)
    assert (both[1:] - ours.unet(x[1:], 500, context[1:], 20)).std() > 0.02 * both.std()


# ---- the reference's pictures


@pytest.mark.parametrize(
    "guidance, level, size", [(9.0, 20, (16, 16)), (4.0, 0, (20, 12)), (1.5, 20, (8, 8)), (1.0, 350, (8, 24))]
)
@pytest.mark.parametrize("negatives", [None, NEGATIVES], ids=["none", "given"])
def test_a_seed_means_what_it_means_in_diffusers(ours, theirs, negatives, guidance, level, size):
    images = [picture(*size, seed=seed) for seed in range(2)]
    drawn = ours.generate(PROMPTS, images, level, negatives, steps=3, guidance_scale=guidance, seed=41)
    generators = [torch.Generator().manual_seed(seed) for seed in (41, 42)]
    options = dict(noise_level=level, num_inference_steps=3, guidance_scale=guidance, generator=generators)
    assert difference(drawn, theirs(PROMPTS, images, negative_prompt=negatives, **options).images) <= 2


def test_pictures_of_any_size_and_one_prompt_for_all(ours):
    images = [picture(17, 9), picture(5, 30, seed=1), picture(1, 1)]
    drawn = ours.generate("a cat", images, steps=2, seed=3)
    assert [each.size for each in drawn] == [(68, 36), (20, 120), (4, 4)]
    (alone,) = ours.generate("a cat", images[1], steps=2, seed=4)
    assert difference([alone], drawn[1:2]) <= 1
    (other,) = ours.generate("a dog", images[1], steps=2, seed=4)
    assert difference([alone], [other]) > 2


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (dict(prompts=["a", "b", "c"]), "3 prompts for 2 pictures"),
        (dict(negative_prompts=["a", "b", "c"]), "3 prompts for 2 pictures"),
        (dict(noise_level=351), "noise_level=351 is not within 0 and 350"),
        (dict(noise_level=-1), "noise_level=-1"),
        (dict(tile=7), "tile=7 is too small"),
        (dict(images=[]), "0 pictures"),
        (dict(seed=-1), "from seed -1"),
        (dict(seed=2**64 - 1), "2 pictures from seed 18446744073709551615"),
        (dict(guidance_scale=float("nan")), "guidance_scale=nan"),
    ],
)
def test_what_does_not_fit_is_named(ours, arguments, reason):
    with pytest.raises(UserError, match=reason):
        ours.generate(**({"prompts": "a dog", "images": [picture(8, 8)] * 2, "steps": 1} | arguments))


def test_a_picture_of_any_mode_is_what_it_shows(ours):
    """Over white, and in 16 bits not clipped to 8: as the command takes it."""
    grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    levels = Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    shown = [levels, Image.new("RGB", (16, 16), "white")]
    drawn = ours.generate("a dog", [Image.fromarray(grey), clear], steps=1, seed=0)
    assert difference(drawn, ours.generate("a dog", shown, steps=1, seed=0)) == 0


# ---- tiles


@pytest.mark.parametrize("length, tile", [(1, 8), (8, 8), (9, 8), (45, 16), (64, 16), (100, 17), (513, 256)])
@pytest.mark.parametrize("factor", [1, 4])
def test_the_weights_of_tiles_sum_to_one(length, tile, factor):
    total, end = torch.zeros(factor * length), 0
    for start, shares in super_resolution.spans(length, tile, factor):
        assert end == 0 or end - start >= min(tile, length) // 4 - 1  # tiles overlap
        total[factor * start : factor * start + len(shares)] += shares
        end = start + len(shares) // factor
    assert end == length
    assert torch.allclose(total, torch.ones(factor * length))


def test_one_tile_changes_nothing_and_what_is_linear_has_no_seams():
    x = normals(2, 3, 30, 41)
    double = torch.nn.Upsample(scale_factor=2)
    assert torch.equal(super_resolution.tiled(lambda part: part.exp(), x, 41), x.exp())
    assert torch.allclose(super_resolution.tiled(double, x, 16, 2), double(x), atol=1e-6)


def test_a_tile_as_large_as_the_picture_is_the_whole(ours):
    image = picture(24, 20)
    whole, tiled = (ours.generate("a dog", image, steps=2, seed=0, tile=tile)[0] for tile in (256, 24))
    assert difference([whole], [tiled]) == 0


def test_tiles_that_disagree_fade_into_each_other():
    side, tile, factor = 100, 32, 4
    answers = itertools.cycle([0.0, 1.0])

    def disagree(part):
        return torch.full((1, 1, factor * tile, factor * tile), next(answers))

    whole = super_resolution.tiled(disagree, normals(1, 3, side, side), tile, factor)
    assert whole.min() < 0.001 and whole.max() > 0.999
    for axis in (2, 3):
        assert whole.diff(dim=axis).abs().max() <= 8 / (factor * tile)  # twice the slope of a straight line over a quarter


def test_seams_do_not_show(ours):
    """Between neighbours where a tile starts or ends, the picture changes no more than elsewhere."""
    side, tile = 80, 32
    (drawn,) = ours.generate("a dog", picture(side, side), steps=4, seed=0, tile=tile)
    starts = [start for start, _ in super_resolution.spans(side, tile, 1)]
    edges = [4 * edge - 1 for edge in starts[1:] + [start + tile for start in starts[:-1]]]
    for axis in (1, 2):
        change = np.abs(np.diff(pixels([drawn]), axis=axis)).mean(axis=(0, 3 - axis, 3))
        assert len(change) == 4 * side - 1 and change[edges].max() <= np.percentile(change, 99)


def test_tiling_changes_little(ours):
    """The same noise, so that in a wide picture most of a tile hardly knows of the tiling."""
    image = picture(64, 16)
    whole, tiled = (pixels(ours.generate("a dog", image, steps=4, seed=0, tile=tile)) for tile in (64, 48))
    (other,) = ours.generate("a dog", image, steps=4, seed=1, tile=64)
    assert np.abs(whole - tiled).mean() < 0.5 * np.abs(whole - pixels([other])).mean()


MEASURE = """
import sys
import numpy as np, torch
from PIL import Image
import minibooth

torch.set_num_threads(1)
pipe = minibooth.load(sys.argv[1])
status = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
for side in map(int, sys.argv[2:]):
    pipe.generate("a dog", Image.new("RGB", (side, side)), steps=2, seed=0, tile=64)
    print(status())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_a_tile_and_of_the_picture(x4):
    """Beyond what a picture of one tile took, a larger one takes three float32 copies of the result, and no more."""
    sides = [64, 128]
    command = [sys.executable, "-c", MEASURE, str(x4), *map(str, sides)]
    peaks = [*map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())]
    for side, peak in zip(sides, peaks, strict=True):
        assert peak - peaks[0] <= 3 * 3 * 4 * (4 * side) ** 2 / 1024 + 8000  # KiB


# ---- what is refused


def test_a_model_for_the_other_task_is_refused_by_every_command(sd1, x4, tmp_path, mistake):
    picture(8, 8).save(tmp_path / "a.png")
    common = ["--device=cpu", "--output_dir", tmp_path / "out", "--prompt", "a dog"]
    for module, argv, use, refused in (
        (generate, ["--model", x4], "minibooth.upscale", x4),
        (generate, ["--model", sd1, "--upscaler", sd1], "minibooth.generate", sd1),
        (upscale, ["--model", sd1, "--images", tmp_path / "a.png"], "minibooth.generate", sd1),
    ):
        line = mistake(module, *argv, *common)
        assert f"{refused} is a " in line and "is needed: name another" in line and use in line
    assert not (tmp_path / "out" / "0000.png").exists()


def without_levels(folder):
    edit_json(folder / "unet" / "config.json", num_class_embeds=None)
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    del tensors["class_embedding.weight"]
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "edit, reason",
    [
        (without_levels, "no x4-upscaler: its UNet knows no noise level"),
        (lambda folder: shutil.rmtree(folder / "low_res_scheduler"), "low_res_scheduler/scheduler_config.json is missing"),
    ],
)
def test_what_lacks_a_part_is_named(x4, copy_of, edit, reason):
    edit(folder := copy_of(x4))
    with pytest.raises(UserError, match=reason):
        minibooth.load(folder)


def test_what_an_old_folder_does_not_say_is_the_published_models(x4, copy_of):
    folder = copy_of(x4)
    for name, key in (("vae/config.json", "scaling_factor"), ("model_index.json", "max_noise_level")):
        config = json.loads((folder / name).read_text())
        del config[key]
        (folder / name).write_text(json.dumps(config))
    pipe = minibooth.load(folder)
    assert (pipe.vae.scaling_factor, pipe.max_noise_level) == (0.08333, 350)


def test_half_precision_leaves_the_vae_whole(x4):
    pipe = minibooth.load(x4, torch.float16)
    assert (pipe.unet.conv_in.weight.dtype, pipe.vae.post_quant_conv.weight.dtype) == (torch.float16, torch.float32)
    (drawn,) = minibooth.load(x4, torch.bfloat16).generate("a dog", picture(8, 8), steps=2, seed=0)
    assert drawn.size == (32, 32)


# ---- the commands


@pytest.fixture
def enlarge(x4, tmp_path):
    """enlarge(flag, ...): runs the command and returns the names of all files in its folder."""

    def run(*argv):
        flags = ["--model", str(x4), "--output_dir", str(tmp_path / "out"), "--steps", "1", "--device=cpu"]
        upscale.main([*flags, *map(str, argv)])
        return sorted(path.name for path in (tmp_path / "out").iterdir())

    return run


def text(path):
    with Image.open(path) as opened:
        return opened.size, dict(opened.text)


def test_files_and_folders_are_enlarged_and_nothing_is_overwritten(enlarge, tmp_path):
    (tmp_path / "some").mkdir()
    for i, (name, size) in enumerate({"some/b.png": (9, 7), "some/a (1.png": (8, 8), "c.jpg": (6, 10)}.items()):
        picture(*size, seed=i).save(tmp_path / name)
    (tmp_path / "some" / "notes.txt").write_text("no picture")
    names = enlarge("--images", tmp_path / "c.jpg", tmp_path / "some", "--prompt", "a dog", "a cat", "a bird", "--seed", 5)
    assert names == ["a (1-0000.png", "b-0000.png", "c-0000.png"]
    before = (tmp_path / "out" / "c-0000.png").read_bytes()
    assert enlarge("--images", tmp_path / "c.jpg") == ["a (1-0000.png", "b-0000.png", "c-0000.png", "c-0001.png"]
    assert (tmp_path / "out" / "c-0000.png").read_bytes() == before
    size, said = text(tmp_path / "out" / "b-0000.png")
    assert size == (36, 28)
    assert (said["prompt"], said["seed"], said["noise_level"]) == ("a bird", "7", "20")
    assert said.pop("parameters").endswith(f"Size: 36x28, Model: {Path(said['model']).name}")
    assert said.pop("software") == "minibooth"
    enlarge(*(word for key, value in said.items() for word in (f"--{key}", value)))  # what it says draws it again
    with Image.open(tmp_path / "out" / "b-0000.png") as a, Image.open(tmp_path / "out" / "b-0001.png") as b:
        assert difference([a], [b]) <= 1


def test_a_name_that_is_no_utf8_is_a_name(x4, tmp_path, capsys):
    picture(8, 8).save(tmp_path / "a\udcff.png")
    words = ["--model", x4, "--images", tmp_path / "a\udcff.png", "--output_dir", tmp_path, "--steps", 1]
    with pytest.raises(SystemExit, match="0"):
        command.run(upscale.main, ["upscale.py", *map(str, words)])
    assert "a\\udcff.png" in text(tmp_path / "a\udcff-0000.png")[1]["images"]
    assert "a\\udcff-0000.png" in capsys.readouterr().out


def test_generate_draws_and_enlarges_in_one_go(sd1, x4, tmp_path):
    words = ["--model", sd1, "--upscaler", x4, "--prompt", "a dog", "a cat", "--steps", 2, "--seed", 7, "--device=cpu"]
    words += ["--noise_level", 5, "--upscaler_guidance_scale", 3, "--batch_size", 1, "--negative_prompt", "a dog"]
    generate.main([*map(str, words), "--output_dir", str(tmp_path)])
    size, said = text(tmp_path / "0001.png")
    assert size == (256, 256)
    assert (said["upscaler"], said["width"], said["prompt"], said["seed"]) == (str(x4), "64", "a cat", "8")
    assert (said["noise_level"], said["upscaler_guidance_scale"]) == ("5", "3.0")
    drawn = minibooth.load(sd1).generate("a cat", "a dog", steps=2, seed=8)
    expected = minibooth.load(x4).generate("a cat", drawn, 5, "a dog", steps=2, guidance_scale=3.0, seed=8)
    with Image.open(tmp_path / "0001.png") as opened:
        assert np.abs(pixels([opened]) - pixels(expected)).mean() < 1


BROKEN = {
    "missing": (["--images", "no.png"], "cannot read picture no.png"),
    "broken": (["--images", "broken.png"], "broken.png"),
    "empty": (["--images", "empty"], "no picture in empty"),
    "prompts": (["--images", "a.png", "--prompt", "a", "b"], "--prompt has 2 for 1 pictures"),
    "level": (["--images", "a.png", "--noise_level", "900"], "--noise_level: 900 is not within 0 and 350"),
    "tile": (["--images", "a.png", "--tile", "0"], "--tile: 0 is not within 8 and"),
    "no images": ([], "--images"),
    "an empty name": (["--images", ""], "--images: name a file or a folder, not ''"),
}


@pytest.mark.parametrize("argv, reason", BROKEN.values(), ids=BROKEN)
def test_a_mistake_ends_with_one_line_and_status_2(x4, tmp_path, monkeypatch, mistake, argv, reason):
    monkeypatch.chdir(tmp_path)
    picture(8, 8).save("a.png")
    Path("broken.png").write_bytes(Path("a.png").read_bytes()[:90])
    Path("empty").mkdir()
    assert reason in mistake(upscale, "--model", x4, "--device=cpu", "--steps", "1", *argv)
    assert not [*tmp_path.glob("pictures/*")]

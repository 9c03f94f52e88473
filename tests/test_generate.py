"""`python -m minibooth.generate` leaves pictures that say how to draw them again; its mistakes take one line."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparing import noise
from PIL import Image
from small_run import photographs

from minibooth import command, drawing, evaluate, generate, upscale
from minibooth.diffusion.samplers import SAMPLERS
from minibooth.diffusion.text_to_image import StableDiffusion


@pytest.fixture
def draw(sd1, tmp_path, capsys):
    """draw(flag, ...): runs the command on a small model and returns the names of all files in its folder."""

    def run(*argv):
        before = {*tmp_path.glob("out/*")}
        generate.main(["--model", str(sd1), "--output_dir", str(tmp_path / "out"), "--steps", "1", *argv])
        files = sorted((tmp_path / "out").iterdir())
        assert capsys.readouterr().out.split() == [str(path) for path in files if path not in before]
        return [path.name for path in files]

    return run


def text(path):
    with Image.open(path) as picture:
        return dict(picture.text)


def same(left, right):
    with Image.open(left) as a, Image.open(right) as b:
        return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


# ---- pictures


def test_pictures_are_numbered_after_those_that_are_there(draw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0002.png").write_bytes(b"not ours")
    assert draw("--prompt", "a dog", "--num_images", "2") == ["0002.png", "0003.png", "0004.png", "grid-0000.png"]
    names = draw("--prompt", "a dog")
    assert names == ["0002.png", "0003.png", "0004.png", "0005.png", "grid-0000.png", "grid-0001.png"]
    assert (tmp_path / "out" / "0002.png").read_bytes() == b"not ours"


def test_a_picture_says_what_it_takes_to_draw_it_again(draw, sd1, tmp_path):
    flags = [
        "--negative-prompt",
        "a cat",
        "--height",
        "32",
        "--width",
        "48",
        "--sampler",
        "euler_a",
        "--guidance-scale=3",
    ]
    draw("--prompt", "sks-dog ü 狗", "a cat", "--num-images", "2", "--seed", "5", "--batch_size", "3", *flags)
    said = text(tmp_path / "out" / "0003.png")
    assert said.pop("parameters").split("\n") == [
        "a cat",
        "Negative prompt: a cat",
        f"Steps: 1, Sampler: Euler a, CFG scale: 3.0, Seed: 8, Size: 48x32, Model: {sd1.name}",
    ]
    assert said.pop("software") == "minibooth"
    assert text(tmp_path / "out" / "0001.png")["prompt"] == "sks-dog ü 狗"
    draw(*(word for key, value in said.items() for word in (f"--{key}", value)))
    assert same(tmp_path / "out" / "0003.png", tmp_path / "out" / "0004.png")
    assert not same(tmp_path / "out" / "0002.png", tmp_path / "out" / "0003.png")
    assert drawing.A1111.keys() == SAMPLERS.keys()


@pytest.mark.parametrize("prompts, count, cells", [(["a"], 1, (1, 1)), (["a"], 4, (2, 2)), (["a", "b", "c"], 2, (2, 3))])
def test_the_grid_has_a_row_for_each_prompt(draw, tmp_path, prompts, count, cells):
    names = draw("--prompt", *prompts, "--num_images", str(count), "--height", "16", "--width", "24")
    assert len(names) == len(prompts) * count + 1
    with Image.open(tmp_path / "out" / "grid-0000.png") as grid:
        assert (grid.width // 24, grid.height // 16) == cells
    said = text(tmp_path / "out" / "grid-0000.png")
    assert said["prompt"] == "\n".join(prompts) and said["parameters"].startswith(said["prompt"] + "\nSteps: 1, ")


def test_without_a_seed_each_run_draws_something_else(draw, tmp_path):
    draw("--prompt", "a dog")
    draw("--prompt", "a dog")
    assert text(tmp_path / "out" / "0000.png")["seed"] != text(tmp_path / "out" / "0001.png")["seed"]
    draw("--prompt", "a dog", "--seed", "0")
    assert text(tmp_path / "out" / "0002.png")["seed"] == "0"


def test_who_draws_into_a_folder_at_the_same_time_takes_another_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "numbered", lambda *given: [])  # nobody sees the others
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda picture: drawing.save(picture, tmp_path, "", {}), pictures))
    names = [f"{i:04d}.png" for i in range(24)]
    assert sorted(path.name for path in tmp_path.glob("*")) == names
    assert sorted(Image.open(tmp_path / name).getpixel((0, 0))[0] for name in names) == [*range(24)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_picture_that_cannot_be_written_leaves_no_empty_one(tmp_path, monkeypatch, error):
    def fail(picture, path, metadata):
        raise error

    monkeypatch.setattr(drawing, "save_png", fail)
    with pytest.raises(type(error)):
        drawing.save(Image.new("RGB", (8, 8)), tmp_path, "", {})
    assert not list(tmp_path.iterdir())


# ---- mistakes

MISTAKES = {
    "model": (["--model", "/nowhere/at/all", "--prompt", "a"], "/nowhere/at/all is missing"),
    "prompt": ([], "--prompt"),
    "unknown flag": (["--prompt", "a", "--promt", "b"], "--promt"),
    "abbreviation": (["--prompt", "a", "--num", "2"], "--num"),
    "number": (["--prompt", "a", "--steps", "many"], "many"),
    "sampler": (["--prompt", "a", "--sampler", "plms"], "plms"),
    "device": (["--prompt", "a", "--device", "tpu"], "--device tpu is not there"),
    "images": (["--prompt", "a", "--num_images", "0"], "--num_images"),
    "size": (["--prompt", "a", "--height", "60"], "divisible by 8"),
    "steps": (["--prompt", "a", "--steps", "0"], "--steps: 0 is not within 1 and 100000"),
    "no height": (["--prompt", "a", "--height", "0"], "--height: 0 is not within"),
    "no width": (["--prompt", "a", "--width", "0"], "--width: 0 is not within"),
    "more images than ever": (["--prompt", "a", "--num_images", "1" + 20 * "0"], "--num_images: 1"),
    "seed": (["--prompt", "a", "--seed", "1" + 20 * "0"], "--seed: 1"),
    "no number": (["--prompt", "a", "--guidance_scale", "nan"], "--guidance_scale: nan is not within"),
    "infinite": (["--prompt", "a", "--lora", "x", "--lora_weight", "1", "inf"], "--lora_weight: inf is not within"),
    "noise level": (["--prompt", "a", "--upscaler", "x", "--noise_level", "900"], "--noise_level: 900 is not within 0 and 350"),
    "no folder": (["--prompt", "a", "--output_dir", ""], "--output_dir: name a file or a folder, not ''"),
    "variant": (["--prompt", "a", "--variant", "fp16"], "fp16.safetensors is missing"),
}


@pytest.mark.parametrize("argv, reason", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_with_one_line_and_status_2(sd1, tmp_path, mistake, argv, reason):
    assert reason in mistake(generate, "--model", sd1, "--output_dir", tmp_path, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [generate, upscale, evaluate], ids=lambda module: module.__name__)
@pytest.mark.parametrize("output", ["file", "file/x", "loop", "x" * 300, "/proc"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(module, output, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(drawing, "load", None)
    photographs(tmp_path / "spot")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    own = ["--prompt", "a"] if module is generate else ["--images", tmp_path / "spot"]
    line = mistake(module, *own, "--output_dir", tmp_path / output)
    assert f"{tmp_path / output} is no folder that can be written" in line
    assert (tmp_path / "file").read_text() == "precious"


def test_without_the_embedded_model_its_place_is_named(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(drawing, "WEIGHTS", tmp_path / "weights")
    noise(8, 8).save(tmp_path / "a.png")
    for module, words, model in ((generate, ["--prompt", "a"], "tiny"), (upscale, ["--images", tmp_path / "a.png"], "tiny-x4")):
        line = mistake(module, *words, "--output_dir", tmp_path)
        assert f"the embedded model is not in {tmp_path / 'weights' / model}; name another with --model" in line


# ---- the model and the prompt


@pytest.mark.parametrize("device, words, dtype", [
    ("cuda", [], torch.float16), ("cpu", [], torch.float32), ("cuda", ["--dtype", "bf16"], torch.bfloat16),
])  # fmt: skip
def test_a_model_is_read_as_the_flags_say_and_on_a_gpu_in_half_precision(tmp_path, monkeypatch, device, words, dtype):
    monkeypatch.setattr(command, "device", lambda name: torch.device(device))
    monkeypatch.setattr(drawing, "load", lambda *given, **how: SimpleNamespace(given=given, how=how, networks={}, sampler=""))
    said = {"tokenizer": "t", "prediction_type": "v_prediction", "revision": "r"}
    words = [*words, "--prompt", "a", "--model", "x", "--output_dir", str(tmp_path), "--variant", "ema"]
    flags = generate.parser().parse_args(words + [word for name, value in said.items() for word in (f"--{name}", value)])
    pipe = drawing.open_model(flags, StableDiffusion)
    assert pipe.given == ("x", dtype, torch.device(device), "ema") and pipe.how == said | {"wanted": StableDiffusion}


def test_what_of_a_prompt_is_not_read_is_said(sd1, tmp_path, capsys):
    words = ["--model", str(sd1), "--steps", "1", "--height", "64", "--width", "64", "--output_dir", str(tmp_path)]
    generate.main([*words, "--prompt", "dog " * 75 + "A cat", "dog " * 75])
    lines = [line for line in capsys.readouterr().out.splitlines() if "too long" in line]
    assert lines == ["a prompt is too long: 'A cat' is not read"]

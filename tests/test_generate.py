"""`python -m minibooth.generate` leaves pictures that say how to draw them again; its mistakes take one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minibooth import __main__, command, drawing, generate
from minibooth.errors import UserError


@pytest.fixture
def draw(sd1, tmp_path, capsys):
    """draw(flag, ...): runs the command on a small model and returns the names of all files in its folder."""

    def run(*argv):
        generate.main(["--model", str(sd1), "--output_dir", str(tmp_path / "out"), "--steps", "1", *argv])
        files = sorted((tmp_path / "out").iterdir())
        printed = capsys.readouterr().out.split()
        assert set(printed) <= {str(path) for path in files}
        return [path.name for path in files]

    return run


def failure(argv, capsys):
    """Status and what is printed, of a run that goes wrong."""
    with pytest.raises(SystemExit) as end:
        command.run(generate.main, ["somewhere/generate.py", *argv])
    return end.value.code, capsys.readouterr().err


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


@pytest.mark.parametrize("prompts, count, cells", [(["a"], 1, (1, 1)), (["a"], 4, (2, 2)), (["a", "b", "c"], 2, (2, 3))])
def test_the_grid_has_a_row_for_each_prompt(draw, tmp_path, prompts, count, cells):
    names = draw("--prompt", *prompts, "--num_images", str(count), "--height", "16", "--width", "24")
    assert len(names) == len(prompts) * count + 1
    with Image.open(tmp_path / "out" / "grid-0000.png") as grid:
        assert (grid.width // 24, grid.height // 16) == cells
    assert text(tmp_path / "out" / "grid-0000.png")["prompt"] == "\n".join(prompts)


def test_without_a_seed_each_run_draws_something_else(draw, tmp_path):
    draw("--prompt", "a dog")
    draw("--prompt", "a dog")
    assert text(tmp_path / "out" / "0000.png")["seed"] != text(tmp_path / "out" / "0001.png")["seed"]


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
    "steps": (["--prompt", "a", "--steps", "0"], "0 steps"),
    "variant": (["--prompt", "a", "--variant", "fp16"], "fp16.safetensors is missing"),
}


@pytest.mark.parametrize("argv, reason", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_with_one_line_and_status_2(sd1, tmp_path, capsys, argv, reason):
    status, printed = failure(["--model", str(sd1), "--output_dir", str(tmp_path), *argv], capsys)
    assert status == 2
    assert printed.startswith("minibooth.generate: error: ") and reason in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_the_embedded_model_its_place_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "WEIGHTS", tmp_path / "weights")
    status, printed = failure(["--prompt", "a"], capsys)
    assert status == 2 and str(tmp_path / "weights" / "tiny") in printed and "--model" in printed


# ---- what all commands share


def test_a_run_ends_as_a_process_should(capsys):
    def raising(error):
        def main(argv):
            raise error

        return main

    ends = [
        (UserError("a\nb"), 2, "a b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "full", "x"), 2, "full: x"),
    ]
    for error, status, line in ends:
        with pytest.raises(SystemExit) as end:
            command.run(raising(error), ["/a/train.py"])
        assert end.value.code == status
        printed = capsys.readouterr().err
        assert printed.startswith("minibooth.train: ") and printed.endswith(f"{line}\n") and printed.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        command.run(raising(ZeroDivisionError()), ["/a/train.py"])
    with pytest.raises(SystemExit) as end:
        command.run(lambda argv: None, ["/a/train.py"])
    assert not end.value.code


def test_flags_are_alike_in_either_spelling_and_values_stay():
    argv = ["--num-images", "4", "--a-b=c-d=e-f", "-x-y", "a-b", "--num_images=a_b", "--", "--"]
    expected = ["--num_images", "4", "--a_b=c-d=e-f", "-x-y", "a-b", "--num_images=a_b", "--", "--"]
    assert command.normalise(argv) == expected


@pytest.mark.parametrize("cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_taken_unless_one_is_named(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert command.device() == torch.device(best)
    assert command.device("cpu") == torch.device("cpu")
    if not cuda:
        with pytest.raises(UserError, match=f"cuda:0 is not there; .*{best}"):
            command.device("cuda:0")


def test_the_package_lists_its_commands(capsys):
    __main__.main()
    listed = capsys.readouterr().out
    modules = [path for path in Path(__main__.__file__).parent.glob("[!_]*.py") if "\ndef main(" in path.read_text()]
    assert {path.stem for path in modules} == {*__main__.COMMANDS}
    for path in modules:
        line = path.read_text().splitlines()[0].strip('"')
        assert f"python -m minibooth.{path.stem}" in listed and line in listed

"""Class pictures are drawn once, for just what they depend on, and never in place of others."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import changed, photographs, small, tiny, train

import minibooth
from minibooth.checkpoint.source import Source
from minibooth.dreambooth import prior
from minibooth.dreambooth.prior import ClassPictures
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError

pytestmark = pytest.mark.usefixtures("few_drawing_steps")


@pytest.fixture
def preserving(tmp_path):
    """preserving(**changes): settings with six class pictures in `tmp_path`/class."""
    usual = dict(
        with_prior_preservation=True, class_prompt="a photo of dog", num_class_images=6,
        class_data_dir=str(tmp_path / "class"),
    )  # fmt: skip
    return lambda model=None, **changes: small(tmp_path, model, **usual | changes)


def plan(settings: Settings, dtype: torch.dtype = torch.float32) -> ClassPictures:
    return ClassPictures(settings, Source.open(settings.pretrained_model_name_or_path), dtype)


def draw(settings: Settings, dtype: torch.dtype = torch.float32) -> ClassPictures:
    planned = plan(settings, dtype)
    if planned.missing:
        planned.draw(minibooth.load(settings.pretrained_model_name_or_path, dtype))
    return planned


def states(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder: when it was written, and what."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_they_are_what_the_frozen_model_draws_for_the_prompt(preserving):
    pictures = draw(preserving()).pictures
    assert [path.name for path in pictures] == [f"{i:05d}.png" for i in range(6)]
    expected = minibooth.load(tiny()).generate(["a photo of dog"] * 6, seed=0, height=64, width=64, **prior.DRAWING)
    for i, path in enumerate(pictures):
        image = Image.open(path)
        assert image.text == {"prompt": "a photo of dog", "seed": str(i)}
        assert difference(image, expected[i]) <= 1


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest, in levels of 255."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def test_guidance_is_a_setting(preserving):
    drawn = [Image.open(draw(preserving(num_class_images=1, class_guidance_scale=scale)).pictures[0]) for scale in (7.5, 1.0)]
    assert difference(*drawn) > 1


def test_the_manifest_says_what_they_depend_on(preserving):
    planned = draw(preserving())
    manifest = json.loads((planned.folder / "manifest.json").read_text())
    weights = manifest.pop("weights")
    assert len(weights) == 16 and int(weights, 16)
    schedule = json.loads((tiny() / "scheduler" / "scheduler_config.json").read_text())
    assert manifest == {
        "prompt": "a photo of dog", "resolution": 64, "scheduler": schedule, "dtype": "torch.float32",
        "sampler": "dpmpp_2m", "steps": 2, "guidance_scale": 7.5, "seed": "the picture's number",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"sample_batch_size": 5}, {"seed": 99}, {"num_class_images": 4}, {"learning_rate": 1.0}]
)
def test_a_second_run_reuses_them_untouched(changes, preserving, tmp_path):
    first = draw(preserving())
    before = states(tmp_path / "class")
    second = draw(preserving(**changes))
    assert second.missing == {} and second.pictures == first.pictures[: len(second.pictures)]
    assert states(tmp_path / "class") == before


def test_more_of_them_are_added(preserving, tmp_path):
    draw(preserving(num_class_images=2))
    before = states(tmp_path / "class")
    assert list(plan(preserving()).missing) == [2, 3, 4, 5]
    after = states(draw(preserving()).folder.parent)
    assert len(after) == 7
    assert {name: after[name] for name in before if name.endswith("png")} == {n: before[n] for n in before if n.endswith("png")}


def test_an_interrupted_run_continues(preserving, tmp_path, monkeypatch, capsys):
    """Ctrl-C while the fourth is saved; what is there then are whole pictures, and they stay, silently."""
    whole = draw(preserving(class_data_dir=str(tmp_path / "whole")))
    save_png, saved = prior.save_png, []

    def interrupted(*args):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(args)
        save_png(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prior, "save_png", interrupted)
        draw(preserving())
    (tmp_path / "class" / "drawn-before").mkdir()
    before = states(tmp_path / "class")
    assert len([name for name in before if name.endswith(".png")]) == 3
    again = draw(preserving())
    assert list(again.missing) == [3, 4, 5] and capsys.readouterr().out == ""
    after = states(tmp_path / "class")
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))
    assert same_pictures(again, whole)


def same_pictures(one: ClassPictures, other: ClassPictures) -> bool:
    """To the last level or the one beside it, since batches differ."""
    assert len(one.pictures) == len(other.pictures)
    return all(difference(Image.open(a), Image.open(b)) <= 1 for a, b in zip(one.pictures, other.pictures, strict=True))


def test_deleted_ones_are_drawn_again(preserving):
    whole = draw(preserving())
    before = states(whole.folder)
    for number in (1, 4):
        whole.pictures[number].unlink()
    again = draw(preserving())
    assert list(again.missing) == [1, 4]
    after = states(again.folder)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name][0] != before[name][0]} == {"00001.png", "00004.png", "manifest.json"}


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_no_picture_depends_on_how_many_are_drawn_at_a_time(size, preserving, tmp_path):
    four = draw(preserving())
    assert same_pictures(draw(preserving(sample_batch_size=size, class_data_dir=str(tmp_path / "other"))), four)


CHANGES = {
    "prompt": lambda copy_of: {"class_prompt": "a photo of cat"},
    "weights": lambda copy_of: {"model": changed(copy_of(tiny()), "unet")},
    "resolution": lambda copy_of: {"resolution": 32},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_drawn_for_something_else_is_not_reused(name, preserving, tmp_path, copy_of, capsys):
    first = draw(preserving())
    before = states(tmp_path / "class")
    assert capsys.readouterr().out == ""
    changed = preserving(**CHANGES[name](copy_of))
    second = draw(changed)
    said = capsys.readouterr().out
    assert first.folder.name in said and "drawing anew" in said and said.count("\n") == 1
    assert len(second.missing) == 6 and not set(second.pictures) & set(first.pictures)
    assert second.pictures[0].read_bytes() != first.pictures[0].read_bytes()
    after = states(tmp_path / "class")
    assert {key: after[key] for key in before} == before
    assert draw(preserving()).missing == {} == draw(changed).missing
    assert capsys.readouterr().out == ""


def test_another_precision_draws_anew(preserving):
    first = draw(preserving(num_class_images=1))
    assert plan(preserving(num_class_images=1), torch.bfloat16).folder != first.folder


def test_a_copy_of_the_model_elsewhere_is_the_same_model(preserving, copy_of):
    draw(preserving())
    assert plan(preserving(model=copy_of(tiny()))).missing == {}


def test_the_users_own_are_used_as_they_are_and_topped_up(preserving, tmp_path):
    own = photographs(tmp_path / "class", count=4)
    before = states(own)
    planned = draw(preserving())
    assert planned.pictures[:4] == sorted(own.glob("*.png"))
    assert [path.name for path in planned.pictures[4:]] == ["00000.png", "00001.png"]
    after = states(own)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("count", [6, 8])
def test_enough_of_the_users_own_leave_nothing_to_draw(count, preserving, tmp_path):
    """Of more than are asked for the first are taken, as by train_dreambooth.py."""
    own = photographs(tmp_path / "class", count=count)
    before = states(own)
    planned = draw(preserving())
    assert planned.missing == {} and planned.pictures == sorted(own.iterdir())[:6]
    assert states(own) == before


@pytest.mark.parametrize("own", [0, 2])
def test_stray_files_do_not_count(own, preserving, tmp_path):
    folder = photographs(tmp_path / "class", count=own)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "notes.txt").write_text("six dogs")
    (folder / "sub").mkdir()
    planned = plan(preserving())
    assert len(planned.missing) == 6 - own and len(planned.pictures) == 6


def test_a_broken_one_is_named(preserving, tmp_path):
    folder = photographs(tmp_path / "class", count=2)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(UserError, match="broken.jpg"):
        plan(preserving())


def test_they_lie_beside_the_result_where_no_folder_is_given(preserving, tmp_path):
    planned = plan(preserving(class_data_dir=None))
    assert planned.folder.parent == tmp_path / "output" / "class"
    assert not (tmp_path / "output").exists()  # planning writes nothing


def test_two_runs_share_what_was_drawn(preserving, tmp_path):
    """From the trainer's side: drawn before the first step, found again by another run."""
    outputs = [train(preserving(output_dir=str(tmp_path / name), max_train_steps=1)) for name in ("one", "two")]
    assert len(states(tmp_path / "class")) == 7
    assert [os.path.exists(output / "class") for output in outputs] == [False, False]
    assert outputs[0].joinpath("unet").is_dir()

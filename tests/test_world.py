"""The toy world: a scene is a picture and a caption that agree, and no random one shows what a subject alone has."""

from dataclasses import replace

import numpy as np
import pytest
from world import ATTRIBUTES, PHOTOGRAPHED, PLACES, SUBJECTS, Scene, draw_all, subject_scene, write_subjects


def scenes(count: int, **fixed: object) -> list[Scene]:
    return [Scene.random(np.random.default_rng([9, i]), **fixed) for i in range(count)]


def test_a_scene_is_always_the_same_picture_at_any_size():
    for scene in scenes(4):
        small, large = scene.draw(64), scene.draw(256)
        assert np.array_equal(small, scene.draw(64))
        shrunk = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(shrunk - small).mean() < 6  # of 255: the same scene, but for how edges are averaged


@pytest.mark.parametrize("name", ["kind", "pattern", "place"])
def test_every_value_looks_different(name):
    scene = Scene("robot", "red", "plain", "none", "beach", seed=1)
    drawn = [replace(scene, **{name: value}).draw(64).astype(float) for value in ATTRIBUTES[name]]
    assert min(np.abs(a - b).mean() for i, a in enumerate(drawn) for b in drawn[:i]) > 0.5


def test_the_full_caption_names_everything_and_others_leave_words_out():
    scene = Scene("robot", "red", "striped", "crown", "snow")
    assert scene.caption() == "a photo of a red striped robot wearing a crown in the snow"
    others = {scene.caption(np.random.default_rng(i)) for i in range(300)}
    assert {"a photo of a robot", "a picture of a red striped robot wearing a crown in the snow"} <= others
    for word in ("red", "striped", "crown", "snow"):
        assert 0.55 < np.mean([word in scene.caption(np.random.default_rng(i)) for i in range(300)]) < 0.8


def test_random_scenes_have_every_value_and_bear_no_marks():
    drawn = scenes(2000)
    assert all({getattr(scene, name) for scene in drawn} == set(table) for name, table in ATTRIBUTES.items())
    assert not any(scene.marks for scene in drawn)


@pytest.mark.parametrize("name", SUBJECTS)
def test_marks_tell_the_subject_from_its_class_and_its_box_holds_them(name):
    scene = subject_scene(name, np.random.default_rng(3))
    left, top, right, bottom = scene.mark_box(256)
    plain = replace(scene, marks="", colour=SUBJECTS[name].halves[1])
    changed = (scene.draw(256) != plain.draw(256)).any(-1)
    assert changed.mean() > 0.03
    assert changed[top:bottom, left:right].mean() > 0.3
    assert not changed[: max(0, top - 60)].any()


def test_photographs_show_the_subject_in_known_places_and_are_repeatable(tmp_path):
    for folder in ("one", "two"):
        write_subjects(tmp_path / folder)
    for name in SUBJECTS:
        files = sorted((tmp_path / "one" / name).iterdir())
        assert len(files) == 5
        assert all(path.read_bytes() == (tmp_path / "two" / name / path.name).read_bytes() for path in files)
    assert set(PHOTOGRAPHED) < set(PLACES)


def test_processes_draw_what_one_draws():
    some, marks = scenes(3), [SUBJECTS["cat"], None, SUBJECTS["car"]]
    alone = [scene.draw(64, mark) for scene, mark in zip(some, marks, strict=True)]
    assert np.array_equal(draw_all(some, 64, 2, marks), alone)


def test_a_limb_whose_points_coincide_is_drawn():
    drawn = [Scene.random(np.random.default_rng(0), kind="robot", pose=pose).draw() for pose in (-0.24, -0.2401)]
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() < 1

"""A run of the ablations is made once, and its figures are those of just its weights and settings."""

from dataclasses import replace

import pytest
from ablations import complete, fingerprints, folder_of
from small_run import small

from minibooth.errors import UserError


def test_a_finished_run_is_left_alone_and_another_is_refused(tmp_path):
    settings = small(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    complete(settings, "cpu")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("*")}
    complete(settings, "cpu")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("*")}
    with pytest.raises(UserError, match="already holds"):
        complete(replace(settings, learning_rate=1e-4), "cpu")


def test_a_folder_is_of_all_that_makes_the_run(tmp_path):
    usual, short = fingerprints({}), fingerprints({"max_train_steps": 2})
    runs = [("cat", 0, {}), ("cat", 1, {}), ("cup", 0, {}), ("cat", 0, {"pictures": 2}), ("cat", 0, None)]
    assert len({folder_of(tmp_path, made, *run) for made in (usual, short) for run in runs}) == 2 * len(runs) - 1  # untrained

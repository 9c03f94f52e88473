"""A run repeats itself bit for bit, however often it is stopped, watched or cut into smaller batches."""

import dataclasses
import errno
import fcntl
import functools
import gc
import json
import random
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from comparing import differing, only, weights
from conftest import content
from PIL import Image
from safetensors.torch import load_file, save_file
from small_run import flags, launch, metrics, run, small, tiny, train, trainer, wait_for_steps, with_class

import minibooth
from minibooth.checkpoint import files
from minibooth.dreambooth import optimizer
from minibooth.dreambooth import trainer as module
from minibooth.dreambooth.parallel import Ranks
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.trainer import Trainer
from minibooth.dreambooth.weights import recompute_activations
from minibooth.errors import UserError
from minibooth.models.blocks import Block, ResnetBlock

pytestmark = pytest.mark.usefixtures("few_drawing_steps")


# ---- stopped and resumed

RUNS = {
    "unet": {},
    "text encoder": {"train_text_encoder": True, "text_encoder_lr": 1e-4},
    "prior": {"prior_loss_weight": 0.5},
    "accumulation": {"train_batch_size": 1, "gradient_accumulation_steps": 3},
    "flips, offset and min-SNR": {"random_flip": True, "offset_noise": True, "snr_gamma": 5.0},
    "crops on the fly": {"crops_per_image": 0, "random_flip": True},
    "8 bits": {"use_8bit_adam": True},
    "8-bit LoRA": {"use_8bit_adam": True, "rank": 8, "full_bf16": True, "mixed_precision": "bf16"},
    "bf16": {"full_bf16": True, "mixed_precision": "bf16", "train_text_encoder": True},
    "least memory": {
        "use_8bit_adam": True, "full_bf16": True, "mixed_precision": "bf16", "fused_backward_pass": True, "max_grad_norm": 0.0,
        "gradient_checkpointing": True, "validation_prompt": "a sks dog", "validation_steps": 2, "num_validation_images": 1,
    },
    "decaying rate": {"lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 1, "lr_num_cycles": 2},
    "all": {
        "train_text_encoder": True, "train_batch_size": 1, "gradient_accumulation_steps": 2, "random_flip": True,
        "offset_noise": True, "snr_gamma": 5.0, "gradient_checkpointing": True, "validation_prompt": "a sks dog",
        "validation_steps": 2, "num_validation_images": 1, "lr_scheduler": "polynomial", "lr_warmup_steps": 2,
    },
}  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that are somewhere in a folder."""
    found = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
    return {f"{path}/{name}": tensor for path, each in found.items() for name, tensor in each.items()}


def stopped_after(output: Path, step: int, name: str) -> Path:
    """A copy of a whole run's folder, as if it had been killed while it wrote the metrics some time after `step`."""
    copy = output.with_name(name)
    shutil.copytree(output, copy)
    for path in copy.iterdir():
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and not (number.isdigit() and int(number) <= step):
            shutil.rmtree(path)
    (copy / "model_index.json").unlink(missing_ok=True)  # a LoRA has none
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[: step + 1]) + "\n" + lines[step + 1][:10])
    return copy


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_in_the_bits_of_one_never_stopped(name, tmp_path):
    prior = with_class(tmp_path) if name in ("prior", "all") else {}
    changes = RUNS[name] | prior | {"checkpointing_steps": 2}
    whole = train(small(tmp_path, **changes))
    assert [line["step"] for line in metrics(whole)] == [1, 2, 3, 4, 5]
    stopped = stopped_after(whole, step=2, name="stopped")
    changes |= {"output_dir": str(stopped), "resume_from_checkpoint": "latest", "seed": None}
    assert not differing(weights(train(small(tmp_path, **changes))), weights(whole))
    assert metrics(stopped) == metrics(whole)
    assert not differing(tensors(stopped / "checkpoint-4"), tensors(whole / "checkpoint-4"))
    dtypes = {x.dtype for x in weights(whole / "checkpoint-4").values()}
    assert dtypes <= {torch.bfloat16 if "full_bf16" in changes else torch.float32}


def test_a_checkpoint_can_be_named(tmp_path, monkeypatch):
    """It is the run's own, whatever lies where the command is given."""
    whole = train(small(tmp_path, checkpointing_steps=1))
    monkeypatch.chdir(whole)
    for i, asked in enumerate(("checkpoint-3", str(tmp_path / "stopped-1" / "checkpoint-3"))):
        stopped = stopped_after(whole, step=3, name=f"stopped-{i}")
        settings = small(tmp_path, output_dir=str(stopped), resume_from_checkpoint=asked)
        goes_on = trainer(settings)
        assert (goes_on.resumed, goes_on.start) == (stopped / "checkpoint-3", 3)
        assert not differing(weights(train(settings)), weights(whole))
    settings.resume_from_checkpoint = "checkpoint-9"
    with pytest.raises(UserError, match="checkpoint-9: no such checkpoint"):
        trainer(settings)


def test_latest_without_a_checkpoint_begins_at_the_beginning(tmp_path):
    """Also where a run was killed before its first."""
    whole = train(small(tmp_path))
    for folder in (tmp_path / "again", stopped_after(whole, step=1, name="killed")):
        again = small(tmp_path, output_dir=str(folder), resume_from_checkpoint="latest")
        assert not differing(weights(train(again)), weights(whole))
        assert metrics(folder) == metrics(whole)


def test_a_finished_run_resumes_to_itself(tmp_path):
    settings = small(tmp_path, checkpointing_steps=5)
    whole = weights(train(settings))
    settings.resume_from_checkpoint = "latest"
    assert not differing(weights(train(settings)), whole)
    assert len(metrics(Path(settings.output_dir))) == 5
    assert "--resume_from_checkpoint" not in json.loads((tmp_path / "output" / "run.json").read_text())["command"]


def test_a_finished_run_that_goes_on_for_longer_is_not_finished(tmp_path, monkeypatch):
    """Not where it is interrupted, though a result lies there, and run.json is of this run: it is the earlier one's."""
    whole = weights(train(small(tmp_path, max_train_steps=4, output_dir=str(tmp_path / "whole"))))
    train(small(tmp_path, max_train_steps=2, checkpointing_steps=2))
    longer = small(tmp_path, max_train_steps=4, checkpointing_steps=3, resume_from_checkpoint="latest")

    def step(self, number, own=Trainer.step):
        if number == 3:
            raise KeyboardInterrupt
        return own(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", step)
        train(longer)
    run = trainer(longer)
    assert not run.journal.finished and run.start == 3
    run.train()
    assert not differing(weights(tmp_path / "output"), whole)
    assert trainer(longer).journal.finished


@pytest.mark.parametrize("changed", ["instance_data_dir", "instance_prompt", "pretrained_model_name_or_path"])
@pytest.mark.parametrize("rank", [0, 2])
def test_another_subject_goes_on_from_no_checkpoint(changed, rank, tmp_path, monkeypatch):
    """Though --resume_from_checkpoint latest may stay in a script. Where the same things lie does not matter."""
    settings = small(tmp_path, max_train_steps=2, checkpointing_steps=1, rank=rank)
    output = train(settings)
    before = content(output)
    there = {"instance_data_dir": settings.instance_data_dir, "pretrained_model_name_or_path": str(tiny())}
    moved = {name: str(shutil.copytree(path, tmp_path / "moved" / Path(path).name)) for name, path in there.items()}
    other = {name: str(shutil.copytree(path, tmp_path / "other")) for name, path in there.items() if name == changed}
    longer = dict(max_train_steps=3, checkpointing_steps=1, rank=rank, resume_from_checkpoint="latest")
    (tmp_path / "link").symlink_to(settings.instance_data_dir)
    trainer(small(tmp_path, **longer | {"instance_data_dir": str(tmp_path / "link")}))
    monkeypatch.chdir(settings.instance_data_dir)
    trainer(small(tmp_path, **longer | {"instance_data_dir": "."}))
    with pytest.raises(UserError, match=f"checkpoint-2 was trained with --{changed} .*another --output_dir"):
        train(small(tmp_path, **{changed: "a photo of xyz cat"} | other | longer))
    assert content(output) == before
    assert len(metrics(train(small(tmp_path, **longer | moved)))) == 3


def test_a_folder_may_be_named_like_a_file(tmp_path):
    """Of a kind that no file is written as."""
    output = train(small(tmp_path, max_train_steps=1, output_dir=str(tmp_path / "dog.bin")))
    assert (output / "model_index.json").exists()


def test_an_upscaler_may_follow_a_finished_run(tmp_path):
    """Its result does not depend on that."""
    train(small(tmp_path))
    later = small(tmp_path, upscaler="x4", noise_levels=(0, 20), resume_from_checkpoint="latest")
    assert trainer(later).journal.finished


def test_what_is_no_text_is_refused_before_pictures_are_drawn(tmp_path):
    prior = dict(with_prior_preservation=True, class_prompt="a dog", num_class_images=9)
    for name in ("instance_prompt", "class_prompt", "validation_prompt"):
        with pytest.raises(UserError, match="is no valid text"):
            trainer(small(tmp_path, **prior | {name: "sks \udcff"}))


def test_a_checkpoint_from_elsewhere_replaces_no_result(tmp_path):
    other = train(small(tmp_path, max_train_steps=2, checkpointing_steps=1, output_dir=str(tmp_path / "other")))
    output = train(small(tmp_path, max_train_steps=2, checkpointing_steps=1, seed=8))
    (interrupted := tmp_path / "interrupted").mkdir()
    for name in ("run.json", "checkpoint-1"):
        shutil.copytree(output / name, interrupted / name) if name != "run.json" else shutil.copy(output / name, interrupted)
    for place in (output, interrupted, tmp_path / "new"):
        settings = small(tmp_path, max_train_steps=2, output_dir=str(place), resume_from_checkpoint=str(other / "checkpoint-2"))
        if place.exists():
            with pytest.raises(UserError, match="already holds run.json: choose another --output_dir"):
                train(settings)
        else:
            assert not differing(weights(train(settings)), weights(other))


def test_a_run_that_came_in_between_is_not_written_over(tmp_path):
    """While this one was still loading its model."""
    for asked, said in ((None, "already holds run.json"), ("latest", "another run has been in")):
        output = tmp_path / str(asked)
        late, first = (small(tmp_path, seed=seed, output_dir=str(output), checkpointing_steps=1) for seed in (7, 8))
        late = trainer(dataclasses.replace(late, resume_from_checkpoint=asked))
        before = content(train(first))
        with pytest.raises(UserError, match=said), late.journal.locked():
            late.train()
        assert content(output) == before


def test_a_finished_run_that_left_no_checkpoint_says_how_to_train_it_further(tmp_path, capsys):
    assert run(flags(small(tmp_path, max_train_steps=1))) == 0
    assert run([*flags(small(tmp_path, max_train_steps=2)), "--resume_from_checkpoint=latest"]) == 2
    assert "its result can be a --pretrained_model_name_or_path" in capsys.readouterr().err


def test_pictures_that_cannot_be_shown_end_no_run(tmp_path, capsys):
    """Another step 0's, broken, and a page that cannot be written."""
    settings = small(tmp_path, max_train_steps=2, checkpointing_steps=1, validation_prompt="a sks dog", num_validation_images=1)
    output = train(dataclasses.replace(settings, max_train_steps=1))
    (output / "samples" / "step-0.png").write_bytes(b"")
    with open(output / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 1, "loss": {10**400}}}\n')
    train(dataclasses.replace(settings, resume_from_checkpoint="latest"))
    assert "report.html was not written" in capsys.readouterr().err
    assert (output / "samples" / "step-2.png").exists() and json.loads((output / "run.json").read_text())["finished"]


def test_a_folder_may_have_any_name(tmp_path, capsys):
    words = flags(small(tmp_path, max_train_steps=1, output_format="single", output_dir=str(tmp_path / "dog [v1]")))
    assert run(words) == 0
    assert run([*words, "--resume_from_checkpoint=latest"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_finished_run_without_a_checkpoint_is_not_done_again(tmp_path, capsys):
    """Nor by its first step's, where the second was interrupted; and with other settings it is refused."""
    words = [*flags(small(tmp_path, seed=None)), "--resume_from_checkpoint=latest"]
    assert run(words) == 0
    before = content(tmp_path / "output")
    assert run([*words, "--hub_token=hf_x"]) == 0
    assert "holds the result of just this run" in capsys.readouterr().out
    assert content(tmp_path / "output") == before
    for other in (["--learning_rate=0.5"], ["--resume_from_checkpoint="]):
        assert run(words + other) == 2
        assert "already holds run.json: choose another --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("form, seed", [("folder", 7), ("single", 7), ("folder", None)])
def test_a_run_that_died_between_its_result_and_its_last_word_can_go_on(form, seed, tmp_path, capsys):
    """With the same settings; with others, that result would be lost."""
    words = [*flags(small(tmp_path, output_format=form, seed=seed)), "--resume_from_checkpoint=latest"]
    assert run(words) == 0
    whole, path = weights(tmp_path / "output") if form == "folder" else None, tmp_path / "output" / "run.json"
    path.write_text(path.read_text().replace('"finished": true', '"finished": false'))
    assert run([*words, "--learning_rate=0.5"]) == 2
    assert run(words) == 0
    assert json.loads(path.read_text())["finished"] and not (whole and seed and differing(weights(tmp_path / "output"), whole))


def test_a_run_goes_on_from_its_checkpoint_whatever_became_of_run_json(tmp_path):
    whole = train(small(tmp_path, checkpointing_steps=1))
    stopped = stopped_after(whole, step=3, name="stopped")
    (stopped / "run.json").write_text("{")
    goes_on = small(tmp_path, checkpointing_steps=1, output_dir=str(stopped), resume_from_checkpoint="latest")
    assert not differing(weights(train(goes_on)), weights(whole))


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with trainer(small(tmp_path)).journal.locked(), pytest.raises(UserError, match="another run is going on in"):
        trainer(small(tmp_path)).journal.locked().__enter__()


def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch):
    def lacking(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", lacking)
    with trainer(small(tmp_path)).journal.locked():
        pass


def test_a_system_without_locks_stops_no_run(tmp_path, monkeypatch):
    journal = trainer(small(tmp_path)).journal
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with journal.locked(), journal.locked():
        assert journal.folder.is_dir()


def test_processes_that_see_different_folders_are_refused(tmp_path):
    """As where one finds a checkpoint that the first does not."""
    ranks = Ranks(torch.device("cpu"))
    ranks.broadcast = lambda value: value + 1
    with pytest.raises(UserError, match="is not the same folder for all processes"):
        Trainer(small(tmp_path), ranks.device, torch.float32, torch.float32, ranks)


def test_later_checkpoints_are_never_touched(tmp_path):
    """They would be taken for those of the run that goes on from an earlier one."""
    output = train(small(tmp_path, checkpointing_steps=1, max_train_steps=3))
    with pytest.raises(UserError, match=r"checkpoint-\d is of later steps than \S*checkpoint-1: move it away"):
        trainer(small(tmp_path, checkpointing_steps=1, resume_from_checkpoint="checkpoint-1"))
    with pytest.raises(UserError, match=r"checkpoint-3 is past the last step, 2: raise --max_train_steps"):
        trainer(small(tmp_path, max_train_steps=2, resume_from_checkpoint="latest"))
    assert checkpoints(output) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


STATES = ['{"step": 1, "seed": "7"}', "{}", "[]", '{"step": null}', '{"step": "2"}', '{"step": -1}', '{"step": 1.5}']


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_that_makes_no_sense_is_refused(state, tmp_path):
    output = train(small(tmp_path, checkpointing_steps=1, max_train_steps=1))
    (output / "checkpoint-1" / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"checkpoint-1/state.json"):
        trainer(small(tmp_path, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("rank, file", [(0, "unet/diffusion_pytorch_model.safetensors"), (2, "kohya.safetensors")])
def test_a_checkpoint_that_lacks_something_is_refused(rank, file, tmp_path):
    output = train(small(tmp_path, checkpointing_steps=1, max_train_steps=1, rank=rank))
    saved = load_file(path := output / "checkpoint-1" / file)
    layer = next(iter(saved)).removesuffix(".weight").split(".")[0]
    save_file({name: x for name, x in saved.items() if not name.startswith(layer)}, path)
    with pytest.raises(UserError, match=r"checkpoint-1.* (lacks|has no LoRA of)"):
        trainer(small(tmp_path, resume_from_checkpoint="latest", rank=rank))


@pytest.mark.parametrize("name", ["use_8bit_adam", "full_bf16"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_run_goes_on_in_the_kind_of_numbers_it_began_in(name, begun, tmp_path):
    changes = {"mixed_precision": "bf16", "checkpointing_steps": 1, "max_train_steps": 1}
    train(small(tmp_path, **changes | {name: begun}))
    with pytest.raises(UserError, match=f"checkpoint-1 was trained with{'' if begun else 'out'} --{name}: go on"):
        trainer(small(tmp_path, resume_from_checkpoint="latest", **changes | {name: not begun}))


# ---- stopped from outside, as a process


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory) -> Settings:
    """A finished run of 40 steps."""
    folder = tmp_path_factory.mktemp("never-stopped")
    settings = small(folder, max_train_steps=40)
    train(settings)
    return settings


@pytest.mark.parametrize("name, every", [("SIGKILL", 1), ("SIGINT", 100)])
def test_a_run_stopped_at_any_moment_can_go_on(name, every, never_stopped, tmp_path):
    changes = {"output_dir": str(tmp_path / "output"), "checkpointing_steps": every, "checkpoints_total_limit": 2}
    settings = Settings(**vars(never_stopped) | changes)
    output = Path(settings.output_dir)
    moment = random.randint(1, 10), random.uniform(0, 0.2)
    print("stopped after", moment)
    with launch("-m", "minibooth.train", *flags(settings)) as process:
        wait_for_steps(process, output, moment[0])
        time.sleep(moment[1])
        process.send_signal(signal.Signals[name])
        out, err = process.communicate(timeout=60)
    steps = len((output / "metrics.jsonl").read_text().splitlines())
    assert moment[0] <= steps < 40 and not (output / "unet").exists()
    if name == "SIGINT":
        assert process.returncode == 130
        assert (output / f"checkpoint-{steps}").is_dir()
        last = err.splitlines()[-1]
        assert last.startswith("minibooth.train: interrupted")
        assert "--resume_from_checkpoint latest" in last and f"step {steps}" in last
        assert "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL

    settings.resume_from_checkpoint = "latest"
    assert trainer(settings).start in (steps - 1, steps)
    train(settings)
    assert not differing(weights(output), weights(Path(never_stopped.output_dir)))
    assert metrics(output) == metrics(Path(never_stopped.output_dir))


def test_an_interrupt_in_the_last_step_leaves_the_result(tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def step(self, number, own=Trainer.step):
        if number + 1 == self.steps:
            signal.raise_signal(signal.SIGINT)
        return own(self, number)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt, match="all 2 steps were done"):
        train(small(tmp_path, max_train_steps=2))
    assert (tmp_path / "output" / "model_index.json").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_was_stopped_says_how_to_go_on_and_what_stopped_it(number, status, tmp_path, monkeypatch, capsys):
    def step(self, *given, own=Trainer.step):
        signal.raise_signal(number)
        return own(self, *given)

    monkeypatch.setattr(Trainer, "step", step)
    assert run(flags(small(tmp_path))) == status
    assert "go on with the same command and --resume_from_checkpoint latest (step 1)" in capsys.readouterr().err


def test_a_second_interrupt_is_not_waited_for():
    with module.interrupts() as caught:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert caught == [signal.SIGINT]


# ---- checkpoints


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if "checkpoint" in path.name)


@pytest.mark.parametrize("limit, kept", [(None, 5), (1, 1), (2, 2), (9, 5)])
def test_the_newest_checkpoints_are_kept(limit, kept, tmp_path):
    """And what the user called like one."""
    run = trainer(small(tmp_path, checkpointing_steps=1, checkpoints_total_limit=limit))
    own = tmp_path / "output" / "checkpoint-0.bak"
    own.mkdir(parents=True)
    run.train()
    assert checkpoints(tmp_path / "output") == [own.name, *(f"checkpoint-{step}" for step in range(6 - kept, 6))]


def test_checkpoints_are_ordered_by_number(tmp_path):
    output = train(small(tmp_path, max_train_steps=11, checkpointing_steps=1, checkpoints_total_limit=2))
    assert checkpoints(output) == ["checkpoint-10", "checkpoint-11"]


@pytest.mark.parametrize(
    "name", ["checkpoint-2", "output", "output.safetensors", "run.json", "samples/step-2.png", "class/drawn-1a/00001.png"]
)
def test_what_a_killed_run_left_half_written_is_cleared_away(name, tmp_path):
    """And nothing of the user's, or of another command that is writing there."""
    place, others = tmp_path / "output" / name, [".unet.original", f"{files.HALF}other.safetensors.x1y2z3_w"]
    for half in (place.with_name(f"{files.HALF}{place.name}.x1y2z3_w"), *(tmp_path / "output" / other for other in others)):
        (half / "new").mkdir(parents=True)
        (half / "new" / "optimizer.safetensors").write_bytes(b"half")
    output = train(small(tmp_path, max_train_steps=1, resume_from_checkpoint="latest"))
    assert sorted(path.name for path in output.rglob(".*")) == sorted(others)


def test_a_resumed_run_that_had_drawn_its_last_grid_keeps_it(tmp_path):
    """It was killed after its last checkpoint, before its result."""
    settings = small(tmp_path, checkpointing_steps=5, validation_prompt="a sks dog", num_validation_images=1)
    output = train(settings)
    drawn = content(output / "samples")
    (output / "model_index.json").unlink()
    settings.resume_from_checkpoint = "latest"
    assert content(train(settings) / "samples") == drawn and len(drawn) == 3


def test_no_part_of_a_checkpoint_stays_where_its_deletion_is_cut_off(tmp_path, monkeypatch):
    settings = small(tmp_path, checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=2)
    with monkeypatch.context() as patch:
        own = shutil.rmtree
        patch.setattr(shutil, "rmtree", lambda path, **how: own(path, **how) if how else None)  # prune's has no options
        output = train(settings)
    assert checkpoints(output) == [f"{files.HALF}checkpoint-1.deleting", "checkpoint-2"]
    trainer(dataclasses.replace(settings, resume_from_checkpoint="latest", max_train_steps=3)).journal.open(2)
    assert checkpoints(output) == ["checkpoint-2"]


def test_a_checkpoint_that_was_moved_to_another_disk_is_left_there(tmp_path):
    settings = small(tmp_path, checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=1)
    moved = (train(settings) / "checkpoint-1").rename(tmp_path / "moved")
    (tmp_path / "output" / "checkpoint-1").symlink_to(moved)
    output = train(dataclasses.replace(settings, resume_from_checkpoint="latest", max_train_steps=3))
    assert checkpoints(output) == ["checkpoint-1", "checkpoint-3"] and (moved / "state.json").exists()


@pytest.mark.parametrize("step, kept", [(0, []), (2, ["mine", "step-0", "step-2"])])
def test_what_was_measured_and_drawn_after_the_checkpoint_is_made_anew(step, kept, tmp_path):
    """And before the first, step 0's."""
    journal = trainer(small(tmp_path, resume_from_checkpoint="latest")).journal
    (samples := journal.folder / "samples").mkdir(parents=True)
    for number in (0, 2, 4, 10):
        journal.log(step=number, subject_similarity=0.5)
        (samples / f"step-{number}.png").touch()
    (samples / "before-after.png").touch()
    (samples / "mine.png").touch()
    journal.open(step)
    assert [line["step"] for line in metrics(journal.folder)] == [number for number in (0, 2) if step]
    assert sorted(path.stem for path in samples.iterdir()) == (kept or ["mine"])


def test_a_crash_while_a_checkpoint_is_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    settings = small(tmp_path, checkpointing_steps=2, checkpoints_total_limit=1)
    whole = weights(train(Settings(**vars(settings) | {"output_dir": str(tmp_path / "whole")})))
    moments, calls = module.moments, []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return moments(*args)

    monkeypatch.setattr(module, "moments", full_disk)
    with pytest.raises(OSError, match="No space"):
        train(settings)
    output = Path(settings.output_dir)
    assert checkpoints(output) == ["checkpoint-2"]
    settings.resume_from_checkpoint = "latest"
    assert not differing(weights(train(settings)), whole)
    assert checkpoints(output) == ["checkpoint-4"]


# ---- what must make no difference


def test_validation_changes_nothing_but_draws(tmp_path):
    plain = train(small(tmp_path, output_dir=str(tmp_path / "plain")))
    changes = {"validation_prompt": "a sks dog on the moon", "validation_steps": 2, "num_validation_images": 3}
    watched = train(small(tmp_path, **changes))
    assert not differing(weights(watched), weights(plain))
    assert metrics(watched) == metrics(plain)
    assert not (plain / "samples").exists()
    samples = {path.name: Image.open(path) for path in (watched / "samples").iterdir()}
    assert samples.keys() == {f"step-{step}.png" for step in (0, 2, 4, 5)} | {"before-after.png"}
    assert {image.size for name, image in samples.items() if "step" in name} == {(3 * 64 + 2 * 4, 64)}
    assert samples["before-after.png"].size == (2 * 200 + 4, 64)
    for left, name in ((0, "step-0.png"), (204, "step-5.png")):
        assert samples["before-after.png"].crop((left, 0, left + 200, 64)).tobytes() == samples[name].tobytes()
    assert samples["step-4.png"].text == {"prompt": "a sks dog on the moon", "step": "4", "seed": "7"}
    assert samples["step-0.png"].tobytes() != samples["step-5.png"].tobytes()


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_samples_start_from_the_same_noise_each_time(train_text_encoder, tmp_path):
    """So that with a learning rate of 0 all are the same picture."""
    changes = {"validation_prompt": "a sks dog", "validation_steps": 1, "max_train_steps": 2, "learning_rate": 0.0}
    output = train(small(tmp_path, train_text_encoder=train_text_encoder, **changes))
    assert len({Image.open(output / "samples" / f"step-{step}.png").tobytes() for step in (0, 1, 2)}) == 1


def test_the_global_random_state_is_left_alone(tmp_path):
    state = torch.get_rng_state()
    changes = RUNS["all"] | {"with_prior_preservation": True, "class_prompt": "a photo of dog", "num_class_images": 1}
    train(small(tmp_path, **changes | {"max_train_steps": 3}))
    assert torch.equal(torch.get_rng_state(), state)


def third_step(settings: Settings) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Its losses and gradients."""
    run = trainer(settings)
    run.prepare()
    run.optimizer.zero_grad = lambda **options: None
    losses, networks = run.step(2), run.trained.items()
    return losses, {f"{name}.{key}": p.grad for name, network in networks for key, p in network.named_parameters()}


@pytest.mark.parametrize("prior", [False, True])
def test_two_batches_of_one_have_the_loss_and_gradient_of_one_batch_of_two(prior, tmp_path):
    changes = {"max_grad_norm": 0.0, "train_text_encoder": True} | (with_class(tmp_path) if prior else {})
    loss, one = third_step(small(tmp_path, train_batch_size=2, **changes))
    losses, two = third_step(small(tmp_path, train_batch_size=1, gradient_accumulation_steps=2, **changes))
    assert losses == pytest.approx(loss)
    scale = max(gradient.abs().max() for gradient in one.values())
    assert scale > 0
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5 * scale


def test_gradient_checkpointing_changes_memory_alone(tmp_path):
    def kept(settings: Settings) -> int:
        """Bytes that the first step's forward pass keeps for the backward pass."""
        run, sizes = trainer(settings), []
        run.prepare()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            run.losses(*run.batch(0))
        return sum(sizes)

    changes = {"train_text_encoder": True, "max_train_steps": 3}
    plain = small(tmp_path, output_dir=str(tmp_path / "plain"), **changes)
    thrifty = small(tmp_path, gradient_checkpointing=True, **changes)
    assert kept(thrifty) < 0.5 * kept(plain)
    expected, found = weights(train(plain)), weights(train(thrifty))
    assert expected.keys() == found.keys()
    assert max((expected[name] - found[name]).abs().max() for name in expected) < 1e-6


@pytest.mark.parametrize("trains", [True, False])
def test_recomputed_what_a_block_is_joined_to_gets_a_gradient_of_its_own(trains):
    """Not a view of that of both, which would be kept until the way down has come to it."""
    block, kept = Block([ResnetBlock(16, 8, 4, 1e-6)]), []
    recompute_activations(block)
    x, skip = (torch.randn(1, 8, 4, 4).requires_grad_(wanted) for wanted in (True, trains))
    pushed = skip * 1
    if trains:
        pushed.register_hook(lambda grad: kept.append((grad.nbytes, grad.untyped_storage().nbytes())))
    block(x, pop=[pushed]).square().sum().backward()
    assert kept == [(512, 512)] * trains
    assert x.grad.any()
    assert not trains or skip.grad.any()


def test_an_update_in_the_backward_pass_changes_memory_alone(tmp_path):
    changes = {"train_text_encoder": True, "max_grad_norm": 0.0, "max_train_steps": 3}
    usual = train(small(tmp_path, output_dir=str(tmp_path / "usual"), **changes))
    run = trainer(small(tmp_path, fused_backward_pass=True, **changes))
    run.train()
    assert not differing(weights(tmp_path / "output"), weights(usual))
    assert all(p.grad is None for network in run.trained.values() for p in network.parameters())


# ---- what trains, and in which precision


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_what_does_not_train_comes_back_bit_for_bit(train_text_encoder, tmp_path, checkpoint):
    before = weights(checkpoint)
    after = weights(train(small(tmp_path, checkpoint, train_text_encoder=train_text_encoder, max_train_steps=2)))
    changed, trained = differing(after, before), only(before, "unet", *["text_encoder"] * train_text_encoder).keys()
    assert changed <= trained
    assert all(name.endswith("k_proj.bias") for name in trained - changed)  # softmax does not feel those


def test_the_text_encoder_has_a_learning_rate_of_its_own(tmp_path):
    output = train(small(tmp_path, train_text_encoder=True, text_encoder_lr=0.0, max_train_steps=2))
    before, after = weights(tiny()), weights(output)
    assert not differing(only(after, "text_encoder"), only(before, "text_encoder"))
    assert differing(only(after, "unet"), only(before, "unet"))


def test_networks_leave_memory_once_they_have_done_their_part(tmp_path, monkeypatch):
    """So do those that drew class pictures, where something made of the UNet is kept by it."""
    run = trainer(small(tmp_path, with_prior_preservation=True, class_prompt="a dog", num_class_images=1))
    done = [weakref.ref(run.pipe.vae), weakref.ref(run.pipe.text_encoder)]

    def draw_faster(pipe, *_):
        pipe.unet.forward = functools.partial(pipe.unet.forward)
        done.append(weakref.ref(pipe.unet))

    monkeypatch.setattr(module.speed, "draw_faster", draw_faster)
    gc.disable()
    try:
        run.prepare()
        left = [reference() for reference in done]
    finally:
        gc.enable()
    assert left == [None, None, None]
    assert not any(tensor.requires_grad for tensor in (run.condition[0], run.sets[0][0][0].mean))


def test_mixed_precision_keeps_masters_in_fp32(tmp_path):
    changes = {"checkpointing_steps": 3, "max_train_steps": 3, "validation_prompt": "a dog", "validation_steps": 3}
    output = train(small(tmp_path, train_text_encoder=True, **changes), torch.bfloat16)
    masters, moments = weights(output / "checkpoint-3"), load_file(output / "checkpoint-3" / "optimizer.safetensors")
    for tensors in (masters, moments):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())
    assert not differing(only(weights(output), "unet", "text_encoder"), masters)
    for config in ("unet/config.json", "text_encoder/config.json"):
        assert (output / "checkpoint-3" / config).read_bytes() == (output / config).read_bytes()
    assert not differing(only(weights(output), "vae"), only(weights(tiny()), "vae"))


def test_bf16_computes_in_bf16(tmp_path):
    first = [
        trained_losses(small(tmp_path, output_dir=str(tmp_path / str(dtype))), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert first[0] != first[1]
    assert first[1] == pytest.approx(first[0], rel=0.05)


def trained_losses(settings: Settings, dtype: torch.dtype) -> list[float]:
    return [line["loss"] for line in metrics(train(settings, dtype))]


def test_a_run_may_go_on_in_another_precision(tmp_path):
    whole = train(small(tmp_path, checkpointing_steps=2, max_train_steps=4))
    for dtype in (torch.float16, torch.bfloat16):
        stopped = stopped_after(whole, step=2, name=f"{dtype}")
        settings = small(tmp_path, output_dir=str(stopped), max_train_steps=4, resume_from_checkpoint="latest")
        assert [line["step"] for line in metrics(train(settings, dtype))] == [1, 2, 3, 4]


def test_fp16_scales_the_loss_and_resumes(tmp_path):
    """Its first steps may be skipped, so that there are no moments yet."""
    settings = small(tmp_path, checkpointing_steps=1, max_train_steps=3)
    whole = train(settings, torch.float16)
    scale = json.loads((whole / "checkpoint-1" / "state.json").read_text())["scaler"]["scale"]
    assert scale > 1
    stopped = stopped_after(whole, step=1, name="stopped")
    settings.output_dir, settings.resume_from_checkpoint = str(stopped), "latest"
    assert not differing(weights(train(settings, torch.float16)), weights(whole))

    state = stopped_after(whole, step=1, name="overflowing") / "checkpoint-1" / "state.json"
    state.write_text(json.dumps((told := json.loads(state.read_text())) | {"scaler": told["scaler"] | {"scale": 2.0**100}}))
    settings.output_dir = str(state.parents[1])
    assert not differing(only(weights(train(settings, torch.float16)), "unet"), weights(state.parent))  # no step was taken


def test_a_half_precision_file_comes_back_as_one(tmp_path, copy_of):
    model = copy_of(tiny())
    for path in model.glob("*/*.safetensors"):
        save_file({name: x.half() for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    output = train(small(tmp_path, model, checkpointing_steps=5))
    before, after, masters = weights(model), weights(output), weights(output / "checkpoint-5")
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert not differing(only(after, "vae", "text_encoder"), only(before, "vae", "text_encoder"))
    assert not differing(only(after, "unet"), {name: tensor.half() for name, tensor in masters.items()})
    assert differing(only(after, "unet"), only(before, "unet"))


# ---- the loss


def test_the_loss_on_a_fixed_set_goes_down(tmp_path):
    settings = small(tmp_path, max_train_steps=40, crops_per_image=1, learning_rate=2e-3)

    @torch.no_grad()
    def loss(model: Path) -> float:
        run = trainer(small(tmp_path, model, crops_per_image=1, output_dir=str(tmp_path / "nothing")))
        run.prepare()
        return sum(run.losses(*run.batch(batch))["loss"].item() for batch in range(1000, 1008)) / 8

    before = loss(tiny())
    assert loss(train(settings)) < 0.8 * before


def test_saving_memory_costs_no_loss(tmp_path, monkeypatch):
    """For each of two seeds; the tiny network's parameters are quantised all the same."""
    monkeypatch.setattr(optimizer, "SMALLEST", optimizer.BLOCK)
    eight = {"use_8bit_adam": True}
    changes = {"fp32": {}, "8 bits": eight, "all": eight | {"full_bf16": True, "mixed_precision": "bf16"}}
    usual = {"max_train_steps": 16, "learning_rate": 2e-3, "crops_per_image": 1, "train_batch_size": 1}
    for seed in range(2):
        found = {}
        for name in changes:
            output = train(small(tmp_path, seed=seed, output_dir=str(tmp_path / f"{name}-{seed}"), **usual | changes[name]))
            losses = [line["loss"] for line in metrics(output)]
            found[name] = sum(losses[8:]) / 8
        assert [found["8 bits"], found["all"]] == pytest.approx([found["fp32"]] * 2, rel=0.01)


@pytest.mark.parametrize("full", [True, False])
def test_full_bf16_needs_no_autocast(full, tmp_path):
    """Masters in fp32 do."""
    lean = {"mixed_precision": "bf16", "full_bf16": full, "train_text_encoder": True}
    run, seen = trainer(small(tmp_path, **lean)), set()

    def look(part, inputs, output):
        seen.add((output.dtype, torch.is_autocast_enabled("cpu")))

    run.prepare()
    for network in run.trained.values():
        for part in network.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv2d | torch.nn.GroupNorm | torch.nn.LayerNorm):
                part.register_forward_hook(look)
    run.losses(*run.batch(0))
    assert seen == {(torch.bfloat16, False)} if full else (torch.bfloat16, True) in seen


def test_metrics_tell_the_parts_of_the_loss(tmp_path):
    changes = with_class(tmp_path) | {"prior_loss_weight": 0.25, "lr_scheduler": "linear", "lr_warmup_steps": 0}
    output = train(small(tmp_path, max_train_steps=4, **changes))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line.keys() == {"step", "loss", "subject", "prior", "lr", "seconds"} for line in lines)
    assert all(line["seconds"] > 0 for line in lines)
    assert [line["loss"] for line in lines] == pytest.approx([line["subject"] + 0.25 * line["prior"] for line in lines])
    assert all(line["prior"] > 0 for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    """Naming the step, and the last checkpoint whose weights a loss was finite with."""
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step 2.*no good checkpoint") as error:
        train(small(tmp_path, learning_rate=1e30, checkpointing_steps=1))
    assert "--learning_rate" in str(error.value)

    changes = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2, "output_dir": str(tmp_path / "second")}
    settings = small(tmp_path, learning_rate=2e30, checkpointing_steps=1, **changes)
    with pytest.raises(UserError, match=r"at step 3.*last good checkpoint is \S*checkpoint-1"):  # the first step's rate is 0
        train(settings)
    assert not (tmp_path / "second" / "unet").exists()


def test_weights_that_are_not_finite_are_no_result(tmp_path):
    """Though the last loss still was."""
    with pytest.raises(UserError, match="the weights are not finite at step 1: lower --learning_rate"):
        train(small(tmp_path, learning_rate=1e38, max_train_steps=1))
    assert not (tmp_path / "output" / "unet").exists()


FLAGS = {
    "snr_gamma": 1.0, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-2, "adam_weight_decay": 10.0,
    "lr_power": 3.0, "lr_num_cycles": 2,
}  # fmt: skip


def test_how_loss_optimizer_and_rate_are_told_to_be_makes_a_difference(tmp_path):
    schedules = {"lr_power": "polynomial", "lr_num_cycles": "cosine_with_restarts"}
    plain = {}

    def left(name, schedule, **changes):
        usual = {"lr_scheduler": schedule, "lr_warmup_steps": 0, "max_train_steps": 2, "output_dir": str(tmp_path / name)}
        return weights(train(small(tmp_path, **usual | changes)))

    for name, value in FLAGS.items():
        schedule = schedules.get(name, "constant")
        plain[schedule] = plain.get(schedule) or left(schedule, schedule)
        assert differing(left(name, schedule, **{name: value}), plain[schedule]), name


def test_warm_up_is_held_against_the_steps_that_epochs_make(tmp_path):
    """But may go on to the end where nothing comes after it."""
    changes = {"max_train_steps": None, "num_train_epochs": 4}
    with pytest.raises(UserError, match="--lr_warmup_steps 8 leaves nothing of 8 steps"):
        trainer(small(tmp_path, lr_scheduler="linear", lr_warmup_steps=8, **changes))
    trainer(small(tmp_path, lr_scheduler="linear", lr_warmup_steps=7, **changes))
    trainer(small(tmp_path, lr_scheduler="constant_with_warmup", **changes))


# ---- samples


def test_a_sample_depends_on_the_seed_and_its_number_alone(tmp_path):
    """And no two share their noise: neither two of a batch, nor a subject and a class picture, nor two seeds."""

    def samples(**changes) -> list[tuple]:
        run = trainer(small(tmp_path, **with_class(tmp_path) | changes))
        run.prepare()
        return [run.sample(latents, n) for latents in run.sets for n in range(6)]

    first = samples()
    again = samples(train_batch_size=1, gradient_accumulation_steps=2, max_train_steps=50)
    assert all(torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True))
    noises = [noise for _, noise, _, _ in first + samples(seed=8)]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(noises)
    timesteps = [t.item() for _, _, t, _ in first]
    assert len(set(timesteps)) > 6 and min(timesteps) >= 0 and max(timesteps) < 1000


def test_dropout_is_drawn_anew_at_every_step(tmp_path, monkeypatch):
    keys, seeded = [], module.seeded
    monkeypatch.setattr(module, "seeded", lambda device, *key: keys.append(key) or seeded(device, *key))
    train(small(tmp_path, max_train_steps=2))
    assert len(set(keys)) == len(keys) == 2


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_each_sample_is_noised_and_told_its_own_prompt(train_text_encoder, tmp_path):
    """The subject's rows first, with the instance prompt; then the class's, with theirs."""
    run = trainer(small(tmp_path, train_text_encoder=train_text_encoder, **with_class(tmp_path)))
    run.prepare()
    seen = []
    run.pipe.unet.register_forward_pre_hook(lambda network, inputs: seen.append(inputs))
    run.losses(*run.batch(1))
    (x, t, context, *_), scheduler = seen[0], run.pipe.scheduler
    samples = [run.sample(latents, n) for latents in run.sets for n in (2, 3)]
    assert torch.equal(x, torch.cat([scheduler.add_noise(*sample[:3]) for sample in samples]))
    assert torch.equal(t, torch.cat([sample[2] for sample in samples]))
    prompts = ["a photo of sks dog"] * 2 + ["a photo of dog"] * 2
    assert torch.allclose(context, minibooth.load(tiny()).encode_prompts(prompts), atol=1e-5)


def test_offset_noise_adds_a_tenth_of_a_constant_per_channel(tmp_path):
    runs = [trainer(small(tmp_path, offset_noise=on, max_train_steps=50)) for on in (False, True)]
    for each in runs:
        each.prepare()
    offsets = []
    for n in range(100):
        (x0, plain, t, _), (same_x0, noise, same_t, _) = (run.sample(run.sets[0], n) for run in runs)
        assert torch.equal(x0, same_x0) and torch.equal(t, same_t)
        offset = noise - plain
        assert torch.allclose(offset, offset.mean((2, 3), keepdim=True).expand_as(offset), atol=1e-6)
        offsets.append(offset[0, :, 0, 0])
    assert torch.stack(offsets).std().item() == pytest.approx(0.1, rel=0.15)


def test_epochs_count_the_larger_set(tmp_path):
    changes = {"max_train_steps": None, "num_train_epochs": 3, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert trainer(small(tmp_path, **changes)).steps == 3 * 2  # three pictures, two a step
    prior = with_class(tmp_path) | {"num_class_images": 9}
    assert trainer(small(tmp_path, **changes | prior)).steps == 3 * 5


def test_the_rate_can_be_scaled_with_the_batch(tmp_path):
    changes = {"scale_lr": True, "train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_steps": 1}
    run = trainer(small(tmp_path, **changes))
    assert dict(run.summary())["rate"] == "0.006, constant"
    run.train()
    assert metrics(tmp_path / "output")[0]["lr"] == pytest.approx(6e-3)
    ranks = Ranks(torch.device("cpu"))
    ranks.world_size = 2
    many = small(tmp_path, output_dir=str(tmp_path / "many"), **changes)
    assert Trainer(many, ranks.device, torch.float32, torch.float32, ranks).scale == 12


def test_the_summary_tells_what_will_run(tmp_path):
    run = trainer(small(tmp_path, report_to="wandb", **with_class(tmp_path) | {"num_class_images": 9}))
    (tmp_path / "photographs" / ".DS_Store").write_bytes(b"not a picture")
    run = trainer(run.settings)
    told = run.summary()
    text = "\n".join(f"{name} {value}" for name, value in told)
    parameters = sum(p.numel() for p in minibooth.load(tiny()).unet.parameters()) / 1e6
    for part in (
        f"{parameters:.1f} M",
        "subject 3 pictures",
        "class 9 pictures",
        "5 of them",
        "0 to 5",
        ".DS_Store",
        "report_to",
    ):
        assert part in text


BYTES = {
    "usual": (16, {}),
    "8 bits": (10, {"use_8bit_adam": True}),
    "bf16": (12, {"full_bf16": True, "mixed_precision": "bf16"}),
    "in the backward pass": (12, {"fused_backward_pass": True, "max_grad_norm": 0.0}),
    "all": (4, RUNS["least memory"]),
}


@pytest.mark.parametrize("name", BYTES)
def test_the_summary_tells_the_memory(name, tmp_path, monkeypatch):
    """Of a UNet of 2^30 parameters."""
    each, changes = BYTES[name]
    run = trainer(small(tmp_path, **changes))
    run.weights.trained = {"unet": torch.nn.Linear(2**15, 2**15, bias=False, device="meta")}
    monkeypatch.setattr(type(run.pipe), "networks", run.weights.trained)
    assert dict(run.summary())["memory"].startswith(f"{each}.0 GiB of weights, gradients and moments")

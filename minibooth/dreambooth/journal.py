"""What a run leaves in its output folder, so that it can be watched, repeated and resumed.

run.json          all settings, versions, and the command that repeats the run
metrics.jsonl     a line per step: step, loss, subject, prior, lr, seconds; with --metrics_model one per grid besides
samples/          step-N.png, grids of the validation prompt from the same noise
report.html       all that on one page, and the photographs
checkpoint-N/     trained networks as they train (the layout of the final model) or a LoRA, optimizer.safetensors, state.json
"""

import contextlib
import dataclasses
import glob
import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minibooth.checkpoint import files
from minibooth.checkpoint.ldm import INDEX
from minibooth.checkpoint.lora import DIFFUSERS
from minibooth.dreambooth.settings import WITHOUT_EFFECT, Settings
from minibooth.errors import UserError

RESULTS = (INDEX, DIFFUSERS, "{}.safetensors")  # of which a finished run leaves one; {}: the folder's name
# A pipeline's folders.
PARTS = "unet", "vae", "text_encoder*", "tokenizer*", "scheduler", "low_res_scheduler", "feature_extractor"
SAME = (
    "rank", "lora_alpha", "lora_targets", "train_text_encoder", "use_8bit_adam", "full_bf16", "instance_prompt",
    "prediction_type",
)  # fmt: skip
NAMED = "pretrained_model_name_or_path", "instance_data_dir"  # the same by their last name, wherever they lie by now
# What a run would overwrite.
TAKEN = ("run.json", "metrics.jsonl", "report.html", "checkpoint-*", *PARTS, *RESULTS)
GRIDS = "samples/step-*.png", "samples/before-after.png"
# What a killed run was writing or deleting.
HALF = (
    *(f"{files.HALF}{name}.????????" for name in (*TAKEN, "{}")),
    *(f"{x}/{files.HALF}*" for x in ("samples", "class/drawn-*")),
)
# Settings on which no result depends.
FREE = {"resume_from_checkpoint", "hub_token", "hub_model_id", "push_to_hub", "checkpoints_total_limit", "upscaler"}


class Journal:
    """The output folder of one run, which may be `finished`.

    Raises UserError if it holds what the run would overwrite, and is not to be resumed or cannot be.
    """

    def __init__(self, settings: Settings):
        self.original = self.settings = settings
        self.folder = Path(settings.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output_dir {self.folder} is a file")
        asked, begun, done = settings.resume_from_checkpoint, self.has("run.json"), self.has(*RESULTS)
        run = files.read_json(begun[0]) if begun and done and asked else {}
        same = self.is_same_run(run)
        self.finished = asked == "latest" and bool(done and same and run.get("finished"))
        resumed, own = self.to_resume(), {path.resolve() for _, path in self.checkpoints()}
        self.found = self.finished, resumed
        # it is just this run, finished; or goes on from a checkpoint of its own; or had none yet, and left no other's result
        goes_on = self.finished or (resumed.resolve() in own if resumed else begun and (same or not done))
        if (taken := self.has(*TAKEN, *GRIDS)) and not (asked and goes_on):
            remedy = ", or go on with --resume_from_checkpoint latest" * bool(begun and not asked)
            further = "; no checkpoint is there to go on from, but its result can be a --pretrained_model_name_or_path"
            remedy += further * bool(asked and not resumed and done and done[0].name != DIFFUSERS)
            first = taken[0].relative_to(self.folder)
            raise UserError(f"{self.folder} already holds {first}: choose another --output_dir{remedy}")

    def has(self, *patterns: str) -> list[Path]:
        """What is in the folder under these names."""
        named = (pattern.format(glob.escape(self.folder.resolve().name)) for pattern in patterns)
        return [path for pattern in named for path in sorted(self.folder.glob(pattern))]

    def is_same_run(self, run: dict[str, Any]) -> bool:
        """Whether this is the run.json of a run with these settings."""
        now = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        free = {*FREE, *WITHOUT_EFFECT, *["seed"] * (now["seed"] is None), *["noise_levels"] * bool(now["upscaler"])}
        told = {name: value for name, value in (run.get("settings") or {}).items() if name not in free}
        return bool(told) and told.items() <= now.items()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other run can begin in the folder, as far as the system has locks. Raises UserError where one goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            with contextlib.suppress(ImportError, OSError):
                import fcntl  # not everywhere

                place = os.open(self.folder, os.O_RDONLY)
                held.callback(os.close, place)
                try:
                    fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"another run is going on in {self.folder}: choose another --output_dir") from None
            if Journal(self.original).found != self.found:
                raise UserError(f"another run has been in {self.folder} since this one began: start again")
            yield

    def open(self, step: int, python: str = "python") -> None:
        """Write run.json; drop metrics and grids of steps that will be done again, and what a killed run left half written.

        python: the command that starts the run's processes.
        """
        again = dataclasses.replace(self.settings, hub_token=None, resume_from_checkpoint=None)
        words = [word for name, value in again.given().items() for word in words_of(name, value)]
        self.run = {
            "command": shlex.join([*python.split(), "-m", "minibooth.train", *words]),
            "settings": dataclasses.asdict(again),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        self.note(finished=False)
        for unfinished in self.has(*HALF):
            shutil.rmtree(unfinished, ignore_errors=True)
        for number, path in grids(self.folder):
            if not step or number > step:
                path.unlink()
                path.with_name("before-after.png").unlink(missing_ok=True)
        kept = [json.dumps(values) + "\n" for values in metrics(self.folder) if step and values["step"] <= step]
        files.write_text(self.folder / "metrics.jsonl", "".join(kept))

    def note(self, finished: bool) -> None:
        """run.json, with whether the folder holds the result of just this run."""
        files.write_text(self.folder / "run.json", json.dumps(self.run | {"finished": finished}, indent=2) + "\n")

    def log(self, **values: float) -> None:
        """Append a line to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a") as stream:
            stream.write(json.dumps(values) + "\n")

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Steps and folders of the checkpoints that are there, oldest first; each is whole, since it was moved into place."""
        return [(step, path) for step, path in numbered(self.folder, r"checkpoint-(\d+)") if path.is_dir()]

    def to_resume(self) -> Path | None:
        """The checkpoint that --resume_from_checkpoint means; None where "latest" finds none, or nothing was asked."""
        if not (asked := self.settings.resume_from_checkpoint):
            return None
        if asked == "latest":
            return max(self.checkpoints(), default=(0, None))[1]
        for path in (self.folder / asked, Path(asked), self.folder / Path(asked).name):
            if (path / "state.json").is_file():
                return path
        raise UserError(f"--resume_from_checkpoint {asked}: no such checkpoint in {self.folder}")

    def resume(self) -> tuple[Path | None, dict[str, Any]]:
        """The checkpoint to go on from, and its state: at least the step. Raises UserError where it does not fit the run."""
        if not (path := self.to_resume()):
            return None, {"step": 0}
        state = files.read_json(path / "state.json")
        for name, own in common(self.settings).items():
            if (begun := state.get(name, own)) != own:
                there = f"with --{name}" + f" {begun}" * (begun is not True) if begun else f"without --{name}"
                raise UserError(f"{path} was trained {there}: go on as it began, or take another --output_dir")
        if type(step := state.get("step")) is not int or step < 0 or type(state.get("seed", 0)) is not int:
            raise UserError(f"{path}/state.json does not say at which step, or by which seed; go on from another")
        if later := [other for number, other in self.checkpoints() if number > step]:
            raise UserError(f"{later[0]} is of later steps than {path}: move it away, or go on from there")
        return path, state

    def prune(self) -> None:
        """Delete the oldest checkpoints beyond --checkpoints_total_limit; to be called once the newest is whole."""
        limit = self.settings.checkpoints_total_limit
        own = [path for _, path in self.checkpoints() if not path.is_symlink()]
        for path in own[: -limit if limit else 0]:
            half = path.rename(path.with_name(f"{files.HALF}{path.name}.deleting"))  # a killed run leaves no part of one
            shutil.rmtree(half)


def numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """What is in a folder, if that is there, under names that match `name`, whose group is a number: by number."""
    named = ((re.fullmatch(name, path.name), path) for path in folder.glob("*"))
    return sorted((int(match[1]), path) for match, path in named if match)


def grids(folder: Path) -> list[tuple[int, Path]]:
    """Steps and pictures of the validation's grids in an output folder."""
    return numbered(folder / "samples", r"step-(\d+)\.png")


def metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of an output folder's metrics.jsonl, but for half a line, as a run leaves that is killed while it writes."""
    path = folder / "metrics.jsonl"
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            if isinstance(values := json.loads(line), dict) and isinstance(values.get("step"), int):
                yield values


def common(settings: Settings) -> dict[str, Any]:
    """What a run that goes on from a checkpoint must have in common with the one that wrote it: what trains, and on what."""
    named = {name: Path(getattr(settings, name)).resolve().name for name in NAMED}
    return named | {name: getattr(settings, name) for name in SAME}


def words_of(name: str, value: Any) -> list[str]:
    """A flag on the command line."""
    words = [] if value is True else [*map(str, value if isinstance(value, tuple) else (value,))]
    return [f"--{name}={words[0]}"] if words and words[0].startswith("-") else [f"--{name}", *words]

"""Training runs small enough for a test: a UNet of two levels, photographs of noise, a handful of steps, one thread."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from comparing import noise
from conftest import REPOSITORY, make_checkpoint
from safetensors.torch import load_file, save_file

from minibooth import command
from minibooth import train as command_line
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.trainer import Trainer

TINY = {
    "unet": dict(
        block_out_channels=[16, 32], layers_per_block=1, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    ),
    "vae": dict(layers_per_block=1),
    "text_encoder": dict(num_hidden_layers=1),
}  # fmt: skip
KEPT = tempfile.TemporaryDirectory(prefix="minibooth-")


@functools.cache
def tiny() -> Path:
    """A Stable Diffusion 1 of two levels, made once: where a law does not depend on the network, its steps are fast."""
    return make_checkpoint(Path(KEPT.name) / "tiny", TINY, seed=30)


def photographs(folder: Path, count: int = 3, seed: int = 0) -> Path:
    """A folder of PNGs, neither square nor of the training's size; made only if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        if not (folder / f"{i}.png").exists():
            noise(48, 40, seed + i).save(folder / f"{i}.png")
    return folder


def small(folder: Path, model: Path | None = None, **changes) -> Settings:
    """Settings of a run of `model` (`tiny`) on three photographs in `folder`, which leaves its output there too."""
    usual = dict(
        pretrained_model_name_or_path=str(model or tiny()), instance_data_dir=str(photographs(folder / "photographs")),
        instance_prompt="a photo of sks dog", output_dir=str(folder / "output"), resolution=64, train_batch_size=2,
        max_train_steps=5, learning_rate=1e-3, seed=7, crops_per_image=2,
    )  # fmt: skip
    return Settings(**(usual | changes))


def changed(folder: Path, network: str) -> Path:
    """The folder, with other weights of a network in it."""
    path = folder / network / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * x for name, x in load_file(path).items()}, path)
    return folder


def with_class(folder: Path) -> dict:
    """The changes that add prior preservation on four class pictures of the user's own."""
    own = photographs(folder / "class", count=4, seed=100)
    return dict(with_prior_preservation=True, class_prompt="a photo of dog", class_data_dir=str(own), num_class_images=4)


def trainer(settings: Settings, dtype: torch.dtype | None = None) -> Trainer:
    dtype = dtype or command.DTYPES[settings.mixed_precision or "no"]
    return Trainer(settings, torch.device(settings.device or "cpu"), dtype, torch.float32)


def train(settings: Settings, dtype: torch.dtype | None = None) -> Path:
    """Run it; returns its output folder."""
    trainer(settings, dtype).train()
    return Path(settings.output_dir)


def flags(settings: Settings) -> list[str]:
    """The command line that says the same."""
    usual = vars(Settings())
    given = {name: value for name, value in vars(settings).items() if value != usual[name]}
    words = ["--device=cpu"]
    for name, value in given.items():
        if isinstance(value, tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return words


def run(words: list[str]) -> int:
    """python -m minibooth.train in this process; returns its exit status."""
    try:
        command.run(command_line.main, ["train.py", *words])
    except SystemExit as end:
        return end.code


def launch(*words: object) -> subprocess.Popen:
    """python with these words as a process of its own, in one thread, whose output goes to pipes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=REPOSITORY, env=environment, **pipes)


def wait_for_steps(process: subprocess.Popen, output: Path, count: int) -> None:
    """Until `count` steps are in the metrics of a run that goes on."""
    file, deadline = output / "metrics.jsonl", time.monotonic() + 300
    while not (file.exists() and file.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl, but for the seconds, which no two runs share."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

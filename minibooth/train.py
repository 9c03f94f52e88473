"""Teach a Stable Diffusion a subject from 3-5 photographs: DreamBooth (arXiv 2208.12242)."""

import argparse
import contextlib
import dataclasses
import gc
import os
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from minibooth import command
from minibooth.checkpoint import files
from minibooth.command import WEIGHTS
from minibooth.dreambooth import hub, parallel
from minibooth.dreambooth.journal import words_of
from minibooth.dreambooth.parallel import Ranks
from minibooth.dreambooth.settings import WITHOUT_EFFECT, Settings
from minibooth.dreambooth.trainer import Trainer
from minibooth.errors import UserError, blaming

# The run on the repository's own small model, where neither a model nor photographs are named.
EMBEDDED: dict[str, typing.Any] = dict(
    pretrained_model_name_or_path=str(WEIGHTS / "tiny"), upscaler=str(WEIGHTS / "tiny-x4"), resolution=64, seed=0,
    instance_data_dir=str(WEIGHTS / "subject" / "robot"), instance_prompt="a photo of a zwx robot", train_text_encoder=True,
    class_prompt="a photo of a robot", with_prior_preservation=True, num_class_images=24, sample_batch_size=16,
    class_guidance_scale=3.0, learning_rate=6e-4, text_encoder_lr=1.2e-3, lr_scheduler="linear", lr_warmup_steps=0,
    validation_prompt="a photo of a zwx robot in the snow | a photo of a zwx robot wearing a crown in the forest | "
    "a photo of a zwx robot with a balloon at night | a photo of a red zwx robot on the moon",
    validation_guidance_scale=4.0, validation_steps=120, max_train_steps=240, metrics_model=str(WEIGHTS / "tiny-clip"),
)  # fmt: skip
# Defaults that --rank changes, unless given: attention alone learns no marks here.
LORA: dict[str, typing.Any] = dict(lora_targets="all", learning_rate=3e-3, text_encoder_lr=3e-3)
SECOND: dict[str, typing.Any] = dict(  # defaults that its second step changes, unless given
    max_train_steps=160, learning_rate=3e-4, lr_scheduler="constant", num_validation_images=3, validation_steps=160,
    validation_guidance_scale=1.0,
)  # fmt: skip
ALIASES = {"tokenizer": ("--tokenizer_name",)}  # as train_dreambooth.py has it
EPILOGUE = "The flags are those of diffusers' train_dreambooth.py, with its spelling (- and _ are alike) and its defaults."


def given_flags(argv: Sequence[str]) -> dict[str, typing.Any]:
    """What a command line says, by flag; each field of Settings is one."""
    parser = command.Parser("python -m minibooth.train", __doc__, EPILOGUE)
    for f in dataclasses.fields(Settings):
        kind = next(each for each in (*typing.get_args(f.type), f.type) if each is not type(None))
        how: dict[str, typing.Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        how |= {key: value for key, value in f.metadata.items() if key in ("help", "choices", "nargs")}
        if f.default and f.name not in WITHOUT_EFFECT:
            how["help"] += f" [{' '.join(map(str, f.default)) if isinstance(f.default, tuple) else f.default}]"
        parser.add_argument(f"--{f.name}", *ALIASES.get(f.name, ()), default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(command.normalise(argv)))
    # as accelerate launch was told, or its configuration says
    if (launched := os.environ.get("ACCELERATE_MIXED_PRECISION")) in ("fp16", "bf16"):
        given.setdefault("mixed_precision", launched)
    return {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}


def parse(argv: Sequence[str]) -> Settings:
    """Command line -> Settings."""
    return first_step(given_flags(argv))


def first_step(given: dict[str, typing.Any]) -> Settings:
    """The run that these flags ask for: EMBEDDED, if it is there, where neither a model nor photographs are named."""
    embedded = EMBEDDED | (LORA if given.get("rank") else {})
    there = Path(EMBEDDED["pretrained_model_name_or_path"]).is_dir()
    named = given.get("pretrained_model_name_or_path") or given.get("instance_data_dir")
    return Settings(**({} if named or not there else embedded) | given)


def second_step(settings: Settings, given: Mapping[str, typing.Any] = {}) -> Settings:
    """The paper's second step, where --upscaler asks for it: the same photographs, another model, no class pictures.

    given: what the command line says; what the embedded run does anyway, as the command in its run.json says, is not said.
    """
    lora, embedded = LORA if settings.rank else {}, settings.upscaler == EMBEDDED["upscaler"]
    said = [name for name, value in given.items() if (EMBEDDED | lora).get(name) != value]
    own = {name: value for name, value in (SECOND | lora).items() if embedded and name not in said}
    off = "with_prior_preservation", "train_text_encoder"
    own |= {f.name: f.default for f in dataclasses.fields(Settings) if f.name in off or f.metadata.get("needs") in off}
    return dataclasses.replace(
        settings, **own, pretrained_model_name_or_path=settings.upscaler, upscaler="", stage="super_resolution",
        variant=None, revision=None, prediction_type=None, metrics_model=None, push_to_hub=False,
        validation_prompt=settings.validation_prompt and settings.instance_prompt,
        output_dir=str(Path(settings.output_dir) / "upscaler"),
        resume_from_checkpoint=settings.resume_from_checkpoint and "latest",
    )  # fmt: skip


def trainer(settings: Settings, ranks: Ranks) -> Trainer:
    """The run on the ranks' devices, in the precision that the settings, or these devices, call for.

    Raises UserError for what a device cannot do.
    """
    kind = ranks.device.type
    precision = settings.prior_generation_precision or ("fp16" if kind == "cuda" else "fp32")
    dtypes = command.DTYPES[settings.mixed_precision or "no"], command.DTYPES[precision]
    if kind == "cuda" and dtypes[0] == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no units for bf16: take --mixed_precision fp16")
    if kind == "mps" and settings.rank and settings.lora_dropout and settings.gradient_checkpointing:
        raise UserError("on mps --gradient_checkpointing does not repeat --lora_dropout: leave out one of them")
    return Trainer(settings, ranks.device, *dtypes, ranks)


def train(settings: Settings, ranks: Ranks) -> tuple[str, list[str]]:
    """One step of the paper, start to end; returns the command that draws with what it left: the model, or that and a LoRA."""
    gc.collect()  # an earlier step's Trainer and its Graph hold each other, and all their memory
    run = trainer(settings, ranks)
    if settings.push_to_hub and ranks.first:
        hub.reserve(settings)
    if run.journal.finished:
        print(f"{settings.output_dir} holds the result of just this run: nothing is left to do")
    else:
        print("\n".join(f"{name:>10}  {value}" for name, value in run.summary()), flush=True)
        if ranks.first:
            command.ready_folder(run.journal.folder)
            if settings.with_prior_preservation and run.prior.missing:
                command.ready_folder(run.prior.folder.parent)
        with run.journal.locked() if ranks.first else contextlib.nullcontext():
            try:
                run.train()
            except KeyboardInterrupt as interrupt:  # one that was not waited for says nothing of its own
                if interrupt.args:
                    raise
                latest = " and --resume_from_checkpoint latest" * bool(run.journal.has("run.json"))
                raise type(interrupt)(f"go on with the same command{latest}") from None
    lora = [settings.pretrained_model_name_or_path, settings.output_dir]
    return run.stage.draw_command.format(*settings.noise_levels), lora if settings.rank else [str(run.weights.result)]


def seed_of(*runs: Settings) -> int:
    """That of the first of these runs which has begun, by its run.json."""
    path = next(path for run in runs if (path := Path(run.output_dir) / "run.json").is_file())
    with blaming(path):
        return files.read_json(path)["settings"]["seed"]


def main(argv: Sequence[str]) -> None:
    """Train as the command line says, and leave the result in --output_dir."""
    given = given_flags(argv)
    settings = first_step(given)
    torch.backends.cuda.matmul.allow_tf32 = settings.allow_tf32
    steps = [settings, second_step(settings, given)] if settings.upscaler else [settings]
    with parallel.start(settings, command.device(settings.device)) as ranks, ranks.guard(settings.output_dir):
        for later in steps[1:]:
            trainer(later, ranks)  # what would stop it is to be known now
        ends: list[tuple[str, list[str]]] = []
        for each in steps:
            if ends and settings.seed is None:  # drawn once, for both steps
                each.seed = ranks.broadcast(seed_of(each, settings) if ranks.first else 0)
            ends.append(train(each, ranks))
        (use, *_), (model, *upscaler) = zip(*ends, strict=True)
        if settings.push_to_hub and ranks.first:
            print(f"uploaded to {hub.push(settings)}")
        how: dict[str, typing.Any] = dict(zip(("model", "lora"), model, strict=False))
        scales = {"guidance_scale": settings.validation_guidance_scale}  # as the grids were drawn
        for own, later in zip(upscaler, steps[1:], strict=True):
            how["upscaler"] = tuple(own)
            scales |= {"upscaler_guidance_scale": later.validation_guidance_scale, "noise_level": later.noise_levels[0]}
        how |= {name: f"{scale:g}" for name, scale in scales.items()} | {"prompt": f"{settings.instance_prompt} in the snow"}
        words = [word for name, value in how.items() for word in words_of(name, value)]
        print(f"draw with it:  python -m minibooth.{use} {shlex.join(words)}")


if __name__ == "__main__":
    command.run(main, sys.argv)

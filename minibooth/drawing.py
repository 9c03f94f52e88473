"""What the commands that draw share: flags, the pipeline these name, and PNGs with all that it takes to draw them again."""

import argparse
import contextlib
import itertools
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from minibooth import command
from minibooth.command import WEIGHTS, within
from minibooth.diffusion import load
from minibooth.diffusion.images import save_png
from minibooth.diffusion.pipeline import Pipeline
from minibooth.diffusion.samplers import SAMPLERS
from minibooth.dreambooth import speed
from minibooth.dreambooth.journal import numbered
from minibooth.errors import UserError

# The samplers as AUTOMATIC1111's web interface calls them (but ddpm), which reads a picture's settings from its "parameters".
A1111 = {"ddpm": "DDPM", "ddim": "DDIM", "pndm": "PLMS", "euler": "Euler", "euler_a": "Euler a", "dpmpp_2m": "DPM++ 2M"}
# Flags that a picture depends on, noted where they were given.
NOTED = "negative_prompt", "steps", "sampler", "guidance_scale", "model", "dtype", *command.SOURCE


def parser(
    name: str, description: str | None, embedded: str, steps: int, guidance_scale: float, output_dir: str = "pictures",
    seed: int | None = None,
) -> command.Parser:  # fmt: skip
    """The shared flags of the command `name`, whose model is that in weights/`embedded` where none is named."""
    parser = command.Parser(f"python -m minibooth.{name}", description)
    add = parser.add_argument
    add("--model", default=str(WEIGHTS / embedded), help=f"{command.MODEL} [embedded model]")
    command.lora_flags(parser)
    add("--negative_prompt", default="", metavar="P", help="what to steer away from")
    add("--output_dir", type=Path, default=Path(output_dir), metavar="D", help=f"where they go, beside others [{output_dir}]")
    usual = "by lot" if seed is None else seed
    add("--seed", type=within(0, 2**63), default=seed, metavar="S", help=f"of the first picture; the next adds 1 [{usual}]")
    add("--steps", type=within(1), default=steps, help=f"of the sampler [{steps}]")
    add("--guidance_scale", type=within(-1e3, 1e3), default=guidance_scale, help=f"1 turns guidance off [{guidance_scale}]")
    add("--sampler", choices=[*SAMPLERS], help="[ddim; for XL euler]")
    add("--dtype", choices=["fp32", "fp16", "bf16"], help="what the networks compute in [fp16 on cuda, otherwise fp32]")
    add("--device", help="cuda, mps or cpu [the best there]")
    command.source_flags(parser)
    return parser


def open_model(flags: argparse.Namespace, wanted: type[Pipeline]) -> Any:
    """The pipeline of --model with its LoRAs. Also makes --output_dir, and fills in --sampler and --seed."""
    if Path(flags.model).parent == WEIGHTS and not Path(flags.model).is_dir():
        raise UserError(f"the embedded model is not in {flags.model}; name another with --model")
    command.ready_folder(flags.output_dir)
    how = dict(prediction_type=flags.prediction_type, revision=flags.revision)
    pipe = open_other(flags, flags.model, wanted, command.loras(flags), **how)
    flags.sampler = flags.sampler or pipe.sampler
    flags.seed = secrets.randbits(32) if flags.seed is None else flags.seed
    return pipe


def open_other(
    flags: argparse.Namespace, model: str, wanted: type[Pipeline], loras: Sequence[tuple[str, float]], **how: Any
) -> Any:
    """A pipeline where and in what the flags say, with these LoRAs in their strengths."""
    device = command.device(flags.device)
    dtype = command.DTYPES[flags.dtype or ("fp16" if device.type == "cuda" else "fp32")]
    pipe = load(model, dtype, device, flags.variant, tokenizer=flags.tokenizer, wanted=wanted, **how)
    for lora, weight in loras:
        pipe.load_lora(lora, weight)
    for network in pipe.networks.values():
        speed.suit(network, device, dtype)
    return pipe


def save(picture: Image.Image, folder: Path, prefix: str, metadata: dict[str, str]) -> None:
    """Write a PNG under the first name after the last of those numbered there, 0007.png or grid-0002.png, and print it."""
    last, _ = max(numbered(folder, rf"{re.escape(prefix)}(\d+)\.png"), default=(-1, folder))
    for path in (folder / f"{prefix}{number:04d}.png" for number in itertools.count(1 + last)):
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)  # from now on the name is ours: others may be drawing into the folder, too
            break
    try:
        save_png(picture, path, metadata)
    except BaseException:
        path.unlink()
        raise
    print(path)


def metadata(flags: argparse.Namespace, prompt: str, seed: int, size: tuple[int, int], **own: Any) -> dict[str, str]:
    """What a picture was drawn from, twice: a chunk for each setting (`own`: of the command), and A1111's way, in one.

    size: width and height.
    """
    a1111 = {
        "Steps": flags.steps, "Sampler": A1111[flags.sampler], "CFG scale": flags.guidance_scale, "Seed": seed,
        "Size": f"{size[0]}x{size[1]}", "Model": Path(flags.model).name,
    }  # fmt: skip
    negative = f"\nNegative prompt: {flags.negative_prompt}" if flags.negative_prompt else ""
    loras = command.loras(flags)
    named = "".join(f" <lora:{Path(path).stem}:{weight:g}>" for path, weight in loras)
    parameters = f"{prompt}{named}{negative}\n" + ", ".join(f"{key}: {value}" for key, value in a1111.items())
    own |= {name: value for name in NOTED if (value := getattr(flags, name)) is not None}
    own |= {"lora": ", ".join(f"{path} {weight:g}" for path, weight in loras)} if loras else {}
    own |= {"prompt": prompt, "seed": seed, "software": "minibooth", "parameters": parameters}
    return {key: str(value) for key, value in own.items()}

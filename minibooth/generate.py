"""Draw pictures of prompts: numbered PNGs, each with all that it takes to draw it again, and a grid."""

import argparse
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from minibooth import command
from minibooth.diffusion import load
from minibooth.diffusion.images import grid, save_png
from minibooth.diffusion.samplers import SAMPLERS
from minibooth.errors import UserError

EMBEDDED = Path(__file__).resolve().parents[1] / "weights" / "tiny"
# The samplers as AUTOMATIC1111's web interface calls them, which reads a picture's settings from its "parameters".
A1111 = {
    "ddpm": "DDPM", "ddim": "DDIM", "pndm": "PLMS", "euler": "Euler", "euler_a": "Euler a", "dpmpp_2m": "DPM++ 2M",
}  # fmt: skip


def parser() -> command.Parser:
    """The command's flags."""
    parser = command.Parser("python -m minibooth.generate", __doc__)
    add = parser.add_argument
    add(
        "--model",
        default=str(EMBEDDED),
        help="a folder in the diffusers layout, a single file, or owner/name on the hub [embedded model]",
    )
    command.lora_flags(parser)
    add("--prompt", nargs="+", required=True, metavar="P", help="what to draw, one or several")
    add("--negative_prompt", default="", metavar="P", help="what to steer away from")
    add("--num_images", type=int, default=1, metavar="N", help="pictures of each prompt [1]")
    add(
        "--output_dir",
        type=Path,
        default=Path("pictures"),
        metavar="D",
        help="where they go, after those there [pictures]",
    )
    add("--seed", type=int, metavar="S", help="of the first picture; each further one adds 1 [drawn by lot]")
    add("--height", type=int, help="in pixels, divisible by 8 [the model's own]")
    add("--width", type=int, help="in pixels, divisible by 8 [the model's own]")
    add("--steps", type=int, default=50, help="of the sampler [50]")
    add("--guidance_scale", type=float, default=7.5, help="how strictly to follow the prompt; 1 turns it off [7.5]")
    add("--sampler", choices=[*SAMPLERS], help="[ddim; for XL euler]")
    add("--batch_size", type=int, default=4, help="pictures drawn at a time; no picture depends on it [4]")
    add("--dtype", choices=["fp32", "fp16", "bf16"], help="what the networks compute in [fp16 on cuda, otherwise fp32]")
    add("--device", help="cuda, mps or cpu [the best there]")
    add("--variant", help="of the weights' files, such as fp16")
    add("--revision", help="of a model on the hub: branch, tag or commit")
    add("--tokenizer", metavar="D", help="folder with CLIP's vocabulary, for a single file [tokenizer/ beside it, or the hub]")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="overrules what the model's scheduler says")
    return parser


def main(argv: Sequence[str]) -> None:
    """Draw as the command line says."""
    flags = parser().parse_args(command.normalise(argv))
    if flags.num_images < 1 or flags.batch_size < 1:
        raise UserError("--num_images and --batch_size start at 1")
    if flags.model == str(EMBEDDED) and not EMBEDDED.is_dir():
        raise UserError(f"the embedded model is not in {EMBEDDED}; name another with --model")
    device = command.device(flags.device)
    dtype = command.DTYPES[flags.dtype or ("fp16" if device.type == "cuda" else "fp32")]
    pipe = load(flags.model, dtype, device, flags.variant, flags.prediction_type, flags.revision, flags.tokenizer)
    flags.sampler = flags.sampler or pipe.sampler
    for lora, weight in command.loras(flags):
        pipe.load_lora(lora, weight)

    prompts = [prompt for prompt in flags.prompt for _ in range(flags.num_images)]
    seed = secrets.randbits(32) if flags.seed is None else flags.seed
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    names = ("height", "width", "steps", "guidance_scale", "sampler")
    settings = {name: getattr(flags, name) for name in names}
    pictures = []
    for start in range(0, len(prompts), flags.batch_size):
        batch = prompts[start : start + flags.batch_size]
        drawn = pipe.generate(batch, flags.negative_prompt, seed=seed + start, **settings)
        for i, (prompt, picture) in enumerate(zip(batch, drawn, strict=True), start=start):
            path = unused(flags.output_dir, "")
            save_png(picture, path, metadata(flags, prompt, seed + i, picture.size))
            print(path)
        pictures += drawn
    columns = flags.num_images if len(flags.prompt) > 1 else round(len(pictures) ** 0.5 + 0.49)
    path = unused(flags.output_dir, "grid-")
    save_png(grid(pictures, columns), path, metadata(flags, "\n".join(flags.prompt), seed, pictures[0].size))
    print(path)


def unused(folder: Path, prefix: str) -> Path:
    """The first name after the last of the numbered pictures that are there: 0007.png, grid-0002.png."""
    names = (re.fullmatch(rf"{prefix}(\d+)\.png", path.name) for path in folder.iterdir())
    return folder / f"{prefix}{1 + max((int(name[1]) for name in names if name), default=-1):04d}.png"


def metadata(flags: argparse.Namespace, prompt: str, seed: int, size: tuple[int, int]) -> dict[str, str]:
    """What a picture was drawn from, twice: a chunk for each setting, and A1111's way, in one."""
    a1111 = {
        "Steps": flags.steps,
        "Sampler": A1111[flags.sampler],
        "CFG scale": flags.guidance_scale,
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": Path(flags.model).name,
    }
    negative = f"\nNegative prompt: {flags.negative_prompt}" if flags.negative_prompt else ""
    loras = "".join(f" <lora:{Path(path).stem}:{weight:g}>" for path, weight in command.loras(flags))
    parameters = f"{prompt}{loras}{negative}\n" + ", ".join(f"{key}: {value}" for key, value in a1111.items())
    own = dict(
        prompt=prompt, negative_prompt=flags.negative_prompt, seed=seed, steps=flags.steps, sampler=flags.sampler,
        guidance_scale=flags.guidance_scale, width=size[0], height=size[1], model=flags.model, software="minibooth",
        **({"lora": loras.strip()} if loras else {}),
    )  # fmt: skip
    return {key: str(value) for key, value in own.items()} | {"parameters": parameters}


if __name__ == "__main__":
    command.run(main, sys.argv)

"""Make pictures four times as wide and high, with detail drawn under a prompt: PNGs numbered after the pictures' names."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minibooth import command, drawing
from minibooth.diffusion.super_resolution import TILE, StableDiffusionUpscale
from minibooth.dreambooth.data import find_pictures, open_picture
from minibooth.errors import UserError


def parser() -> command.Parser:
    """The command's flags."""
    parser = drawing.parser("upscale", __doc__, "tiny-x4", steps=75, guidance_scale=9.0)
    add = parser.add_argument
    add("--images", nargs="+", required=True, type=Path, metavar="I", help="pictures of any size, or folders of such")
    add("--prompt", nargs="+", default=[""], metavar="P", help="what they show: one for all, or one for each [nothing]")
    add("--noise_level", type=command.within(0, 350), default=20, metavar="N", help="0 to 350: how freely to draw [20]")
    add("--tile", type=command.within(8), default=TILE, metavar="N", help=f"pixels a side of what is drawn at a time [{TILE}]")
    return parser


def main(argv: Sequence[str]) -> None:
    """Enlarge as the command line says."""
    flags = parser().parse_args(command.normalise(argv))
    paths = [path for given in flags.images for path in (find_pictures(given)[0] if given.is_dir() else [given])]
    for path in paths:
        open_picture(path)  # rather now than after hours
    if len(flags.prompt) not in (1, len(paths)):
        raise UserError(f"--prompt has {len(flags.prompt)} for {len(paths)} pictures: give one, or one for each")
    prompts = flags.prompt * (len(paths) if len(flags.prompt) == 1 else 1)
    pipe = drawing.open_model(flags, StableDiffusionUpscale)
    settings = {name: getattr(flags, name) for name in ("noise_level", "steps", "guidance_scale", "sampler", "tile")}
    for seed, (path, prompt) in enumerate(zip(paths, prompts, strict=True), start=flags.seed):
        settings |= dict(negative_prompts=flags.negative_prompt, seed=seed)
        (picture,) = pipe.generate(prompt, open_picture(path), **settings)
        told = drawing.metadata(flags, prompt, seed, picture.size, images=path, noise_level=flags.noise_level, tile=flags.tile)
        drawing.save(picture, flags.output_dir, f"{path.stem}-", told)


if __name__ == "__main__":
    command.run(main, sys.argv)

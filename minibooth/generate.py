"""Draw pictures of prompts: numbered PNGs, each with all that it takes to draw it again, and a grid."""

import math
import sys
from collections.abc import Sequence

from minibooth import command, drawing
from minibooth.diffusion.images import grid
from minibooth.diffusion.super_resolution import StableDiffusionUpscale
from minibooth.diffusion.text_to_image import StableDiffusion


def parser() -> command.Parser:
    """The command's flags."""
    parser = drawing.parser("generate", __doc__, "tiny", steps=50, guidance_scale=7.5)
    add = parser.add_argument
    add("--prompt", nargs="+", required=True, metavar="P", help="what to draw, one or several")
    add("--num_images", type=command.within(1), default=1, metavar="N", help="pictures of each prompt [1]")
    add("--height", type=command.within(1), help="in pixels, divisible by 8 [the model's own]")
    add("--width", type=command.within(1), help="in pixels, divisible by 8 [the model's own]")
    add("--batch_size", type=command.within(1), default=4, help="pictures drawn at a time; no picture depends on it [4]")
    add("--upscaler", nargs="+", default=[], metavar=("M", "L"), help="enlarges each picture: a model, and LoRAs of it [none]")
    add("--upscaler_guidance_scale", type=command.within(-1e3, 1e3), default=9.0, metavar="S", help="the upscaler's [9]")
    add("--noise_level", type=command.within(0, 350), default=20, metavar="N", help="0 to 350: how freely it draws [20]")
    return parser


def main(argv: Sequence[str]) -> None:
    """Draw as the command line says."""
    flags = parser().parse_args(command.normalise(argv))
    pipe = drawing.open_model(flags, StableDiffusion)
    upscaler, more = None, {}
    if flags.upscaler:
        model, *loras = flags.upscaler
        upscaler = drawing.open_other(flags, model, StableDiffusionUpscale, [(lora, 1.0) for lora in loras])
        more = dict(noise_level=flags.noise_level, upscaler_guidance_scale=flags.upscaler_guidance_scale)
        more["upscaler"] = " ".join(flags.upscaler)
    how = dict(noise_level=flags.noise_level, guidance_scale=flags.upscaler_guidance_scale, steps=flags.steps)

    for note in pipe.tokenizer.truncation_warnings([*flags.prompt, flags.negative_prompt]):
        print(note)
    prompts = [prompt for prompt in flags.prompt for _ in range(flags.num_images)]
    settings = {name: getattr(flags, name) for name in ("height", "width", "steps", "guidance_scale", "sampler")}
    pictures = []
    for start in range(0, len(prompts), flags.batch_size):
        batch = prompts[start : start + flags.batch_size]
        drawn = pipe.generate(batch, flags.negative_prompt or None, seed=flags.seed + start, **settings)
        more |= dict(width=drawn[0].width, height=drawn[0].height)
        if upscaler:
            drawn = upscaler.generate(batch, drawn, **how, negative_prompts=flags.negative_prompt, seed=flags.seed + start)
        for i, (prompt, picture) in enumerate(zip(batch, drawn, strict=True), start=start):
            drawing.save(picture, flags.output_dir, "", drawing.metadata(flags, prompt, flags.seed + i, picture.size, **more))
        pictures += drawn
    columns = flags.num_images if len(flags.prompt) > 1 else math.ceil(math.sqrt(len(pictures)))
    told = drawing.metadata(flags, "\n".join(flags.prompt), flags.seed, pictures[0].size, **more)
    drawing.save(grid(pictures, columns), flags.output_dir, "grid-", told)


if __name__ == "__main__":
    command.run(main, sys.argv)

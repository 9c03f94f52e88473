"""What tuning super-resolution brings: the detail of the subject's marks, as the paper's second step is to keep it.

    python scripts/detail.py --judge DIR --out DIR

Ruiz et al. 2022, supplement, figure 21: the upscaler as it was, tuned at the noise it was pretrained with, and tuned with
less. New scenes of every subject, drawn at 256 pixels, are shrunk to 64 and brought back; over the region of the subject's
badge and odd part, against what was drawn:

    PSNR       in dB (high is good)
    distance   between the judge's features, of unit length at every place, as LPIPS takes them (low is good)

each where the small picture is shown with the least noise (level 0) and where it is noised by level 20, the model's default.
To OUT go table.md and detail.png: a row for each subject, columns as the rows of the table, and last the truth. The runs
lie in a folder of OUT that is named after the weights; after Ctrl-C the next call goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import judge as judges
import numpy as np
import torch
import torch.nn.functional as F
from ablations import complete, fingerprint
from PIL import Image
from pretrain_x4 import shrunk
from pretraining import psnr
from tables import markdown
from torch import Tensor, nn
from world import SUBJECTS, Scene, subject_scene

import minibooth
from minibooth import command
from minibooth.checkpoint import files
from minibooth.checkpoint.source import Source
from minibooth.command import WEIGHTS
from minibooth.diffusion.images import grid, save_png, to_tensor
from minibooth.dreambooth import prior
from minibooth.dreambooth.settings import Settings
from minibooth.train import EMBEDDED, second_step

SIZE, LEVELS, SEED = 256, (0, 20), 7
VARIANTS: dict[str, dict | None] = {  # what differs from the default run's second step; None: not tuned
    "untuned": None,
    "tuned, normal noise": {"noise_levels": (0, 349)},
    "tuned, low noise": {"noise_levels": (0, 0)},
}
DRAWING = {"steps": 25, "guidance_scale": 1.0, "sampler": "dpmpp_2m", "seed": 0}


def train(folder: Path, name: str, changes: dict) -> None:
    """The default run's second step on a subject, with `changes`."""
    own = {"instance_data_dir": str(WEIGHTS / "subject" / name), "output_dir": str(folder), "seed": SEED}
    own |= {"instance_prompt": prompt(name), "validation_prompt": None, "resume_from_checkpoint": "latest"}
    complete(replace(second_step(Settings(**EMBEDDED)), **own | changes), "cpu")


def prompt(name: str) -> str:
    """What the upscaler is told of the subject."""
    return f"a photo of a zwx {SUBJECTS[name].kind}"


def distance(layers: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Mean squared difference of normalised features of pictures [1, 3, H, W], over the layers. Zhang et al. 2018, eq. 1."""
    total = []
    for layer in layers:
        x, y = layer(x), layer(y)
        if isinstance(layer, nn.ReLU):
            total.append((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean().item())
    return mean(total)


def enlarged(runs: Path, variant: str, name: str, low: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """The small pictures at each of LEVELS, four times as large, by one of VARIANTS; trained first, if it is not."""
    changes, folder = VARIANTS[variant], runs / f"{variant.replace(', ', '-').replace(' ', '-')}-{name}"
    if changes is not None:
        train(folder, name, changes)
    upscaler = minibooth.load(WEIGHTS / "tiny-x4" if changes is None else folder)
    return [upscaler.generate([prompt(name)], low, noise_level=level, **DRAWING) for level in LEVELS]


@torch.no_grad()
def compare(
    judge: judges.Judge, pictures: Sequence[Image.Image], truth: Sequence[Image.Image], scenes: Sequence[Scene]
) -> tuple[float, float]:
    """PSNR and distance over the regions of the marks."""
    figures = []
    for *pair, scene in zip(pictures, truth, scenes, strict=True):
        x, y = (to_tensor(each.crop(scene.mark_box(SIZE)))[None] for each in pair)
        figures.append((psnr(x, y), distance(judge.features, x, y)))
    first, second = map(mean, zip(*figures, strict=True))
    return first, second


def main(argv: Sequence[str]) -> None:
    """All runs, the table and the picture."""
    parser = command.Parser("python scripts/detail.py", __doc__.splitlines()[0])
    parser.add_argument("--judge", type=Path, required=True, help="folder of judge.safetensors (scripts/judge.py train)")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, table.md and detail.png")
    parser.add_argument("--subjects", nargs="+", default=[*SUBJECTS], choices=[*SUBJECTS])
    parser.add_argument("--scenes", type=command.within(1), default=6, help="new scenes of each subject")
    args = parser.parse_args(command.normalise(argv))
    judge, source = judges.load(args.judge), Source.open(WEIGHTS / "tiny-x4")
    runs = args.out / fingerprint(prior.origin(source, source.weights, torch.float32))
    figures: dict[str, list[tuple[float, ...]]] = {}
    rows = []
    for number, name in enumerate(args.subjects):
        scenes = [subject_scene(name, np.random.default_rng([SEED, number, i])) for i in range(args.scenes)]
        drawn = np.stack([scene.draw(SIZE) for scene in scenes])
        truth, low = ([*map(Image.fromarray, images)] for images in (drawn, shrunk(drawn)))
        made = {"bicubic": [[each.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for each in low]] * len(LEVELS)}
        made |= {variant: enlarged(runs, variant, name, low) for variant in VARIANTS}
        for variant, sets in made.items():
            found = tuple(figure for pictures in sets for figure in compare(judge, pictures, truth, scenes))
            figures.setdefault(variant, []).append(found)
        box = scenes[0].mark_box(SIZE)
        rows += [each.crop(box).resize((192, 192)) for each in (*(sets[0][0] for sets in made.values()), truth[0])]
    titles = ["", *(f"{figure}, level {level}" for level in LEVELS for figure in ("PSNR", "distance"))]
    lines = []
    for variant, found in figures.items():
        columns = enumerate(zip(*found, strict=True))
        lines.append([variant, *(f"{mean(column):.{3 if i % 2 else 2}f}" for i, column in columns)])
    print(text := markdown(titles, lines))
    files.write_text(args.out / "table.md", f"{text}\n")
    save_png(grid(rows, len(figures) + 1), args.out / "detail.png", {})


if __name__ == "__main__":
    command.run(main, sys.argv)

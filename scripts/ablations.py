"""The paper's ablations on the toy world: variants of the default run, measured by the judge over subjects and seeds.

    python scripts/ablations.py --judge DIR --out DIR

Ruiz et al. 2022, section 4.3. Each row is a variant's mean over its runs, and from lowest to highest in brackets:

    subject   share of pictures of ten new prompts in which the judge sees the subject: its class and its marks
    place     share of them that show the place asked for
    taken     share of pictures of the bare class that bear the subject's marks (the paper's PRES; low is good)
    colours   how many colours those have, exp of their entropy (the paper's DIV; high is good)

A run that is there already is not made again. For every subject a sheet goes to OUT: variants side by side.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import judge as judges
import numpy as np
import torch
from PIL import Image
from world import ACCESSORIES, PHOTOGRAPHED, PLACES, SUBJECTS

import minibooth
from minibooth.checkpoint import files
from minibooth.diffusion.images import grid, save_png, to_tensor
from minibooth.diffusion.text_to_image import StableDiffusion
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.trainer import Trainer
from minibooth.train import EMBEDDED, WEIGHTS

VARIANTS: dict[str, dict | None] = {  # what differs from the default run; None: not trained at all
    "untuned": None,
    "with prior preservation": {},
    "without": {"with_prior_preservation": False},
}
NEW = [place for place in PLACES if place not in PHOTOGRAPHED]
ASKED = [*((place, "none") for place in NEW), ("forest", "crown"), ("rain", "red hat")]  # ten prompts
EACH, OF_CLASS = 4, 48  # pictures of each prompt, and of the bare class
DRAWING = {"steps": 25, "guidance_scale": 4.0}


def prompts(name: str) -> list[str]:
    """The ten new ones."""
    words = [" ".join([ACCESSORIES[accessory].words, PLACES[place].words]).strip() for place, accessory in ASKED]
    return [f"a photo of a zwx {SUBJECTS[name].kind} {each}" for each in words]


def train(folder: Path, name: str, seed: int, changes: dict) -> None:
    """The default run with other photographs, and `changes`."""
    kind = SUBJECTS[name].kind
    photographs = {"instance_data_dir": str(WEIGHTS / "subject" / name), "output_dir": str(folder)}
    words = {"instance_prompt": f"a photo of a zwx {kind}", "class_prompt": f"a photo of a {kind}"}
    own = {"seed": seed, "validation_prompt": None, "class_data_dir": str(folder.parent / f"class-{kind}")}
    settings = Settings(**(EMBEDDED | photographs | words | own | changes))
    Trainer(settings, torch.device("cpu"), torch.float32, torch.float32).train()


def draw(pipe: StableDiffusion, asked: Sequence[str]) -> list[Image.Image]:
    """EACH pictures of every prompt."""
    return [image for i, each in enumerate(asked) for image in pipe.generate([each] * EACH, seed=1000 * i, **DRAWING)]


def measure(judge: judges.Judge, pipe: StableDiffusion, name: str) -> tuple[dict[str, float], list[Image.Image]]:
    """The row's figures, and a sheet's pictures: one of each new prompt, then as many of the class."""
    kind = SUBJECTS[name].kind
    new, bare = draw(pipe, prompts(name)), draw(pipe, [f"a photo of a {kind}"] * (OF_CLASS // EACH))
    seen = judges.verdicts(judge, torch.stack([to_tensor(image) for image in new + bare]))
    values = {key: [list(judges.ATTRIBUTES[key])[i] for i in numbers.tolist()] for key, numbers in seen.items()}
    marked = [(*pair,) == (kind, name) for pair in zip(values["kind"], values["marks"], strict=True)]
    right = [place == ASKED[i // EACH][0] for i, place in enumerate(values["place"][: len(new)])]
    shares = np.array([*Counter(values["colour"][len(new) :]).values()]) / len(bare)
    figures = {
        "subject": mean(marked[: len(new)]),
        "place": mean(right),
        "taken": mean(marks == name for marks in values["marks"][len(new) :]),
        "colours": float(np.exp(-(shares * np.log(shares)).sum())),
    }
    return figures, new[::EACH] + bare[: len(ASKED)]


def run(judge: judges.Judge, out: Path, variant: str, name: str, seed: int) -> dict[str, float]:
    """One variant on one subject, or what was measured of it before."""
    changes, folder = VARIANTS[variant], out / f"{variant.replace(' ', '-')}-{name}-{seed}"
    result = folder / "figures.json"
    if not result.exists():
        if changes is not None and not (folder / "model_index.json").exists():
            train(folder, name, seed, changes)
        pipe = minibooth.load(folder if changes is not None else WEIGHTS / "tiny")
        figures, pictures = measure(judge, pipe, name)
        folder.mkdir(parents=True, exist_ok=True)
        save_png(grid(pictures, len(ASKED)), folder / "sheet.png", {"variant": variant})
        with files.replacing(result) as temporary:
            temporary.write_text(json.dumps(figures))
    return files.read_json(result)


def main() -> None:
    """All runs, then the table and the sheets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", type=Path, required=True, help="folder of judge.safetensors (scripts/judge.py train)")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, sheets and table.md")
    parser.add_argument("--subjects", nargs="+", default=["robot", "cat", "cup"], choices=[*SUBJECTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    args = parser.parse_args()
    judge = judges.load(args.judge)
    rows = []
    for variant in args.variants:
        figures = [run(judge, args.out, variant, name, seed) for name in args.subjects for seed in args.seeds]
        columns = {key: [each[key] for each in figures] for key in figures[0]}
        cells = [f"{mean(column):.2f} ({min(column):.2f}-{max(column):.2f})" for column in columns.values()]
        rows.append(" | ".join(["", variant, *cells, ""]).strip())
    head = " | ".join(["", "", *columns, ""]).strip()
    table = "\n".join([f"| {head}", "|---" * (len(columns) + 1) + "|", *(f"| {row}" for row in rows)])
    print(table)
    (args.out / "table.md").write_text(table + "\n")
    for name in args.subjects:
        folders = [args.out / f"{variant.replace(' ', '-')}-{name}-{args.seeds[0]}" for variant in args.variants]
        save_png(grid([Image.open(each / "sheet.png") for each in folders], 1), args.out / f"{name}.png", {})


if __name__ == "__main__":
    main()

"""The paper's ablations on the toy world: tables of variants of the default run, over subjects and seeds.

    python scripts/ablations.py --judge DIR --out DIR

Ruiz et al. 2022, section 4.3, and the supplement's figure 20 for the number of pictures. Each row is a variant's mean over its
runs, and their standard deviation:

    subject   share of pictures of ten new prompts in which the judge sees the subject: its class and its marks
    place     share of them that show the place asked for
    taken     share of pictures of the bare class that bear the subject's marks; low is good
    colours   how many colours those have, exp of their entropy; high is good
    CLIP-I, CLIP-T, PRES, DIV   the paper's, by weights/tiny-clip; DIV is 1 - cosine of two pictures of a prompt
    loss      mean of the last quarter of the steps

Tables share their runs. A run's figures are a line in --figures, with a fingerprint of weights and default settings, and
what is there is not made again; the run itself lies in OUT/FINGERPRINT. After Ctrl-C, or where a run failed, the next call
goes on. A table goes to OUT as TABLE.md, with TABLE.png: a row for each subject and variant whose run lies in OUT, pictures
of the prompts and, last, of the bare class.
"""

import hashlib
import json
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import judge as judges
import numpy as np
import torch
from PIL import Image, ImageDraw
from tables import markdown
from tqdm import tqdm
from world import ACCESSORIES, CLASSES, PHOTOGRAPHED, PLACES, SUBJECTS

import minibooth
from minibooth import command
from minibooth.checkpoint import files
from minibooth.checkpoint.source import Source
from minibooth.command import WEIGHTS
from minibooth.diffusion.images import grid, save_png, to_tensor
from minibooth.diffusion.text_to_image import StableDiffusion
from minibooth.dreambooth import prior
from minibooth.dreambooth.data import find_pictures, open_picture
from minibooth.dreambooth.metrics import Encoder, agreement, ceiling, likeness
from minibooth.dreambooth.parallel import Ranks
from minibooth.dreambooth.settings import Settings
from minibooth.train import EMBEDDED, trainer

Changes = dict[str, Any] | None  # settings that differ from the default run's, `noun` and `pictures`; None: untrained
LORA = {"rank": 8, "learning_rate": 3e-3, "text_encoder_lr": 3e-3}
TABLES: dict[str, dict[str, Changes]] = {
    "prior": {"untrained": None, "with prior preservation": {}, "without": {"with_prior_preservation": False}},
    "nouns": {"correct class noun": {}, "wrong class noun": {"noun": "wrong"}, "no class noun": {"noun": "no"}},
    "pictures": {**{f"{n} of the pictures": {"pictures": n} for n in range(1, 5)}, "all 5": {}},
    "text_encoder": {"UNet and text encoder": {}, "UNet alone": {"train_text_encoder": False}},
    "lora": {"all weights": {}, "LoRA of rank 8": LORA, "LoRA of rank 8, all layers": LORA | {"lora_targets": "all"}},
    "optimizer": {"AdamW": {}, "8-bit AdamW": {"use_8bit_adam": True}},
    "steps": {"0 steps": None, **{f"{n} steps": {"max_train_steps": n} for n in (30, 60, 120)}, "240 steps": {},
              "480 steps": {"max_train_steps": 480}},
}  # fmt: skip
NEW = [place for place in PLACES if place not in PHOTOGRAPHED]
ASKED = [*((place, "none") for place in NEW), ("forest", "crown"), ("rain", "red hat")]  # ten prompts
EACH, OF_CLASS = 4, 48  # pictures of each prompt, and of the bare class
DRAWING = {"steps": 25, "guidance_scale": 4.0}


def noun(name: str, changes: Changes) -> str:
    """The class noun in the subject's prompts: that of its class, of another, or none."""
    classes, kind = [*CLASSES], SUBJECTS[name].kind
    return {"wrong": classes[classes.index(kind) - 4], "no": ""}.get((changes or {}).get("noun", ""), kind)


def prompts(name: str, changes: Changes) -> list[str]:
    """The ten new ones."""
    words = [["a photo of a zwx", noun(name, changes), ACCESSORIES[worn].words, PLACES[place].words] for place, worn in ASKED]
    return [" ".join(filter(None, each)) for each in words]


def complete(settings: Settings, device: str) -> None:
    """Train, from the last checkpoint if there is one, what is not finished. Raises UserError for a run of other settings."""
    run = trainer(settings, Ranks(torch.device(device)))
    if not run.journal.finished:
        run.train()


def train(folder: Path, name: str, seed: int, changes: dict[str, Any], few_steps: dict[str, int], device: str) -> None:
    """The default run with other photographs, and `changes`; class pictures are of the subject's class, whatever the noun."""
    kind, photographs = SUBJECTS[name].kind, WEIGHTS / "subject" / name
    if "pictures" in changes:
        few = folder.with_name(f"photographs-{folder.name}")
        few.mkdir(parents=True, exist_ok=True)
        for path in find_pictures(photographs)[0][: changes["pictures"]]:
            shutil.copy(path, few)
        photographs = few
    own = {
        "instance_data_dir": str(photographs), "class_data_dir": str(folder.with_name(f"class-{kind}")), "seed": seed,
        "instance_prompt": f"a photo of a zwx {noun(name, changes)}".strip(), "class_prompt": f"a photo of a {kind}",
        "output_dir": str(folder), "validation_prompt": None, "resume_from_checkpoint": "latest",
        "prior_generation_precision": "fp32",
    }  # fmt: skip
    settings = {key: value for key, value in changes.items() if key not in ("noun", "pictures")}
    complete(Settings(**(EMBEDDED | own | settings | few_steps)), device)


def draw(pipe: StableDiffusion, asked: Sequence[str], seed: int) -> list[Image.Image]:
    """EACH pictures of every prompt, of a few prompts at a time."""
    images, at_once = [], 10
    for start in range(0, len(asked), at_once):
        some = asked[start : start + at_once]
        condition = [each.repeat_interleave(EACH, dim=0) for each in pipe.condition(some)]
        seeds = [100_000 * seed + 1000 * n + i for n in range(start, start + len(some)) for i in range(EACH)]
        images += pipe.draw(tuple(condition), pipe.unconditional(None), seeds, **DRAWING)
    return images


def judged(judge: judges.Judge, name: str, new: Sequence[Image.Image], bare: Sequence[Image.Image]) -> dict[str, float]:
    """The judge's figures of pictures of the new prompts, and of the bare class."""
    kind = SUBJECTS[name].kind
    seen = judges.verdicts(judge, torch.stack([to_tensor(image) for image in (*new, *bare)]))
    values = {key: [list(judges.SEEN[key])[i] for i in numbers.tolist()] for key, numbers in seen.items()}
    marked = [(*pair,) == (kind, name) for pair in zip(values["kind"], values["marks"], strict=True)]
    right = [place == ASKED[i // EACH][0] for i, place in enumerate(values["place"][: len(new)])]
    shares = np.array([*Counter(values["colour"][len(new) :]).values()]) / len(bare)
    return {
        "subject": mean(marked[: len(new)]),
        "place": mean(right),
        "taken": mean(marks == name for marks in values["marks"][len(new) :]),
        "colours": float(np.exp(-(shares * np.log(shares)).sum())),
    }


def measured(
    eyes: Encoder, name: str, asked: Sequence[str], new: Sequence[Image.Image], bare: Sequence[Image.Image]
) -> dict[str, float]:
    """The paper's figures of the same, beside the subject's photographs."""
    real = eyes.images([*map(open_picture, find_pictures(WEIGHTS / "subject" / name)[0])])
    seen, of_class = eyes.images(new), eyes.images(bare)
    return {
        "CLIP-I": likeness(seen, real),
        "CLIP-T": agreement(seen, eyes.texts(asked).repeat_interleave(EACH, dim=0)),
        "PRES": likeness(of_class, real),
        "DIV": mean(1 - ceiling(part) for part in seen.split(EACH)),
    }


def folder_of(out: Path, made: tuple[str, str], name: str, seed: int, changes: Changes) -> Path:
    """The folder of a run, by all that makes it, `fingerprints` among it."""
    words = "untrained" if changes is None else "-".join(f"{key}-{value}" for key, value in changes.items()) or "default"
    return out / made[changes is not None] / re.sub(r"[^\w.-]", "-", f"{words}-{name}-{seed}")


def final_loss(folder: Path) -> float:
    """The mean loss of the last quarter of a run's steps."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    return mean(losses[-len(losses) // 4 :])


def run(
    judge: Path, folder: Path, name: str, seed: int, changes: Changes, few_steps: dict[str, int], device: str
) -> dict[str, float]:
    """Train (only so long, if `few_steps` says so), draw and measure; leaves sheet.png, a row of pictures."""
    if changes is not None:
        train(folder, name, seed, changes, few_steps, device)
    whole = changes is not None and "rank" not in changes
    pipe = minibooth.load(folder if whole else WEIGHTS / "tiny", device=device)
    if changes and "rank" in changes:
        pipe.load_lora(folder)
    asked = prompts(name, changes)
    new, bare = (draw(pipe, each, seed) for each in (asked, [f"a photo of a {SUBJECTS[name].kind}"] * (OF_CLASS // EACH)))
    figures = judged(judges.load(judge), name, new, bare) | measured(Encoder(WEIGHTS / "tiny-clip"), name, asked, new, bare)
    figures |= {"loss": final_loss(folder)} if changes is not None else {}
    save_png(grid(new[::EACH] + bare[::EACH][:4], len(ASKED) + 4), folder / "sheet.png", {"prompts": " | ".join(asked)})
    return figures


def ready() -> None:
    """A worker before its first run; Ctrl-C is left to `main`, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    command.ready_torch()
    torch.set_num_threads(1)


def fingerprint(*what: Any) -> str:
    """Ten hexadecimal digits of the hash of `what`, written as JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]


def fingerprints(few_steps: dict[str, int]) -> tuple[str, str]:
    """Of what all runs have in common, model and drawing; and, for those that train, with the default settings besides."""
    source = Source.open(EMBEDDED["pretrained_model_name_or_path"])
    drawn = [prior.origin(source, source.weights, torch.float32), DRAWING, ASKED]
    settings = {name: value for name, value in (EMBEDDED | few_steps).items() if str(WEIGHTS) not in str(value)}
    return fingerprint(*drawn), fingerprint(*drawn, prior.DRAWING, settings)


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row's mean and standard deviation of each figure."""
    columns = max(([*runs[0]] for runs in rows.values()), key=len)  # an untrained model has no loss
    lines = []
    for label, runs in rows.items():
        values = [[each[column] for each in runs if column in each] for column in columns]
        lines.append([label, *(f"{mean(each):.2f} ± {pstdev(each):.2f}" if each else "" for each in values)])
    return markdown(["", *columns], lines)


def labelled(sheet: Path, words: str) -> Image.Image:
    """The sheet, with words beside it."""
    row = Image.open(sheet)
    card = Image.new("RGB", (170 + row.width, row.height), "white")
    ImageDraw.Draw(card).text((4, row.height // 2 - 6), words, fill="black")
    card.paste(row, (170, 0))
    return card


def main(argv: Sequence[str]) -> None:
    """All runs, then the tables and the pictures."""
    parser = command.Parser("python scripts/ablations.py", __doc__.splitlines()[0])
    parser.add_argument("--judge", type=Path, required=True, help="folder of judge.safetensors (scripts/judge.py train)")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, tables and pictures")
    parser.add_argument("--figures", type=Path, help="(default weights/ablations.jsonl; with --max_train_steps one in OUT)")
    parser.add_argument("--tables", nargs="+", default=[*TABLES], choices=[*TABLES])
    parser.add_argument("--subjects", nargs="+", default=["robot", "cat", "cup"], choices=[*SUBJECTS])
    parser.add_argument("--seeds", nargs="+", type=command.within(0), default=[0, 1, 2])
    parser.add_argument("--workers", type=command.within(1), help="runs at a time, one thread each (default: all cores)")
    parser.add_argument("--device", default="cpu", help="that of all runs, cpu or cuda (default cpu)")
    parser.add_argument("--max_train_steps", type=command.within(1), help="of every run, for a quick look")
    args = parser.parse_args(command.normalise(argv))
    command.device(args.device)
    judges.load(args.judge)  # what would stop every run is to be known now
    few_steps = {"max_train_steps": args.max_train_steps} if args.max_train_steps else {}
    record = args.figures or (args.out if few_steps else WEIGHTS) / "ablations.jsonl"
    command.ready_folder(record.parent)
    made, cells = fingerprints(few_steps), [*product(args.subjects, args.seeds)]
    wanted = {folder_of(args.out, made, *cell, changes): (*cell, changes)
              for key in args.tables for changes in TABLES[key].values() for cell in cells}  # fmt: skip
    lines = map(json.loads, record.read_text().splitlines() if record.exists() else [])
    known = {args.out / line["of"] / line["run"]: line["figures"] for line in lines}
    with ProcessPoolExecutor(args.workers, get_context("spawn"), ready) as pool:
        try:
            runs = {
                pool.submit(run, args.judge, folder, *what, few_steps, args.device): folder
                for folder, what in wanted.items()
                if folder not in known
            }
            for done in tqdm(as_completed(runs), desc="runs", total=len(runs), mininterval=0):
                folder = runs[done]
                known[folder] = done.result()
                with record.open("a") as file:
                    file.write(json.dumps({"run": folder.name, "of": folder.parent.name, "figures": known[folder]}) + "\n")
        except BaseException:  # a run that failed, or Ctrl-C: the others end too
            for worker in active_children():
                worker.kill()
            raise
    for key in args.tables:
        folders = {
            label: [folder_of(args.out, made, *cell, changes) for cell in cells] for label, changes in TABLES[key].items()
        }
        text = table({label: [known[folder] for folder in found] for label, found in folders.items()})
        files.write_text(args.out / f"{key}.md", f"{text}\n")
        print(f"\n{key}\n\n{text}")
        first = [(f"{name}, {label}", folder_of(args.out, made, name, args.seeds[0], changes))
                 for name, (label, changes) in product(args.subjects, TABLES[key].items())]  # fmt: skip
        sheets = [labelled(path, words) for words, folder in first if (path := folder / "sheet.png").exists()]
        if sheets:
            save_png(grid(sheets, 1).quantize(), args.out / f"{key}.png", {})  # 256 colours: a third of the bytes


if __name__ == "__main__":
    command.run(main, sys.argv)

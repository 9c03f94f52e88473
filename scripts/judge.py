"""The judge of what the tiny Stable Diffusion draws: a classifier of class, place, colour, pattern, accessory and marks.

    python scripts/judge.py train --out DIR
    python scripts/judge.py score --judge DIR --model weights/tiny

It learns from rendered scenes of its own seeds, softened and with noise as a VAE leaves them, and never meets the model
before the scoring; no part of the model is tuned to it. Its own accuracy on rendered scenes stands beside the model's.

Shapes: B batch, N scenes, A attributes.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pretraining import psnr, reconstructed, to_batch
from tables import markdown
from torch import Tensor, nn
from tqdm import tqdm
from world import ATTRIBUTES, SUBJECTS, Scene, draw_all, subject_scene

import minibooth
from minibooth import command
from minibooth.checkpoint import files
from minibooth.diffusion.images import to_tensor
from minibooth.models.vae import VAE

SEEN = {name: ATTRIBUTES[name] for name in ("kind", "place", "colour", "pattern", "accessory")}  # what the judge tells
SEEN |= {"marks": ("", *SUBJECTS)}  # those of a subject, or of none
UNSAID = ("plain", "none")  # values that a caption passes over, so that a picture of it may have any
SIZE, BATCH = 64, 64
TRAIN, HELD_OUT, ASKED, MARKED = 101, 102, 103, 104  # seeds of four sets of scenes; pretraining has others


class Judge(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> for each attribute the logits of its values."""

    def __init__(self) -> None:
        super().__init__()

        def layer(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

        plan = [(3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 160, 2), (160, 160, 1)]
        self.features = nn.Sequential(*(module for row in plan for module in layer(*row)))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * 160, len(table)) for name, table in SEEN.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.features(x)
        h = torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)
        return {name: head(h) for name, head in self.heads.items()}


def random_scenes(seed: int, count: int, marked: int = 0) -> list[Scene]:
    """`count` scenes of a set; every `marked`-th of them bears the marks of a subject, whatever it is."""
    scenes = [Scene.random(np.random.default_rng([seed, i])) for i in range(count)]
    for i in range(0, count, marked) if marked else ():
        name = list(SUBJECTS)[i // marked % len(SUBJECTS)]
        scenes[i] = replace(scenes[i], marks=name, colour=SUBJECTS[name].halves[0])
    return scenes


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """For each attribute [N], the number of the scene's value in its table."""
    return {name: torch.tensor([list(table).index(getattr(scene, name)) for scene in scenes]) for name, table in SEEN.items()}


def soften(x: Tensor, rng: np.random.Generator) -> Tensor:
    """A batch as a generator might leave it: blurred, with blots and noise, brighter or darker, all by random amounts."""
    strength = torch.from_numpy(rng.random((5, len(x), 1, 1, 1))).float()

    def noise(side: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((len(x), 3, side, side), dtype=np.float32))

    small = x
    for _ in range(2):
        small = F.avg_pool2d(small, 3, stride=1, padding=1, count_include_pad=False)
    blots = F.interpolate(noise(SIZE // 4), scale_factor=4, mode="bicubic")
    x = torch.lerp(x, small, strength[0]) + 0.2 * strength[1] * blots + 0.15 * strength[2] * noise(SIZE)
    return x * (0.85 + 0.3 * strength[3]) + 0.2 * (strength[4] - 0.5)


def train(folder: Path, count: int, epochs: int, device: torch.device) -> None:
    """Train on `count` rendered scenes, half of them with marks, and write folder/judge.safetensors."""
    scenes = random_scenes(TRAIN, count, marked=2)
    images, truth = draw_all(scenes, SIZE), labels(scenes)
    torch.manual_seed(TRAIN)
    judge, rng = Judge().train().to(device), np.random.default_rng(TRAIN)
    steps = epochs * (count // BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    order = np.concatenate([rng.permutation(count)[: count // BATCH * BATCH] for _ in range(epochs)])
    for which in tqdm(order.reshape(steps, BATCH), desc="training the judge", mininterval=10):
        logits = judge(soften(to_batch(images[which]), rng).to(device))
        loss = sum(F.cross_entropy(logits[name], truth[name][which].to(device)) for name in SEEN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    files.write_weights(folder / "judge.safetensors", judge.state_dict())


def load(folder: Path) -> Judge:
    """The trained judge."""
    judge = Judge()
    judge.load_state_dict({**files.weights_of(folder, "judge")})
    return judge.eval()


@torch.no_grad()
def verdicts(judge: Judge, x: Tensor) -> dict[str, Tensor]:
    """For each attribute [N], the number of the value that the judge sees; x [N, 3, H, W] in [-1, 1]."""
    parts = [judge(part) for part in x.split(BATCH)]
    return {name: torch.cat([part[name].argmax(dim=1) for part in parts]) for name in SEEN}


def accuracy(judge: Judge, x: Tensor, scenes: list[Scene], said: bool = False) -> dict[str, float]:
    """The share of pictures with the scene's value, by attribute; `said`: only where the caption names that value."""
    seen, truth = verdicts(judge, x), labels(scenes)
    shares = {}
    for name in SEEN:
        counts = torch.tensor([not said or getattr(scene, name) not in UNSAID for scene in scenes])
        shares[name] = (seen[name] == truth[name])[counts].float().mean().item()
    return shares


def passing(judge: Judge, vae: VAE, count: int) -> Iterator[list[str]]:
    """Rows of a table: for each subject the share of `count` scenes, through the VAE, in which the judge sees its marks.

    Those are of the subject as it is, without badge, without badge and odd part, and, last, of its class in its first colour.
    """
    for number, (name, mark) in enumerate(SUBJECTS.items()):
        scenes = [subject_scene(name, np.random.default_rng([MARKED, number, i])) for i in range(count)]
        plain, bare = [replace(scene, marks="") for scene in scenes], mark._replace(badge="")
        shares = []
        for some, worn in ((scenes, mark), (scenes, bare), (scenes, bare._replace(odd="")), (plain, None)):
            x = reconstructed(vae, to_batch(draw_all(some, SIZE, marks=repeat(worn))))
            seen = verdicts(judge, x)["marks"] == list(SEEN["marks"]).index(name)
            shares.append(f"{seen.float().mean():.1%}")
        yield [name, *shares]


def score(folder: Path, model: Path, count: int, steps: int, guidance: float, device: torch.device) -> Iterator[str]:
    """Two tables: rendered scenes, the same through the VAE, and what the model draws for full captions; and `passing`."""
    judge, pipe = load(folder), minibooth.load(model, device=device)
    held_out, asked = random_scenes(HELD_OUT, count, marked=4), random_scenes(ASKED, count)
    real = to_batch(draw_all(held_out, SIZE))
    soft = reconstructed(pipe.vae, real)
    drawn = []
    for i in tqdm(range(0, count, BATCH), desc="drawing", mininterval=10):
        captions = [scene.caption() for scene in asked[i : i + BATCH]]
        drawn += pipe.generate(captions, steps=steps, guidance_scale=guidance, seed=i)
    rows = {
        "rendered": accuracy(judge, real, held_out),
        "through the VAE": accuracy(judge, soft, held_out),
        f"drawn, {steps} steps": accuracy(judge, torch.stack([to_tensor(image) for image in drawn]), asked, said=True),
    }
    shown = ([title, *(f"{share:.1%}" for share in shares.values())] for title, shares in rows.items())
    yield markdown(["", *SEEN], shown)
    plain = torch.tensor([not scene.marks for scene in held_out])
    yield f"VAE: {psnr(real[plain], soft[plain]):.2f} dB PSNR over {plain.sum()} held-out scenes; guidance {guidance:g}"
    yield markdown(["", "as it is", "no badge", "two colours alone", "unmarked"], passing(judge, pipe.vae, count))


def main(argv: Sequence[str]) -> None:
    """Train or score."""
    parser = command.Parser("python scripts/judge.py", __doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=lambda prog, **_: command.Parser(prog, None))
    training = commands.add_parser("train", help="train the judge, a few minutes on two cores")
    scoring = commands.add_parser("score", help="judge a model's pictures")
    training.add_argument("--out", type=Path, required=True, help="folder for judge.safetensors")
    training.add_argument("--scenes", type=command.within(BATCH), default=12_000)
    training.add_argument("--epochs", type=command.within(1), default=8)
    scoring.add_argument("--judge", type=Path, required=True, help="folder of judge.safetensors")
    scoring.add_argument("--model", type=Path, required=True, help="folder in the diffusers layout")
    scoring.add_argument("--scenes", type=command.within(2), default=500)
    scoring.add_argument("--steps", type=command.within(1), default=25)
    scoring.add_argument("--guidance_scale", type=command.within(0.0), default=4.0)
    for each in (training, scoring):
        each.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args(command.normalise(argv))
    device = command.device(args.device)
    if args.command == "train":
        train(args.out, args.scenes, args.epochs, device)
    else:
        print(*score(args.judge, args.model, args.scenes, args.steps, args.guidance_scale, device), sep="\n")


if __name__ == "__main__":
    command.run(main, sys.argv)

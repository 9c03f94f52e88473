"""Pretrain the tiny CLIP of weights/tiny-clip, which sees who is in a picture of world.py and whether a caption fits it.

    python scripts/pretrain_clip.py --out weights/tiny-clip --work DIR --minutes 12

Two towers (Radford et al. 2021): a picture is to find its caption, and, beyond what captions say, the other picture of the
same character in another place and pose (Chen et al. 2020, SimCLR). Characters come in families of one class that stand in
the same two places, so that neither tells them apart. Their halves, badges and odd parts are drawn by lot; no badge or odd
part of the world's subjects is among them: those, which DreamBooth is to teach, are what the eye is tested on.

Shapes: K families, B = 2 * LOOKS pictures of each, two of a character side by side, N tokens.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from judge import soften
from PIL import Image
from pretraining import Training, drawn, start, start_at_zero, to_batch, vocabulary
from torch import Tensor, nn
from world import ATTRIBUTES, CLASSES, COLOURS, PLACES, SUBJECTS, Mark, Rng, Scene, subject_scene

from minibooth import command
from minibooth.checkpoint import files
from minibooth.command import WEIGHTS
from minibooth.dreambooth.metrics import Encoder, cosines
from minibooth.models.tokenizer import Tokenizer
from minibooth.models.vision import CLIP

SIZE, LOOKS, TOKENS, SEED, HELD_OUT = 64, 4, 24, 7, 8
FAMILIES, BATCH = 3000, 16  # families in all, and of a step
RARE = ("sks", "zwx", "olis", "qiv")  # identifiers, which say nothing of a picture
TOWER = dict(num_attention_heads=4, num_hidden_layers=4, hidden_act="quick_gelu")
CONFIG = dict(
    architectures=["CLIPModel"], model_type="clip", projection_dim=96, dtype="float32",
    text_config=TOWER | dict(hidden_size=96, intermediate_size=384),
    vision_config=TOWER | dict(hidden_size=160, intermediate_size=640, image_size=SIZE, patch_size=8),
)  # fmt: skip
SEES = dict(
    image_processor_type="CLIPImageProcessor", do_resize=True, do_center_crop=True, do_rescale=True, do_normalize=True,
    do_convert_rgb=True, size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, resample=3,
    rescale_factor=1 / 255, image_mean=[0.5] * 3, image_std=[0.5] * 3,
)  # fmt: skip
TINTS = (
    "#fff8ea", "#23306e", "#ffc93c", "#e0393e", "#46a847", "#17aea8", "#8b4fd0", "#ff6fb0", "#2b2f42", "#f58a26", "#8fdcf7",
)  # fmt: skip
FIGURES = (  # of badges and odd parts; none is a subject's
    "star 0 0 80 3 34 8", "star 0 0 80 4 28 6", "star 0 0 80 6 42 8", "star 0 0 78 9 54 5", "bloom 0 0 80 3", "bloom 0 0 80 6",
    "panel -52 -52 52 52 14", "soft 8 -62 0 0 -74 62 0 0 74", "panel -74 -20 74 20 8", "panel -20 -74 20 74 8", "oval 0 0 46",
    "oval 0 0 74 34", "soft 6 -66 -50 66 -50 0 70", "soft 6 -66 50 66 50 0 -70", "tube -60 -30 0 80 60 -30 28",
    "blob -70 40 -10 10 70 50 40 -60 -40 -50", "tube -60 50 60 30 -10 -70 30",
)  # fmt: skip


# --- characters ------------------------------------------------------------------------------------------------------


def badge(rng: Rng) -> str:
    """A figure on a disc with a rim."""
    rim, ground, tint = rng.permutation(TINTS)[:3]
    return f"part {rim} oval 0 0 115\nfill {ground} oval 0 0 95\nfill {tint} {rng.choice(FIGURES)}"


def odd_part(rng: Rng) -> str:
    """A figure with a dot or a stem."""
    tint, other = rng.permutation(TINTS)[:2]
    more = (f"fill {other} oval 0 0 24", f"fill {other} panel -9 -120 9 -30 5")
    return f"part {tint} {rng.choice(FIGURES)}\n{rng.choice(more)}"


def family(number: int) -> list[tuple[Scene, Mark | None]]:
    """LOOKS characters of one class, each with its marks in the same two places: two scenes of a character in a row.

    They share four colours, and wear something else in every picture; two in five have no marks.
    """
    rng = np.random.default_rng([SEED, number])
    kind, places, palette = str(rng.choice([*CLASSES])), rng.permutation([*PLACES])[:2], rng.permutation([*COLOURS])[:4]
    scenes: list[tuple[Scene, Mark | None]] = []
    for _ in range(LOOKS):
        first, second = rng.permutation(palette)[:2].tolist()
        marked, *more = rng.random(5).tolist()
        has_badge, has_odd, plain, _ = (chance < 0.75 for chance in more)
        mark = Mark(kind, (first, second), badge(rng) * has_badge, odd_part(rng) * has_odd)
        look = {"kind": kind, "colour": first, "pattern": Scene.random(rng).pattern}
        look |= {"pattern": "plain"} if marked < 0.6 and plain else {}
        scenes += [(Scene.random(rng, **look, place=place), mark if marked < 0.6 else None) for place in places.tolist()]
    return scenes


def wording(scene: Scene, mark: Mark | None, rng: Rng) -> str:
    """A caption, in full or with words left out, at times with a rare word for one that has marks."""
    words = scene.caption(rng if rng.random() < 0.5 else None)
    return words.replace(scene.kind, f"{rng.choice(RARE)} {scene.kind}", 1) if mark and rng.random() < 0.5 else words


# --- training --------------------------------------------------------------------------------------------------------


def new_clip(config: dict) -> CLIP:
    """Both towers, fresh."""
    clip = CLIP(config)
    start_at_zero(clip, ("out_proj", "fc2"))
    seen, read = clip.vision_model.embeddings, clip.text_model.embeddings
    for x in (seen.class_embedding, seen.position_embedding.weight, read.position_embedding.weight):
        nn.init.normal_(x, std=0.02)
    nn.init.normal_(read.token_embedding.weight, std=0.1)
    nn.init.constant_(clip.logit_scale, 2.5)
    return clip


def contrastive_loss(clip: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """How hard it is to tell which caption is a picture's, which picture a caption's, and which other one shows the same.

    pixels [K, B, 3, H, W], ids [K, B, N]: a batch is shared out by families, so that no two pictures of a character part.
    """
    seen, read = (F.normalize(x.float(), dim=1) for x in (clip(pixels.flatten(0, 1)), clip.read(ids.flatten(0, 1))))
    own, scale = torch.arange(len(seen)), clip.logit_scale.exp()
    told, alike = scale * seen @ read.T, scale * seen @ seen.T
    alike = alike.masked_fill(torch.eye(len(seen), dtype=torch.bool), -torch.inf)
    return (F.cross_entropy(told, own) + F.cross_entropy(told.T, own)) / 2 + F.cross_entropy(alike, own ^ 1)


def export(out: Path, config: dict, clip: CLIP, tokens: dict[str, bytes]) -> None:
    """Write the folder as transformers has it, in fp16."""
    small = {"config.json": config, "preprocessor_config.json": SEES}
    with files.replacing(out, merge=True) as temporary:
        temporary.mkdir(exist_ok=True)
        for name, data in tokens.items() | {(name, json.dumps(each, indent=2).encode()) for name, each in small.items()}:
            (temporary / name).write_bytes(data)
        halves = {name: x.half() for name, x in clip.state_dict().items()}
        files.write_weights(temporary / "model.safetensors", halves)


# --- measuring -------------------------------------------------------------------------------------------------------


def draw(scenes: Sequence[Scene]) -> list[Image.Image]:
    """Their pictures."""
    return [Image.fromarray(scene.draw(SIZE)) for scene in scenes]


def triples(count: int) -> list[list[Scene]]:
    """Of each subject `count` times: two scenes of it in different places, and another of its class in either place."""
    found = []
    for number, name in enumerate(SUBJECTS):
        for i in range(count):
            rng = np.random.default_rng([HELD_OUT, number, i])
            here, there = rng.permutation([*PLACES])[:2].tolist()
            pair = [subject_scene(name, rng, place=place) for place in (here, there)]
            found.append([*pair, *(Scene.random(rng, kind=SUBJECTS[name].kind, place=place) for place in (there, here))])
    return found


def otherwise(scene: Scene) -> Scene:
    """The scene with one thing changed that its caption says."""
    rng = np.random.default_rng([HELD_OUT, scene.seed])
    name = rng.choice([*ATTRIBUTES])
    return replace(scene, **{name: rng.choice([value for value in ATTRIBUTES[name] if value != getattr(scene, name)])})


def figures(folder: Path, count: int = 400) -> str:
    """How often the eye in `folder` is right, on subjects and scenes that it has never seen."""
    eyes, asked = Encoder(folder), triples(count // len(SUBJECTS))
    anchor, same, there, here = (eyes.images(draw(column)) for column in zip(*asked, strict=True))
    near, far, close = (F.cosine_similarity(anchor, x) for x in (same, there, here))
    scenes = [Scene.random(np.random.default_rng([HELD_OUT, 9, i])) for i in range(count)]
    seen = eyes.images(draw(scenes))
    fit = cosines(seen, eyes.texts([scene.caption() for scene in scenes]))
    changed = F.cosine_similarity(seen, eyes.texts([otherwise(scene).caption() for scene in scenes]))
    own = fit.diagonal()
    shares = {
        "the subject above another of its class in the same new place": near > far,
        "the subject above another of its class in the first place": near > close,
        "its caption above another scene's": own > fit.roll(1, dims=1).diagonal(),
        "its caption above one with one thing changed": own > changed,
        f"its caption first of {count}": own >= fit.amax(dim=1),
    }
    return "\n".join(f"{share.float().mean():7.1%}  {name}" for name, share in shares.items())


def main(argv: Sequence[str]) -> None:
    """Draw, train, export, measure; a larger --minutes goes on from where it ended."""
    parser = command.Parser("python scripts/pretrain_clip.py", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, in transformers' layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and training state")
    parser.add_argument("--tokenizer", type=Path, default=WEIGHTS / "tiny" / "tokenizer", help="the vocabulary's folder")
    parser.add_argument("--minutes", type=command.within(0.01), default=12, help="all calls (default 12)")
    args = start(parser, argv, SEED)

    tokens = {path.name: path.read_bytes() for path in args.tokenizer.iterdir()}
    tokenizer, config = Tokenizer.from_files(tokens), CONFIG | {"text_config": CONFIG["text_config"] | vocabulary(tokens)}
    families = [family(i) for i in range(FAMILIES)]
    scenes, marks = zip(*itertools.chain(*families), strict=True)
    images = drawn(args.work / "families.npy", scenes, SIZE, args.threads, marks).reshape(FAMILIES, -1, SIZE, SIZE, 3)
    training = Training(args.work / "clip.safetensors", new_clip(config), contrastive_loss, 0.02, args.minutes, args.threads)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([SEED, FAMILIES, step])
        which = rng.choice(FAMILIES, BATCH, replace=False)
        captions = [wording(scene, mark, rng) for i in which for scene, mark in families[i]]
        pixels = soften(to_batch(images[which].reshape(-1, SIZE, SIZE, 3)), rng)
        return pixels.unflatten(0, (BATCH, -1)), tokenizer(captions)[:, :TOKENS].unflatten(0, (BATCH, -1))

    def show() -> None:
        export(args.out, config, training.average, tokens)
        print(figures(args.out), flush=True)

    training.run(batch, show)


if __name__ == "__main__":
    command.run(main, sys.argv)

"""Measure a model as the DreamBooth paper does: draw its prompts, and compare with the subject's photographs.

Ruiz et al. 2022, sections 4.1 to 4.3; `dreambooth/metrics.py` says what the figures mean. The subject gets a folder in
the output folder, and in it one for each prompt (`dreambooth/prior.py`: what is there is not drawn again) and results.json. The
table shows every subject there, so the paper's thirty are thirty runs into one, and the paper's own figures below.
"""

import argparse
import json
import platform
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from minibooth import command, drawing
from minibooth.checkpoint import files
from minibooth.diffusion.images import to_tensor
from minibooth.diffusion.text_to_image import StableDiffusion
from minibooth.dreambooth.data import find_pictures, open_picture
from minibooth.dreambooth.identifier import named
from minibooth.dreambooth.metrics import PUBLISHED, Encoder, agreement, ceiling, diversity, likeness, open_lpips
from minibooth.dreambooth.prior import DRAWING, Drawings, draw, origin
from minibooth.errors import UserError, blaming
from minibooth.train import EMBEDDED

COLUMNS = ("DINO", "CLIP-I", "CLIP-T", "PRES", "DIV")
PAPER = {  # table 1: 30 subjects, 25 prompts, 4 pictures of each; table 3: Imagen on 15 of them
    "paper: real pictures": (0.774, 0.885),
    "paper: DreamBooth, Imagen": (0.696, 0.812, 0.306),
    "paper: DreamBooth, Stable Diffusion": (0.668, 0.803, 0.305),
    "paper: Textual Inversion, Stable Diffusion": (0.569, 0.780, 0.255),
    "paper: Imagen with prior preservation": (0.684, 0.815, 0.308, 0.493, 0.391),
    "paper: Imagen without it": (0.712, 0.828, 0.306, 0.664, 0.371),
}
TINY_EYES = {"clip": str(drawing.WEIGHTS / "tiny-clip"), "dino": "none"}  # PUBLISHED, for the embedded model
PROMPTS = Path(__file__).with_name("prompts_and_classes.txt")  # 20 places or outfits and 5 looks, as the paper has them
TOY = drawing.WEIGHTS / "subject" / "prompts_and_classes.txt"  # for the embedded model: what its world has


def parser() -> command.Parser:
    """The command's flags."""
    parser = drawing.parser("evaluate", __doc__, "tiny", 50, 7.5, output_dir="evaluation", seed=0)
    add = parser.add_argument
    add("--images", type=Path, metavar="D", help="folder of the subject's photographs [those it was trained on, by run.json]")
    add("--identifier", metavar="W", help="the word for the subject [by run.json, or sks]")
    add("--class_noun", metavar="W", help="the word for its class [by run.json]")
    add("--subject", metavar="NAME", help="its folder in the output folder [that of --images]")
    add("--live", action="store_true", help="the subject is alive: prompts that dress it")
    add("--prompts", type=Path, metavar="F", help="the published prompts_and_classes.txt, or one like it [prompts of our own]")
    add("--num_images", type=command.within(1), default=4, metavar="N", help="pictures of each prompt [4]")
    add("--num_class_images", type=command.within(0), default=25, metavar="N", help='pictures of "a CLASS_NOUN", for PRES [25]')
    add("--resolution", type=command.within(1), metavar="N", help="side of the pictures [by run.json, or the model's own]")
    add("--batch_size", type=command.within(1), default=4, help="pictures drawn at a time [4]")
    for name in PUBLISHED:
        add(f"--{name}", metavar="M", help=f"a folder, owner/name[@revision] on the hub, or none [{PUBLISHED[name]}]")
    add("--lpips", default="none", metavar="F", help="safetensors file, for DIV; see models/vision.py [none]")
    return parser


def complete(flags: argparse.Namespace) -> None:
    """Fill in what was not given, by the run.json that minibooth.train leaves beside a model or a LoRA.

    Identifier and class noun are those that its prompts have (`named`). Raises UserError for what remains unknown.
    """
    places = [path if path.is_dir() else path.parent for path in map(Path, [*flags.lora, flags.model])]
    runs = [files.read_json(place / "run.json") for place in places if (place / "run.json").is_file()]
    told = runs[0].get("settings") if runs else {}
    said = {k: told[k] for k, x in EMBEDDED.items() if isinstance(told.get(k), type(x))} if isinstance(told, dict) else {}
    embedded = Path(said.get("pretrained_model_name_or_path") or flags.model).resolve().parent == drawing.WEIGHTS
    said = said or (EMBEDDED if embedded else {})
    prompt, kinds = said.get("instance_prompt", ""), [*filter(None, (flags.class_noun, said.get("class_prompt")))]
    identifier, noun = next((found for kind in kinds if any(found := named(prompt, kind))), ("", ""))
    if flags.identifier is None:
        flags.identifier = identifier or ("" if prompt and kinds else "sks")
        if not flags.identifier:
            raise UserError(f"--identifier is missing: the word for the subject in {prompt!r} (see --class_noun too)")
    flags.class_noun = flags.class_noun or noun or prompt.partition(f"{flags.identifier} ")[2]
    photographs = said.get("instance_data_dir")  # which may be meant from elsewhere
    flags.images = flags.images or (photographs if photographs and Path(photographs).is_dir() else None)
    flags.resolution = flags.resolution or said.get("resolution")
    flags.prompts = flags.prompts or (TOY if embedded and not flags.live else PROMPTS)
    for name, usual in (TINY_EYES if embedded and Path(TINY_EYES["clip"]).is_dir() else PUBLISHED).items():
        setattr(flags, name, getattr(flags, name) or usual)
    if not flags.images:
        raise UserError("--images is missing: the folder of the subject's photographs")
    if not flags.class_noun:
        raise UserError(f"--class_noun is missing: what {flags.identifier!r} is, such as dog (see --identifier too)")
    flags.subject = flags.subject or Path(flags.images).resolve().name


def prompts(flags: argparse.Namespace) -> list[str]:
    """The subject's prompts: one of the file's two lists. Raises UserError for a file without them."""
    if not flags.prompts.is_file():
        raise UserError(f"--prompts {flags.prompts} is missing")
    part = flags.prompts.read_text("utf-8", "replace").partition("Live Subject Prompts")[2 if flags.live else 0]
    found = [line[2] for line in re.finditer(r"""^\s*(['"])(.*)\1\.format\(""", part, re.M)]
    if not found:
        what = "'a {0} {1} in the snow'.format(...), those for --live under the heading Live Subject Prompts"
        raise UserError(f"--prompts {flags.prompts} has no {'live ' * flags.live}prompts; one a line is needed: {what}")
    return [" ".join(each.replace("{0}", flags.identifier).replace("{1}", flags.class_noun).split()) for each in found]


def encoder(flags: argparse.Namespace, name: str, make: Callable[[str], Any]) -> Any:
    """What the flag of that name says; None for "none". Raises UserError for what cannot be had."""
    try:
        return None if getattr(flags, name) == "none" else make(getattr(flags, name))
    except UserError as error:
        raise UserError(f"--{name}: {error}; --{name} none leaves its figures out") from None


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each column that is in all rows."""
    return {name: statistics.fmean(row[name] for row in rows) for name in COLUMNS if all(name in row for row in rows)}


def measure(
    real: Sequence[Image.Image], drawn: Sequence[Drawings], of_class: Drawings, clip: Encoder | None, dino: Encoder | None,
    lpips: Any,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a subject, of each of its prompts, and of its real pictures; those that lack an encoder are left out."""
    eyes = {column: eye for column, eye in {"DINO": dino, "CLIP-I": clip}.items() if eye}
    known = {column: eye.images(real) for column, eye in eyes.items()}
    rows: list[dict[str, Any]] = []
    for each in tqdm(drawn, desc="measuring", disable=None):
        prompt, pictures = each.manifest["prompt"], [open_picture(path) for path in each.pictures]
        seen = {column: eye.images(pictures) for column, eye in eyes.items()}
        row = {column: likeness(x, known[column]) for column, x in seen.items()}
        if clip:
            row["CLIP-T"] = agreement(seen["CLIP-I"], clip.texts([prompt]))
        if lpips and len(pictures) > 1:
            row["DIV"] = diversity(torch.stack([*map(to_tensor, pictures)]).to(next(lpips.parameters()).device), lpips)
        rows.append({"prompt": prompt, "folder": each.folder.name, **row})
    figures = means(rows)
    if eyes and of_class.pictures:
        column = next(iter(eyes))
        figures["PRES"] = likeness(eyes[column].images([*map(open_picture, of_class.pictures)]), known[column])
    return {"figures": figures, "real": {name: ceiling(x) for name, x in known.items() if len(real) > 1}, "prompts": rows}


def table(found: Mapping[str, Any]) -> str:
    """Results by subject, their mean, and, but for the embedded encoder's, the paper."""
    rows = {f"{name}, {len(x['prompts'])} x {x['settings']['num_images']} pictures": x["figures"] for name, x in found.items()}
    if len(found) > 1:
        rows[f"mean of {len(found)} subjects"] = means([*rows.values()])
    rows["real pictures"] = means([x["real"] for x in found.values()])
    if any(x["settings"]["clip"] != TINY_EYES["clip"] for x in found.values()):
        rows |= {name: dict(zip(COLUMNS, values, strict=False)) for name, values in PAPER.items()}
    cells = {name: [f"{row[column]:.3f}" if column in row else "-" for column in COLUMNS] for name, row in rows.items()}
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}" + "".join(f"{cell:>8}" for cell in row) for name, row in [("", COLUMNS), *cells.items()])


def main(argv: Sequence[str]) -> None:
    """Draw and measure as the command line says; what was drawn before is measured again."""
    flags = parser().parse_args(command.normalise(argv))
    complete(flags)
    real, texts = [open_picture(path) for path in find_pictures(Path(flags.images))[0]], prompts(flags)
    pipe = drawing.open_model(flags, StableDiffusion)
    clip = encoder(flags, "clip", lambda name: Encoder(name, device=pipe.device, kind="clip"))
    dino = encoder(flags, "dino", lambda name: Encoder(name, device=pipe.device, kind="vit"))
    lpips = encoder(flags, "lpips", lambda name: open_lpips(name, pipe.device))
    if lpips and flags.resolution and flags.resolution < 32:  # AlexNet's pooling leaves nothing of less
        raise UserError("--lpips needs pictures of 32 pixels or more: take a larger --resolution, or --lpips none")
    how = {name: getattr(flags, name) for name in ("resolution", "negative_prompt", *DRAWING)}
    how |= origin(pipe.source, {name: network.state_dict() for name, network in pipe.networks.items()}, pipe.dtype)
    folder = flags.output_dir / flags.subject
    own = folder / "results.json"
    with blaming(own):
        there = files.read_json(own)["settings"]["images"] if own.exists() else flags.images
        if Path(there).resolve() != Path(flags.images).resolve():
            raise UserError(f"{own} has the figures of {there}: give {flags.images} another name with --subject")
    drawn = [Drawings(folder, {"prompt": text} | how, flags.num_images, flags.seed) for text in texts]
    of_class = Drawings(folder, {"prompt": f"a {flags.class_noun}"} | how, flags.num_class_images, flags.seed)
    draw([*drawn, of_class], pipe, flags.batch_size, flags.subject)

    results = {"subject": flags.subject, **measure(real, drawn, of_class, clip, dino, lpips), "model": how}
    results |= {"settings": vars(flags), "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    files.write_text(own, json.dumps(results, indent=2, default=str) + "\n")
    found: dict[str, Any] = {}
    for path in sorted({own, *flags.output_dir.glob("*/results.json")}):
        try:
            table(said := {path.parent.name: files.read_json(path)})
            found |= said
        except Exception as error:  # nearly anything, of a damaged file
            print(f"{path} is left out, for it holds no results: {error!r}")
    print(f"{table(found)}\n{own}")


if __name__ == "__main__":
    command.run(main, sys.argv)

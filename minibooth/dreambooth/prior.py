"""Pictures that a model draws to be kept; among them the class pictures of prior preservation, of the frozen model itself.

Ruiz et al. 2022, section 3.3, which draws them by ancestral sampling; here DPM-Solver++ takes 25 steps. They lie in a folder
of their own that is named after all they depend on (prompt, weights, sampler, size), so that they are reused only for what
they were drawn for, and an interrupted run goes on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minibooth.checkpoint import files
from minibooth.checkpoint.source import SCHEDULE, Source
from minibooth.diffusion.images import save_png
from minibooth.diffusion.text_to_image import StableDiffusion
from minibooth.dreambooth.data import is_picture
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.stages import VALIDATION

DRAWING: dict[str, Any] = VALIDATION | {"guidance_scale": 7.5}


def origin(source: Source, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> dict[str, Any]:
    """What pictures depend on of the model that draws them, with these weights, by network."""
    named = {f"{part}.{name}": x for part, tensors in weights.items() for name, x in tensors.items()}
    scheduler = source.json(SCHEDULE)
    return {"weights": files.hash_of(named), "scheduler": scheduler, "dtype": str(dtype), "seed": "the picture's number"}


class Drawings:
    """`count` pictures of one prompt, in a folder of `parent`; each has its seed, from `first` on, for a name.

    manifest: all they depend on, that is prompt, resolution (None: the model's own), what DRAWING has, negative_prompt where
    there is one, and `origin`. `missing`: those still to be drawn, by seed.
    """

    def __init__(self, parent: Path, manifest: dict[str, Any], count: int, first: int = 0):
        self.manifest = manifest
        self.folder = parent / f"drawn-{hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:10]}"
        drawn = {seed: self.folder / f"{seed:05d}.png" for seed in range(first, first + count)}
        self.missing = {seed: path for seed, path in drawn.items() if not path.exists()}
        self.pictures = [*drawn.values()]


@torch.no_grad()
def draw(sets: Sequence[Drawings], pipe: StableDiffusion, batch_size: int, name: str) -> None:
    """Draw what is missing in sets that differ by their prompts alone, so many at a time, and keep each as soon as it is there.

    name: what the progress bar says is drawn.
    """
    for each in (each for each in sets if each.missing):
        files.write_text(each.folder / "manifest.json", json.dumps(each.manifest, indent=2) + "\n")
    manifest, todo = sets[0].manifest, [(each, seed) for each in sets for seed in each.missing]
    negative, side = manifest.get("negative_prompt"), manifest["resolution"]
    how = {setting: manifest[setting] for setting in DRAWING}
    unconditional = pipe.unconditional([negative] if negative else None) if how["guidance_scale"] > 1 else None
    with tqdm(total=len(todo), desc=f"drawing {name}", disable=None) as bar:
        for batch in (todo[start : start + batch_size] for start in range(0, len(todo), batch_size)):
            prompts, seeds = [each.manifest["prompt"] for each, _ in batch], [seed for _, seed in batch]
            pictures = pipe.draw(pipe.condition(prompts), unconditional, seeds, side, side, **how)
            for (each, seed), prompt, picture in zip(batch, prompts, pictures, strict=True):
                save_png(picture, each.missing[seed], {"prompt": prompt, "seed": str(seed)})
            bar.update(len(batch))


class ClassPictures(Drawings):
    """--num_class_images: the user's own in --class_data_dir, topped up by drawn ones; drawn picture i has seed i.

    `pictures` are all of them. Raises UserError for pictures that cannot be read.
    """

    def __init__(self, settings: Settings, source: Source, dtype: torch.dtype):
        self.settings = s = settings
        folder = Path(s.class_data_dir or Path(s.output_dir) / "class")
        own = [path for path in sorted(folder.glob("*")) if is_picture(path)][: s.num_class_images]
        chosen = {"prompt": s.class_prompt, "resolution": s.resolution, "guidance_scale": s.class_guidance_scale}
        super().__init__(folder, origin(source, source.weights, dtype) | DRAWING | chosen, s.num_class_images - len(own))
        self.outdated = [path.name for path in folder.glob("drawn-*")]
        self.pictures = own + self.pictures

    def draw(self, pipe: StableDiffusion, first: int = 0, step: int = 1) -> None:
        """Draw the missing ones, from the `first` on every `step`-th, with the frozen pipeline."""
        if not self.folder.exists() and self.outdated:
            print(f"class pictures in {', '.join(self.outdated)} are of another prompt, model or setting: drawing anew")
        self.missing = dict([*self.missing.items()][first::step])
        draw([self], pipe, self.settings.sample_batch_size, "class pictures")

"""The class pictures of prior preservation: what the frozen model itself draws for the class prompt.

Ruiz et al. 2022, section 3.3. They lie in a folder of their own that is named after all they depend on (prompt, weights,
sampler, size, seed), so that they are reused only for what they were drawn for, and an interrupted run goes on.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minibooth.checkpoint import files
from minibooth.checkpoint.load import Source
from minibooth.diffusion.images import save_png
from minibooth.diffusion.text_to_image import StableDiffusion
from minibooth.dreambooth.data import find_pictures, is_picture
from minibooth.dreambooth.settings import Settings

DRAWING: dict[str, Any] = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5}


class ClassPictures:
    """The user's own pictures in --class_data_dir, topped up to --num_class_images by drawn ones; picture i has seed i.

    `pictures` are all of them, of which `missing` are still to be drawn. Raises UserError for pictures that cannot be read.
    """

    def __init__(self, settings: Settings, source: Source, dtype: torch.dtype):
        self.settings = settings
        folder = Path(settings.class_data_dir or Path(settings.output_dir) / "class")
        own = find_pictures(folder)[0] if folder.is_dir() and any(map(is_picture, folder.iterdir())) else []
        weights = {f"{part}.{name}": x for part, tensors in source.weights.items() for name, x in tensors.items()}
        self.manifest = {
            "prompt": settings.class_prompt,
            "resolution": settings.resolution,
            "weights": files.hash_of(weights),
            "scheduler": source.json("scheduler/scheduler_config.json"),
            "dtype": str(dtype),
            "seed": "the picture's number",
            **DRAWING,
        }
        key = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()[:10]
        self.folder = folder / f"drawn-{key}"
        self.outdated = [path.name for path in folder.glob("drawn-*") if path != self.folder]
        drawn = [self.folder / f"{i:05d}.png" for i in range(settings.num_class_images - len(own))]
        self.missing = {i: path for i, path in enumerate(drawn) if not path.exists()}
        self.pictures = own + drawn

    @torch.no_grad()
    def draw(self, pipe: StableDiffusion) -> None:
        """Draw the missing ones with the frozen pipeline, a batch at a time, and keep each as soon as it is there."""
        if not self.folder.exists() and self.outdated:
            print(f"class pictures in {', '.join(self.outdated)} are of another prompt, model or setting: drawing anew")
        with files.replacing(self.folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps(self.manifest, indent=2) + "\n")
        side, todo, size = self.settings.resolution, list(self.missing), self.settings.sample_batch_size
        conditions = pipe.condition([self.settings.class_prompt]), pipe.unconditional(None)
        with tqdm(total=len(todo), desc="drawing class pictures", disable=None) as bar:
            for seeds in (todo[start : start + size] for start in range(0, len(todo), size)):
                pictures = pipe.draw(*conditions, seeds, side, side, **DRAWING)
                for seed, picture in zip(seeds, pictures, strict=True):
                    save_png(picture, self.missing[seed], {"prompt": self.settings.class_prompt, "seed": str(seed)})
                bar.update(len(seeds))

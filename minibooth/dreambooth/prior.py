"""The class pictures of prior preservation: what the frozen model itself draws for the class prompt.

Ruiz et al. 2022, section 3.3. They lie in a folder of their own that is named after all they depend on (prompt, weights,
sampler, size, seed), so that they are reused only for what they were drawn for, and an interrupted run goes on.
"""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from minibooth.checkpoint import files
from minibooth.diffusion import load
from minibooth.diffusion.images import save_png
from minibooth.dreambooth.data import find_pictures
from minibooth.dreambooth.settings import Settings

DRAWING = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5}


def class_pictures(settings: Settings, device: torch.device, dtype: torch.dtype) -> list[Path]:
    """The pictures to preserve the class with: the user's own in --class_data_dir, topped up by drawn ones.

    Draws in `dtype` on `device`; picture i has seed i. Raises UserError for pictures that cannot be read.
    """
    folder = Path(settings.class_data_dir or Path(settings.output_dir) / "class")
    own = find_pictures(folder)[0] if folder.is_dir() and any(entry.is_file() for entry in folder.iterdir()) else []
    count = max(0, settings.num_class_images - len(own))
    if not count:
        return own

    pipe = load(settings.pretrained_model_name_or_path, dtype, device, settings.variant, revision=settings.revision)
    weights = {f"{part}.{name}": x for part, tensors in pipe.source.weights.items() for name, x in tensors.items()}
    manifest = {
        "prompt": settings.class_prompt,
        "resolution": settings.resolution,
        "weights": files.hash_of(weights),
        "scheduler": pipe.scheduler.config,
        "dtype": str(dtype),
        **DRAWING,
    }
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:10]
    drawn = folder / f"drawn-{key}"
    others = [path.name for path in folder.glob("drawn-*") if path != drawn]
    if others and not drawn.exists():
        print(f"class pictures in {', '.join(others)} are of another prompt, model or setting: drawing anew")
    with files.replacing(drawn / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")

    pictures = [drawn / f"{i:05d}.png" for i in range(count)]
    missing = [i for i, path in enumerate(pictures) if not path.exists()]
    context, unconditional = pipe.encode_prompts([settings.class_prompt]), pipe.encode_prompts([""])
    bar = tqdm(total=len(missing), desc="drawing class pictures", disable=None)
    for start in range(0, len(missing), settings.sample_batch_size):
        seeds = missing[start : start + settings.sample_batch_size]
        prompts = (prompt.expand(len(seeds), -1, -1) for prompt in (context, unconditional))
        side = settings.resolution
        for i, picture in zip(seeds, pipe.draw(*prompts, height=side, width=side, seed=seeds, **DRAWING), strict=True):
            save_png(picture, pictures[i], {"prompt": settings.class_prompt, "seed": str(i)})
        bar.update(len(seeds))
    bar.close()
    return own + pictures

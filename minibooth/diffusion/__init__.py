"""How pictures appear: the noise schedule, the samplers, and the pipelines that draw with them."""

from pathlib import Path
from typing import Any

import torch

from minibooth.checkpoint.source import Source
from minibooth.diffusion.pipeline import Pipeline
from minibooth.diffusion.super_resolution import StableDiffusionUpscale
from minibooth.diffusion.text_to_image import StableDiffusion, StableDiffusionXL
from minibooth.errors import UserError

# By the class that a folder names.
PIPELINES = {f"{each.__name__}Pipeline": each for each in (StableDiffusion, StableDiffusionXL, StableDiffusionUpscale)}


def load(
    source: str | Path | Source, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    variant: str | None = None, prediction_type: str | None = None, revision: str | None = None,
    tokenizer: str | Path | None = None, ema: bool = False, wanted: type[Pipeline] = Pipeline,
) -> Any:  # fmt: skip
    """A ready pipeline from a folder in the diffusers layout, an LDM single file, "owner/name" on the hub, or an open Source.

    StableDiffusion(XL) or StableDiffusionUpscale, as the checkpoint says; any other than `wanted` is refused.

    dtype: of weights and computing. On a CPU without units for it PyTorch is slow in bf16 and far slower in fp16: take float32,
    or a command, which sees to that (dreambooth/speed.py). variant: the infix of the files to read, such as fp16.
    prediction_type: overrules the checkpoint's "epsilon" or "v_prediction". revision: the hub's branch, tag or commit.
    tokenizer: a folder with CLIP's vocabulary, which single files of others lack. ema: of a single file, the averaged weights.
    Raises UserError for what cannot be opened.
    """
    if not isinstance(source, Source):
        how: dict[str, Any] = dict(variant=variant, revision=revision, tokenizer=tokenizer, prediction_type=prediction_type)
        source = Source.open(source, ema=ema, **how)
    found = PIPELINES[source.kind]
    if not issubclass(found, wanted):
        use = f"name another, or give this one to python -m minibooth.{found.command}"
        raise UserError(f"{source.name} is {found.kind}, where {wanted.kind} is needed: {use}")
    return found(source, dtype, device)

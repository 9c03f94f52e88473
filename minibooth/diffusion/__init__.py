"""How pictures appear: the noise schedule, the samplers, and the pipelines that draw with them."""

from pathlib import Path

import torch

from minibooth.checkpoint.load import Source
from minibooth.diffusion.text_to_image import StableDiffusion, StableDiffusionXL

PIPELINES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": StableDiffusionXL}


def load(
    source: str | Path | Source,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    prediction_type: str | None = None,
    revision: str | None = None,
) -> StableDiffusion:
    """A ready pipeline from a folder in the diffusers layout, from "owner/name" on the hub, or from an open Source.

    variant: the infix of the files to read, such as fp16. prediction_type: overrules the folder's "epsilon" or
    "v_prediction". revision: the hub's branch, tag or commit. Raises UserError for what cannot be opened.
    """
    opened = source if isinstance(source, Source) else Source.open(source, variant, revision)
    return PIPELINES[opened.kind](opened, dtype, device, prediction_type)

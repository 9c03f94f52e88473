"""Pictures out: tensors to PIL images, contact sheets, and PNG files that are whole or not there."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from minibooth.checkpoint import files
from minibooth.errors import UserError

GAP = 4  # pixels between the pictures of a grid


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, over white. Raises UserError for grey levels of unknown range."""
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip these to 8 bits
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535 or (image.mode == "I" and 0 < levels.max() < 256):
            raise UserError("a picture has grey levels of unknown range: convert it to 8 or 16 bits")
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [3, H, W]: black is exactly -1, white exactly 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1], of any float type and device, as an RGB picture; values beyond the range are clamped.

    Raises UserError for values that are no numbers, such as a network leaves that overflows.
    """
    if not pixels.isfinite().all():
        flags = "--dtype, in training --mixed_precision and --prior_generation_precision"
        raise UserError(f"a picture is not finite: compute in fp32 or bf16 ({flags}), or take other weights")
    levels = (pixels.detach().float() + 1).mul_(127.5).round_().clamp_(0, 255)
    return Image.fromarray(levels.byte().permute(1, 2, 0).cpu().numpy())


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """A white contact sheet, row by row, with cells as large as the largest picture."""
    columns = min(columns, len(images))
    width, height = (GAP + max(sizes) for sizes in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * width - GAP, math.ceil(len(images) / columns) * height - GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a PNG with `metadata` as its text chunks; a failure leaves what was there before."""
    chunks = PngInfo()
    for key, text in metadata.items():
        chunks.add_text(key, text.encode(errors="backslashreplace").decode())  # a path may hold what is no text
    with files.replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)

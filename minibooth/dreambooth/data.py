"""Pictures in: a folder's photographs, upright and in sRGB, cut to squares (the 3-5 pictures of arXiv 2208.12242)."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from minibooth.diffusion.images import to_rgb, to_tensor
from minibooth.errors import UserError

Image.MAX_IMAGE_PIXELS = 1 << 28  # a telephone's picture may have 200 million; twice as many as this are refused
INTERPOLATION = {each.name.lower(): each for each in Image.Resampling}
# Photographs that Pillow cannot open. A camera's raw file may open all the same: as a TIFF that holds the thumbnail.
RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2"}
PROGRAMS = {"EPS", "WMF"}  # to be run, by another program: nothing to do with what a stranger sends
UNREADABLE = {".heic", ".heif", ".jxl"} | RAW


class Crop(NamedTuple):
    """A square cut from a picture; the two pairs are what SDXL is told about it, rows first."""

    pixels: Tensor  # [3, resolution, resolution] in [-1, 1]
    original_size: tuple[int, int]  # height and width before resizing
    top_left: tuple[int, int]  # pixels cut off above and to the left, after resizing and mirroring


def find_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder and what was skipped, both sorted by name; sub-folders are not entered.

    A file is a picture if it decodes, whatever its name. Raises UserError for one that does not but is a picture by its
    name or its first bytes, and for a folder that is missing or holds no picture.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder of pictures: {folder}{' (a file)' * folder.exists()}")
    pictures, skipped = list[Path](), list[Path]()
    for path in sorted(folder.iterdir()):
        (pictures if is_picture(path) else skipped).append(path)
    if not pictures:
        raise UserError(f"no picture in {folder}: put JPEG or PNG files there (sub-folders are not entered)")
    return pictures, skipped


def is_picture(path: Path) -> bool:
    """Whether a file decodes. Raises UserError for one that does not but should."""
    if path.name.startswith(".") or not path.is_file():
        return False
    try:
        open_picture(path)
    except UserError as error:
        end = path.suffix.lower()
        named_so = end in UNREADABLE or Image.registered_extensions().get(end) in Image.OPEN
        if named_so or not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        return False
    return True


def open_picture(path: Path) -> Image.Image:
    """Decode a picture's first frame, upright, over white, as 8-bit sRGB. Raises UserError if that cannot be done."""
    try:
        with Image.open(path) as image:
            if image.format in PROGRAMS or (image.format == "TIFF" and path.suffix.lower() in RAW):
                raise ValueError("a drawing, or a camera's raw file")
            picture, profile = to_rgb(ImageOps.exif_transpose(image)), image.info.get("icc_profile")
            return in_srgb(picture, profile) if profile else picture
    except Image.DecompressionBombError as error:
        raise UserError(f"picture {path} is too large; make it smaller ({error})") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise UserError(f"cannot read picture {path} ({error}): convert it to JPEG or PNG, or remove it") from error


def short_side(path: Path) -> int:
    """Of a picture, in pixels; by the beginning of its file, without decoding it."""
    with Image.open(path) as image:
        return min(image.size)


def in_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """An RGB picture whose colours are by a profile, such as a telephone's Display P3; as it is, where that cannot be read."""
    with contextlib.suppress(ImportError, OSError, ImageCms.PyCMSError):  # some Pillows lack littlecms
        colours = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" not in ImageCms.getProfileDescription(colours):
            return ImageCms.profileToProfile(picture, colours, ImageCms.createProfile("sRGB")) or picture
    return picture


def crop(
    picture: Image.Image, resolution: int, center: bool, flip: bool, generator: torch.Generator,
    interpolation: str = "lanczos", resize: bool = True,
) -> Crop:  # fmt: skip
    """Resize an RGB picture's short side to `resolution`, then cut a square out, at the centre or anywhere.

    Without `resize` the square is cut from the picture as it is, which must be large enough. With `flip` half of
    the squares are mirrored. The generator (on the CPU) moves on by the same three draws whatever the options.
    """
    width, height = picture.size
    short = min(width, height)
    size = wide, high = (width * resolution // short, height * resolution // short) if resize else picture.size
    down, right, coin = torch.rand(3, generator=generator).tolist()
    if center:
        top, left = round((high - resolution) / 2), round((wide - resolution) / 2)
    else:
        top, left = int(down * (high - resolution + 1)), int(right * (wide - resolution + 1))
    square = picture.resize(size, INTERPOLATION[interpolation]).crop((left, top, left + resolution, top + resolution))
    if flip and coin < 0.5:
        square, left = ImageOps.mirror(square), wide - resolution - left
    return Crop(to_tensor(square), (height, width), (top, left))

"""The two steps of DreamBooth as the trainer sees them: what a picture's crop is, what the UNet is told of it, what is drawn.

First the text-to-image model (Ruiz et al. 2022, section 3.2), then super-resolution on pairs of low and high resolution from
the same pictures (supplement, "Personalized Instance-Specific Super-Resolution").

Shapes: B batch, H x W = resolution x resolution, h x w latent size.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minibooth.diffusion.images import to_image, to_tensor
from minibooth.diffusion.pipeline import Condition, Pipeline
from minibooth.diffusion.super_resolution import StableDiffusionUpscale
from minibooth.dreambooth.data import INTERPOLATION, crop, open_picture, short_side
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError, refuse

VALIDATION: dict[str, Any] = {"steps": 25, "sampler": "dpmpp_2m"}


class TextToImage:
    """A picture is resized to the resolution; XL is told its sizes [B, 6]."""

    name, draw_command = "text_to_image", "generate"  # the value of --stage; the command that draws, at a noise level
    caption = ""  # what the columns of the validation's grid are, where prompts do not say it

    def __init__(self, settings: Settings, pipe: Any, pictures: Sequence[Path]):
        self.settings, self.pipe, self.pictures = settings, pipe, pictures
        self.drawing = VALIDATION | {"guidance_scale": settings.validation_guidance_scale}
        if settings.stage not in (None, self.name):
            raise UserError(f"{pipe.source.name} is {pipe.kind}: --stage {settings.stage} trains another")
        self.check(pictures)

    def check(self, pictures: Sequence[Path], drawn: int = 0) -> None:
        """Raises UserError for a picture that is of no use, or where `drawn` of them cannot be drawn by the model."""

    def warnings(self) -> Iterator[str]:
        """What speaks against the resolution, a line each."""
        side, own = self.settings.resolution, max(self.pipe.latent_size(None, None)) * self.pipe.factor
        if 2 * side <= own:
            yield f"--resolution {side} is far from the {own} px that the model is for, and may come out well at neither"
        if small := [path.name for path in self.pictures if short_side(path) < side]:
            yield f"{', '.join(small)}: smaller than --resolution {side}, and so enlarged"

    def load_crop(self, path: Path, place: torch.Generator) -> tuple[Tensor, Tensor]:
        """One crop of a picture, [3, H, W] in [-1, 1], and what is to be known of it, [1, ...]."""
        s = self.settings
        square = crop(open_picture(path), s.resolution, s.center_crop, s.random_flip, place, s.image_interpolation_mode)
        return square.pixels, torch.tensor([[*square.original_size, *square.top_left, s.resolution, s.resolution]])

    def conditioning(self, known: Tensor, rng: torch.Generator) -> tuple[Tensor, ...]:
        """From what is known of a crop [1, ...], what the UNet is told of it at one step, [1, ...] each."""
        return (known,)

    def predict(self, x: Tensor, t: Tensor, condition: Condition, sizes: Tensor) -> Tensor:
        """The UNet's answer to a batch of noisy latents x [B, Z, h, w] at t [B], [B, Z, h, w]."""
        return self.pipe.unet(x.to(self.pipe.dtype), t, *self.pipe.with_sizes(condition, sizes))

    def show(self, conditions: Sequence[Condition], unconditional: Condition, seeds: Sequence[int]) -> list[list[Image.Image]]:
        """Rows of pictures for the validation prompts."""
        side, size = self.settings.resolution, self.settings.sample_batch_size
        todo, pictures = [(each, seed) for each in conditions for seed in seeds], []
        for start in range(0, len(todo), size):
            chosen, own = zip(*todo[start : start + size], strict=True)
            condition = tuple(torch.cat(column) for column in zip(*chosen, strict=True))
            pictures += self.pipe.draw(condition, unconditional, own, side, side, **self.drawing)
        return [pictures[row : row + len(seeds)] for row in range(0, len(pictures), len(seeds))]


class SuperResolution(TextToImage):
    """A picture is cut at its full detail, and shrunk for the UNet to see, noised by a level drawn anew at each step.

    LatentUpscaleDiffusion of Stability-AI/stablediffusion, which draws levels 0 to 349. DreamBooth lowers the noise, lest the
    model learn to invent what the pictures show: level 0 adds the schedule's least, of variance 1e-4 (the paper: 1e-5).
    """

    name, draw_command = "super_resolution", "upscale --noise_level {} --images ..."
    caption = "from left to right: what it is shown, what it makes of it, the photograph"

    def check(self, pictures: Sequence[Path], drawn: int = 0) -> None:
        (low, high), most, side = self.settings.noise_levels, self.pipe.max_noise_level, self.settings.resolution
        refuse({
            f"{self.pipe.source.name} is an upscaler already: leave out --upscaler": self.settings.upscaler,
            "--metrics_model is for what a text-to-image model draws: an upscaler does without": self.settings.metrics_model,
            f"--noise_levels {low} {high}: give the lowest and the highest, from 0 to {most}": not 0 <= low <= high <= most,
            f"an upscaler cannot draw class pictures: put {drawn} more into --class_data_dir, or lower --num_class_images":
                drawn,
        })  # fmt: skip
        for path in pictures:
            if short_side(path) < side:
                size = open_picture(path).size
                sizes = f"{size[0]} x {size[1]} pixels, and pairs of low and high resolution need {side} x {side}"
                raise UserError(f"{path} has {sizes}: take a larger picture or a smaller --resolution")

    def warnings(self) -> Iterator[str]:
        yield from ()  # `check` has refused what is too small

    def load_crop(self, path: Path, place: torch.Generator) -> tuple[Tensor, Tensor]:
        """One crop [3, H, W] at full detail, and the same a quarter as large [1, 3, h, w], in [-1, 1]."""
        s = self.settings
        square = crop(open_picture(path), s.resolution, s.center_crop, s.random_flip, place, resize=False)
        return square.pixels, to_tensor(self.shrink(to_image(square.pixels)))[None]

    def shrink(self, picture: Image.Image) -> Image.Image:
        """A quarter as wide and high, without aliasing."""
        w, h = (side // self.pipe.factor for side in picture.size)
        return picture.resize((w, h), INTERPOLATION[self.settings.image_interpolation_mode])

    def conditioning(self, known: Tensor, rng: torch.Generator) -> tuple[Tensor, ...]:
        """The small picture, noised, and by how much [1]."""
        low, high = self.settings.noise_levels
        level = torch.randint(low, high + 1, (1,), generator=rng)
        return self.pipe.low_res_scheduler.add_noise(known, torch.randn(known.shape, generator=rng), level), level

    def predict(self, x: Tensor, t: Tensor, condition: Condition, *added: Tensor) -> Tensor:
        low, level = added
        return self.pipe.unet(torch.cat([x, low], dim=1).to(self.pipe.dtype), t, *condition, level)

    def show(self, conditions: Sequence[Condition], unconditional: Condition, seeds: Sequence[int]) -> list[list[Image.Image]]:
        """For the middle of each of the subject's pictures a row: what the model is shown, what it makes of it, the truth."""
        rows, s = [], self.settings
        for seed, path in zip(seeds, self.pictures, strict=False):
            truth = to_image(crop(open_picture(path), s.resolution, True, False, torch.Generator(), resize=False).pixels)
            low = self.shrink(truth)
            drawn = self.pipe.draw(low, [unconditional, conditions[0]], seed, s.noise_levels[0], **self.drawing)
            rows.append([low.resize(truth.size, Image.Resampling.NEAREST), drawn, truth])
        return rows


def of(pipe: Pipeline) -> type[TextToImage]:
    """The step that a model belongs to."""
    return SuperResolution if isinstance(pipe, StableDiffusionUpscale) else TextToImage

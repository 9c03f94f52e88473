"""Pictures as the diffusion model sees them: crops, encoded once, from which every step draws anew.

The VAE's posterior is kept, not a sample of it, so that each step still sees fresh posterior noise.

Shapes: Z latent channels, h x w latent size, H x W = resolution x resolution.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minibooth.diffusion.noise import generator
from minibooth.dreambooth.data import crop, open_picture
from minibooth.dreambooth.settings import Settings
from minibooth.models.vae import VAE, Posterior


class Latents:
    """A set of pictures as an endless, shuffled sequence: latents[n] is the run's n-th sample, a posterior and its sizes.

    Which picture and which of its crops that is depends on the seed and n alone. Posteriors [1, Z, h, w] are in fp32 and in
    the diffusion model's units (the VAE's times its scaling factor).
    """

    def __init__(self, name: str, pictures: Sequence[Path], settings: Settings, seed: int):
        self.name, self.pictures, self.settings, self.seed = name, pictures, settings, seed
        self.encoded: dict[tuple[int, int], tuple[Posterior, Tensor]] = {}

    def which(self, n: int) -> tuple[int, int]:
        """Sample n -> (picture, crop): every picture once before any comes again."""
        seed, crops = self.seed, self.settings.crops_per_image
        epoch, place = divmod(n, len(self.pictures))
        order = torch.randperm(len(self.pictures), generator=generator(seed, self.name, "order", epoch))
        number = torch.randint(crops, (), generator=generator(seed, self.name, "crop", n)) if crops else n
        return int(order[place]), int(number)

    def prepare(self, vae: VAE, samples: Iterable[int]) -> None:
        """Encode the crops that these samples will want, after which the VAE may go; or keep it, to encode on the fly."""
        self.vae = None if self.settings.crops_per_image else vae
        wanted = set() if self.vae else {self.which(n) for n in samples}
        known: dict[bytes, Posterior] = {}  # a square picture has but one crop, or two with its mirror image
        for which in tqdm(sorted(wanted), desc=f"encoding the {self.name}", leave=False, disable=None):
            pixels, sizes = self.cut(*which)
            content = hashlib.sha256(pixels.numpy().tobytes()).digest()
            known[content] = known.get(content) or self.encode(vae, pixels)
            self.encoded[which] = known[content], sizes

    def __getitem__(self, n: int) -> tuple[Posterior, Tensor]:
        which = self.which(n)
        if self.vae is None:
            return self.encoded[which]
        pixels, sizes = self.cut(*which)
        return self.encode(self.vae, pixels), sizes

    def cut(self, picture: int, number: int) -> tuple[Tensor, Tensor]:
        """One crop of one picture, [3, H, W] in [-1, 1], and the sizes [1, 6] that XL is told of it."""
        s, place = self.settings, generator(self.seed, self.name, "place", picture, number)
        image = open_picture(self.pictures[picture])
        square = crop(image, s.resolution, s.center_crop, s.random_flip, place, s.image_interpolation_mode)
        return square.pixels, torch.tensor([[*square.original_size, *square.top_left, s.resolution, s.resolution]])

    @torch.no_grad()
    def encode(self, vae: VAE, pixels: Tensor) -> Posterior:
        """A crop through the VAE."""
        weight = vae.quant_conv.weight
        posterior = vae.encode(pixels[None].to(weight.device, weight.dtype))
        return Posterior(*(x.float().cpu() * vae.scaling_factor for x in (posterior.mean, posterior.std)))

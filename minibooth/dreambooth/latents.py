"""Pictures as the diffusion model sees them: crops, encoded once, from which every step draws anew.

The VAE's posterior is kept, not a sample of it, so that each step still sees fresh posterior noise.

Shapes: Z latent channels, h x w latent size.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minibooth.diffusion.noise import generator
from minibooth.dreambooth.stages import TextToImage
from minibooth.models.vae import VAE, Posterior


class Latents:
    """A set of pictures as an endless, shuffled sequence: latents[n] is the run's n-th sample, a posterior and what else is
    known of the crop (`stages`).

    Which picture and which of its crops that is depends on the seed and n alone. Posteriors [1, Z, h, w] are in fp32 and in
    the diffusion model's units (the VAE's times its scaling factor).
    """

    def __init__(self, name: str, pictures: Sequence[Path], stage: TextToImage, seed: int):
        self.name, self.pictures, self.stage, self.seed = name, pictures, stage, seed
        self.crops = stage.settings.crops_per_image
        self.encoded: dict[tuple[int, int], tuple[Posterior, Tensor]] = {}

    def pick(self, n: int) -> tuple[int, int]:
        """Sample n -> (picture, crop): every picture once before any comes again."""
        epoch, place = divmod(n, len(self.pictures))
        order = torch.randperm(len(self.pictures), generator=generator(self.seed, self.name, "order", epoch))
        number = int(torch.randint(self.crops, (), generator=generator(self.seed, self.name, "crop", n))) if self.crops else n
        return int(order[place]), number

    def prepare(self, vae: VAE, samples: Iterable[int]) -> None:
        """Encode the crops that these samples will want, after which the VAE may go; or keep it, to encode on the fly."""
        self.vae = None if self.crops else vae
        wanted = set() if self.vae else {self.pick(n) for n in samples}
        posteriors: dict[bytes, Posterior] = {}  # a square picture has but one crop, or two with its mirror image
        for which in tqdm(sorted(wanted), desc=f"encoding the {self.name}", leave=False, disable=None):
            pixels, known = self.load_crop(*which)
            content = hashlib.sha256(pixels.numpy().tobytes()).digest()
            posteriors[content] = posteriors.get(content) or self.encode(vae, pixels)
            self.encoded[which] = posteriors[content], known

    def __getitem__(self, n: int) -> tuple[Posterior, Tensor]:
        which = self.pick(n)
        if self.vae is None:
            return self.encoded[which]
        pixels, known = self.load_crop(*which)
        return self.encode(self.vae, pixels), known

    def load_crop(self, picture: int, number: int) -> tuple[Tensor, Tensor]:
        """One crop of one picture."""
        return self.stage.load_crop(self.pictures[picture], generator(self.seed, self.name, "place", picture, number))

    @torch.no_grad()
    def encode(self, vae: VAE, pixels: Tensor) -> Posterior:
        """A crop through the VAE."""
        posterior = vae.encode(pixels[None].to(vae.quant_conv.weight))
        return Posterior(*(x.float().cpu() * vae.scaling_factor for x in (posterior.mean, posterior.std)))

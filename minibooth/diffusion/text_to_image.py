"""Text to image: the networks of one Stable Diffusion, and how they draw together. Rombach et al. 2022.

Shapes: B pictures, N prompt tokens, D width of their encoding, h x w latent size, H x W picture size.
"""

import secrets
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minibooth.checkpoint import lora as lora_files
from minibooth.checkpoint.load import Source
from minibooth.diffusion.images import to_image
from minibooth.diffusion.noise import gaussian
from minibooth.diffusion.samplers import calls, trajectory
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.errors import UserError
from minibooth.models import lora
from minibooth.models.clip import CLIPText
from minibooth.models.unet import UNet
from minibooth.models.vae import VAE

Condition = tuple[Tensor, ...]  # what the UNet is told besides x and t, [B, ...] each; [1, ...] stands for any B


class StableDiffusion:
    """A Stable Diffusion 1 or 2. `release` frees a network's memory; `save` still writes it.

    Networks are in `dtype` on `device`. Raises UserError for a checkpoint whose parts do not fit together.
    """

    text_encoder: CLIPText
    unet: UNet
    vae: VAE
    sampler = "ddim"

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device | str, prediction_type: str | None = None):
        self.source = source
        for name in source.weights:
            setattr(self, name, source.build(name, dtype, device))
        self.factor = self.vae.factor  # picture pixels per latent pixel; known even when the VAE is gone
        channels = self.unet.config.in_channels
        if channels != self.vae.config.latent_channels:
            kind = "an inpainting model" if channels == 9 else "not text-to-image"
            raise UserError(f"{source.name} is {kind}: its UNet takes {channels} channels")
        schedule = source.json("scheduler/scheduler_config.json")
        self.scheduler = DDPMScheduler.from_config(schedule | ({"prediction_type": prediction_type} if prediction_type else {}))
        self.tokenizer = source.tokenizer()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that are still there, by the names of their folders."""
        return {name: network for name in self.source.weights if (network := getattr(self, name)) is not None}

    def save(self, path: str | Path) -> None:
        """Write a folder in the diffusers layout, or an LDM single file if `path` ends in .safetensors (`Source.save`)."""
        self.source.save(Path(path), self.networks)

    def load_lora(self, path: str | Path, weight: float = 1.0, merge: bool = False) -> None:
        """Add a LoRA, a file of diffusers' or kohya's or a folder with pytorch_lora_weights.safetensors, in strength `weight`.

        Several add up. `merge` adds them into the weights for good, which draws faster and rounds them in half precision;
        `save` writes the sum in any case. Raises UserError for what is no LoRA, or one for another base.
        """
        for name, adapters in lora_files.read(path, self.source, weight).items():
            lora.attach(getattr(self, name), adapters)
            if merge:
                lora.merge(getattr(self, name))

    def release(self, name: str) -> None:
        """Give up a network once it has nothing left to do; `save` copies it from where it was read."""
        setattr(self, name, None)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor | Condition:
        """The UNet's conditioning: context [B, N, D]."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device)).to(self.dtype)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """`encode_prompts` as a tuple, whatever the model."""
        encoded = self.encode_prompts(prompts)
        return encoded if isinstance(encoded, tuple) else (encoded,)

    def unconditional(self, negative_prompts: Sequence[str] | None) -> Condition:
        """What guidance leads away from; the empty prompt where there are no others."""
        return self.condition(negative_prompts or [""])

    def told(self, condition: Condition, sizes: Tensor) -> Condition:
        """The condition with `sizes` [B, 6] (see UNet) put in, for a model that is told of them."""
        return condition

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
    ) -> list[Image.Image]:
        """Draw a picture for each prompt.

        height, width: pixels, divisible by 8; the model's own size where not given. sampler: ddim where not given (XL: euler).
        seed: picture i is that of seed + i whatever the batch, and the one that diffusers draws with
        torch.Generator().manual_seed(seed + i). latents: the starting noise [B, 4, h, w], instead of the seed's.
        Raises UserError for sizes that do not fit.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negative = [negative_prompts] if isinstance(negative_prompts, str) else negative_prompts
        if negative and len(negative) not in (1, len(prompts)):
            raise UserError(f"{len(negative)} negative prompts for {len(prompts)} prompts")
        unconditional = self.unconditional(negative) if guidance_scale > 1 else None
        first = secrets.randbits(32) if seed is None else seed
        seeds = range(first, first + len(prompts))
        return self.draw(self.condition(prompts), unconditional, seeds, height, width, steps, guidance_scale, sampler, latents)

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        unconditional: Condition | None,
        seeds: Sequence[int],
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | None = None,
        latents: Tensor | None = None,
    ) -> list[Image.Image]:
        """A picture for each of B seeds, from encoded prompts; no guidance without `unconditional`."""
        B, sampler = len(seeds), sampler or self.sampler
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if latents is None:
            latents = gaussian((B, self.unet.config.in_channels, *self.latent_size(height, width)), generators)
        elif latents.shape[:2] != (B, self.unet.config.in_channels):
            raise UserError(f"latents {[*latents.shape]} do not fit {B} pictures of {self.unet.config.in_channels} channels")
        H, W = (side * self.factor for side in latents.shape[2:])
        sizes = torch.tensor([[H, W, 0, 0, H, W]], device=self.device)
        conditions = [self.told(each, sizes) for each in (unconditional, condition) if each]
        copies = len(conditions)
        rows = [torch.cat([each.expand(B, *each.shape[1:]) for each in parts]) for parts in zip(*conditions, strict=True)]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            outputs = self.unet(x.to(self.dtype).repeat(copies, 1, 1, 1), t.repeat(copies), *rows).chunk(copies)
            return torch.lerp(outputs[0], outputs[-1], guidance_scale)  # Ho & Salimans 2022, eq. 6

        x = latents.to(self.device, torch.float32)
        states = trajectory(predict, x, self.scheduler, steps, sampler, generators)
        x = deque(tqdm(states, total=calls(sampler, steps), leave=False, disable=None), maxlen=1).pop()
        pictures = self.vae.decode((x / self.vae.scaling_factor).to(self.vae.post_quant_conv.weight.dtype))
        return [to_image(picture) for picture in pictures]

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """h and w of a picture's latent; the model's own for None. Raises UserError for sides not divisible by 8."""
        own = self.unet.config.sample_size
        sides = own if isinstance(own, tuple) else (own, own)
        H, W = (given or side * self.factor for given, side in zip((height, width), sides, strict=True))
        if H % 8 or W % 8 or min(H, W) <= 0:
            raise UserError(f"a picture of {W} x {H} pixels cannot be drawn: both sides must be divisible by 8")
        return H // self.factor, W // self.factor


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL's base model: two text encoders, and a UNet that is told of sizes. Podell et al. 2023."""

    text_encoder_2: CLIPText
    sampler = "euler"

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device | str, prediction_type: str | None = None):
        super().__init__(source, dtype, device, prediction_type)
        self.tokenizer_2 = source.tokenizer("tokenizer_2")
        if dtype == torch.float16 and self.vae.config.force_upcast:  # it overflows there
            self.vae.float()

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The UNet's conditioning: context [B, N, D1 + D2], pooled [B, P], and the sizes of a whole picture [B, 6]."""
        pairs = (self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)
        (first, _), (second, pooled) = (encoder.penultimate(tokenizer(prompts).to(self.device)) for encoder, tokenizer in pairs)
        h, w = self.latent_size(None, None)
        whole = torch.tensor([[h, w, 0, 0, h, w]], device=self.device) * self.factor
        return torch.cat([first, second], dim=-1).to(self.dtype), pooled.to(self.dtype), whole.expand(len(prompts), 6)

    def unconditional(self, negative_prompts: Sequence[str] | None) -> Condition:
        """Zeros where there are no negative prompts, as the published model was trained."""
        context, pooled, sizes = super().unconditional(negative_prompts)
        zeros = negative_prompts is None and self.source.json("model_index.json").get("force_zeros_for_empty_prompt", True)
        return (context * 0, pooled * 0, sizes) if zeros else (context, pooled, sizes)

    def told(self, condition: Condition, sizes: Tensor) -> Condition:
        """The condition with other sizes."""
        return (*condition[:2], sizes)

"""What the pipelines share: the networks of one Stable Diffusion read, asked and saved. Rombach et al. 2022.

Shapes: B pictures, N prompt tokens, D width of their encoding, C channels and h x w size of the latent.
"""

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minibooth.checkpoint import lora as lora_files
from minibooth.checkpoint.ldm import OTHERS
from minibooth.checkpoint.source import SCHEDULE, Source
from minibooth.diffusion.noise import Generators
from minibooth.diffusion.samplers import Predict, calls, trajectory
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.errors import UserError, blaming
from minibooth.models import lora
from minibooth.models.clip import CLIPText
from minibooth.models.unet import UNet
from minibooth.models.vae import VAE

Condition = tuple[Tensor, ...]  # what the UNet is told besides x and t, [B, ...] each; [1, ...] stands for any B


class Pipeline:
    """Networks in `dtype` on `device`. `release` frees a network's memory; `save` still writes it.

    Raises UserError for a checkpoint whose parts do not fit together.
    """

    text_encoder: CLIPText
    unet: UNet
    vae: VAE
    kind: ClassVar[str]  # what a user calls it, and the command that draws with it
    command: ClassVar[str]
    schedule: ClassVar[dict[str, Any]] = {}  # settings of its scheduler, whatever the file says
    sampler = "ddim"
    extra_channels = 0  # channels that the UNet sees besides the latent
    half_vae = True  # in fp16 keep the VAE in fp16, even where its configuration has force_upcast

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device | str):
        self.source = source
        for name in source.weights:
            setattr(self, name, source.build(name, self.precision(name, dtype), device))
        self.factor = self.vae.factor  # picture pixels per latent pixel; known even when the VAE is gone
        self.channels = self.vae.config.latent_channels
        if (channels := self.unet.config.in_channels) != self.channels + self.extra_channels:
            raise UserError(f"{source.name} is {OTHERS.get(channels, f'not {self.kind}')}: its UNet takes {channels} channels")
        self.texts = [name for name in source.weights if name.startswith("text_encoder")]
        wide, known = self.unet.config.cross_attention_dim, [getattr(self, name).config.hidden_size for name in self.texts]
        if sum(known) != wide:
            raise UserError(f"{source.name}: its UNet attends to states of {wide} numbers, its text encoders give {known}")
        with blaming(f"{source.name}/{SCHEDULE}"):
            self.scheduler = DDPMScheduler.from_config(source.json(SCHEDULE) | self.schedule)
        self.tokenizer = source.tokenizer()

    def precision(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Of one network, when the others are in `dtype`: fp32 for a VAE that overflows in fp16."""
        overflows = name == "vae" and dtype == torch.float16 and not self.half_vae and self.source.config("vae").force_upcast
        return torch.float32 if overflows else dtype

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that are still there, by the names of their folders."""
        return {name: network for name in self.source.weights if (network := getattr(self, name)) is not None}

    def save(self, path: str | Path) -> None:
        """Write a folder in the diffusers layout, or an LDM single file if `path` ends in .safetensors (`Source.save`)."""
        bare = {name: getattr(network, "_orig_mod", network) for name, network in self.networks.items()}  # of torch.compile's
        self.source.save(Path(path), {name: network.state_dict() for name, network in bare.items()})

    def load_lora(self, path: str | Path, weight: float = 1.0) -> None:
        """Add a LoRA, a file of diffusers' or kohya's or a folder that holds one, in strength `weight`.

        Several add up, and `save` merges them in. Raises UserError for what is no LoRA, or one for another base.
        """
        for name, adapters in lora_files.read(path, self.source, weight).items():
            lora.attach(getattr(self, name), adapters)
        self.source.forget()

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

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What `encode` takes: token ids [B, N], on the device."""
        return (self.tokenizer(prompts).to(self.device),)

    def encode(self, ids: Tensor) -> Condition:
        """The UNet's conditioning, as a tuple whatever the model: context [B, N, D]."""
        return (self.text_encoder(ids).to(self.dtype),)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """`encode`, from words."""
        return self.encode(*self.tokens(prompts))

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor | Condition:
        """The UNet's conditioning for B prompts: context [B, N, D], or for XL what its `encode` gives."""
        encoded = self.condition(prompts)
        return encoded if len(encoded) > 1 else encoded[0]

    def unconditional(self, negative_prompts: Sequence[str] | None) -> Condition:
        """What guidance leads away from; the empty prompt where there are no others."""
        return self.condition(negative_prompts or [""])

    def guided(self, conditions: Sequence[Condition], guidance_scale: float) -> Predict:
        """What the UNet predicts, led from the first of one or two conditions to the last. Ho & Salimans 2022, eq. 6, where
        guidance_scale is 1 + w. Raises UserError for one that is not finite.
        """
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale={guidance_scale} is no finite number; {self.kind} takes some 1 to 15")
        copies, rows = len(conditions), [torch.cat(parts) for parts in zip(*conditions, strict=True)]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            outputs = self.unet(x.to(self.dtype).repeat(copies, 1, 1, 1), t.repeat(copies), *rows).chunk(copies)
            return torch.lerp(outputs[0], outputs[-1], guidance_scale)

        return predict

    def denoise(self, predict: Predict, noise: Tensor, steps: int, sampler: str | None, generators: Generators) -> Tensor:
        """From noise of unit variance [B, C, h, w] to a latent, with a progress bar. Raises UserError as `sample` does."""
        sampler = sampler or self.sampler
        states = trajectory(predict, noise.to(self.device, torch.float32), self.scheduler, steps, sampler, generators)
        return deque(tqdm(states, total=calls(sampler, steps), leave=False, disable=None), maxlen=1).pop()

    def decode(self, latent: Tensor) -> Tensor:
        """A latent as the UNet knows it -> pictures [B, 3, H, W] in about [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):
            return self.vae.decode((latent / self.vae.scaling_factor).to(self.vae.post_quant_conv.weight.dtype))

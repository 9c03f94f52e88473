"""Pretrain the tiny x4-upscaler of weights/tiny-x4 on the world that world.py draws: pictures of 64 pixels to 256.

    python scripts/pretrain_x4.py --tiny WORK --out weights/tiny-x4 --work DIR --minutes 40

WORK is the folder that pretrain_tiny.py worked in: text encoder, vocabulary and the VAE to begin with are the tiny model's.
Stages, each kept in DIR: large pictures of random scenes; the VAE's training on crops of them; latents and encoded captions;
the UNet, by the recipe of LatentUpscaleDiffusion (Stability-AI/stablediffusion): a noise level of 0 to 349 for every sample,
but for half of them 0: each level has an embedding of its own, and the least noise is what DreamBooth goes on with.

Shapes: B batch, N scenes, C crop, Z latent channels, h x w latent size.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pretrain_tiny as tiny
import torch
import torch.nn.functional as F
from PIL import Image
from pretraining import Training, averages, drawn, export, noised, psnr, reconstructed, start, start_at_zero, to_batch, weighted
from safetensors.torch import load_file
from torch import Tensor, nn
from world import Scene

import minibooth
from minibooth import command
from minibooth.checkpoint import files
from minibooth.diffusion.images import grid, save_png, to_tensor
from minibooth.diffusion.noise import generator
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.models.clip import CLIPText
from minibooth.models.config import UNetConfig, VAEConfig
from minibooth.models.tokenizer import Tokenizer
from minibooth.models.unet import UNet
from minibooth.models.vae import VAE

SIZE, HELD_OUT, SEED, LEVELS = 256, 24, 5, 350
INDEX = {
    "_class_name": "StableDiffusionUpscalePipeline",
    "max_noise_level": LEVELS,
    **dict.fromkeys(("feature_extractor", "safety_checker", "watermarker"), [None, None]),
}
BETAS = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False)
CONFIGS = {
    "vae": tiny.CONFIGS["vae"] | {"sample_size": SIZE, "scaling_factor": 0.08333},  # diffusers takes no other
    "text_encoder": tiny.CONFIGS["text_encoder"],
    "unet": tiny.CONFIGS["unet"] | dict(
        sample_size=SIZE // 4, in_channels=7, num_class_embeds=1000, block_out_channels=[64, 96, 96],
        only_cross_attention=[True, True, False],
    ),
    "scheduler": tiny.CONFIGS["scheduler"] | BETAS,
    "low_res_scheduler": dict(_class_name="DDPMScheduler", prediction_type="epsilon", **BETAS),
}  # fmt: skip


def shrunk(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3], a quarter as large."""
    side = images.shape[1] // 4
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)) for image in images])


def train_vae(args: argparse.Namespace, images: np.ndarray) -> VAE:
    """The tiny model's VAE, which knows pictures of 64 pixels, on crops of larger ones."""
    vae = VAE(VAEConfig.from_dict(CONFIGS["vae"]))
    vae.load_state_dict(averages(args.tiny / "vae.safetensors"))
    training = Training(args.work / "vae.safetensors", vae, tiny.vae_loss, 0.01, args.vae_minutes, args.threads)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([SEED, 1, step])
        places = rng.integers((len(images) - HELD_OUT, SIZE - 63, SIZE - 63), size=(8, 3))
        crops = np.stack([images[i, y : y + 64, x : x + 64] for i, y, x in places])
        return to_batch(crops), torch.randn((8, vae.config.latent_channels, 16, 16), generator=generator(SEED, "vae", step))

    def show() -> None:
        x = to_batch(images[-8:])
        print(f"vae: {psnr(x, reconstructed(training.average, x)):.2f} dB", flush=True)

    training.run(draw, show)
    return training.average


@torch.no_grad()
def rescale(vae: VAE, by: float) -> None:
    """Multiply the VAE's latents; what it decodes from them stays."""
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias.chunk(2)
    weight.chunk(2)[0].mul_(by)
    bias[0].mul_(by)
    bias[1].add_(2 * math.log(by))
    vae.post_quant_conv.weight /= by


@torch.no_grad()
def prepare(
    args: argparse.Namespace, images: np.ndarray, scenes: list[Scene], tokens: dict[str, bytes], text_encoder: CLIPText
) -> dict[str, Tensor]:
    """latents-N.safetensors: N scenes' posteriors, the scaling factor, and captions encoded, in full and shortened."""
    path = args.work / f"latents-{len(scenes)}.safetensors"
    if not path.exists():
        vae = train_vae(args, images)
        with torch.autocast("cpu", torch.bfloat16):
            posteriors = [vae.encode(to_batch(part)) for part in np.array_split(images, len(images) // 4)]
        mean, std = (torch.cat([getattr(each, name).float() for each in posteriors]) for name in ("mean", "std"))
        rngs = (np.random.default_rng([SEED, 3, i]) for i in range(len(scenes)))
        captions = [words for scene, rng in zip(scenes, rngs, strict=True) for words in (scene.caption(), scene.caption(rng))]
        tokenizer = Tokenizer.from_files(tokens)
        context = torch.cat([text_encoder(tokenizer(part.tolist())) for part in np.array_split([*captions, ""], 20)])
        scale = (mean.var() + std.square().mean()).rsqrt()
        found = {"mean": mean.half(), "std": std.half(), "scale": scale, "context": context.half()}
        files.write_weights(path, found)
    return load_file(path)


def unet_loss(unet: UNet, x: Tensor, t: Tensor, context: Tensor, level: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The weighted squared error of the predicted velocity, and five times that of its coarse part, where colours are."""
    prediction = unet(x, t, context, level).float()
    coarse = weighted(F.avg_pool2d(prediction, 4), F.avg_pool2d(target, 4), weight)
    return weighted(prediction, target, weight) + 5 * coarse


def train_unet(
    args: argparse.Namespace, images: np.ndarray, scenes: list[Scene], tokens: dict[str, bytes], text_encoder: CLIPText
) -> None:
    """The UNet on crops of the scenes."""
    known = prepare(args, images, scenes, tokens, text_encoder)
    scheduler, low_res = (DDPMScheduler.from_config(CONFIGS[name]) for name in ("scheduler", "low_res_scheduler"))
    unet = UNet(UNetConfig.from_dict(CONFIGS["unet"]))
    start_at_zero(unet, ("conv2", "proj_out", "conv_out"))
    nn.init.normal_(unet.class_embedding.weight, std=0.02)
    training = Training(args.work / "unet.safetensors", unet, unet_loss, 0.02, args.minutes, args.threads)
    scale, small = known["scale"].item(), to_batch(shrunk(images))
    vae = VAE(VAEConfig.from_dict(CONFIGS["vae"]))
    vae.load_state_dict(averages(args.work / "vae.safetensors"))
    rescale(vae, scale / vae.scaling_factor)
    parts = {"vae": vae, "unet": training.average, "text_encoder": text_encoder}
    batch, side = 32, 24

    def draw(step: int) -> tuple[Tensor, ...]:
        rng, noise = np.random.default_rng([SEED, 2, step]), generator(SEED, "x4", step)
        places = rng.integers((len(images) - HELD_OUT, SIZE // 4 - side + 1, SIZE // 4 - side + 1), size=(batch, 3))

        def crops(x: Tensor) -> Tensor:
            return torch.stack([x[i, :, top : top + side, left : left + side] for i, top, left in places]).float()

        mean, std, low = crops(known["mean"]), crops(known["std"]), crops(small)
        told = torch.from_numpy(np.where(rng.random(batch) < 0.1, -1, 2 * places[:, 0] + rng.integers(2, size=batch)))
        level = torch.from_numpy(rng.integers(LEVELS, size=batch) * (rng.random(batch) < 0.5))
        low = low_res.add_noise(low, torch.randn(low.shape, generator=noise), level)
        x0 = scale * (mean + std * torch.randn(mean.shape, generator=noise))
        x, t, target, weight = noised(scheduler, x0, noise)
        return torch.cat([x, low], dim=1), t, known["context"][told].float(), level, target, weight

    def show() -> None:
        export(args.out, INDEX, CONFIGS, parts, tokens)
        upscaler = minibooth.load(args.out)
        truth, low = images[-8:], shrunk(images[-8:])
        with torch.autocast("cpu", torch.bfloat16):
            how = dict(noise_level=0, steps=10, guidance_scale=1.0, seed=0)
            large = upscaler.generate([scene.caption() for scene in scenes[-8:]], [Image.fromarray(x) for x in low], **how)
        bicubic = [Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for x in low]
        figures = [psnr(to_batch(truth), torch.stack([to_tensor(x) for x in made])) for made in (bicubic, large)]
        print(f"x4: bicubic {figures[0]:.2f} dB, drawn {figures[1]:.2f} dB", flush=True)
        sheet = grid([*bicubic, *large, *(Image.fromarray(x) for x in truth)], 8)
        save_png(sheet, args.work / "samples.png", {})

    training.run(draw, show)


def main(argv: Sequence[str]) -> None:
    """The stages in turn."""
    parser = command.Parser("python scripts/pretrain_x4.py", __doc__.splitlines()[0])
    minutes = command.within(0.01)
    parser.add_argument("--tiny", type=Path, required=True, help="the folder that pretrain_tiny.py worked in")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, in the diffusers layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, training state and samples")
    parser.add_argument("--minutes", type=minutes, default=40, help="the UNet, all calls (default 40)")
    parser.add_argument("--vae_minutes", type=minutes, default=8, help="the VAE, all calls (default 8)")
    parser.add_argument("--scenes", type=command.within(HELD_OUT + 1), default=1500, help="how many to draw (default 1500)")
    args = start(parser, argv, SEED)

    tokens = {path.name: path.read_bytes() for path in (args.tiny / "tokenizer").iterdir()}
    networks = tiny.new_generator(tokens)
    networks.load_state_dict(averages(args.tiny / "generator.safetensors"))
    scenes = [Scene.random(np.random.default_rng([SEED, i])) for i in range(args.scenes)]
    images = drawn(args.work / f"scenes-{args.scenes}.npy", scenes, SIZE, args.threads)
    train_unet(args, images, scenes, tokens, networks["text_encoder"])


if __name__ == "__main__":
    command.run(main, sys.argv)

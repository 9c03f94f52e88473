"""Pretrain the tiny Stable Diffusion of weights/tiny on the world that world.py draws.

    python scripts/pretrain_tiny.py --out weights/tiny --work DIR --minutes 120

Stages, each kept in DIR and skipped or continued by the next call: a vocabulary learnt from the captions of random scenes;
the captions, in several wordings each; pictures of the scenes; the VAE (Rombach et al. 2022, section 3.1); the latents of all;
UNet and text encoder together, with captions dropped for classifier-free guidance. A larger --minutes takes the training
up again from where it ended; another --scenes words, draws and encodes anew. Whatever a step needs lies on the device, so
that a GPU is never waited for.

Shapes: B batch, N scenes, W wordings, L tokens, Z latent channels, h x w latent size.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pretraining import (
    Training,
    averages,
    drawn,
    export,
    generator_on,
    noised,
    psnr,
    reconstructed,
    start,
    start_at_zero,
    to_batch,
    vocabulary,
    weighted,
)
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from world import Scene

import minibooth
from minibooth import command
from minibooth.checkpoint import files
from minibooth.diffusion.images import grid, save_png, to_image
from minibooth.diffusion.noise import generator
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.models.clip import CLIPText
from minibooth.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from minibooth.models.tokenizer import END, START, Tokenizer
from minibooth.models.unet import UNet
from minibooth.models.vae import VAE

CHUNK, HELD_OUT, SIZE, WORDINGS, SEED = 1000, 500, 64, 8, 0
VAE_BATCH, UNET_BATCH = {"cpu": 4, "cuda": 64}, {"cpu": 48, "cuda": 256}  # whole pictures, latents
RARE = "sks zwx olis qiv"  # identifiers for DreamBooth: a token each, in no caption
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": False,
    **dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), [None, None]),
}
COMMON = "the and with without my this toy cute tiny drawing painting portrait background"
CONFIGS = {  # the folder's files, but for what is measured: the vocabulary's size and the scaling factor
    "vae": dict(
        _class_name="AutoencoderKL", sample_size=SIZE, block_out_channels=[32, 64, 64],
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4, force_upcast=False,  # a group's mean is lost, so that many groups fade colours
    ),
    "text_encoder": dict(
        architectures=["CLIPTextModel"], model_type="clip_text_model", hidden_size=128, intermediate_size=512,
        num_hidden_layers=4, num_attention_heads=4, dtype="float32",  # to be computed in, by programs that ask
    ),
    "unet": dict(
        _class_name="UNet2DConditionModel", sample_size=SIZE // 4, block_out_channels=[96, 128, 128],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], layers_per_block=1,
        attention_head_dim=4, cross_attention_dim=128, use_linear_projection=True, norm_num_groups=8,
    ),
    "scheduler": dict(
        _class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
    ),
}  # fmt: skip

# --- scenes and their captions ---------------------------------------------------------------------------------------


def random_scenes(count: int) -> list[Scene]:
    """The scenes; the last HELD_OUT are for measuring."""
    return [Scene.random(np.random.default_rng([SEED, *divmod(i, CHUNK)])) for i in range(count)]


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """The byte pairs to join, most frequent first, until each of these words is one token. Sennrich et al. 2016."""
    spelt = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelt.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in spelt.values():
            for i in reversed(range(len(parts) - 1)):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]


def learn_vocabulary(folder: Path, captions: Sequence[str]) -> None:
    """Write a tokenizer in CLIP's format: every byte, within and at the end of a word, then the merges."""
    words = Counter(word for caption in captions for word in caption.split())
    words.update(f"{RARE} {COMMON}".split())
    merges, alphabet = learn_merges(words), sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    with files.replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
        (temporary / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
        (temporary / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
        (temporary / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def worded(tokens: dict[str, bytes], chunk: int, scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Captions of a chunk's scenes, three in ten in full, as ids [CHUNK, W, L]; where errors weigh most [CHUNK, 1, h, w]."""
    tokenizer, rng = Tokenizer.from_files(tokens), np.random.default_rng([SEED, 2, chunk])
    said = [scene.caption(rng if rng.random() < 0.7 else None) for scene in scenes for _ in range(WORDINGS)]
    emphasis = np.stack([scene.emphasis(SIZE // 4) for scene in scenes])
    return tokenizer(said).view(len(scenes), WORDINGS, -1).short().numpy(), emphasis[:, None].astype(np.float16)


def word_all(path: Path, tokens: dict[str, bytes], scenes: list[Scene], workers: int) -> None:
    """The same of all scenes, in a file."""
    chunks = [scenes[i : i + CHUNK] for i in range(0, len(scenes), CHUNK)]
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(worded, [tokens] * len(chunks), range(len(chunks)), chunks)
        ids, emphasis = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    files.write_weights(path, {"ids": ids, "emphasis": emphasis})


# --- the VAE ---------------------------------------------------------------------------------------------------------


def vae_loss(vae: VAE, x: Tensor, noise: Tensor) -> Tensor:
    """The error, a touch of KL divergence, and the divergence of all latents' common covariance from the identity.

    The last keeps each channel in use: without it they stay copies of light and dark for thousands of steps. Of crops the
    error is the absolute and the squared, the latter also of the coarse picture, where colours are; of whole pictures the
    logarithm of each one's squared error, which PSNR is the mean of and whose slope is twelve times as steep.
    """
    posterior = vae.encode(x)
    mean, std = posterior.mean.float(), posterior.std.float()
    error = vae.decode(mean + std * noise).float() - x
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
    rest = 1e-4 * kl + 0.1 * divergence(mean.transpose(0, 1).flatten(1))
    if x.shape[-1] == SIZE:
        return error.square().mean(dim=(1, 2, 3)).log().mean() + 12 * rest
    return error.abs().mean() + 5 * error.square().mean() + 10 * F.avg_pool2d(error, 4).square().mean() + rest


def divergence(x: Tensor) -> Tensor:
    """Of the Gaussian with the covariance of x [Z, samples] from the standard one; by elimination, so that no GPU waits."""
    x = x - x.mean(dim=1, keepdim=True)
    covariance = (x[:, None] * x[None]).mean(dim=2) + 1e-4 * torch.eye(len(x), device=x.device)
    trace, logdet = covariance.diagonal().sum(), torch.zeros((), device=x.device)
    for _ in range(len(x)):
        column = covariance[1:, 0]
        logdet = logdet + covariance[0, 0].log()
        covariance = covariance[1:, 1:] - column[:, None] * column[None] / covariance[0, 0]
    return 0.5 * (trace - len(x) - logdet)


def train_vae(args: argparse.Namespace, path: Path, images: Tensor) -> None:
    """The VAE on crops of 32 x 32, four for the price of one picture, and towards the end on whole pictures.

    Then every scene's posterior goes to the file `path`, with the factor that brings the latents to unit variance.
    """
    work, device = args.work, images.device
    train, held_out = images[:-HELD_OUT], to_batch(images[-HELD_OUT:])
    vae = VAE(VAEConfig.from_dict(CONFIGS["vae"])).to(device)
    start_at_zero(vae, ("conv2", "to_out.0"))
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -6)  # else noise drowns what it has yet to say
    training = Training(work / "vae.safetensors", vae, vae_loss, 0.02, args.vae_minutes, args.threads)
    vae = training.average

    def draw(step: int) -> tuple[Tensor, Tensor]:
        rng, whole = generator(SEED, "vae", step), training.seconds > 0.65 * training.budget
        side, count = (SIZE, 1) if whole else (SIZE // 2, 4)
        top, left = torch.randint(SIZE - side + 1, (2,), generator=rng).tolist()
        count, noise = count * VAE_BATCH[device.type], generator_on(device, rng)
        which = torch.randint(len(train), (count,), generator=noise, device=device)
        shape = count, vae.config.latent_channels, side // vae.factor, side // vae.factor
        crops = train[which, top : top + side, left : left + side]
        return to_batch(crops), torch.randn(shape, generator=noise, device=device)

    def show() -> None:
        x = held_out[:200]
        y = reconstructed(vae, x)
        print(f"vae: {psnr(x, y):.2f} dB on held-out scenes", flush=True)
        pairs = [to_image(torch.cat(pair, dim=1)).resize((128, 256)) for pair in zip(x[:24], y[:24], strict=True)]
        save_png(grid(pairs, 12), work / "vae.png", {})

    @torch.no_grad()
    def encode(part: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(to_batch(part))
        return posterior.mean.half(), posterior.std.half()

    training.run(draw, show)
    parts = training.pool.map(encode, images.split(20 * VAE_BATCH[device.type]))
    mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    scale = (mean.float().var() + std.float().square().mean()).rsqrt()
    print(f"{len(mean)} latents: scaling factor {scale:.4f}, noise {std.float().mean() * scale:.3f}", flush=True)
    files.write_weights(path, {"mean": mean, "std": std, "scale": scale})


# --- UNet and text encoder -------------------------------------------------------------------------------------------


def new_generator(tokens: dict[str, bytes]) -> nn.ModuleDict:
    """Both networks, fresh, for a tokenizer's files."""
    text = CLIPText(CLIPTextConfig.from_dict(CONFIGS["text_encoder"] | vocabulary(tokens)))
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.1)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.02)
    unet = UNet(UNetConfig.from_dict(CONFIGS["unet"]))
    start_at_zero(unet, ("conv2", "proj_out", "conv_out"))
    return nn.ModuleDict({"unet": unet, "text_encoder": text})


def generator_loss(networks: nn.ModuleDict, x: Tensor, t: Tensor, ids: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The weighted squared error of the predicted velocity."""
    return weighted(networks["unet"](x, t, networks["text_encoder"](ids)), target, weight)


def train_generator(
    args: argparse.Namespace, known: dict[str, Tensor], scenes: list[Scene], tokens: dict[str, bytes], device: torch.device
) -> None:
    """UNet and text encoder on what is `known` of the scenes: their posteriors and their captions.

    Pictures are not mirrored: latents are not mirror images of one another, and the world draws both facings anyway.
    """
    work, batch = args.work, UNET_BATCH[device.type]
    scheduler, tokenizer = DDPMScheduler.from_config(CONFIGS["scheduler"]), Tokenizer.from_files(tokens)
    known = {name: x.to(device) for name, x in known.items()}
    networks = new_generator(tokens).to(device)
    training = Training(work / "generator.safetensors", networks, generator_loss, 0.02, args.minutes, args.threads)
    vae = VAE(VAEConfig.from_dict(CONFIGS["vae"] | {"scaling_factor": round(known["scale"].item(), 5)}))
    vae.load_state_dict(averages(work / "vae.safetensors"))
    captions, nothing = [scene.caption() for scene in scenes[-24:]], tokenizer([""]).to(device)

    def draw(step: int) -> tuple[Tensor, ...]:
        rng = generator_on(device, generator(SEED, "generator", step))
        which, wording = (torch.randint(n, (batch,), generator=rng, device=device) for n in (len(scenes) - HELD_OUT, WORDINGS))
        mean, std = (known[name][which].float() * vae.scaling_factor for name in ("mean", "std"))
        x0 = mean + std * torch.randn(mean.shape, generator=rng, device=device)
        x, t, target, weight = noised(scheduler, x0, rng)
        dropped = torch.rand((batch, 1), generator=rng, device=device) < 0.1
        ids = torch.where(dropped, nothing, known["ids"][which, wording].long())
        return x, t, ids, target, weight * known["emphasis"][which].float()

    def show() -> None:
        export(args.out, INDEX, CONFIGS, {**training.average, "vae": vae}, tokens)
        pipe = minibooth.load(args.out, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            pictures = pipe.generate(captions, steps=25, guidance_scale=4.0, seed=0)
        sheet = grid([labelled(*pair) for pair in zip(pictures, captions, strict=True)], 8)
        save_png(sheet, work / f"samples-{int(training.clock[1]):08d}.png", {})

    training.run(draw, show)


def labelled(picture: Image.Image, caption: str) -> Image.Image:
    """The picture, enlarged, above its caption."""
    words = caption.removeprefix("a photo of ").split()
    lines = " ".join(words[: (middle := -(-len(words) // 2))]), " ".join(words[middle:])
    card = Image.new("RGB", (3 * SIZE, 3 * SIZE + 26), "white")
    card.paste(picture.resize((3 * SIZE, 3 * SIZE), Image.Resampling.NEAREST))
    ImageDraw.Draw(card).multiline_text((2, 3 * SIZE), "\n".join(lines), fill="black", spacing=0)
    return card


def main(argv: Sequence[str]) -> None:
    """The stages in turn."""
    parser = command.Parser("python scripts/pretrain_tiny.py", __doc__.splitlines()[0])
    minutes = command.within(0.01)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, in the diffusers layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, training state and sample grids")
    parser.add_argument("--minutes", type=minutes, default=120, help="UNet and text encoder, all calls (default 120)")
    parser.add_argument("--vae_minutes", type=minutes, default=60, help="the VAE, all calls (default 60)")
    parser.add_argument(
        "--scenes", type=command.within(HELD_OUT + 1, 10**6), default=40_000, help="how many to draw (default 40000)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = start(parser, argv, SEED)
    device = command.device(args.device)

    scenes = random_scenes(args.scenes)
    if not (folder := args.work / "tokenizer").exists():
        learn_vocabulary(folder, [scene.caption(np.random.default_rng(i)) for i, scene in enumerate(scenes[:5000])])
    tokens = {path.name: path.read_bytes() for path in folder.iterdir()}
    words, latents = (args.work / f"{name}-{args.scenes}.safetensors" for name in ("words", "latents"))
    if not words.exists():
        word_all(words, tokens, scenes, args.threads)
    if not latents.exists():
        images = drawn(args.work / f"scenes-{args.scenes}.npy", scenes, SIZE, args.threads)
        train_vae(args, latents, torch.from_numpy(images).to(device))
    train_generator(args, load_file(words) | load_file(latents), scenes, tokens, device)


if __name__ == "__main__":
    command.run(main, sys.argv)

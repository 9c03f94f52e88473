"""Small CLIPs, DINOs and LPIPS that the tests make themselves, in the published layouts, with random weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import MERGES, TOKENIZER, randomise, vocabulary, write_json
from safetensors.torch import save_file

# preprocessor_config.json of openai/clip-vit-base-patch32 and of facebook/dino-vits16, but for their size of 224.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_SEES = dict(
    crop_size=32, do_center_crop=True, do_normalize=True, do_resize=True, feature_extractor_type="CLIPFeatureExtractor",
    image_mean=MEAN, image_std=STD, resample=3, size=32,
)  # fmt: skip
DINO_SEES = dict(
    do_normalize=True, do_resize=True, feature_extractor_type="ViTFeatureExtractor", image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225], resample=2, size=32,
)  # fmt: skip

SMALL = dict(num_attention_heads=4, num_hidden_layers=3, layer_norm_eps=1e-5)
SMALL_CLIP = dict(
    model_type="clip", projection_dim=20,
    text_config=SMALL | dict(
        hidden_size=24, intermediate_size=48, vocab_size=len(vocabulary()), bos_token_id=len(vocabulary()) - 2,
        eos_token_id=len(vocabulary()) - 1,
    ),
    vision_config=SMALL | dict(hidden_size=32, intermediate_size=80, patch_size=8, image_size=32),
)  # fmt: skip
SMALL_VIT = SMALL | dict(hidden_size=32, intermediate_size=80, patch_size=8, image_size=32)


def saved(model, sees, folder):
    """The model as transformers writes it, with other weights and the older form of what is beside it."""
    randomise(model, seed=0)
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name:  # [1, ...], which `randomise` takes for a layer's weight and draws too small
            parameter.data.mul_(parameter[0].numel() ** 0.5)
    model.eval().save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", sees)
    write_json(folder / "vocab.json", vocabulary())
    write_json(folder / "tokenizer_config.json", TOKENIZER)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return folder, model


def small_clip(folder, activation="quick_gelu"):
    """A folder like openai/clip-vit-base-patch32, and transformers' model of it."""
    transformers = pytest.importorskip("transformers")
    sections = {name: SMALL_CLIP[name] | {"hidden_act": activation} for name in ("text_config", "vision_config")}
    return saved(transformers.CLIPModel(transformers.CLIPConfig(**SMALL_CLIP | sections)), CLIP_SEES, folder)


def small_dino(folder):
    """A folder like facebook/dino-vits16, and transformers' model of it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL_VIT), add_pooling_layer=False)
    return saved(model, DINO_SEES, folder)


def random_lpips(folder: Path) -> Path:
    """A file of the names that torchvision and lpips publish; heads are not negative there."""
    draw = torch.Generator().manual_seed(0)
    state, channels = {}, 3
    for layer, width, kernel in ((0, 64, 11), (3, 192, 5), (6, 384, 3), (8, 256, 3), (10, 256, 3)):
        shape = (width, channels, kernel, kernel)
        state[f"features.{layer}.weight"] = torch.randn(shape, generator=draw) * (2 / (channels * kernel**2)) ** 0.5
        state[f"features.{layer}.bias"] = 0.1 * torch.randn(width, generator=draw)
        channels = width
    for i, width in enumerate((64, 192, 384, 256, 256)):
        state[f"lin{i}.model.1.weight"] = torch.rand((1, width, 1, 1), generator=draw)
    save_file(state, folder / "lpips.safetensors")
    return folder / "lpips.safetensors"


def by_formula(w, a, b):
    """Zhang et al. 2018, eq. 1: over layers, the sum of the mean over places of w * (a's unit feature - b's)^2."""
    total = 0
    x = [p - torch.tensor([-0.030, -0.088, -0.188])[:, None, None] for p in (a, b)]
    x = [p / torch.tensor([0.458, 0.448, 0.450])[:, None, None] for p in x]
    for i, (layer, stride, padding, pool) in enumerate([(0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)]):
        x = [F.max_pool2d(p, 3, 2) if pool else p for p in x]
        x = [F.conv2d(p, w[f"features.{layer}.weight"], w[f"features.{layer}.bias"], stride, padding).clamp(min=0) for p in x]
        one, other = (p / (p.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for p in x)
        total = total + ((one - other) ** 2 * w[f"lin{i}.model.1.weight"][0]).sum(1).mean((1, 2))
    return total

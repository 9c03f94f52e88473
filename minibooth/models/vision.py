"""What DreamBooth's paper measures with: CLIP (Radford et al. 2021), DINO (Caron et al. 2021), LPIPS (Zhang et al. 2018).

CLIP sees with the layers of its text encoder, over patches of a picture. So does DINO's ViT but for the names in its file,
which `from_vit` translates.

Shapes: B pictures or prompts, N patches, D width, P width of what CLIP projects both to.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from minibooth.errors import UserError
from minibooth.models.clip import Encoder, TextModel
from minibooth.models.config import CLIPTextConfig, VisionConfig

VIT_NAMES = {  # a part of a name in a ViT's file -> of ours
    "cls_token": "class_embedding", "patch_embeddings.projection": "patch_embedding",
    "position_embeddings": "position_embedding.weight", "encoder.layer.": "encoder.layers.",
    "attention.attention.query": "self_attn.q_proj", "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj", "attention.output.dense": "self_attn.out_proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2", "layernorm.": "post_layernorm.",
}  # fmt: skip


def from_vit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT's file as `VisionModel` has them: other names, and two of them without sides of 1."""
    parts = re.compile("|".join(map(re.escape, VIT_NAMES)))
    ours = {name: parts.sub(lambda match: VIT_NAMES[match[0]], name) for name in tensors}
    return {ours[name]: x.squeeze() if name.startswith("embeddings.") else x for name, x in tensors.items()}


def preprocessor(config: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """preprocessor_config.json -> a function from an RGB picture to what its encoder was trained to see, fp32 [3, H, W].

    Old files say a size by one number: the shorter side's where a crop follows, else both. Pillow resizes, as it did in
    training. Raises UserError for a step left out, LookupError for a missing number.
    """
    if off := [key for key in ("do_resize", "do_rescale", "do_normalize") if not config.get(key, True)]:
        raise UserError(f"{off[0]}=False in preprocessor_config.json is not supported")

    def sides(size: int | Mapping[str, int]) -> tuple[int, int]:
        return (size, size) if isinstance(size, int) else (size["width"], size["height"])

    size, middle = config["size"], sides(config["crop_size"]) if config.get("do_center_crop") else None
    if middle and isinstance(size, int):
        size = {"shortest_edge": size}
    whole = None if isinstance(size, dict) and "shortest_edge" in size else sides(size)
    factor, resample = float(config.get("rescale_factor", 1 / 255)), Image.Resampling(config["resample"])
    mean, std = (np.array(config[key], np.float32) for key in ("image_mean", "image_std"))

    def see(picture: Image.Image) -> Tensor:
        wide, high = whole or (int(size["shortest_edge"] * side / min(picture.size)) for side in picture.size)
        w, h = middle or (wide, high)
        left, top = (wide - w) // 2, (high - h) // 2
        levels = np.asarray(picture.resize((wide, high), resample).crop((left, top, left + w, top + h)))
        return torch.from_numpy(((levels * factor).astype(np.float32) - mean) / std).permute(2, 0, 1)

    return see


class PatchEmbeddings(nn.Module):
    """Squares of pixels as tokens, after one that will stand for the whole picture, each plus a vector for its place."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=config.PLAIN)
        self.position_embedding = nn.Embedding(1 + (config.image_size // patch) ** 2, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels)
        tokens = [self.class_embedding.expand(len(patches), 1, -1), rearrange(patches, "b d h w -> b (h w) d")]
        return torch.cat(tokens, dim=1) + self.places(*patches.shape[2:])

    def places(self, rows: int, columns: int) -> Tensor:
        """Position vectors [1 + N, D]; of a picture of another size than trained on, those of its patches interpolated."""
        first, square = self.position_embedding.weight.tensor_split([1])
        side = math.isqrt(len(square))
        if (rows, columns) != (side, side):
            square = F.interpolate(rearrange(square, "(h w) d -> 1 d h w", h=side), (rows, columns), mode="bicubic")
            square = rearrange(square, "1 d h w -> (h w) d")
        return torch.cat([first, square])


class VisionModel(nn.Module):
    """pixels [B, 3, H, W] -> [B, D]: the last state of the token that stands for the whole picture."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.Identity() if config.PLAIN else nn.LayerNorm(width, eps)  # the file's spelling
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        _, last = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(last[:, 0])


class CLIP(nn.Module):
    """Pixels [B, 3, H, W] -> [B, P]; `read` does the same to prompts. config: config.json of the whole model.

    Raises UserError for an unsupported setting.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        text, vision = CLIPTextConfig.from_dict(config), VisionConfig.from_dict(config)
        width = config.get("projection_dim", 512)
        self.text_model = TextModel(text)
        self.text_projection = nn.Linear(text.hidden_size, width, bias=False)
        self.vision_model = VisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))  # of training alone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixels))

    def read(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> [B, P]."""
        return self.text_projection(self.text_model(ids)[2])


class LPIPS(nn.Module):
    """lpips(a, b): how different pictures [B, 3, H, W] in [-1, 1] look, [B]; in fp32. Zhang et al. 2018, eq. 1, version 0.1.

    AlexNet's features are torchvision's (`features.0.weight`), the weights of their differences lpips' (`lin0.model.1.weight`).
    Both are published as pickles, which are never opened here; in the folder of both, this makes the file once:

        python -c "import torch; from safetensors.torch import save_file; save_file({key: x
            for file in ('alexnet-owt-7be5be79.pth', 'alex.pth') for key, x in torch.load(file, weights_only=True).items()
            if 'classifier' not in key}, 'lpips.safetensors')"
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        for i, width in enumerate((64, 192, 384, 256, 256)):
            model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))  # dropout, in training
            self.add_module(f"lin{i}", nn.ModuleDict({"model": model}))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        mean, std = (a.new_tensor(rgb)[:, None, None] for rgb in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x, distance = (torch.cat([a, b]) - mean) / std, a.new_zeros(len(a))
        heads = (self.get_submodule(f"lin{i}.model") for i in range(5))
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                first, second = (x / (x.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
                distance = distance + next(heads)((first - second).square()).mean(dim=(1, 2, 3))
        return distance

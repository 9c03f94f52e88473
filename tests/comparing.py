"""How one thing is held against another: seeded inputs, and differences of tensors, files, gradients and pictures."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of it."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(folder: Path, **options):
    """diffusers' pipeline of a folder, of the class that it names; it draws in silence."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def error(ours, theirs):
    """Largest difference, in units of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """Of two sets of tensors by name: the names that only one has, or whose dtypes, shapes or bits are not equal."""

    def same(a: Tensor, b: Tensor) -> bool:
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))

    def bits(x: Tensor) -> Tensor:
        return x.contiguous().flatten().view(torch.uint8)

    return {name for name in one.keys() | other.keys() if not (name in one and name in other and same(one[name], other[name]))}


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a pipeline's folder, or of a checkpoint's, by network."""
    found = [path for part in ("text_encoder*", "unet", "vae") for path in folder.glob(f"{part}/*.safetensors")]
    return {f"{path.parent.name}/{name}": tensor for path in found for name, tensor in load_file(path).items()}


def only(tensors: Mapping[str, Tensor], *networks: str) -> dict[str, Tensor]:
    """Those of some of the networks."""
    return {name: tensor for name, tensor in tensors.items() if name.split("/")[0] in networks}


def pixels(pictures):
    return np.stack([np.asarray(picture, np.int16) for picture in pictures])


def difference(left, right):
    """In levels of 255, between pictures that show something."""
    left, right = pixels(left), pixels(right)
    assert left.shape == right.shape
    assert left.std(axis=(1, 2, 3)).min() > 10
    return np.abs(left - right).max()


def gradients(network, output, target):
    """Of the squared error of what the network has put out, by its parameters' names."""
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad((output - target).square().mean(), named.values()), strict=True))


def worst_error(ours, theirs):
    """Of two sets of tensors by name: the largest error, and whose it is."""
    assert ours.keys() == theirs.keys()
    return max((error(ours[name], theirs[name]), name) for name in ours)

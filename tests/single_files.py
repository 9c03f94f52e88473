"""LDM single files for the tests, of small checkpoints whose heads and groups are those that a file's shapes mean."""

import functools
import shutil
import tempfile
from pathlib import Path

from conftest import SD2, SDXL, X4, make_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import minibooth
from minibooth.checkpoint import ldm

TINY = {  # SD 1: 8 heads; SD 2 and XL, and every text encoder: a head for each 64 channels
    "sd1": {
        "unet": dict(attention_head_dim=8, layers_per_block=1, norm_num_groups=16),
        "text_encoder": dict(num_attention_heads=1),
    },
    "sd2": {
        "unet": dict(
            attention_head_dim=[1, 1, 1, 2], block_out_channels=[32, 32, 64, 128], cross_attention_dim=128,
            layers_per_block=1, norm_num_groups=32,
        ),
        "text_encoder": dict(hidden_size=128, intermediate_size=256, num_attention_heads=2),
    },
    "sdxl": {
        "unet": dict(
            attention_head_dim=[1, 1, 2], block_out_channels=[32, 64, 128], cross_attention_dim=152, layers_per_block=1,
            norm_num_groups=32,
        ),
        "text_encoder": dict(num_attention_heads=1),
        "text_encoder_2": dict(hidden_size=128, intermediate_size=256, num_attention_heads=2),
    },
    "x4": {
        "unet": dict(cross_attention_dim=128),
        "text_encoder": dict(hidden_size=128, intermediate_size=256, num_attention_heads=2),
    },
}  # fmt: skip
BASE = {"sd1": {}, "sd2": SD2, "sdxl": SDXL, "x4": X4}
TEXT = {  # where each file's text encoders stand
    "sd1": ["cond_stage_model.transformer."],
    "sd2": ["cond_stage_model.model."],
    "x4": ["cond_stage_model.model."],
    "sdxl": ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."],
}
KEPT = tempfile.TemporaryDirectory(prefix="minibooth-")


@functools.cache
def folder(kind: str, **changes) -> Path:
    """A checkpoint in the diffusers layout, made once; read only."""
    base, tiny = BASE[kind], TINY[kind]
    merged = {part: base.get(part, {}) | tiny.get(part, {}) for part in base | tiny}
    if layers := changes.get("layers"):
        merged["text_encoder"]["num_hidden_layers"] = layers
    name = "-".join([kind, *map(str, changes.values())])
    return make_checkpoint(Path(KEPT.name) / name, merged, seed=50)


@functools.cache
def file(kind: str) -> Path:
    """The same as a single file as others write it, with the vocabulary beside it; made once, read only."""
    said, path = (Path(KEPT.name) / name / f"{kind}.safetensors" for name in ("said", "files"))
    pipe = minibooth.load(folder(kind))
    pipe.save(said)
    change(said, path, lambda tensors: None, {key: x for key, x in metadata(said).items() if not key.startswith(ldm.OURS)})
    shutil.copytree(folder(kind) / "tokenizer", path.parent / "tokenizer", dirs_exist_ok=True)
    return path


def change(source: Path, target: Path, edit, metadata: dict[str, str] | None = None) -> Path:
    """A file with edit(tensors) in it; it says nothing of what it predicts but in `metadata`."""
    tensors = load_file(source)
    tensors = edit(tensors) or tensors
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata)
    return target


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def states(pipe) -> dict[str, Tensor]:
    """All tensors of a pipeline, by network."""
    return {f"{part}/{name}": x for part, network in pipe.networks.items() for name, x in network.state_dict().items()}

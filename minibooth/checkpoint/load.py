"""A path or a hub name in, networks out, and back: the folder layout of diffusers, as every Stable Diffusion is published.

    model_index.json   which classes the folder holds
    unet/  vae/        config.json and diffusion_pytorch_model[.variant].safetensors
    text_encoder/      config.json and model[.variant].safetensors
    tokenizer/         vocab.json and merges.txt, or tokenizer.json
    scheduler/         scheduler_config.json

Attribute names of our networks are the names in these files, so there is no table, but for names of the first years.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minibooth.checkpoint import files
from minibooth.errors import UserError
from minibooth.models.clip import CLIPText
from minibooth.models.config import CLIPTextConfig, Config, UNetConfig, VAEConfig
from minibooth.models.tokenizer import Tokenizer
from minibooth.models.unet import UNet
from minibooth.models.vae import VAE


class Component(NamedTuple):
    """A network of the folder: its class, its configuration's, and how its weights' file is called."""

    network: type[nn.Module]
    config: type[Config]
    stem: str


COMPONENTS = {
    "text_encoder": Component(CLIPText, CLIPTextConfig, "model"),
    "text_encoder_2": Component(CLIPText, CLIPTextConfig, "model"),
    "unet": Component(UNet, UNetConfig, "diffusion_pytorch_model"),
    "vae": Component(VAE, VAEConfig, "diffusion_pytorch_model"),
}
KINDS = {  # what model_index.json may say, and what to read then
    "StableDiffusionPipeline": ("text_encoder", "unet", "vae"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "unet", "vae"),
}
SMALL_FILES = ("model_index.json", "*/*.json", "tokenizer*/*.txt")  # read into memory, written back as they were

# Names as files have them -> names as published today: a missing prefix, a buffer that became a constant, old attention.
RENAMES = (
    (re.compile(r"^(?=(embeddings|encoder\.layers|final_layer_norm)\.)"), "text_model."),
    (re.compile(r"\.query\."), ".to_q."),
    (re.compile(r"\.key\."), ".to_k."),
    (re.compile(r"\.value\."), ".to_v."),
    (re.compile(r"\.proj_attn\."), ".to_out.0."),
)
DROPPED = re.compile(r"embeddings\.position_ids$")


def published_name(name: str) -> str:
    """Today's name of a tensor."""
    for old, new in RENAMES:
        name = old.sub(new, name)
    return name


class Uninitialised(TorchFunctionMode):
    """Networks built here get no initial values: a file replaces them, and nn.Embedding's on meta would take a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == nn.init.__name__:
            return (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


@dataclass
class Source:
    """What a pipeline was read from: its small files, and its weights by component, under today's names and still on disk."""

    name: str
    files: dict[str, bytes]
    weights: dict[str, Mapping[str, Tensor]]

    @classmethod
    def open(cls, source: str | Path, variant: str | None = None, revision: str | None = None) -> "Source":
        """Open a folder in the diffusers layout or a hub repository, "owner/name".

        Raises UserError where something is missing, damaged or of another kind, or cannot be had from the hub.
        """
        folder = find(source, variant, revision)
        paths = sorted({path for pattern in SMALL_FILES for path in folder.glob(pattern)})
        small = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if ".index." not in path.name}
        self = cls(str(source), small, {})
        if self.kind not in KINDS:
            raise UserError(f"{source} is a {self.kind}; supported: {', '.join(KINDS)}")
        for name in KINDS[self.kind]:
            tensors = files.weights_of(folder / name, COMPONENTS[name].stem, variant)
            names = {published_name(key): key for key in tensors if not DROPPED.search(key)}
            self.weights[name] = files.Renamed(tensors, names)
        return self

    @property
    def kind(self) -> str:
        """The pipeline's class, as diffusers calls it."""
        return self.json("model_index.json").get("_class_name") or "checkpoint of unknown kind"

    def json(self, path: str) -> dict:
        """One of the small files, parsed. Raises UserError where it is missing or damaged."""
        if path not in self.files:
            raise UserError(f"{self.name}/{path} is missing")
        return files.parse_json(self.files[path], f"{self.name}/{path}")

    def tokenizer(self, folder: str = "tokenizer") -> Tokenizer:
        """The tokenizer of a folder. Raises UserError where its vocabulary is missing."""
        paths = {path: path.removeprefix(f"{folder}/") for path in self.files if path.startswith(f"{folder}/")}
        return Tokenizer.from_files({name: self.files[path] for path, name in paths.items()})

    def build(self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
        """The component's network with its weights, in eval mode. Raises UserError at the first name or shape that differs."""
        component = COMPONENTS[name]
        config = self.json(f"{name}/config.json")
        try:
            with torch.device("meta"), Uninitialised():
                network = component.network(component.config.from_dict(config))
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(f"{self.name}/{name}/config.json describes no network that is known here: {error}") from error
        wanted, tensors = network.state_dict(), self.weights[name]
        for kind, keys in (
            ("lacks", wanted.keys() - tensors.keys()),
            ("has unexpected", tensors.keys() - wanted.keys()),
        ):
            if keys:
                raise UserError(f"{self.name}: {name} {kind} {min(keys)} and {len(keys) - 1} more; is it of another kind?")
        state = {key: tensors[key] for key in wanted}
        for key, tensor in state.items():
            if tensor.shape != wanted[key].shape:
                shapes = f"{[*tensor.shape]}, where its config.json means {[*wanted[key].shape]}"
                raise UserError(f"{self.name}: {name}'s {key} is {shapes}")
        network.load_state_dict({key: x.to(device, dtype) for key, x in state.items()}, strict=True, assign=True)
        return network.eval()

    def save(self, folder: Path, networks: Mapping[str, nn.Module | None]) -> None:
        """Write the folder again, with the weights of `networks` where given, and as they were read where not.

        Every tensor gets the dtype it was read in, so that what was not trained comes back bit for bit. Parts that other
        programs attach and we do not read, the safety checker for one, become null in model_index.json.
        """
        index = self.json("model_index.json")
        kept = {path.split("/")[0] for path in self.files} - {"safety_checker", "image_encoder"}
        new = {key: [None, None] if isinstance(x, list) and key not in kept else x for key, x in index.items()}
        small = self.files | ({"model_index.json": json.dumps(new, indent=2).encode()} if new != index else {})
        with files.replacing(folder, merge=True) as temporary:
            for path, data in small.items():
                if path.split("/")[0] in kept:
                    (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / path).write_bytes(data)
            for name, read in self.weights.items():
                network = networks.get(name)
                state = network.state_dict() if network is not None else read
                files.write_weights(temporary / name / f"{COMPONENTS[name].stem}.safetensors", state, like=read)


def find(source: str | Path, variant: str | None = None, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the path itself, or the hub's cache after a download. Raises UserError otherwise."""
    path = Path(source)
    if (path / "model_index.json").is_file():
        return path
    if path.suffix in files.PICKLES:
        raise UserError(f"{path} is a pickle, which is never opened here; convert it to safetensors")
    if path.is_file():
        raise UserError(f"{path} is a file; a folder in the diffusers layout is needed (model_index.json, unet/, vae/, ...)")
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir())[:6]
        what = "a LoRA, to be used with its base model" if "pytorch_lora_weights.safetensors" in found else "no checkpoint"
        raise UserError(f"{path} is {what}: it has no model_index.json, but {', '.join(found) or 'nothing'}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"{path} is missing")
    return download(str(source), variant, revision)


def download(repository: str, variant: str | None, revision: str | None) -> Path:
    """A snapshot of a hub repository's files of one variant, through huggingface_hub and its cache (offline mode included)."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    infix = f".{variant}" if variant else ""
    patterns = list(SMALL_FILES)
    for name, component in COMPONENTS.items():
        patterns += [f"{name}/{component.stem}{infix}{end}.safetensors" for end in ("", "-?????-of-?????")]
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{repository} is no folder here, and could not be had from the hub ({reason})") from None

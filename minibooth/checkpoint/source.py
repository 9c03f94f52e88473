"""A path or a hub name in, networks out, and back: the folder layout of diffusers, as every Stable Diffusion is published.

An LDM single file is read as if it were such a folder, and either can be written (`ldm`).

    model_index.json   which classes the folder holds
    unet/  vae/        config.json and diffusion_pytorch_model[.variant].safetensors
    text_encoder/      config.json and model[.variant].safetensors
    tokenizer/         vocab.json and merges.txt, or tokenizer.json
    scheduler/         scheduler_config.json

Attribute names of our networks are the names in these files, so there is no table, but for names of the first years.
"""

import contextlib
import json
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minibooth.checkpoint import files, ldm
from minibooth.checkpoint.ldm import INDEX, SCHEDULE
from minibooth.errors import UserError, blaming, refusals
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
KINDS = {kind: sorted(family.prefixes) for kind, family in ldm.FAMILIES.items()}  # what a folder may be, and what to read then
SMALL_FILES = (INDEX, "*/*.json", "tokenizer*/*.txt")  # read into memory, written back as they were
OF_TOKENIZER = re.compile(r"tokenizer(_2)?/[\w-]+\.(json|txt)")  # by what a file says itself: "../" would leave a folder
OF_WEIGHTS = re.compile(r"modelspec\.(title|hash)|sshs_")  # metadata by kohya's programs
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json")
PARTIAL = {  # what a folder is that has this file, but no INDEX
    "pytorch_lora_weights.safetensors": "a LoRA, to be used with its base model",
    "state.json": "a run's checkpoint; to draw with it, give it to the same command as --resume_from_checkpoint, with its step "
    "as --max_train_steps and another --output_dir",
}
CLIP = "openai/clip-vit-large-patch14"  # has the vocabulary of all these models

# Names as files have them -> names as published today: text encoders without their prefix, attention of the first years.
BARE = re.compile(r"^(?=(embeddings|encoder\.layers|final_layer_norm)\.)")
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
DROPPED = re.compile(r"embeddings\.position_ids$|^logit_scale$")  # a buffer that became a constant; of training alone


def published_name(name: str) -> str:
    """Today's name of a tensor."""
    parts = BARE.sub("text_model.", name).split(".")
    return ".".join(ATTENTION.get(part, part) for part in parts)


class Uninitialised(TorchFunctionMode):
    """Networks built here get no initial values: a file replaces them, and nn.Embedding's on meta would take a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == nn.init.__name__:
            return (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


def on_meta(make: Callable[[], Any]) -> Any:
    """The network that `make` builds, without values: `fill` gives it its weights."""
    with torch.device("meta"), Uninitialised():
        return make()


@dataclass
class Source:
    """What a pipeline was read from: its small files, and its weights by component, under today's names and still on disk.

    `rest` and `metadata` are what a single file holds besides.
    """

    name: str
    small_files: dict[str, bytes]
    weights: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls, source: str | Path, *, variant: str | None = None, revision: str | None = None,
        tokenizer: str | Path | None = None, ema: bool = False, prediction_type: str | None = None,
    ) -> "Source":  # fmt: skip
        """Open a folder in the diffusers layout, an LDM single file, or a hub repository, "owner/name".

        tokenizer: the folder to take the vocabulary from. ema: of a single file, the averaged weights. Raises UserError
        where something is missing, damaged or of another kind, or cannot be had from the hub.
        """
        if not str(source):  # which Path would take for this folder
            raise UserError("the model's name is empty")
        path = Path(source)
        if path.suffix in (".safetensors", *files.PICKLES) and path.is_file():
            return cls._of_file(path, tokenizer, ema, prediction_type)
        if ema:
            raise UserError(f"{source} is no single file: --ema means nothing there")
        folder = find(source, variant, revision)
        paths = sorted({path for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file()})
        small = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if ".index." not in path.name}
        self = cls(str(source), small)
        if self.kind not in KINDS:
            raise UserError(f"{source} is a {self.kind}; supported: {', '.join(KINDS)}")
        parts = {*KINDS[self.kind], "scheduler", "low_res_scheduler", "tokenizer", "tokenizer_2", "feature_extractor"}
        self.small_files = {name: data for name, data in small.items() if name == INDEX or name.split("/")[0] in parts}
        if tokenizer:
            self._take(vocabulary(path, tokenizer))
        if prediction_type:
            schedule = self.json(SCHEDULE) | {"prediction_type": prediction_type}
            self.small_files[SCHEDULE] = json.dumps(schedule, indent=2).encode()
        having = [name for name in KINDS[self.kind] if variant in variants(folder, name)]
        for name in KINDS[self.kind]:  # where one has the variant, others may lack it
            tensors = files.weights_of(folder / name, COMPONENTS[name].stem, variant if name in having or not having else None)
            with blaming(folder / name):
                names = files.distinct((published_name(key), key) for key in tensors if not DROPPED.search(key))
            self.weights[name] = files.renamed(tensors, names)
        return self

    @classmethod
    def _of_file(cls, path: Path, tokenizer: str | Path | None, ema: bool, prediction_type: str | None) -> "Source":
        tensors, metadata = ldm.open_file(path, ema)
        known = prediction_type or ldm.predicts(tensors, metadata)
        shapes = files.meta(tensors)
        own = {key.removeprefix(ldm.OURS): metadata.pop(key) for key in [*metadata] if key.startswith(ldm.OURS)}
        if tokenizer:
            own = {name: text for name, text in own.items() if not name.startswith("tokenizer")}
        self = cls(str(path), ldm.describe(path, shapes, known or "epsilon", own), metadata=metadata)
        if words := {name: text.encode() for name, text in own.items() if OF_TOKENIZER.fullmatch(name)}:
            others = {name: data for name, data in self.small_files.items() if not name.startswith("tokenizer")}
            self.small_files = others | words
        else:
            self._take(vocabulary(path, tokenizer))
        places = {name: self.places(name) for name in KINDS[self.kind]}
        self.weights = {name: ldm.read(where, tensors) for name, where in places.items()}
        used = {each.name for where in places.values() for each in where.values()}
        rest = [name for name in tensors if name not in used]
        if unknown := [name for name in rest if name.startswith(ldm.UNET) or "scale_weight" in name]:
            raise UserError(f"{path} has unexpected {unknown[0]} and {len(unknown) - 1} more; supported: {ldm.SUPPORTED}")
        self.rest = files.renamed(tensors, {name: name for name in rest})
        if not known:
            self.small_files |= ldm.describe(path, shapes, self.infer_prediction_type(), own)
        return self

    def _take(self, vocabulary: Mapping[str, bytes]) -> None:
        """Give each tokenizer this vocabulary."""
        folders = {path.split("/")[0] for path in self.small_files if path.startswith("tokenizer")}
        self.small_files = {path: data for path, data in self.small_files.items() if path.split("/")[-1] not in VOCABULARY}
        self.small_files |= {f"{folder}/{name}": data for folder in folders for name, data in vocabulary.items()}

    @torch.no_grad()
    def infer_prediction_type(self) -> str:
        """The prediction type of a model that does not say it, by its answer to pure noise at the last timestep.

        There next to nothing is left of a picture: the best guess at the noise is the input itself, and the best guess at the
        velocity, minus the picture, hardly depends on it. So the answer's share of the input is about 1 or about 0. In bf16,
        and on a small latent: it need not be precise. Prints what was found.
        """
        context = self.build("text_encoder", torch.bfloat16)(self.tokenizer()([""]))
        unet = self.build("unet", torch.bfloat16)
        x = torch.randn((1, unet.config.in_channels, 32, 32), generator=torch.Generator().manual_seed(0))
        answer = unet(x.bfloat16(), self.json(SCHEDULE)["num_train_timesteps"] - 1, context).float()
        share = ((answer * x).sum() / x.square().sum()).item()
        found = "epsilon" if share > 0.5 else "v_prediction"
        print(f"{self.name} predicts {found} (its answer to noise holds {share:.2f} of it); --prediction_type overrules this")
        return found

    @property
    def kind(self) -> str:
        """The pipeline's class, as diffusers calls it."""
        return str(self.json(INDEX).get("_class_name") or "checkpoint of unknown kind")

    def json(self, path: str) -> dict:
        """One of the small files, parsed. Raises UserError where it is missing or damaged."""
        if path not in self.small_files:
            raise UserError(f"{self.name}/{path} is missing")
        return files.parse_json(self.small_files[path], f"{self.name}/{path}")

    def tokenizer(self, folder: str = "tokenizer") -> Tokenizer:
        """The tokenizer of a folder. Raises UserError where its vocabulary is missing, damaged or not its text encoder's."""
        paths = {path: path.removeprefix(f"{folder}/") for path in self.small_files if path.startswith(f"{folder}/")}
        text = self.config(folder.replace("tokenizer", "text_encoder"))
        with blaming(f"{self.name}/{folder}"):
            made = Tokenizer.from_files({name: self.small_files[path] for path, name in paths.items()})
            last = max(made.backend.get_vocab().values())
            if last >= text.vocab_size or not 1 < made.max_length <= text.max_position_embeddings:
                raise UserError("tokens or model_max_length exceed the text encoder's; name the model's own with --tokenizer")
            return made

    def config(self, name: str) -> Any:
        """A component's configuration. Raises UserError for one that is not supported."""
        usual = {"scaling_factor": ldm.FAMILIES[self.kind].scaling_factor} if name == "vae" else {}  # files of 2022 lack it
        said = usual | self.json(f"{name}/config.json")
        early = name == "unet" and re.match(r"0\.[0-8]\.", str(said.get("_diffusers_version")))  # there 32 meant 64
        if early and type(size := said.get("sample_size")) is int:
            said["sample_size"] = max(size, 64)
        with blaming(f"{self.name}/{name}/config.json"):
            return COMPONENTS[name].config.from_dict(said)

    def skeleton(self, name: str) -> Any:
        """The component's network on meta. Raises UserError for a configuration that is not supported."""
        with blaming(f"{self.name}/{name}/config.json"):
            return on_meta(lambda: COMPONENTS[name].network(self.config(name)))

    def places(self, name: str) -> dict[str, ldm.Place]:
        """Where the component's tensors stand in a single file."""
        return ldm.places(self.kind, name, self.skeleton(name))

    def build(self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
        """The component's network with its weights, in eval mode. Raises UserError at the first name or shape that differs."""
        return fill(self.skeleton(name), self.weights[name], f"{self.name}: {name}", dtype, device)

    def unlock(self, names: Iterable[str]) -> None:
        """These networks' weights are about to change: `forget`. Raises UserError for weights too coarse to take it up."""
        for name in names:
            if any(x.dtype.itemsize == 1 for x in files.meta(self.weights[name]).values()):
                raise UserError(f"{self.name}: {name} is in 8 bits, too coarse to change: first convert it to --dtype fp16")
        self.forget()

    def forget(self) -> None:
        """Let go of what is said of weights as they were: their averages, title and hashes."""
        self.rest = files.renamed(self.rest, {name: name for name in self.rest if not name.startswith("model_ema.")})
        self.metadata = {key: text for key, text in self.metadata.items() if not OF_WEIGHTS.match(key)}

    def save(self, path: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype | None = None) -> None:
        """Write everything again, with these `weights` of networks where given, and as they were read where not.

        path: a folder, or x.safetensors for an LDM single file. Every tensor gets the dtype it was read in, or `dtype`, so
        that what was not trained comes back bit for bit; of a single file in a single file, what we do not use does too.
        Parts of a folder that we do not read, the safety checker for one, become null in model_index.json. Raises UserError
        where what was read does not fit together, and for a file of another kind.
        """
        for name, read in self.weights.items():
            network = self.skeleton(name)
            for state in (read, weights.get(name, read)):
                check(network, state, f"{self.name}: {name}")
        states = {name: weights.get(name, read) for name, read in self.weights.items()}
        (self._save_file if is_single_file(path) else self._save_folder)(path, states, dtype)

    def _save_folder(self, folder: Path, states: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype | None) -> None:
        index = self.json(INDEX)
        kept = {path.split("/")[0] for path in self.small_files} - {"safety_checker", "image_encoder"}
        new = {key: [None, None] if isinstance(x, list) and key not in kept else x for key, x in index.items()}
        small = self.small_files | ({INDEX: json.dumps(new, indent=2).encode()} if new != index else {})
        with files.replacing(folder, merge=True) as temporary:
            for name, data in small.items():
                if name.split("/")[0] in kept:
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / name).write_bytes(data)
            for name, state in states.items():
                file = temporary / name / f"{COMPONENTS[name].stem}.safetensors"
                files.write_weights(file, state, self.weights[name], dtype)

    def _save_file(self, path: Path, states: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype | None) -> None:
        places, schedule = {name: self.places(name) for name in states}, self.json(SCHEDULE)
        marks = ldm.marks(schedule) if self.kind == "StableDiffusionXLPipeline" else {}
        rest = files.renamed(self.rest, {name: name for name in self.rest if name not in ldm.MARKS or name in marks}), marks

        def whole(parts: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
            return ChainMap(*(ldm.write(places[name], part) for name, part in parts.items()), *rest)  # type: ignore[arg-type]

        schedule["prediction_type"] = predicts = str(schedule.get("prediction_type") or "epsilon")
        described = ldm.describe(path, files.meta(whole(self.weights)), predicts)
        own = {name: self.json(name) for name in described if not name.startswith("tokenizer")} | {SCHEDULE: schedule}
        told = {ldm.OURS + name: json.dumps(content) for name, content in own.items()}
        with blaming(f"{self.name}/tokenizer"):
            told |= {ldm.OURS + x: self.small_files[x].decode() for x in sorted(self.small_files) if x.startswith("tokenizer")}
        says = {"modelspec.prediction_type": predicts.removesuffix("_prediction")}
        files.write_weights(path, whole(states), whole(self.weights), dtype, {**self.metadata, **says, **told})


def is_single_file(path: Path) -> bool:
    """Whether a single file is to be written there, or a folder. Raises UserError for a file of another kind."""
    if path.suffix.lower() in (*files.PICKLES, ".safetensors") and path.suffix != ".safetensors" and not path.is_dir():
        raise UserError(f"a single file is written as {path.with_suffix('.safetensors')}, not as {path.name}")
    return path.suffix == ".safetensors" and not path.is_dir()


def fill(network: nn.Module, weights: Mapping[str, Tensor], name: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A network on meta with these weights, in eval mode. Raises UserError as `check` does."""
    check(network, weights, name)
    network.load_state_dict({key: x.to(device, dtype) for key, x in weights.items()}, strict=True, assign=True)
    return network.eval()


def check(network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Raises UserError at the first name or shape of the weights that is not the network's; `name` is for the error."""
    wanted, tensors = network.state_dict(), files.meta(weights)
    for kind, keys in (("lacks", wanted.keys() - tensors.keys()), ("has unexpected", tensors.keys() - wanted.keys())):
        if keys:
            raise UserError(f"{name} {kind} {min(keys)} and {len(keys) - 1} more; is it of another kind?")
    with blaming(name):
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise UserError(f"{name}'s {key} is {tensor.dtype}, quantised: take the original")
            if tensor.shape != wanted[key].shape:
                raise UserError(f"{name}'s {key} is {[*tensor.shape]}, where its config.json means {[*wanted[key].shape]}")


def find(source: str | Path, variant: str | None = None, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the path itself, or the hub's cache after a download. Raises UserError otherwise."""
    path = Path(source)
    if (path / INDEX).is_file():
        return path
    if path.is_file():
        raise UserError(f"{path} is a file of unknown kind; a .safetensors file or a folder in the diffusers layout is needed")
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir())[:6]
        what = next((what for name, what in PARTIAL.items() if (path / name).is_file()), "no checkpoint")
        raise UserError(f"{path} is {what} (it has no model_index.json, but {', '.join(found) or 'nothing'})")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"{path} is missing: name a folder, a .safetensors file, or owner/name on the hub")
    return download(str(source), variant, revision)


def download(repository: str, variant: str | None, revision: str | None) -> Path:
    """A snapshot of a hub repository's files, through huggingface_hub and its cache (offline mode included): of one variant,
    and of components that lack it, where others have it, the plain weights. Raises UserError with what is there instead.
    """

    def fetch(parts: Iterable[str], infix: str) -> Path:
        ends = f"{infix}.safetensors", f"{infix}-?????-of-?????.safetensors"
        weights = [f"{part}/{COMPONENTS[part].stem}{end}" for part in parts for end in ends]
        return snapshot(repository, [*SMALL_FILES, *weights], revision)

    infix = f".{variant}" if variant else ""
    folder = fetch(COMPONENTS, infix)
    parts = KINDS.get(files.read_json(folder / INDEX).get("_class_name", ""), []) if (folder / INDEX).is_file() else []
    lacking = [part for part in parts if (variant or "") not in variants(folder, part)]
    if variant and 0 < len(lacking) < len(parts):
        folder, infix = fetch(lacking, ""), ""
        lacking = [part for part in lacking if "" not in variants(folder, part)]
    if lacking and (names := listed(repository, lacking[0], revision)):
        raise files.absent(Path(repository, lacking[0], f"{COMPONENTS[lacking[0]].stem}{infix}.safetensors"), names)
    return folder


def variants(folder: Path, part: str) -> set[str]:
    """Those of a component's weights in a folder."""
    return files.variants((path.name for path in (folder / part).glob("*")), COMPONENTS[part].stem)


def listed(repository: str, part: str, revision: str | None) -> list[str]:
    """The names of a component's files on the hub, as far as it can be asked."""
    from huggingface_hub import HfApi  # half a second

    with contextlib.suppress(Exception):
        paths = [each.rfilename for each in HfApi().model_info(repository, revision=revision).siblings or ()]
        return [path.split("/")[-1] for path in paths if path.startswith(f"{part}/")]
    return []


def snapshot(repository: str, patterns: list[str], revision: str | None = None, cached: bool = False) -> Path:
    """A hub repository's files; `cached`: only those already here. Raises UserError with the reason where it cannot be had."""
    from huggingface_hub import snapshot_download  # half a second

    with refusals(f"{repository} is no folder here, and could not be had from the hub", "mend its name, or try again"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=cached))


def vocabulary(path: Path, tokenizer: str | Path | None = None) -> dict[str, bytes]:
    """The files of CLIP's vocabulary, name to content: of the folder `tokenizer`, or of the checkpoint there.

    Where none is given, those in tokenizer/ beside `path`, then the hub's. Raises UserError where there are none.
    """

    def folders() -> Iterator[Path]:
        if tokenizer:
            yield from (Path(tokenizer), Path(tokenizer) / "tokenizer")
            return
        yield path.parent / "tokenizer"
        for cached in (True, False):
            with contextlib.suppress(UserError):
                yield snapshot(CLIP, list(VOCABULARY), cached=cached)

    for folder in folders():
        found = {name: (folder / name).read_bytes() for name in VOCABULARY if (folder / name).is_file()}
        if "tokenizer.json" in found or {"vocab.json", "merges.txt"} <= found.keys():
            return found
    places = f"{tokenizer} and its folder tokenizer" if tokenizer else f"{path.parent / 'tokenizer'} and the hub's {CLIP}"
    missing = f"vocab.json and merges.txt, or tokenizer.json, are missing in {places}"
    raise UserError(f"{path} needs its vocabulary, but {missing}; name their folder with --tokenizer")

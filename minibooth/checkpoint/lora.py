"""LoRA files in and out: diffusers' pytorch_lora_weights.safetensors, and kohya's, which A1111 and ComfyUI read.

    diffusers   unet.mid_block.attentions.0.proj_in.lora_A.weight                  .lora_B.weight
    kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight          .lora_up.weight      .alpha

Kohya's names do not tell a dot from an underscore, and for XL's UNet they are the LDM layout's: both are looked up among the
names of our own networks' layers, never guessed. A layer's update is alpha / rank * up @ down. A missing alpha means the
rank, as kohya's own reader (networks/lora.py, create_network_from_weights), diffusers, A1111 and ComfyUI take it.
"""

import collections
import functools
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibooth.checkpoint import files, ldm
from minibooth.checkpoint.source import Source
from minibooth.errors import UserError, blaming
from minibooth.models.lora import Adapter, layers, merged

DIFFUSERS = "pytorch_lora_weights.safetensors"
PREFIXES = {"unet": ["lora_unet"], "text_encoder": ["lora_te", "lora_te1"], "text_encoder_2": ["lora_te2"]}
Adapters = dict[str, dict[str, Adapter]]  # by network and layer

KEY = re.compile(r"(?P<layer>.+?)[._](lora[._])?(linear_layer\.)?((?P<down>A|down)|(?P<up>B|up))\.weight|(?P<of>.+)\.alpha")
RENAMES = (  # diffusers' names of former years -> today's
    (re.compile(r"^(?=(down_blocks|mid_block|up_blocks)\.)"), "unet."),
    (re.compile(r"^(text_encoder(_2)?)\.(?=encoder\.)"), r"\1.text_model."),
    (re.compile(r"self_attn\.to_(q|k|v|out)$"), r"self_attn.\1_proj"),
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"\.to_out$"), ".to_out.0"),
)


def spellings(source: Source) -> Iterator[tuple[str, tuple[str, str, torch.Size]]]:
    """What files call each layer of a checkpoint's networks -> (network, layer, shape of its weight)."""
    for part in source.weights.keys() & PREFIXES.keys():
        network = source.skeleton(part)
        places = ldm.places(source.kind, part, network)
        for path, layer in layers(network).items():
            place = part, path, layer.weight.shape
            theirs = places[f"{path}.weight"].name.removeprefix(ldm.UNET).removesuffix(".weight") if part == "unet" else path
            yield f"{part}.{path}", place
            for prefix, name in itertools.product(PREFIXES[part], (path, theirs)):
                yield f"{prefix}_{name.replace('.', '_')}", place


def read(path: str | Path, source: Source, weight: float = 1.0) -> Adapters:
    """The adapters in a file, or in a folder's `DIFFUSERS` or only file, for a checkpoint's networks and in this strength.

    Raises UserError for what is missing, no LoRA, or one for another base: naming the first key that does not fit.
    """
    there = [*Path(path).glob("*.safetensors")]  # of a folder
    path = (there[0] if len(there) == 1 else Path(path) / DIFFUSERS) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; a LoRA is a .safetensors file, or a folder that holds {DIFFUSERS} or no other")
    with blaming(path):
        tensors, known = files.Tensors([path]), dict(spellings(source))
        config = files.parse_json(tensors.metadata.get("lora_adapter_metadata", "{}").encode(), path)
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if not (match := KEY.fullmatch(key)):
                raise UserError(f"{path}: {key} is no part of a LoRA as it is known here (lora_A or down, lora_B or up, alpha)")
            name = match["layer"] or match["of"]
            for old, new in RENAMES:
                name = old.sub(new, name)
            if name not in known:
                raise UserError(f"{path} is a LoRA for another base, or has unknown names: no layer here has {key}")
            part, layer, (outputs, *inputs) = known[name]
            end = "down" if match["down"] else "up" if match["up"] else "alpha"
            ones: list[Any] = [1] * (len(inputs) - 1)
            if tensor.dim() > 1 and tensor.shape[2:].numel() == 1:  # a 1 x 1 convolution is a linear layer elsewhere
                tensor = tensor.reshape(*tensor.shape[:2], *ones)
            needed = {"down": ["rank", *inputs], "up": [outputs, "rank", *ones], "alpha": [1] * tensor.dim()}[end]
            if [*tensor.shape] != [n if own == "rank" else own for own, n in itertools.zip_longest(needed, tensor.shape)]:
                shape = f"{part}.{layer} of this model needs [{', '.join(map(str, needed))}]"
                raise UserError(f"{path} is a LoRA for another base: its {key} is {[*tensor.shape]}, but {shape}")
            if end in found.setdefault((part, layer), {}):
                raise UserError(f"{path} holds two LoRAs of {part}.{layer}: take them apart")
            found[part, layer][end] = tensor
        if not found:
            raise UserError(f"{path} is empty")
        adapters: Adapters = {}
        for (part, layer), x in found.items():
            if "down" not in x or "up" not in x or not x["up"].shape[1] == len(x["down"]) > 0:
                raise UserError(f"{path}: {part}.{layer} lacks its down or up, or they have no common rank; download it again")
            alpha = x["alpha"].item() if "alpha" in x else said(config, part, layer, len(x["down"]))
            if not math.isfinite(alpha):
                raise UserError(f"{path}: the alpha of {part}.{layer} is {alpha}; download it again")
            adapters.setdefault(part, {})[layer] = Adapter(x["down"], x["up"], alpha, weight)
    return adapters


def merge(source: Source, loras: Iterable[tuple[str | Path, float]]) -> None:
    """Let a checkpoint's weights be read with LoRAs, (path, strength) each, added in: each tensor when it is asked for."""
    added = collections.defaultdict(list)
    for path, weight in loras:
        for part, adapters in read(path, source, weight).items():
            for layer, adapter in adapters.items():
                added[part, f"{layer}.weight"].append(adapter)

    def recipe(part: str, name: str) -> files.Recipe:
        own = added.get((part, name))
        return (lambda tensors: merged(tensors[name], own)) if own else operator.itemgetter(name)

    if added:
        source.unlock({part for part, _ in added})
    for part, weights in source.weights.items():
        source.weights[part] = files.View(weights, {name: recipe(part, name) for name in weights})


def said(config: Mapping[str, Any], part: str, layer: str, rank: int) -> float:
    """A layer's alpha by peft's configuration, which diffusers keeps in the metadata; the rank where there is none."""
    patterns = config.get(f"{part}.alpha_pattern") or {}
    own = [alpha for pattern, alpha in patterns.items() if compiled(pattern).fullmatch(layer)]
    alpha = float((own or [config.get(f"{part}.lora_alpha", rank)])[0])
    return alpha * rank**0.5 if config.get(f"{part}.use_rslora") else alpha


@functools.cache
def compiled(pattern: str) -> re.Pattern:
    """One of peft's patterns for names of layers. Raises UserError for one that might take for ever."""
    if re.search(r"\)[*+{]|([*+{].*){4}", pattern):
        raise UserError(f"its alpha_pattern {pattern!r} might be looked for without end: save it with names of layers instead")
    return re.compile(rf"(.*\.)?({pattern})")


def write(folder: Path, name: str, adapters: Adapters, source: Source, metadata: Mapping[str, str]) -> None:
    """Both files, for the checkpoint `source`: `DIFFUSERS`, and kohya's under `name`, exact and with alpha and metadata.

    Not every reader of diffusers' layout knows an alpha, so there it is multiplied into lora_B and the same as the rank.
    """
    theirs, kohya = dict[str, Tensor](), dict[str, Tensor]()
    of_xl = {place[:2]: name for name, place in spellings(source)} if "XL" in source.kind else {}  # the last: the LDM layout's
    for part, updates in adapters.items():
        for layer, adapter in updates.items():
            path, flat = f"{part}.{layer}.lora", of_xl.get((part, layer), f"{PREFIXES[part][0]}_{layer.replace('.', '_')}")
            theirs |= {f"{path}_A.weight": adapter.down, f"{path}_B.weight": adapter.scale * adapter.up}
            kohya |= {f"{flat}.lora_down.weight": adapter.down, f"{flat}.lora_up.weight": adapter.up}
            kohya[f"{flat}.alpha"] = torch.tensor(float(adapter.alpha))
    files.write_weights(folder / DIFFUSERS, theirs)
    files.write_weights(folder / name, kohya, metadata=metadata)

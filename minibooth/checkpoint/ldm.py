"""LDM single files, as CompVis and Stability AI published them and A1111 and ComfyUI read them: one table, both directions.

`places` says where each tensor of a network of ours stands in such a file; reading and writing both follow from it. The
file has no configuration: `recognise` and `describe` infer from names and shapes what the folder layout would say. A file of
ours holds the folder's own small files besides, in its metadata, under `OURS` and their names.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minibooth.checkpoint import files
from minibooth.errors import UserError, blaming
from minibooth.models.config import ATTENDS, CLIPTextConfig, UNetConfig, VAEConfig

INDEX, SCHEDULE = "model_index.json", "scheduler/scheduler_config.json"
UNET = "model.diffusion_model."


class Family(NamedTuple):
    """The files of a pipeline: what its components' names begin with, and what of its small files no tensor tells."""

    prefixes: Mapping[str, str]
    sample_size: int
    scaling_factor: float
    scheduler: dict[str, Any]
    model_index: dict[str, Any]
    unet: dict[str, Any] = {}
    more: dict[str, dict[str, Any]] = {}  # further small files, by path


COMMON = {"unet": UNET, "vae": "first_stage_model."}
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
X4_BETAS = SD_BETAS | dict(beta_start=0.0001, beta_end=0.02)
STEPS = dict(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
FAMILIES = {
    "StableDiffusionPipeline": Family(
        COMMON | {"text_encoder": "cond_stage_model."}, 64, 0.18215,
        dict(_class_name="DDIMScheduler", **SD_BETAS, **STEPS),
        dict(safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False),
    ),
    "StableDiffusionXLPipeline": Family(
        COMMON | {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."}, 128, 0.13025,
        dict(_class_name="EulerDiscreteScheduler", timestep_spacing="leading", interpolation_type="linear") | SD_BETAS | STEPS,
        dict(force_zeros_for_empty_prompt=True),
    ),
    "StableDiffusionUpscalePipeline": Family(
        COMMON | {"text_encoder": "cond_stage_model."}, 128, 0.08333,
        dict(_class_name="DDIMScheduler", **X4_BETAS, **STEPS),
        dict(max_noise_level=350),
        dict(attention_head_dim=8, only_cross_attention=[True, True, True, False], upcast_attention=False),
        {"low_res_scheduler/scheduler_config.json": dict(_class_name="DDPMScheduler", **X4_BETAS)},
    ),
}  # fmt: skip
TOKENIZER = dict(
    add_prefix_space=False, bos_token="<|startoftext|>", do_lower_case=True, eos_token="<|endoftext|>", errors="replace",
    model_max_length=77, tokenizer_class="CLIPTokenizer", unk_token="<|endoftext|>",
)  # fmt: skip
PADDING = {"quick_gelu": "<|endoftext|>", "gelu": "!"}  # by the text encoder's activation
Shapes = Mapping[str, tuple[int, ...]]
OURS = "minibooth."
MARKS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}  # empty tensors
SUPPORTED = "single files of Stable Diffusion 1, 2, XL (base) and x4"
OTHERS = {9: "an inpainting model", 8: "an InstructPix2Pix or video model"}  # by the UNet's input channels
ALIKE = {"edm_mean": "Playground v2.5", "edm_vpred.sigma_max": "CosXL", "noise_augmentor.betas": "an unCLIP model"}  # by a key
LORA = re.compile(r"^lora_(unet|te\d?)_|\.lora_?([AB]|down|up)\b|[._]lora\.(down|up)\.|\.lora_linear_layer\.")
LINEAR = ".model.text_projection.weight"  # as diffusers' script for XL wrote it until 2024, like a linear layer's
SD2_LAYERS = 23  # of its text encoder's 24 that anything is made of, and that the published folders hold
END = 49407  # CLIP's end token; behind it are tokens that were added
HEAD = 64  # width of an attention head, where the number of heads is not 8


class Form(NamedTuple):
    """How a tensor there becomes ours, and back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(lambda x: x.T.contiguous(), lambda x: x.T)
CONVOLUTION = Form(lambda x: x.reshape(x.shape[:2]), lambda x: x[..., None, None] if x.dim() == 2 else x)  # 1 x 1, here linear


class Place(NamedTuple):
    """Where a tensor of ours stands: its name there, its form, and which third of it where q, k and v are joined."""

    name: str
    form: Form = SAME
    part: int | None = None

    def read(self, file: Mapping[str, Tensor]) -> Tensor:
        """Our tensor, out of the file's."""
        x = file[self.name]
        return self.form.read(x if self.part is None else x.chunk(3)[self.part])


# ---- the table: ours -> theirs, modules or tensors

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
HALF = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
Rows = Iterator[tuple[str, Place]]


def inside(ours: str, theirs: str, table: Mapping[str, str], form: Form = SAME) -> Rows:
    """The rows of a module's table, as whole names."""
    return ((f"{ours}.{a}", Place(f"{theirs}.{b}", form)) for a, b in table.items())


def unet_rows(config: UNetConfig) -> Rows:
    """Their blocks are counted through: a resnet with its attention, or a downsampling, each."""
    depth, last = config.layers_per_block, len(config.block_out_channels) - 1
    yield from {"conv_in": Place("input_blocks.0.0"), "conv_norm_out": Place("out.0"), "conv_out": Place("out.2")}.items()
    yield from {"mid_block.attentions.0": Place("middle_block.1"), "class_embedding": Place("label_emb")}.items()
    for i in (0, 1):
        yield f"time_embedding.linear_{i + 1}", Place(f"time_embed.{2 * i}")
        yield f"add_embedding.linear_{i + 1}", Place(f"label_emb.0.{2 * i}")
        yield from inside(f"mid_block.resnets.{i}", f"middle_block.{2 * i}", RESNET)
    down, up = itertools.count(1), itertools.count()
    for level, kind in enumerate(config.up_block_types):
        for i in range(depth):
            block = f"input_blocks.{next(down)}"
            yield from inside(f"down_blocks.{level}.resnets.{i}", f"{block}.0", RESNET)
            yield f"down_blocks.{level}.attentions.{i}", Place(f"{block}.1")
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv", Place(f"input_blocks.{next(down)}.0.op")
        for i in range(depth + 1):
            block = f"output_blocks.{next(up)}"
            yield from inside(f"up_blocks.{level}.resnets.{i}", f"{block}.0", RESNET)
            yield f"up_blocks.{level}.attentions.{i}", Place(f"{block}.1")
        yield f"up_blocks.{level}.upsamplers.0.conv", Place(f"{block}.{1 + ATTENDS[kind]}.conv")


def vae_rows(config: VAEConfig) -> Rows:
    """Their decoder counts its levels from the highest resolution."""
    levels = len(config.block_out_channels)
    yield from {name: Place(name) for name in ("quant_conv", "post_quant_conv")}.items()
    for half in ("encoder", "decoder"):
        yield from inside(half, half, HALF)
        yield f"{half}.mid_block.attentions.0.group_norm", Place(f"{half}.mid.attn_1.norm")
        yield from inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION, CONVOLUTION)
        for i in (0, 1):
            yield from inside(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}", VAE_RESNET)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        yield f"encoder.down_blocks.{level}.downsamplers.0.conv", Place(f"{down}.downsample.conv")
        yield f"decoder.up_blocks.{level}.upsamplers.0.conv", Place(f"{up}.upsample.conv")
        for i in range(config.layers_per_block + 1):
            yield from inside(f"encoder.down_blocks.{level}.resnets.{i}", f"{down}.block.{i}", VAE_RESNET)
            yield from inside(f"decoder.up_blocks.{level}.resnets.{i}", f"{up}.block.{i}", VAE_RESNET)


def text_rows(config: CLIPTextConfig) -> Rows:
    """OpenAI's CLIP keeps its names; OpenCLIP joins q, k and v, and multiplies by its projection from the other side."""
    if config.hidden_act == "quick_gelu":
        yield "", Place("transformer.")
        return
    yield "text_model.embeddings.token_embedding", Place("model.token_embedding")
    yield "text_model.embeddings.position_embedding.weight", Place("model.positional_embedding")
    yield "text_model.final_layer_norm", Place("model.ln_final")
    yield "text_projection.weight", Place("model.text_projection", TRANSPOSED)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"model.transformer.resblocks.{i}"
        yield from inside(ours, theirs, LAYER)
        for (part, letter), end in itertools.product(enumerate("qkv"), ("weight", "bias")):
            yield f"{ours}.self_attn.{letter}_proj.{end}", Place(f"{theirs}.attn.in_proj_{end}", part=part)


ROWS: Mapping[str, Callable[[Any], Rows]] = {"unet": unet_rows, "vae": vae_rows}


def place(rows: Mapping[str, Place], name: str) -> Place:
    """Where a tensor stands: its own row, or its name's end after what its module's row says."""
    head = name
    while head and head not in rows:
        head = head.rpartition(".")[0]
    return rows[head]._replace(name=rows[head].name + name[len(head) :])


def places(pipeline: str, component: str, network: nn.Module) -> dict[str, Place]:
    """Where each tensor of the network stands in a file, by its name here."""
    rows, prefix = dict(ROWS.get(component, text_rows)(network.config)), FAMILIES[pipeline].prefixes[component]
    found = {name: place(rows, name) for name in network.state_dict()}
    return {name: where._replace(name=prefix + where.name) for name, where in found.items()}


def read(places: Mapping[str, Place], file: Mapping[str, Tensor]) -> files.View:
    """The network's tensors out of a file's: those that are there."""
    return files.View(file, {name: where.read for name, where in places.items() if where.name in file})


def write(places: Mapping[str, Place], state: Mapping[str, Tensor]) -> files.View:
    """The file's tensors out of a network's."""
    ordered = sorted(places.items(), key=lambda item: (item[1].name, item[1].part or 0))
    grouped = itertools.groupby(ordered, key=lambda item: item[1].name)
    return files.View(state, {name: functools.partial(_join, list(parts)) for name, parts in grouped})


def _join(parts: list[tuple[str, Place]], state: Mapping[str, Tensor]) -> Tensor:
    tensors = [where.form.write(state[name]) for name, where in parts]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


# ---- what a file holds


def open_file(path: Path, ema: bool = False) -> tuple[files.View, dict[str, str]]:
    """A file's tensors under the published names, and its metadata.

    ema: the UNet is the average that training kept in model_ema, which then is left out. Raises UserError where there is none.
    """
    tensors = files.Tensors([path])
    bare = re.compile(r"\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)")  # as some merges write them
    names = {bare.sub(".transformer.text_model.", name): name for name in tensors}
    if not count(names, f"{UNET}label_emb."):  # no XL, but an SD 1 or 2 as XL's program names it
        names = {re.sub(r"^conditioner\.embedders\.0\.", "cond_stage_model.", name): own for name, own in names.items()}
    if twice := {name for name in tensors if not name.endswith("position_ids")} - {*names.values()}:
        raise UserError(f"{path} has {min(twice)} under a second name, too: remove the wrong one")
    if ema:
        averages = {name: f"model_ema.{name[len('model.') :].replace('.', '')}" for name in names if name.startswith(UNET)}
        if missing := [name for name in averages.values() if name not in tensors]:
            raise UserError(f"{path} has no EMA weights ({missing[0]} and {len(missing) - 1} more are missing); omit --ema")
        names = {name: averages.get(name, own) for name, own in names.items() if not name.startswith("model_ema.")}
    found = {name: Place(own) for name, own in names.items() if not name.endswith(LINEAR)}
    found |= {name.removesuffix(".weight"): Place(names[name], TRANSPOSED) for name in names if name.endswith(LINEAR)}
    return read(found, tensors), tensors.metadata


def recognise(path: Path, file: Mapping[str, Tensor]) -> str:
    """The pipeline whose file this is. Raises UserError that says what it is, for any other."""
    stem = file.get(f"{UNET}input_blocks.0.0.weight")
    if any(LORA.search(name) for name in file):
        found = "a LoRA, to be used with its base model"
    elif stem is None:
        beginnings = sorted({".".join(name.split(".")[:2]) for name in file})[:4]
        found = f"a file of another kind: its names begin with {', '.join(beginnings) or 'nothing'}"
    elif stem.shape[1] in OTHERS:
        found = OTHERS[stem.shape[1]]
    elif others := [model for key, model in ALIKE.items() if key in file]:
        found = others[0]
    elif count(file, "conditioner.embedders.0.model.") and not count(file, "conditioner.embedders.1."):
        found = "the refiner of Stable Diffusion XL"
    else:
        told = "Upscale" if f"{UNET}label_emb.weight" in file else "XL" if count(file, f"{UNET}label_emb.") else ""
        pipeline = f"StableDiffusion{told}Pipeline"
        prefixes = FAMILIES[pipeline].prefixes
        lacking = [f"{component} ({prefix}...)" for component, prefix in prefixes.items() if not count(file, prefix)]
        if not lacking:
            return pipeline
        raise UserError(f"{path} lacks its {' and '.join(lacking)}; a whole checkpoint is needed")
    raise UserError(f"{path} is {found}; supported: folders in the diffusers layout, and {SUPPORTED}")


def predicts(file: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """Its prediction type as far as anything says so: ComfyUI's key or metadata, kohya's metadata; None for a silent SD 2."""
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    if "v_pred" in file or said.startswith("v") or (said != "epsilon" and f"{UNET}label_emb.weight" in file):  # x4
        return "v_prediction"
    return None if count(file, "cond_stage_model.model.") and said != "epsilon" else "epsilon"  # SD 2's text encoder


def marks(schedule: Mapping[str, Any]) -> dict[str, Tensor]:
    """The keys by which programs know an XL's schedule, from its scheduler_config.json."""
    return {name: torch.empty(0) for name, (key, value) in MARKS.items() if schedule.get(key) == value}


def count(names: Iterable[str], head: str) -> int:
    """How many different modules follow `head` in these names: of blocks.0, blocks.1.conv and blocks.1.norm, two."""
    return len({name[len(head) :].split(".")[0] for name in names if name.startswith(head)})


def describe(path: Path, file: Mapping[str, Tensor], prediction_type: str, own: Mapping[str, str] = {}) -> dict[str, bytes]:
    """The small files of the folder layout, all but the vocabulary; where `own` has one's text, that.

    Raises UserError where what they follow from is missing or is of another kind.
    """
    with blaming(path):
        pipeline = recognise(path, file)
        family = FAMILIES[pipeline]

        def shapes(component: str) -> Shapes:
            start = family.prefixes[component]
            return {name[len(start) :]: tuple(x.shape) for name, x in file.items() if name.startswith(start)}

        configs = {name: text_config(shapes(name), pipeline) for name in family.prefixes if name.startswith("text")}
        unet, vae = unet_config(shapes("unet")), vae_config(shapes("vae"))
    if "addition_embed_type" in unet:
        pooled = configs["text_encoder_2"]["projection_dim"]
        unet["addition_time_embed_dim"] = (unet["projection_class_embeddings_input_dim"] - pooled) // 6
    else:
        unet["upcast_attention"] = unet["use_linear_projection"]  # SD 2
    unet |= family.unet
    large = unet.get("upcast_attention") and prediction_type == "v_prediction"  # SD 2 as trained on
    unet["sample_size"] = size = 96 if large else family.sample_size
    vae |= dict(scaling_factor=family.scaling_factor, sample_size=size * 2 ** (len(vae["block_out_channels"]) - 1))

    parts = {SCHEDULE: dict(family.scheduler), **family.more}
    if "ztsnr" in file:
        parts[SCHEDULE] |= dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    parts |= {f"{name}/config.json": config for name, config in (configs | {"unet": unet, "vae": vae}).items()}
    for name, config in configs.items():
        folder = name.replace("text_encoder", "tokenizer")
        parts[f"{folder}/tokenizer_config.json"] = TOKENIZER | {"pad_token": PADDING[config["hidden_act"]]}
    index = {"_class_name": pipeline, **family.model_index}
    for name, config in parts.items():
        theirs = ["transformers", *config.get("architectures", ["CLIPTokenizer"])]
        index[name.split("/")[0]] = ["diffusers", config["_class_name"]] if "_class_name" in config else theirs
    written: dict[str, Mapping[str, Any]] = {INDEX: index, **parts}
    written |= {name: files.parse_json(text.encode(), f"{path}/{name}") for name, text in own.items() if name in written}
    written[SCHEDULE] = {**written[SCHEDULE], "prediction_type": prediction_type}
    written[INDEX] = {**written[INDEX], "_class_name": pipeline}
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in written.items()}


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """unet/config.json, but for what the family tells."""
    blocks = count(shapes, "input_blocks.")
    depth = next((n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in shapes), blocks) - 1
    first = [f"input_blocks.{n}" for n in range(1, blocks, depth + 1)]  # of each level
    widths = [shapes[f"{block}.0.out_layers.3.weight"][0] for block in first]
    depths = [count(shapes, f"{block}.1.transformer_blocks.") for block in first]
    attends = ["CrossAttn" if n else "" for n in depths]
    layers = [max(n, 1) for n in depths[:-1]] + [count(shapes, "middle_block.1.transformer_blocks.")]
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    config = dict(
        _class_name="UNet2DConditionModel", in_channels=shapes["input_blocks.0.0.weight"][1], layers_per_block=depth,
        out_channels=shapes["out.2.weight"][0], block_out_channels=widths, norm_num_groups=math.gcd(32, *widths),
        down_block_types=[f"{attn}DownBlock2D" for attn in attends], use_linear_projection=linear,
        up_block_types=[f"{attn}UpBlock2D" for attn in attends[::-1]],
        attention_head_dim=[max(width // HEAD, 1) for width in widths] if linear else 8,
        transformer_layers_per_block=layers if len({*layers}) > 1 else layers[0],
        cross_attention_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    )  # fmt: skip
    if levels := shapes.get("label_emb.weight"):
        config |= dict(num_class_embeds=levels[0])
    if told := shapes.get("label_emb.0.0.weight"):
        config |= dict(addition_embed_type="text_time", projection_class_embeddings_input_dim=told[1])
    return config


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """vae/config.json, but for what the family tells."""
    levels = count(shapes, "encoder.down.")
    widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
    return dict(
        _class_name="AutoencoderKL", in_channels=shapes["encoder.conv_in.weight"][1], block_out_channels=widths,
        latent_channels=shapes["post_quant_conv.weight"][0], out_channels=shapes["decoder.conv_out.weight"][0],
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=count(shapes, "encoder.down.0.block."), norm_num_groups=math.gcd(32, *widths),
    )  # fmt: skip


def text_config(shapes: Shapes, pipeline: str) -> dict[str, Any]:
    """A text encoder's config.json. OpenCLIP's are GELU ones; SD 2 leaves out the last layer, and XL needs the projection."""
    openai = count(shapes, "transformer.text_model.encoder.layers.")
    layers = openai or count(shapes, "model.transformer.resblocks.")
    kept = layers if openai or "XL" in pipeline else min(layers, SD2_LAYERS)
    act, projects = ("quick_gelu" if openai else "gelu"), not openai and "XL" in pipeline
    rows = dict(text_rows(CLIPTextConfig.from_dict(dict(hidden_act=act, num_hidden_layers=layers))))

    def shape(module: str) -> tuple[int, ...]:
        return shapes[place(rows, f"text_model.{module}.weight").name]

    vocabulary, width = shape("embeddings.token_embedding")
    return dict(
        architectures=["CLIPTextModelWithProjection" if projects else "CLIPTextModel"], model_type="clip_text_model",
        vocab_size=vocabulary, hidden_size=width, intermediate_size=shape("encoder.layers.0.mlp.fc1")[0], hidden_act=act,
        num_hidden_layers=kept, num_attention_heads=max(width // HEAD, 1), layer_norm_eps=1e-5, pad_token_id=1,
        max_position_embeddings=shape("embeddings.position_embedding")[0], bos_token_id=0,
        projection_dim=shapes["model.text_projection"][1] if projects else width,
        eos_token_id=END if vocabulary > END else 2,
    )  # fmt: skip

"""Small Stable Diffusions that the tests make themselves: published configurations, narrow, with random weights.

`sd1`, `sd2`, `sdxl` and `x4` are folders in the diffusers layout, shared by the whole session: read them, and change only
what `copy_of(folder)` gives. `checkpoint` is either of the first two in turn.

Besides, what many files need: fewer steps of drawing, a hub on loopback, a command's mistake in its one line.
"""

import json
import shutil
import signal
from pathlib import Path

import hub_standin
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn

import minibooth
from minibooth import command
from minibooth.dreambooth import prior, stages
from minibooth.errors import UserError
from minibooth.models.clip import CLIPText
from minibooth.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from minibooth.models.unet import UNet
from minibooth.models.vae import VAE

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: what tests of Ctrl-C start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # more only wait for each other here, and a run's bits depend on their number

REPOSITORY = Path(__file__).resolve().parents[1]
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["d o", "do g</w>", "s k", "sk s</w>", "o f</w>", "p h", "ph o", "t o</w>", "pho to</w>", "c a", "ca t</w>"]

UNET = dict(
    _class_name="UNet2DConditionModel", _diffusers_version="0.10.0", act_fn="silu", attention_head_dim=4,
    block_out_channels=[16, 16, 32, 32], center_input_sample=False, cross_attention_dim=24,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], downsample_padding=1, dual_cross_attention=False,
    flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-05,
    norm_num_groups=8, num_class_embeds=None, only_cross_attention=False, out_channels=4, sample_size=8,
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, use_linear_projection=False,
)  # fmt: skip
VAE_CONFIG = dict(
    _class_name="AutoencoderKL", _diffusers_version="0.8.0", act_fn="silu", block_out_channels=[8, 8, 16, 16],
    down_block_types=["DownEncoderBlock2D"] * 4, in_channels=3, latent_channels=4, layers_per_block=2,
    norm_num_groups=8, out_channels=3, sample_size=64, up_block_types=["UpDecoderBlock2D"] * 4,
)  # fmt: skip
TEXT_ENCODER = dict(
    _name_or_path="openai/clip-vit-large-patch14", architectures=["CLIPTextModel"], attention_dropout=0.0,
    bos_token_id=0, dropout=0.0, eos_token_id=2, hidden_act="quick_gelu", hidden_size=24, initializer_factor=1.0,
    initializer_range=0.02, intermediate_size=96, layer_norm_eps=1e-05, max_position_embeddings=77,
    model_type="clip_text_model", num_attention_heads=4, num_hidden_layers=3, pad_token_id=1, projection_dim=24,
    torch_dtype="float32", transformers_version="4.22.0.dev0",
)  # fmt: skip
SCHEDULER = dict(
    _class_name="PNDMScheduler", _diffusers_version="0.7.0.dev0", beta_end=0.012, beta_schedule="scaled_linear",
    beta_start=0.00085, clip_sample=False, num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True,
    steps_offset=1, trained_betas=None,
)  # fmt: skip
TOKENIZER = dict(
    add_prefix_space=False, bos_token=START, do_lower_case=True, eos_token=END, errors="replace", model_max_length=77,
    pad_token=END, tokenizer_class="CLIPTokenizer", unk_token=END,
)  # fmt: skip
MODEL_INDEX = dict(
    _class_name="StableDiffusionPipeline", _diffusers_version="0.8.0", feature_extractor=[None, None],
    requires_safety_checker=False, safety_checker=[None, None], scheduler=["diffusers", "PNDMScheduler"],
    text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
    unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
)  # fmt: skip

# What Stable Diffusion 2.1 says otherwise: velocity, linear projections, heads by level, GELU, padding with "!".
SD2 = {
    "unet": dict(
        attention_head_dim=[1, 2, 4, 4], block_out_channels=[16, 32, 32, 32], cross_attention_dim=32,
        use_linear_projection=True, upcast_attention=True, sample_size=12,
    ),
    "text_encoder": dict(hidden_act="gelu", hidden_size=32, intermediate_size=128, num_hidden_layers=2),
    "scheduler": dict(prediction_type="v_prediction", _class_name="DDIMScheduler"),
    "tokenizer": dict(pad_token="!"),
    "model_index": dict(scheduler=["diffusers", "DDIMScheduler"]),
}  # fmt: skip

# What Stable Diffusion XL says otherwise: three levels, two text encoders, pooled and size conditioning.
SDXL = {
    "unet": dict(
        addition_embed_type="text_time", addition_time_embed_dim=8, attention_head_dim=[1, 2, 4],
        block_out_channels=[16, 32, 32], cross_attention_dim=56,
        down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        projection_class_embeddings_input_dim=68, sample_size=12, transformer_layers_per_block=[1, 1, 2],
        up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], use_linear_projection=True,
    ),
    "vae": dict(force_upcast=True, scaling_factor=0.13025),
    "text_encoder": {},
    "text_encoder_2": dict(
        architectures=["CLIPTextModelWithProjection"], hidden_act="gelu", hidden_size=32, intermediate_size=128,
        num_hidden_layers=2, projection_dim=20,
    ),
    "scheduler": dict(
        _class_name="EulerDiscreteScheduler", interpolation_type="linear", prediction_type="epsilon",
        sample_max_value=1.0, timestep_spacing="leading", use_karras_sigmas=False,
    ),
    "tokenizer_2": dict(pad_token="!"),
    "model_index": dict(
        _class_name="StableDiffusionXLPipeline", force_zeros_for_empty_prompt=True,
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"], tokenizer_2=["transformers", "CLIPTokenizer"],
    ),
}  # fmt: skip

# What the x4-upscaler says otherwise: the picture and its noise level beside the latent, a VAE of three levels.
X4_BETAS = dict(beta_start=0.0001, beta_end=0.02)
X4 = {
    "unet": dict(
        attention_head_dim=8, block_out_channels=[16, 32, 32, 64], cross_attention_dim=32,
        down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3, in_channels=7, layers_per_block=1,
        norm_num_groups=16, num_class_embeds=1000, only_cross_attention=[True, True, True, False], sample_size=16,
        up_block_types=["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"], use_linear_projection=True,
    ),
    "vae": dict(
        block_out_channels=[8, 8, 16], down_block_types=["DownEncoderBlock2D"] * 3, scaling_factor=0.08333,
        up_block_types=["UpDecoderBlock2D"] * 3,
    ),
    "text_encoder": SD2["text_encoder"],
    "scheduler": dict(_class_name="DDIMScheduler", prediction_type="v_prediction", **X4_BETAS),
    "low_res_scheduler": dict(_class_name="DDPMScheduler", prediction_type="epsilon", **X4_BETAS),
    "tokenizer": SD2["tokenizer"],
    "model_index": dict(
        _class_name="StableDiffusionUpscalePipeline", low_res_scheduler=["diffusers", "DDPMScheduler"], max_noise_level=350,
        scheduler=["diffusers", "DDIMScheduler"],
    ),
}  # fmt: skip


def randomise(network: nn.Module, seed: int) -> None:
    """Weights that keep a signal's size and mix it thoroughly, so that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for name, parameter in network.named_parameters():
        if "embedding.weight" in name:
            value = normal(parameter)
        elif parameter.dim() > 1:
            value = normal(parameter) / parameter[0].numel() ** 0.5
        else:
            value = 0.2 * normal(parameter) + (name.endswith("weight"))
        parameter.data.copy_(value)


def vocabulary() -> dict[str, int]:
    """Every byte, inside a word and at its end, and what MERGES make of them, numbered as CLIP's own vocabulary is."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(m.replace(" ", "") for m in MERGES), START, END]
    return {token: i for i, token in enumerate(tokens)}


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def edit_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(source, **options) -> str:
    """The one line in which `load` refuses what is no checkpoint."""
    with pytest.raises(UserError) as caught:
        minibooth.load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_checkpoint(folder: Path, changes: dict[str, dict], seed: int) -> Path:
    """Write a small Stable Diffusion 1; `changes`: by component, what its configuration says otherwise."""
    vocab = vocabulary()
    text = TEXT_ENCODER | {"vocab_size": len(vocab)}
    said = {"unet": UNET, "vae": VAE_CONFIG, "text_encoder": text, "text_encoder_2": text}
    kinds = {"unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig), "text_encoder": (CLIPText, CLIPTextConfig)}
    kinds |= {"text_encoder_2": kinds["text_encoder"]} if "text_encoder_2" in changes else {}
    for i, (name, (network, config)) in enumerate(kinds.items()):
        said[name] = said[name] | changes.get(name, {})
        write_json(folder / name / "config.json", said[name])
        made = network(config.from_dict(said[name]))
        randomise(made, seed + i)
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        save_file(made.state_dict(), folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
    for name in ("scheduler", *({"low_res_scheduler"} & changes.keys())):
        write_json(folder / name / "scheduler_config.json", SCHEDULER | changes.get(name, {}))
    for name in (name.replace("text_encoder", "tokenizer") for name in kinds if name.startswith("text_encoder")):
        write_json(folder / name / "tokenizer_config.json", TOKENIZER | changes.get(name, {}))
        write_json(folder / name / "vocab.json", vocab)
        (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    index = MODEL_INDEX | changes.get("model_index", {})
    if index["_class_name"] != "StableDiffusionPipeline":
        index = {key: value for key, value in index.items() if "safety" not in key}
    write_json(folder / "model_index.json", index)
    return folder


@pytest.fixture(scope="session")
def sd1(tmp_path_factory) -> Path:
    """A folder like Stable Diffusion 1.4's, of about 400,000 parameters; draws 64 x 64 pixels."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "sd1", {}, seed=10)


@pytest.fixture(scope="session")
def sd2(tmp_path_factory) -> Path:
    """A folder like Stable Diffusion 2.1's, of about 500,000 parameters; draws 96 x 96 pixels."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "sd2", SD2, seed=20)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory) -> Path:
    """A folder like Stable Diffusion XL's, of about 500,000 parameters; draws 96 x 96 pixels."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "sdxl", SDXL, seed=40)


@pytest.fixture(scope="session")
def x4(tmp_path_factory) -> Path:
    """A folder like the x4-upscaler's, of about 700,000 parameters."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "x4", X4, seed=60)


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def checkpoint(request) -> Path:
    """Either folder."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's stand-in, with an empty cache. It is huggingface_hub's only endpoint for as long as the test lasts."""
    with hub_standin.serving() as hub:
        hub_standin.point_at(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def few_drawing_steps(monkeypatch):
    """Validation's grids and class pictures in two steps of drawing, for what does not depend on how they look."""
    for table in (stages.VALIDATION, prior.DRAWING):
        monkeypatch.setitem(table, "steps", 2)


@pytest.fixture
def mistake(capsys):
    """mistake(command, word, ...): the one line in which a command ends, with status 2, for a mistake of its user's."""

    def run(module, *words) -> str:
        with pytest.raises(SystemExit) as end:
            command.run(module.main, [module.__file__, *map(str, words)])
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith(f"{module.__name__}: error: ")
        return line

    return run


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(folder, name="copy"): a copy to change."""

    def copy(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy

"""A single file is read as the folder of the same model is, and comes back with every bit that was not trained."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import single_files
import torch
from comparing import differing, reference, weights
from conftest import edit_json, refusal, write_json
from PIL import Image
from safetensors.torch import load_file, save_file
from single_files import change, file, folder, metadata, states
from small_run import small, train

import minibooth
from minibooth import convert
from minibooth.checkpoint.ldm import OURS
from minibooth.checkpoint.source import SCHEDULE, Source
from minibooth.command import WEIGHTS
from minibooth.errors import UserError
from minibooth.models.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
KINDS = ["sd1", "sd2", "sdxl", "x4"]
PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "x4": "StableDiffusionUpscalePipeline",
}  # diffusers' name, where it is another
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))  # for the upscaler
UNET, VAE = "model.diffusion_model.", "first_stage_model."
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def ids(pipe, prompt="a dog"):
    return pipe.tokenizer([prompt])[0].tolist()


def draw(pipe):
    """The picture of seed 1, 64 pixels wide."""
    what = dict(images=PICTURE) if hasattr(pipe, "low_res_scheduler") else dict(height=64, width=64)
    return np.asarray(pipe.generate("a dog", steps=2, seed=1, guidance_scale=7.5, **what)[0], np.int16)


# ---- out: what other programs read


@kinds
def test_diffusers_reads_our_file_as_it_reads_the_folder(kind):
    expected = reference(folder(kind))
    theirs = type(expected).from_single_file(str(file(kind)), config=str(folder(kind)), local_files_only=True)
    for part in Source.open(folder(kind)).weights:
        assert not differing(getattr(theirs, part).state_dict(), getattr(expected, part).state_dict())


PUBLISHED = {  # names and shapes of the published files, at the width of ours
    "sd1": {
        f"{UNET}input_blocks.1.1.proj_in.weight": [16, 16, 1, 1], f"{UNET}time_embed.2.bias": [64],
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": [77, 24],
        f"{VAE}encoder.mid.attn_1.q.weight": [16, 16, 1, 1], f"{VAE}decoder.up.3.block.1.norm2.bias": [16],
    },
    "sd2": {
        f"{UNET}middle_block.1.proj_out.weight": [128, 128], f"{UNET}out.2.weight": [4, 32, 3, 3],
        "cond_stage_model.model.positional_embedding": [77, 128], "cond_stage_model.model.ln_final.weight": [128],
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight": [384, 128],
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias": [384],
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": [256, 128],
    },
    "x4": {
        f"{UNET}label_emb.weight": [1000, 64], f"{UNET}input_blocks.0.0.weight": [16, 7, 3, 3],
        f"{UNET}input_blocks.3.1.transformer_blocks.0.attn1.to_k.weight": [32, 128],
        f"{UNET}input_blocks.7.1.transformer_blocks.0.attn1.to_k.weight": [64, 64],
        f"{UNET}output_blocks.1.1.transformer_blocks.0.attn1.to_k.weight": [64, 64],
        f"{UNET}output_blocks.3.1.transformer_blocks.0.attn1.to_k.weight": [32, 128],
        f"{VAE}decoder.up.0.block.1.norm2.bias": [8], "cond_stage_model.model.ln_final.weight": [128],
    },
    "sdxl": {
        f"{UNET}label_emb.0.0.weight": [128, 68], f"{UNET}input_blocks.4.0.skip_connection.weight": None,
        f"{UNET}output_blocks.1.2.conv.weight": [128, 128, 3, 3], f"{UNET}output_blocks.3.2.conv.bias": [64],
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": [24],
        "conditioner.embedders.1.model.text_projection": [128, 20],
    },
}  # fmt: skip


@kinds
def test_names_and_shapes_are_those_of_the_published_files(kind):
    written = load_file(file(kind))
    for name, shape in PUBLISHED[kind].items():
        assert shape is None or [*written[name].shape] == shape, name
    prefixes = (UNET, VAE, *single_files.TEXT[kind])
    assert all(name.startswith(prefixes) for name in written)


def test_a_velocity_xl_carries_comfyuis_mark(tmp_path):
    pipe = minibooth.load(folder("sdxl"), prediction_type="v_prediction")
    pipe.save(tmp_path / "v.safetensors")
    assert load_file(tmp_path / "v.safetensors")["v_pred"].numel() == 0
    assert metadata(tmp_path / "v.safetensors")["modelspec.prediction_type"] == "v"
    shutil.copytree(file("sdxl").parent / "tokenizer", tmp_path / "tokenizer")
    assert minibooth.load(tmp_path / "v.safetensors").scheduler.prediction_type == "v_prediction"
    minibooth.load(tmp_path / "v.safetensors", prediction_type="epsilon").save(tmp_path / "e.safetensors")
    assert "v_pred" not in load_file(tmp_path / "e.safetensors")


@pytest.mark.parametrize("name", ["tiny", "tiny-x4"])
def test_what_no_shape_tells_comes_back_from_a_file(name, tmp_path):
    """Heads, groups, sizes, factors and betas of our own models are unlike any published."""
    pipe = minibooth.load(WEIGHTS / name)
    pipe.save(tmp_path / "x.safetensors")
    opened = minibooth.load(tmp_path / "x.safetensors")
    opened.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    opened.save(tmp_path / "folder")
    expected = draw(pipe)
    for other in (opened, minibooth.load(tmp_path / "folder")):
        assert {name: x.config for name, x in other.networks.items()} == {name: x.config for name, x in pipe.networks.items()}
        assert torch.equal(other.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
        assert np.array_equal(draw(other), expected)
    overruled = minibooth.load(tmp_path / "x.safetensors", prediction_type="epsilon")
    assert overruled.scheduler.prediction_type == "epsilon"
    assert torch.equal(overruled.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)


def test_a_schedule_may_leave_open_what_is_predicted(copy_of, tmp_path):
    copy = copy_of(folder("sd1"))
    edit_json(copy / SCHEDULE, prediction_type=None)
    minibooth.load(copy).save(tmp_path / "x.safetensors")
    assert minibooth.load(tmp_path / "x.safetensors", tokenizer=copy).scheduler.prediction_type == "epsilon"


def test_a_zero_terminal_snr_comes_back_from_a_file(copy_of, tmp_path):
    copy = copy_of(folder("sd2"))
    edit_json(copy / SCHEDULE, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    minibooth.load(copy).save(tmp_path / "x.safetensors")
    again = minibooth.load(tmp_path / "x.safetensors", tokenizer=copy)
    assert again.scheduler.config == json.loads((copy / SCHEDULE).read_text())


DRAWN = {  # what no tensor tells of how a model draws: of which kind, in which of its small files
    "turbo": ("sd2", "scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}),
    "alpha": ("sd1", "scheduler/scheduler_config.json", {"set_alpha_to_one": True}),
    "clipped": ("x4", "scheduler/scheduler_config.json", {"clip_sample": True}),
    "variance": ("sd1", "scheduler/scheduler_config.json", {"variance_type": "fixed_large"}),
    "offset": ("x4", "scheduler/scheduler_config.json", {"steps_offset": 0}),
    "xl turbo": ("sdxl", "scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}),
    "no zeros": ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": False}),
    "levels": ("x4", "model_index.json", {"max_noise_level": 100}),
}


@pytest.mark.parametrize("kind, path, says", DRAWN.values(), ids=DRAWN)
def test_how_a_model_draws_comes_back_from_a_file(kind, path, says, copy_of, tmp_path):
    source = copy_of(folder(kind))
    edit_json(source / path, **says)
    pipe = minibooth.load(source)
    pipe.save(tmp_path / "x.safetensors")
    again = minibooth.load(tmp_path / "x.safetensors", tokenizer=source)
    assert json.loads(again.source.small_files[path]).items() >= says.items()
    assert np.array_equal(draw(again), draw(pipe))


NOISE = dict(
    num_train_timesteps=500, beta_schedule="linear", beta_start=0.001, beta_end=0.015, trained_betas=[0.1, 0.2],
    rescale_betas_zero_snr=True,
)  # fmt: skip


@pytest.mark.parametrize("path", [SCHEDULE, "low_res_scheduler/scheduler_config.json"])
def test_a_file_tells_what_is_its_own_of_its_noise(path, monkeypatch, tmp_path):
    told, source = [], Source.open(folder("x4"))
    monkeypatch.setattr("minibooth.checkpoint.files.write_weights", lambda *given: told.append(given[-1]))
    usual = source.json(path)
    for key, value in NOISE.items():
        source.small_files[path] = json.dumps(usual | {key: value}).encode()
        source.save(tmp_path / "x.safetensors", {})
        assert json.loads(told[-1][f"minibooth.{path}"])[key] == value


def test_an_xls_file_has_the_published_schedule():
    """So that latents are not clipped, as diffusers' DDIM does where a folder does not say so."""
    pipe = minibooth.load(file("sdxl"), tokenizer=folder("sdxl"))
    said = json.loads(pipe.source.small_files[SCHEDULE])
    assert (said["clip_sample"], said["set_alpha_to_one"], said["skip_prk_steps"]) == (False, False, True)


@pytest.mark.parametrize("text", ["{", "[]", '{"norm_num_groups": 7}', '{"down_block_types": []}', '{"act_fn": "gelu"}'])
def test_a_wrong_word_of_the_metadata_is_refused_by_name(text, tmp_path):
    told = {"minibooth.unet/config.json": text, "minibooth.../../x/config.json": "{", "minibooth.author": "me"}
    path = change(file("sd1"), tmp_path / "x.safetensors", lambda tensors: None, told)
    assert f"{path}/unet/config.json" in refusal(path, tokenizer=folder("sd1"))


def test_a_file_says_what_its_folder_says(monkeypatch, tmp_path):
    """Of the folders that CompVis and Stability AI published, with the settings of then, and as diffusers writes them now."""
    written, wanted = {}, {}
    monkeypatch.setattr("minibooth.checkpoint.files.write_weights", lambda path, *given: written.update({path.stem: given[-1]}))
    for kind, configs in published_configs().items():
        pipeline = PIPELINES.get(kind, "StableDiffusionPipeline")
        small = {f"{part}/config.json": config for part, config in configs.items() if "scheduler" not in part}
        small |= {f"{part}/scheduler_config.json": config for part, config in configs.items() if "scheduler" in part}
        small["model_index.json"] = {"_class_name": pipeline}
        wanted[kind] = small
        source = Source(kind, {name: json.dumps(config).encode() for name, config in small.items()})
        source.weights = {part: source.skeleton(part).state_dict() for part in configs if "scheduler" not in part}
        source.save(tmp_path / f"{kind}.safetensors", {})
    for kind, said in written.items():
        assert said.pop("modelspec.prediction_type")
        wanted[kind][SCHEDULE] = {"prediction_type": "epsilon"} | wanted[kind][SCHEDULE]
        assert {key.removeprefix(OURS): json.loads(text) for key, text in said.items()} == wanted[kind]


def test_no_name_in_a_file_leaves_the_folder_that_is_written(tmp_path):
    words = {
        f"{OURS}tokenizer/{name}": (folder("sd1") / "tokenizer" / name).read_text() for name in ("vocab.json", "merges.txt")
    }
    path = change(file("sd1"), tmp_path / "x.safetensors", lambda tensors: None, words | {f"{OURS}tokenizer/../../../x": "x"})
    Source.open(path).save(tmp_path / "a" / "b", {})
    assert [*(tmp_path / "a").iterdir()] == [tmp_path / "a" / "b"]


def published_configs():
    down, up = ["CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D"]
    unet = dict(
        _class_name="UNet2DConditionModel", act_fn="silu", attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280],
        center_input_sample=False, cross_attention_dim=768, down_block_types=[*down * 3, "DownBlock2D"], downsample_padding=1,
        flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-05,
        norm_num_groups=32, out_channels=4, sample_size=64, up_block_types=["UpBlock2D", *up * 3],
    )  # fmt: skip
    today = dict.fromkeys(("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"))
    today |= dict(transformer_layers_per_block=1, num_class_embeds=None, time_embedding_type="positional")
    vae = dict(
        _class_name="AutoencoderKL", act_fn="silu", block_out_channels=[128, 256, 512, 512], latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, in_channels=3, layers_per_block=2, norm_num_groups=32, out_channels=3,
        sample_size=512, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    text = dict(
        architectures=["CLIPTextModel"], hidden_act="quick_gelu", hidden_size=768, intermediate_size=3072, layer_norm_eps=1e-05,
        max_position_embeddings=77, num_attention_heads=12, num_hidden_layers=12, projection_dim=768, vocab_size=49408,
    )  # fmt: skip
    large = dict(hidden_act="gelu", hidden_size=1024, intermediate_size=4096, num_attention_heads=16, projection_dim=512)
    sd2, x4 = dict(cross_attention_dim=1024, use_linear_projection=True), dict(cross_attention_dim=1024, sample_size=128)
    sigmas = dict(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, trained_betas=None,
        clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
    )  # fmt: skip
    betas = sigmas | dict(beta_start=0.0001, beta_end=0.02)
    return {
        "sd1": {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": sigmas},
        "sd1-today": {"unet": unet | today, "vae": vae | {"force_upcast": True}, "text_encoder": text, "scheduler": sigmas},
        "sd2": {
            "unet": unet | sd2 | dict(attention_head_dim=[5, 10, 20, 20], upcast_attention=True, sample_size=96),
            "vae": vae | {"sample_size": 768}, "text_encoder": text | large | {"num_hidden_layers": 23},
            "scheduler": sigmas | {"prediction_type": "v_prediction"},
        },
        "x4": {
            "unet": unet | x4 | dict(
                block_out_channels=[256, 512, 512, 1024], down_block_types=["DownBlock2D", *down * 3], in_channels=7,
                num_class_embeds=1000, only_cross_attention=[True, True, True, False], up_block_types=[*up * 3, "UpBlock2D"],
                use_linear_projection=True,
            ),
            "vae": vae | dict(
                block_out_channels=[128, 256, 512], down_block_types=["DownEncoderBlock2D"] * 3, scaling_factor=0.08333,
                up_block_types=["UpDecoderBlock2D"] * 3, sample_size=256,
            ),
            "text_encoder": text | large | {"num_hidden_layers": 23},
            "scheduler": betas | {"prediction_type": "v_prediction"}, "low_res_scheduler": betas,
        },
        "sdxl": {
            "unet": unet | dict(
                addition_embed_type="text_time", addition_time_embed_dim=256, attention_head_dim=[5, 10, 20],
                block_out_channels=[320, 640, 1280], cross_attention_dim=2048, down_block_types=["DownBlock2D", *down * 2],
                projection_class_embeddings_input_dim=2816, sample_size=128, transformer_layers_per_block=[1, 2, 10],
                up_block_types=[*up * 2, "UpBlock2D"], upcast_attention=None, use_linear_projection=True,
            ),
            "vae": vae | dict(force_upcast=True, sample_size=1024, scaling_factor=0.13025), "text_encoder": text,
            "text_encoder_2": text | dict(
                architectures=["CLIPTextModelWithProjection"], hidden_act="gelu", hidden_size=1280, intermediate_size=5120,
                num_attention_heads=20, num_hidden_layers=32, projection_dim=1280,
            ),
            "scheduler": sigmas | {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"},
        },
    }  # fmt: skip


# ---- in: the networks, and what is inferred


@kinds
def test_a_file_is_the_pipeline_of_its_folder(kind):
    ours, expected = minibooth.load(file(kind)), minibooth.load(folder(kind))
    assert not differing(states(ours), states(expected))
    assert np.abs(draw(ours) - draw(expected)).max() <= 1  # where tensors lie in memory decides about last bits
    assert (ours.vae.scaling_factor, ours.sampler) == (expected.vae.scaling_factor, expected.sampler)
    found, wanted = vars(ours.scheduler), vars(expected.scheduler)
    assert torch.equal(found["alphas_cumprod"], wanted["alphas_cumprod"])
    assert all(found[key] == wanted[key] for key in wanted.keys() - {"alphas_cumprod", "config"})
    if kind == "x4":
        assert ours.max_noise_level == expected.max_noise_level == 350
        assert torch.equal(ours.low_res_scheduler.alphas_cumprod, expected.low_res_scheduler.alphas_cumprod)


@kinds
def test_tokenizers_pad_as_the_published_ones(kind):
    ours, expected = minibooth.load(file(kind)), minibooth.load(folder(kind))
    assert ids(ours) == ids(expected)
    if kind == "sdxl":
        assert torch.equal(ours.tokenizer_2(["a"]), expected.tokenizer_2(["a"]))
        assert not torch.equal(ours.tokenizer_2(["a"]), ours.tokenizer(["a"]))


def test_the_size_to_draw_follows_from_the_kind():
    sizes = {"sd1": (512, 8), "sd2": (768, 8), "sdxl": (1024, 8), "x4": (512, 4)}
    for kind, (side, factor) in sizes.items():
        unet, vae = (Source.open(file(kind)).json(f"{part}/config.json") for part in ("unet", "vae"))
        assert factor * unet["sample_size"] == vae["sample_size"] == side
    assert Source.open(file("sd2"), prediction_type="epsilon").json("unet/config.json")["sample_size"] == 64


@pytest.mark.parametrize(
    "kind, stored", [("sd1", torch.float8_e4m3fn), ("sd2", torch.bfloat16), ("sdxl", torch.float16), ("x4", torch.bfloat16)]
)
def test_files_of_any_precision_are_read(kind, stored, tmp_path):
    path = change(file(kind), tmp_path / "x.safetensors", lambda x: {name: y.to(stored) for name, y in x.items()})
    opened = minibooth.load(path, tokenizer=folder(kind), prediction_type="epsilon")
    expected = {name: x.to(stored).float() for name, x in states(minibooth.load(folder(kind))).items()}
    assert not differing(states(opened), expected)


@kinds
def test_a_file_becomes_a_folder_that_diffusers_opens(kind, tmp_path):
    pipe = minibooth.load(file(kind))
    pipe.save(tmp_path / "folder")
    assert not differing(weights(tmp_path / "folder"), weights(folder(kind)))
    theirs = reference(tmp_path / "folder")
    what = dict(image=PICTURE) if kind == "x4" else dict(height=64, width=64)
    options = dict(output_type="np", num_inference_steps=2, guidance_scale=7.5, generator=torch.Generator().manual_seed(1))
    expected = theirs("a dog", **options, **what).images[0] * 255
    assert np.abs(draw(pipe) - expected).max() <= 2.5


# ---- what files hold besides


def with_everything(kind):
    """What the published files and programs add to a kind's tensors."""

    def more(tensors):
        added = {
            "betas": torch.linspace(0, 1, 1000, dtype=torch.float64), "model_ema.num_updates": torch.tensor(7),
            "model_ema.decay": torch.tensor(0.9999), "low_scale_model.betas": torch.rand(3),
            f"{VAE}loss.logvar": torch.tensor(0.0),
        }  # fmt: skip
        for name, tensor in tensors.items():
            if name.startswith(UNET):
                added["model_ema." + name.removeprefix("model.").replace(".", "")] = tensor + 1
        if kind in ("sd2", "x4"):
            text = "cond_stage_model.model."
            added |= {f"{text}logit_scale": torch.tensor(4.6), f"{text}text_projection": torch.rand(128, 128)}
        else:
            text = single_files.TEXT[kind][0]
            added[f"{text}text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return tensors | added

    return more


@kinds
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_everything_comes_back_bit_for_bit(kind, stored, tmp_path):
    def edit(tensors):
        whole = with_everything(kind)(tensors)
        return {name: x.to(stored) if x.dtype == torch.float32 else x for name, x in whole.items()}

    said = {"format": "pt", "modelspec.prediction_type": "v" if kind in ("sd2", "x4") else "epsilon", "modelspec.author": "me"}
    path = change(file(kind), tmp_path / "x.safetensors", edit, said)
    pipe = minibooth.load(path, tokenizer=folder(kind))
    pipe.save(tmp_path / "again.safetensors")
    assert not differing(load_file(tmp_path / "again.safetensors"), load_file(path))
    told = metadata(tmp_path / "again.safetensors")
    assert {key: text for key, text in told.items() if not key.startswith(OURS)} == said
    pipe.save(path)  # over itself
    assert not differing(load_file(path), load_file(tmp_path / "again.safetensors"))


def test_training_changes_what_was_trained_alone(tmp_path):
    pipe = minibooth.load(change(file("sd2"), tmp_path / "x.safetensors", with_everything("sd2")), tokenizer=folder("sd2"))
    before = load_file(tmp_path / "x.safetensors")
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
        pipe.text_encoder.text_model.encoder.layers[1].self_attn.k_proj.weight += 1
    pipe.vae = None  # released
    pipe.save(tmp_path / "trained.safetensors")
    after = load_file(tmp_path / "trained.safetensors")
    joined, stem = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight", f"{UNET}input_blocks.0.0.bias"
    assert torch.equal(after[stem], before[stem] + 1)
    expected = before[joined].clone()
    expected[128:256] += 1
    assert torch.equal(after[joined], expected)
    untouched = before.keys() - {stem, joined}
    assert not differing({name: after[name] for name in untouched}, {name: before[name] for name in untouched})


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_old_names_are_read_and_todays_written(kind, tmp_path):
    def bare(tensors):
        return {name.replace(".transformer.text_model.", ".transformer."): x for name, x in tensors.items()}

    path = change(file(kind), tmp_path / "x.safetensors", bare)
    assert load_file(path).keys() != load_file(file(kind)).keys()
    pipe = minibooth.load(path, tokenizer=folder(kind))
    assert not differing(states(pipe), states(minibooth.load(folder(kind))))
    pipe.save(tmp_path / "again.safetensors")
    assert not differing(load_file(tmp_path / "again.safetensors"), load_file(file(kind)))


def test_what_other_programs_call_otherwise_is_read(tmp_path):
    """Stable Diffusion 2 as sgm has it; XL by diffusers' own script, which keeps the projection as a linear layer's."""

    def sgm(tensors):
        return {name.replace("cond_stage_model.", "conditioner.embedders.0."): x for name, x in tensors.items()}

    def script(tensors):
        return without(linear)(tensors) | {f"{linear}.weight": tensors[linear].T.contiguous()}

    linear = "conditioner.embedders.1.model.text_projection"
    for kind, edit in (("sd2", sgm), ("sdxl", script)):
        path = change(file(kind), tmp_path / f"{kind}.safetensors", edit)
        assert load_file(path).keys() != load_file(file(kind)).keys()
        pipe = minibooth.load(path, tokenizer=folder(kind), prediction_type="v_prediction" if kind == "sd2" else None)
        assert not differing(states(pipe), states(minibooth.load(folder(kind))))
        pipe.save(tmp_path / "again.safetensors")
        assert not differing(load_file(tmp_path / "again.safetensors"), load_file(file(kind)))


def test_the_average_is_taken_where_it_is_asked_for(tmp_path):
    path = change(file("sd1"), tmp_path / "x.safetensors", with_everything("sd1"))
    left, taken = (minibooth.load(path, tokenizer=folder("sd1"), ema=ema) for ema in (False, True))
    expected = states(minibooth.load(folder("sd1")))
    assert not differing(states(left), expected)
    assert not differing(states(taken), {name: x + name.startswith("unet/") for name, x in expected.items()})
    taken.save(tmp_path / "taken.safetensors")
    written = load_file(tmp_path / "taken.safetensors")
    assert not any(name.startswith("model_ema") for name in written)
    assert torch.equal(written[f"{UNET}out.2.bias"], load_file(path)[f"{UNET}out.2.bias"] + 1)
    assert "has no EMA weights" in refusal(file("sd1"), ema=True)
    assert "no single file" in refusal(folder("sd1"), ema=True)


def test_averages_and_hashes_of_other_weights_are_not_written_with_those_that_trained(tmp_path):
    """A program that prefers the average would draw what there was before."""
    said = {"modelspec.title": "old", "modelspec.hash_sha256": "1", "sshs_model_hash": "2", "modelspec.author": "me"}
    path = change(file("sd1"), tmp_path / "x.safetensors", with_everything("sd1"), said)
    settings = small(tmp_path, path, max_train_steps=1, output_format="single", tokenizer=str(folder("sd1")))
    trained = train(settings) / "output.safetensors"
    written, before = load_file(trained), load_file(path)
    assert before.keys() - written.keys() == {name for name in before if name.startswith("model_ema.")} != set()
    assert said.keys() & metadata(trained).keys() == {"modelspec.author"}

    lora = train(dataclasses.replace(settings, rank=2, output_format="folder", output_dir=str(tmp_path / "lora")))
    (pipe := minibooth.load(path, tokenizer=folder("sd1"))).load_lora(lora)
    pipe.save(tmp_path / "loaded.safetensors")
    for name, more in (("merged.safetensors", ["--lora", str(lora)]), ("copy.safetensors", [])):
        convert.main([str(path), str(tmp_path / name), "--tokenizer", str(folder("sd1")), *more])
    for name, kept in (("loaded", {"modelspec.author"}), ("merged", {"modelspec.author"}), ("copy", said.keys())):
        there = tmp_path / f"{name}.safetensors"
        assert said.keys() & metadata(there).keys() == kept
        assert any(name.startswith("model_ema.") for name in load_file(there)) == (len(kept) > 1)


def test_nothing_is_merged_into_weights_in_8_bits(tmp_path, mistake, capsys):
    """They would hardly take it up."""
    lora = train(small(tmp_path, file("sd1"), rank=2, max_train_steps=1, tokenizer=str(folder("sd1"))))
    coarse = {name: x.to(torch.float8_e4m3fn) for name, x in load_file(file("sd1")).items()}
    save_file(coarse, tmp_path / "coarse.safetensors")
    words = [tmp_path / "coarse.safetensors", tmp_path / "merged", "--lora", lora, "--tokenizer", folder("sd1")]
    capsys.readouterr()  # of the training
    assert "unet is in 8 bits, too coarse to change: first convert it to --dtype fp16" in mistake(convert, *words)


def test_the_24th_layer_of_sd_2_is_kept_but_not_used(tmp_path):
    published = folder("sd2", layers=23)  # as the folders are published
    pipe = minibooth.load(published)
    pipe.save(tmp_path / "x.safetensors")

    def grow(tensors):
        layer = "cond_stage_model.model.transformer.resblocks."
        last = {n.replace(f"{layer}22.", f"{layer}23."): x + 1 for n, x in tensors.items() if n.startswith(f"{layer}22.")}
        return tensors | last

    for path in (tmp_path / "x.safetensors", change(tmp_path / "x.safetensors", tmp_path / "24.safetensors", grow)):
        opened = minibooth.load(path, tokenizer=published, prediction_type="v_prediction")
        assert not differing(states(opened), states(pipe))
        opened.save(tmp_path / "again.safetensors")
        assert not differing(load_file(tmp_path / "again.safetensors"), load_file(path))


# ---- epsilon or v


def predicting(kind_of_answer, path):
    """An SD 2 file that does not say what it predicts: its UNet answers with most of the noise, or with minus a picture."""
    pipe = minibooth.load(folder("sd2"))
    unet = pipe.unet
    gain, constant = {"epsilon": (0.7, 0.0), "v_prediction": (0.3, -1.0)}[kind_of_answer]
    with torch.no_grad():  # the input goes through twice, once negated, on the last skip: silu(x) - silu(-x) = x
        last = unet.up_blocks[3]
        for parameters in (unet.conv_in, last.resnets[1].conv2, last.resnets[1].conv_shortcut, unet.conv_out):
            parameters.weight.zero_()
            parameters.bias.zero_()
        last.attentions[1].proj_out.weight.zero_()
        last.attentions[1].proj_out.bias.zero_()
        unet.conv_norm_out.weight.fill_(1)
        unet.conv_norm_out.bias.zero_()
        for c in range(4):
            for channel, sign in ((c, 1), (c + 4, -1)):
                unet.conv_in.weight[channel, c, 1, 1] = sign
                last.resnets[1].conv_shortcut.weight[channel, channel - 32] = 1
                unet.conv_out.weight[c, channel, 1, 1] = sign * gain
        unet.conv_out.bias += constant
    pipe.save(path.with_name("said.safetensors"))
    return change(path.with_name("said.safetensors"), path, lambda tensors: None)


@pytest.mark.parametrize("answer", ["epsilon", "v_prediction"])
def test_a_silent_sd_2_is_measured(answer, tmp_path, capsys, monkeypatch):
    path = predicting(answer, tmp_path / "x.safetensors")
    asked, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, context: asked.append(t) or forward(self, x, t, context))
    pipe = minibooth.load(path, tokenizer=folder("sd2"))
    assert asked == [999]
    assert pipe.scheduler.prediction_type == answer
    said = capsys.readouterr().out
    assert re.fullmatch(rf".*x\.safetensors predicts {answer} \(.*\); --prediction_type .*\n", said)
    assert pipe.unet.config.sample_size == {"epsilon": 64, "v_prediction": 96}[answer]
    pipe.save(tmp_path / "again.safetensors")  # which then says it
    assert minibooth.load(tmp_path / "again.safetensors", tokenizer=folder("sd2")).scheduler.prediction_type == answer
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, options, metadata, expected",
    [
        ("sd1", {}, None, "epsilon"),
        ("sd1", {"prediction_type": "v_prediction"}, None, "v_prediction"),
        ("sd2", {"prediction_type": "epsilon"}, None, "epsilon"),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("sd2", {}, {"modelspec.predict_key": "v"}, "v_prediction"),
        ("sdxl", {}, None, "epsilon"),
        ("x4", {}, None, "v_prediction"),
        ("x4", {"prediction_type": "epsilon"}, None, "epsilon"),
        ("x4", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_who_says_it_is_believed(kind, options, metadata, expected, tmp_path, capsys):
    path = change(file(kind), tmp_path / "x.safetensors", lambda tensors: None, metadata)
    assert minibooth.load(path, tokenizer=folder(kind), **options).scheduler.prediction_type == expected
    assert not capsys.readouterr().out


def test_comfyuis_keys_are_believed(tmp_path):
    marks = {"v_pred": torch.tensor(1.0), "ztsnr": torch.tensor(1.0)}
    path = change(file("sdxl"), tmp_path / "x.safetensors", lambda tensors: tensors | marks)
    pipe = minibooth.load(path, tokenizer=folder("sdxl"))
    assert pipe.scheduler.prediction_type == "v_prediction"
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    assert pipe.scheduler.timestep_spacing == "trailing"
    pipe.save(tmp_path / "again.safetensors")
    assert not differing(load_file(tmp_path / "again.safetensors"), load_file(path))
    pipe.save(tmp_path / "folder")
    minibooth.load(tmp_path / "folder").save(tmp_path / "new.safetensors")
    assert load_file(tmp_path / "new.safetensors").keys() == load_file(path).keys()


# ---- the vocabulary


@pytest.mark.parametrize("place", ["folder", "checkpoint", "beside", "hub"])
def test_where_the_vocabulary_is_found(place, tmp_path, monkeypatch):
    path, source = tmp_path / "x.safetensors", folder("sd1") / "tokenizer"
    shutil.copy(file("sd1"), path)
    options = {"folder": {"tokenizer": source}, "checkpoint": {"tokenizer": folder("sd1")}}.get(place, {})
    if place == "beside":
        shutil.copytree(source, tmp_path / "tokenizer")
    if place == "hub":
        repository = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
        shutil.copytree(source, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    assert ids(minibooth.load(path, **options)) == ids(minibooth.load(folder("sd1")))


@kinds
def test_a_file_of_ours_holds_its_tokenizers(kind, copy_of, tmp_path):
    """Unusual ones, and XL's two different ones; the argument `tokenizer` overrules them."""
    copy = copy_of(folder(kind))
    tokenizers = {path.name: path for path in copy.glob("tokenizer*")}
    for name, path in tokenizers.items():
        config, words = (json.loads((path / f"{file}.json").read_text()) for file in ("tokenizer_config", "vocab"))
        write_json(path / "tokenizer_config.json", config | {"model_max_length": len(name)})
        write_json(path / "vocab.json", words | {"a</w>": words[f"{name[-1]}</w>"], f"{name[-1]}</w>": words["a</w>"]})
    pipe, alone = minibooth.load(copy), tmp_path / "alone" / "x.safetensors"
    pipe.save(alone)
    again = minibooth.load(alone)
    rows = {name: [getattr(each, name)(["a r 2"]).tolist() for each in (pipe, again)] for name in tokenizers}
    assert all(row == other for row, other in rows.values()) and len({str(row) for row, _ in rows.values()}) == len(rows)
    again.save(tmp_path / "again")
    for path in copy.glob("tokenizer*/*.*"):
        assert (tmp_path / "again" / path.relative_to(copy)).read_text().split() == path.read_text().split()
    overruled, usual = minibooth.load(alone, tokenizer=folder(kind)), minibooth.load(folder(kind))
    assert ids(overruled, "a r") == ids(usual, "a r") != ids(pipe, "a r")


@kinds
def test_what_a_folder_leaves_out_of_its_tokenizers_a_file_does_not_add(kind, copy_of, tmp_path):
    copy = copy_of(folder(kind))
    for path in copy.glob("tokenizer*/tokenizer_config.json"):
        path.unlink()
    pipe = minibooth.load(copy)
    pipe.save(tmp_path / "x.safetensors")
    assert ids(minibooth.load(tmp_path / "x.safetensors"), "a dog!") == ids(pipe, "a dog!")


def test_a_tokenizer_in_another_encoding_is_no_file(copy_of, tmp_path):
    copy = copy_of(folder("sd1"))
    (copy / "tokenizer" / "special_tokens_map.json").write_bytes(json.dumps({}).encode("utf-16"))
    with pytest.raises(UserError, match="copy/tokenizer holds something unexpected"):
        minibooth.load(copy).save(tmp_path / "x.safetensors")


def test_a_vocabulary_that_is_nowhere_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    shutil.copy(file("sd1"), path)
    said = refusal(path)
    assert "vocab.json and merges.txt" in said and "--tokenizer" in said and "openai/clip-vit-large-patch14" in said
    for name in ("vocab.json", "merges.txt"):  # of which one is not enough
        (tmp_path / name).mkdir()
        shutil.copy(folder("sd1") / "tokenizer" / name, tmp_path / name)
    for place in ("no", "vocab.json", "merges.txt"):
        assert f"missing in {tmp_path / place} and its folder tokenizer" in refusal(path, tokenizer=tmp_path / place)


def test_a_folder_takes_another_vocabulary_too(copy_of):
    copy = copy_of(folder("sdxl"))
    for name in ("tokenizer", "tokenizer_2"):
        (copy / name / "vocab.json").unlink()
        write_json(copy / name / "added_tokens.json", {"<of the old one>": 10**6})
    assert "vocab.json" in refusal(copy)
    assert ids(minibooth.load(copy, tokenizer=folder("sdxl"))) == ids(minibooth.load(folder("sdxl")))


# ---- refusals


def without(*starts):
    return lambda tensors: {name: x for name, x in tensors.items() if not name.startswith(starts)}


def channels(count):
    return lambda tensors: tensors | {f"{UNET}input_blocks.0.0.weight": torch.zeros(16, count, 3, 3)}


def refiner(tensors):
    renamed = {name.replace("embedders.1.", "embedders.0."): x for name, x in tensors.items() if ".embedders.0." not in name}
    return renamed


def shaped(name, *shape):
    return lambda tensors: tensors | {name: torch.zeros(shape)}


TO_K = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
MIDDLE = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
JOINED = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"


REFUSED = {
    "inpainting": ("sd1", channels(9), "an inpainting model"),
    "pix2pix": ("sd1", channels(8), "an InstructPix2Pix"),
    "unclip": ("sd2", lambda x: x | {"noise_augmentor.betas": torch.zeros(4)}, "an unCLIP model"),
    "half an upscaler": ("sd1", channels(7), "not a text-to-image model: its UNet takes 7 channels"),
    "refiner": ("sdxl", refiner, "the refiner of Stable Diffusion XL"),
    "playground": ("sdxl", lambda x: x | {"edm_mean": torch.zeros(4)}, "Playground v2.5"),
    "cosxl": ("sdxl", lambda x: x | {"edm_vpred.sigma_max": torch.tensor(120.0)}, "CosXL"),
    "no vae": ("sd1", without(VAE), r"lacks its vae \(first_stage_model"),
    "no text encoder": ("sd2", without("cond_stage_model"), r"lacks its text_encoder \(cond_stage_model"),
    "unet alone": ("sdxl", without(VAE, "conditioner"), "lacks its vae .* and text_encoder .* and text_encoder_2"),
    "one tensor": ("sd1", without(f"{UNET}middle_block.0.emb_layers.1.bias"), "lacks mid_block.resnets.0.time_emb_proj.bias"),
    "no level": ("sd1", without(f"{VAE}encoder.down.1.block.0.conv1"), "KeyError: 'encoder.down.1.block.0.conv1.weight"),
    "a tensor more": ("sd1", lambda x: x | {f"{UNET}input_hint.0.weight": torch.zeros(1)}, "unexpected .*input_hint"),
    "a tensor twice": (
        "sd1",
        lambda x: x | {name.replace("text_model.", ""): 2 * y for name, y in x.items() if ".text_model.final" in name},
        "has .*final_layer_norm.bias under a second name, too",
    ),
    "scaled to 8 bits": (
        "sd1",
        lambda x: x | {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.scale_weight": torch.ones(())},
        "unexpected .*scale_weight",
    ),
    "another shape": ("sd1", shaped(TO_K, 16, 5), r"to_k.weight is \[16, 5\]"),
    "a number": ("sd1", shaped(f"{UNET}input_blocks.0.0.weight"), "IndexError"),
    "a row": ("sd1", shaped(f"{UNET}input_blocks.0.0.weight", 16), "IndexError"),
    "a row in the middle": ("sd1", shaped(MIDDLE, 16), "IndexError"),
    "no channels": ("sd1", shaped(f"{UNET}input_blocks.0.0.weight", 16, 0, 3, 3), "takes 0 channels"),
    "an embedding of a row": ("sd2", shaped("cond_stage_model.model.token_embedding.weight", 16), "ValueError"),
    "q, k and v as a number": ("sd2", shaped(JOINED), "RuntimeError"),
    "q, k and v as one": ("sd2", shaped(JOINED, 1), "IndexError"),
    "a large convolution": ("sd1", shaped(f"{VAE}encoder.mid.attn_1.q.weight", 16, 16, 3, 3), "RuntimeError"),
    "kohya's lora": ("sd1", lambda x: {"lora_unet_mid.lora_down.weight": torch.zeros(1)}, "a LoRA"),
    "diffusers' lora": ("sd1", lambda x: {"unet.mid.to_q.lora_A.weight": torch.zeros(1)}, "a LoRA"),
    "diffusers' lora of old": ("sd1", lambda x: {"unet.mid.to_q.lora.down.weight": torch.zeros(1)}, "a LoRA"),
    "a text encoder's loha": ("sd1", lambda x: {"lora_te1_mlp_fc1.hada_w1_a": torch.zeros(1)}, "a LoRA"),
    "another model": ("sd1", lambda x: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "begin with double_blocks.0"),
    "nothing": ("sd1", lambda x: {"a": torch.zeros(1)}, "names begin with a"),
}


@pytest.mark.parametrize("kind, edit, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_no_whole_stable_diffusion_is_refused_by_name(kind, edit, reason, tmp_path):
    path = change(file(kind), tmp_path / "x.safetensors", edit)
    said = refusal(path, tokenizer=folder(kind), prediction_type="epsilon")
    assert re.search(reason, said) and str(path) in said

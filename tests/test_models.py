"""The networks: the numbers of diffusers and transformers on the same weights, and what holds without a reference."""

import dataclasses
import inspect

import pytest
import torch
from comparing import error, gradients, normals, reference, worst_error
from conftest import SD2, TEXT_ENCODER, UNET, VAE_CONFIG, randomise

import minibooth
from minibooth.errors import UserError
from minibooth.models import ops
from minibooth.models.clip import CLIPText
from minibooth.models.config import CLIPTextConfig, UNetConfig, VAEConfig, VisionConfig, ViTConfig
from minibooth.models.unet import UNet
from minibooth.models.vae import VAE, Posterior
from minibooth.models.vision import CLIP

PROMPTS = ["a photo of sks dog", "", "a cat! " * 60]


@pytest.fixture(scope="module")
def ours(checkpoint):
    return minibooth.load(checkpoint)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return reference(checkpoint)


@pytest.fixture
def context(ours):
    return ours.encode_prompts(PROMPTS)


# ---- the references' numbers


def test_text_encoder_gives_the_numbers_of_transformers(ours, theirs):
    ids = ours.tokenizer(PROMPTS)
    with torch.no_grad():
        assert error(ours.text_encoder(ids), theirs.text_encoder(ids).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("batch, height, width", [(1, 64, 64), (2, 40, 72)])
def test_vae_gives_the_numbers_of_diffusers(ours, theirs, batch, height, width):
    images, latents = normals(batch, 3, height, width).tanh(), normals(batch, 4, height // 8, width // 8)
    with torch.no_grad():
        posterior, expected = ours.vae.encode(images), theirs.vae.encode(images).latent_dist
        assert error(posterior.mean, expected.mean) <= 1e-5
        assert error(posterior.std, expected.std) <= 1e-5
        ours_drawn, theirs_drawn = (x.sample(torch.Generator().manual_seed(0)) for x in (posterior, expected))
        assert error(ours_drawn, theirs_drawn) <= 1e-5
        assert error(ours.vae.decode(latents), theirs.vae.decode(latents).sample) <= 1e-5
    assert ours.vae.factor == 8


@pytest.mark.parametrize("batch, height, width", [(1, 8, 8), (2, 8, 24), (3, 9, 13)])
def test_unet_gives_the_numbers_of_diffusers(ours, theirs, context, batch, height, width):
    x, t = normals(batch, 4, height, width), torch.tensor([999, 0, 437])[:batch]
    with torch.no_grad():
        expected = theirs.unet(x, t, context[:batch]).sample
        assert error(ours.unet(x, t, context[:batch]), expected) <= 1e-5


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_a_norms_epsilon_is_that_of_the_reference(network, ours, theirs):
    """Read off: 1e-5 where 1e-6 belongs changes most numbers by less than 1e-5."""

    def epsilons(pipe):
        norms = torch.nn.GroupNorm | torch.nn.LayerNorm
        named = getattr(pipe, network).named_modules()
        return {name.removeprefix("text_model."): norm.eps for name, norm in named if isinstance(norm, norms)}

    assert epsilons(ours) == epsilons(theirs)


def test_unet_gradients_are_those_of_diffusers(ours, theirs, context):
    x, t, target = normals(2, 4, 8, 24), torch.tensor([3, 801]), normals(2, 4, 8, 24, seed=1)
    mine = gradients(ours.unet, ours.unet(x, t, context[:2]), target)
    worst = worst_error(mine, gradients(theirs.unet, theirs.unet(x, t, context[:2]).sample, target))
    assert worst[0] <= 1e-4, worst


def test_only_cross_attention_leaves_the_middle_its_own():
    diffusers = pytest.importorskip("diffusers")
    config = UNET | {"only_cross_attention": True}
    theirs = diffusers.UNet2DConditionModel.from_config(config)
    randomise(theirs, 0)
    ours = UNet(UNetConfig.from_dict(config))
    ours.load_state_dict(theirs.state_dict())
    x, t, context = normals(1, 4, 8, 8), torch.tensor([7]), normals(1, 5, config["cross_attention_dim"])
    with torch.no_grad():
        assert error(ours(x, t, context), theirs(x, t, context).sample) <= 1e-5


# ---- laws that need no reference


def test_unet_treats_the_samples_of_a_batch_alone(ours, context):
    x, t = normals(3, 4, 9, 13), torch.tensor([999, 0, 437])
    with torch.no_grad():
        together = ours.unet(x, t, context)
        alone = torch.cat([ours.unet(x[i : i + 1], t[i].item(), context[i : i + 1]) for i in range(3)])
    assert error(together, alone) <= 1e-5


def test_unet_heeds_picture_time_and_prompt(ours, context):
    """The small networks would hide a mistake if an input hardly mattered to them."""
    inputs = [normals(1, 4, 8, 8), torch.tensor([100]), context[:1]]
    others = [normals(1, 4, 8, 8, seed=1), torch.tensor([900]), context[1:2]]
    with torch.no_grad():
        before = ours.unet(*inputs)
        for i in range(3):
            after = ours.unet(*inputs[:i], others[i], *inputs[i + 1 :])
            assert (after - before).std() > 0.05 * before.std()


def test_text_encoder_is_causal(ours):
    ids = ours.tokenizer(PROMPTS[:1])
    changed = ids.clone()
    changed[0, 5] = 1 + ids[0, 5]
    with torch.no_grad():
        before, after = ours.text_encoder(ids), ours.text_encoder(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after)[0, 5:].abs().amax(dim=1) > 1e-3).all()


def test_a_posterior_is_a_gaussian_of_its_mean_and_std():
    mean, std = torch.tensor([-3.0, 0.5]), torch.tensor([0.01, 2.0])
    posterior = Posterior(mean.expand(100_000, 2), std.expand(100_000, 2))
    drawn = posterior.sample(torch.Generator().manual_seed(0))
    assert torch.allclose((drawn.mean(0) - mean) / std, torch.zeros(2), atol=0.02)
    assert torch.allclose(drawn.std(0) / std, torch.ones(2), atol=0.02)
    assert torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(1)))


def test_a_posterior_never_overflows():
    """logvar is clamped to [-30, 20]."""
    vae = VAE(VAEConfig.from_dict(VAE_CONFIG))
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [-1e4, -30, 20, 1e4]))
        std = vae.encode(normals(1, 3, 8, 8)).std.flatten()
    assert torch.allclose(std.log(), torch.tensor([-15.0, -15, 10, 10]))


def test_half_precision_changes_little_and_keeps_the_dtype():
    unet = UNet(UNetConfig.from_dict(UNET | SD2["unet"]))
    randomise(unet, seed=0)
    inputs = normals(1, 4, 8, 8), torch.tensor([500]), normals(1, 77, unet.config.cross_attention_dim)
    with torch.no_grad():
        expected = unet(*inputs)
        half = unet.bfloat16()(inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16())
    assert half.dtype == torch.bfloat16
    assert error(half.float(), expected) < 0.05


def test_attention_is_in_fp32_where_the_configuration_says_so(checkpoint, ours, context, monkeypatch):
    asked, attention = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *given, upcast: asked.append(upcast) or attention(*given, upcast=upcast))
    with torch.no_grad():
        ours.unet(normals(1, 4, 8, 8), 500, context[:1])
    assert {*asked} == {checkpoint.name == "sd2"}


# ---- configurations

UNSUPPORTED = [
    (UNetConfig, UNET, "class_embed_type", "timestep"),
    (UNetConfig, UNET, "addition_embed_type", "image"),
    (UNetConfig, UNET, "flip_sin_to_cos", False),
    (UNetConfig, UNET, "resnet_time_scale_shift", "scale_shift"),
    (UNetConfig, UNET, "mid_block_type", None),
    (UNetConfig, UNET, "act_fn", "gelu"),
    (UNetConfig, UNET, "a_key_of_tomorrow", 1),
    (VAEConfig, VAE_CONFIG, "use_quant_conv", False),
    (VAEConfig, VAE_CONFIG, "use_post_quant_conv", False),
    (VAEConfig, VAE_CONFIG, "mid_block_add_attention", False),
    (VAEConfig, VAE_CONFIG, "latents_mean", [0.0]),
]


@pytest.mark.parametrize("config, published, key, value", UNSUPPORTED, ids=[row[2] for row in UNSUPPORTED])
def test_a_setting_that_is_not_implemented_is_refused_by_name(config, published, key, value):
    with pytest.raises(UserError, match=key):
        config.from_dict(published | {key: value})


@pytest.mark.parametrize(
    "network, config, published, change",
    [
        (CLIPText, CLIPTextConfig, TEXT_ENCODER, {"hidden_act": "swish"}),
        (UNet, UNetConfig, UNET, {"down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"]}),
        (UNet, UNetConfig, UNET, {"_class_name": "UNet3DConditionModel"}),
        (VAE, VAEConfig, VAE_CONFIG, {"_class_name": "AutoencoderTiny"}),
    ],
    ids=["activation", "block", "unet", "vae"],
)
def test_what_we_have_no_code_for_is_refused_by_name(network, config, published, change):
    value = next(iter(change.values()))
    with pytest.raises(UserError, match=value if isinstance(value, str) else value[-1]):
        network(config.from_dict(published | change))


def test_neutral_settings_of_newer_files_change_nothing():
    newer = {"class_embed_type": None, "conv_in_kernel": 3, "dropout": 0.0, "attention_type": "default", "_use_ema": 1}
    assert UNetConfig.from_dict(UNET | newer) == UNetConfig.from_dict(UNET)
    newer = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True, "shift_factor": None}
    assert VAEConfig.from_dict(VAE_CONFIG | newer) == VAEConfig.from_dict(VAE_CONFIG)


WRITERS = {  # ours -> whose defaults a file leaves out
    UNetConfig: "diffusers.UNet2DConditionModel", VAEConfig: "diffusers.AutoencoderKL",
    CLIPTextConfig: "transformers.CLIPTextConfig", VisionConfig: "transformers.CLIPVisionConfig",
    ViTConfig: "transformers.ViTConfig",
}  # fmt: skip


@pytest.mark.parametrize("config", WRITERS, ids=lambda config: config.__name__)
def test_what_a_file_leaves_out_is_what_the_class_that_wrote_it_means(config):
    library, name = WRITERS[config].split(".")
    theirs = getattr(pytest.importorskip(library), name)
    parameters = inspect.signature(theirs.__init__).parameters
    usual = {key: x.default for key, x in parameters.items()} if library == "diffusers" else theirs().to_dict()
    for field in dataclasses.fields(config):
        if usual[field.name] is not None:  # a model that was published says it
            assert field.default == usual[field.name], field.name


def test_a_whole_clip_model_that_says_nothing_is_transformers_own():
    theirs = pytest.importorskip("transformers").CLIPConfig().to_dict()
    assert all(kind.from_dict({}) == kind.from_dict(theirs) for kind in (CLIPTextConfig, VisionConfig))
    with torch.device("meta"):
        assert CLIP({}).text_projection.out_features == CLIP(theirs).text_projection.out_features


@pytest.mark.parametrize("said, heads", [(4, [4, 4, 4]), ([1, 2, 4, 4], [1, 2, 4])])
def test_attention_head_dim_is_the_number_of_heads(said, heads):
    blocks = UNet(UNetConfig.from_dict(UNET | {"attention_head_dim": said})).down_blocks[:3]
    assert [block.attentions[0].transformer_blocks[0].attn2.heads for block in blocks] == heads

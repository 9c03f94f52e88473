"""LoRA: a sum of weights, live or merged; files that diffusers and kohya's programs share; runs that repeat themselves."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import differing, reference
from PIL import Image
from safetensors.torch import load_file, save_file
from single_files import metadata
from small_run import flags, metrics, run, small, tiny, train, trainer, with_class

import minibooth
from minibooth import convert, generate
from minibooth.checkpoint import lora as files
from minibooth.checkpoint.source import Source
from minibooth.errors import UserError
from minibooth.models import lora
from minibooth.models.clip import CLIPText

pytestmark = pytest.mark.usefixtures("few_drawing_steps")
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="session", params=["sd1", "sd2", "sdxl"])
def base(request) -> Path:
    """Each kind of checkpoint."""
    return request.getfixturevalue(request.param)


def adapters(network, targets="all", ranks=(1, 2, 4), alphas=(3.0, 4.0), seed=0, weight=1.0) -> dict[str, lora.Adapter]:
    """Of random weights, with ranks and alphas that change from layer to layer."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for i, layer in enumerate(lora.fresh(network, targets, 1, 1.0, 0.0, generator)):
        rank = ranks[i % len(ranks)]
        outputs, *inputs = lora.layers(network)[layer].weight.shape
        down = torch.randn(rank, *inputs, generator=generator) / np.prod(inputs) ** 0.5
        up = 0.3 * torch.randn(outputs, rank, *[1] * (len(inputs) - 1), generator=generator)
        made[layer] = lora.Adapter(down, up, alphas[i % len(alphas)], weight)
    return made


def lora_of(base: Path, folder: Path, targets="all", texts=True, **options) -> tuple[Path, Path]:
    """A LoRA for a checkpoint, in diffusers' file and in kohya's."""
    networks = minibooth.load(base).networks
    parts = [name for name in networks if name == "unet" or texts and name.startswith("text")]
    made = {name: adapters(networks[name], targets, seed=i, **options) for i, name in enumerate(parts)}
    files.write(folder, "kohya.safetensors", made, Source.open(base), {"ss_network_dim": "4"})
    return folder / files.DIFFUSERS, folder / "kohya.safetensors"


def inputs(network, seed=0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(network, CLIPText):
        return (torch.randint(0, 100, (2, 77), generator=generator),)
    width = network.config.cross_attention_dim
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, width, generator=generator)
    return x, torch.tensor([7, 800]), context


def pixels(pipe, **options) -> np.ndarray:
    usual = dict(steps=4, sampler="ddim", seed=3, height=64, width=64)
    return np.stack([np.asarray(image, np.int16) for image in pipe.generate([PROMPT], **usual | options)])


# ---- the layers


@pytest.mark.parametrize("targets", lora.TARGETS)
@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_a_new_one_changes_no_bit(name, targets, checkpoint):
    network = getattr(minibooth.load(checkpoint), name)
    before = network(*inputs(network))
    made = lora.fresh(network, targets, 4, 4.0, 0.5, torch.Generator())
    lora.attach(network, made, torch.float32)
    assert len(made) > 2 and all(isinstance(network.get_submodule(layer), lora.LoRA) for layer in made)
    assert torch.equal(network(*inputs(network)), before)


@pytest.mark.parametrize("rank", [2, 8])
def test_a_new_one_is_drawn_as_by_diffusers_script(rank, sd1):
    """So that its learning rates carry over: train_dreambooth_lora.py asks peft for "gaussian"."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4000, 8)), peft.LoraConfig(
        r=rank, target_modules=["0"], init_lora_weights="gaussian"))  # fmt: skip
    made = lora.fresh(minibooth.load(sd1).unet, "all", rank, rank, 0.0, torch.Generator().manual_seed(0))
    ours = torch.cat([each.down.flatten() for each in made.values()])
    (down,) = (p for name, p in theirs.named_parameters() if "lora_A" in name)
    for drawn in (ours, down):
        assert abs(drawn.mean() * rank) < 0.05 and abs(drawn.std() * rank - 1) < 0.05
        assert abs((drawn * rank).pow(4).mean() - 3) < 0.5  # as normal numbers have it


def test_targets_are_those_of_diffusers_script_or_of_kohyas(sd1):
    unet = minibooth.load(sd1).unet
    attention, everything = (set(lora.fresh(unet, targets, 1, 1.0, 0.0, torch.Generator())) for targets in lora.TARGETS)
    assert {layer.partition("attn")[2][2:] for layer in attention} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(attention) == 4 * 2 * sum(type(part).__name__ == "TransformerBlock" for part in unet.modules())
    outside = lora.layers(unet).keys() - everything
    assert outside == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def test_gradients_are_in_down_and_up_alone(sd1):
    unet = minibooth.load(sd1).unet.requires_grad_(False)
    lora.attach(unet, adapters(unet))
    unet(*inputs(unet)).square().mean().backward()
    have = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert have == {name for name, _ in unet.named_parameters() if name.endswith((".down", ".up"))}


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_several_are_a_weighted_sum_live_and_saved(name, checkpoint):
    """Of mixed ranks and alphas, on linear layers and on convolutions with and without strides."""
    network, plain = (getattr(minibooth.load(checkpoint), name) for _ in range(2))
    state = plain.state_dict()
    for seed, weight, ranks in ((1, 0.7, (1, 2, 4)), (2, -0.4, (3,))):
        made = adapters(network, ranks=ranks, seed=seed, weight=weight)
        for layer, x in made.items():
            update = weight * x.alpha / len(x.down) * (x.up.flatten(1) @ x.down.flatten(1))
            state[f"{layer}.weight"] = state[f"{layer}.weight"] + update.detach().reshape(state[f"{layer}.weight"].shape)
        lora.attach(network, made)
    untouched = {key: p for key, p in network.named_parameters() if ".adapters." not in key}
    assert not differing(untouched, dict(plain.named_parameters()))
    plain.load_state_dict(state)
    expected = plain(*inputs(plain))
    assert (network(*inputs(network)) - expected).abs().max() < 1e-5 * expected.abs().max()
    saved = network.state_dict()
    assert saved.keys() == state.keys() and max((saved[key] - state[key]).abs().max() for key in state) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_adds_in_fp32_and_rounds_once(dtype):
    layer = torch.nn.Linear(8, 8).to(dtype)
    made = [lora.Adapter(torch.randn(2, 8) * 0.01, torch.randn(8, 2) * 0.01, 2.0) for _ in range(3)]
    exact = layer.weight.float() + sum(x.up @ x.down for x in made)
    assert torch.equal(lora.merged(layer.weight, made), exact.to(dtype))


def test_dropout_is_for_training_alone():
    network = torch.nn.Sequential(torch.nn.Linear(64, 8))
    lora.attach(network, {"0": lora.Adapter(torch.randn(2, 64), torch.randn(8, 2), 2.0, dropout=0.5)})
    x = torch.randn(1, 64)
    assert torch.equal(network.eval()(x), network(x))
    assert not torch.equal(network.train()(x), network(x))
    network[0].adapters[0] = lora.Adapter(torch.randn(2, 64), torch.randn(8, 2), 2.0)  # which says nothing of it
    assert torch.equal(network.train()(x), network.eval()(x))


# ---- files


def test_both_files_draw_the_same_picture_live_and_saved(base, tmp_path):
    plain = pixels(minibooth.load(base))
    ways = []
    for path in (*lora_of(base, tmp_path / "lora"), tmp_path / "lora"):
        live = minibooth.load(base)
        live.load_lora(path, 0.8)
        ways.append(pixels(live))
    live.save(tmp_path / "saved")
    live.save(tmp_path / "saved.safetensors")
    ways.append(pixels(minibooth.load(tmp_path / "saved")))
    saved, file = (Source.open(tmp_path / name, tokenizer=base / "tokenizer") for name in ("saved", "saved.safetensors"))
    assert not {name: found for name, tensors in saved.weights.items() if (found := differing(file.weights[name], tensors))}
    assert np.abs(ways[0] - plain).max() > 20
    assert all(np.abs(way - ways[0]).max() <= 1 for way in ways)


def test_diffusers_draws_our_pictures_with_both_files(base, tmp_path):
    pytest.importorskip("peft")
    for path in lora_of(base, tmp_path, alphas=(3.0,)):  # it misreads kohya's where they differ (0.42)
        ours = minibooth.load(base)
        ours.load_lora(path)
        theirs = reference(base)
        plain = their_pixels(theirs)
        theirs.load_lora_weights(path.parent, weight_name=path.name)
        drawn = their_pixels(theirs)
        assert np.abs(drawn - plain).max() > 20
        assert np.abs(drawn - pixels(ours)).max() <= 2


def their_pixels(pipeline) -> np.ndarray:
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    options = dict(num_inference_steps=4, generator=torch.Generator().manual_seed(3), height=64, width=64, guidance_scale=7.5)
    return np.stack([np.asarray(image, np.int16) for image in pipeline([PROMPT], **options).images])


@pytest.mark.parametrize("rslora, said", [(False, True), (True, True), (True, False)], ids=["alpha", "rslora", "no metadata"])
def test_what_diffusers_saved_draws_its_pictures(base, rslora, said, tmp_path):
    """With peft's alpha, in a pattern too, if the file says it; otherwise alpha is the rank, as diffusers takes it."""
    peft = pytest.importorskip("peft")
    pipeline = reference(base)
    texts = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    layers, configs = {}, {}
    for name in ["unet", *texts]:
        targets = ["to_q", "to_k", "to_v", "to_out.0"] if name == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        pattern = {targets[0]: 2, r"attn1.to_out.0": 5}
        config = peft.LoraConfig(
            r=4, target_modules=targets, lora_alpha=6, alpha_pattern=pattern, use_rslora=rslora, init_lora_weights=False
        )
        network = getattr(pipeline, name)
        network.add_adapter(config)
        torch.manual_seed(len(name))
        for key, parameter in network.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.15)
        layers[name] = peft.get_peft_model_state_dict(network)
        configs[name] = {key: value for key, value in config.to_dict().items() if value is not None}
    options = {f"{name}_lora_layers": state for name, state in layers.items()}
    options |= {f"{name}_lora_adapter_metadata": config for name, config in configs.items() if said}
    type(pipeline).save_lora_weights(tmp_path, **options)

    theirs = reference(base)
    theirs.load_lora_weights(tmp_path)
    ours = minibooth.load(base)
    plain = pixels(ours)
    ours.load_lora(tmp_path)
    assert np.abs(pixels(ours) - plain).max() > 20
    assert np.abs(pixels(ours) - their_pixels(theirs)).max() <= 2


OLDER = {  # today's ends of diffusers' keys -> those of other years
    "lora.down (0.18)": {"lora_A": "lora.down", "lora_B": "lora.up"},
    "lora_linear_layer (0.20)": {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"},
    "processors (0.11)": {
        **{f"attn{i}.to_{x}{y}.lora_{a}": f"attn{i}.processor.to_{x}_lora.{b}" for i in (1, 2)
           for x, y in (("q", ""), ("k", ""), ("v", ""), ("out", ".0")) for a, b in (("A", "down"), ("B", "up"))},
        **{f"self_attn.{x}_proj.lora_{a}": f"self_attn.to_{x}_lora.{b}" for x in ("q", "k", "v", "out")
           for a, b in (("A", "down"), ("B", "up"))},
    },
    "no text_model (transformers 5)": {"text_encoder.text_model.": "text_encoder."},
    "no unet (0.11)": {"unet.": ""},
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_older_names_are_read(name, sd1, tmp_path):
    diffusers, _ = lora_of(sd1, tmp_path, "attention", texts=name != "no unet (0.11)")
    tensors, renamed = load_file(diffusers), {}
    for key, tensor in tensors.items():
        for new, old in OLDER[name].items():
            key = key.replace(new, old)
        renamed[key] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "old.safetensors")
    expected, found = (files.read(path, Source.open(sd1)) for path in (diffusers, tmp_path / "old.safetensors"))
    assert flat(found).keys() == flat(expected).keys()
    assert all(torch.equal(a, b) for key, pair in flat(found).items() for a, b in zip(pair, flat(expected)[key], strict=True))


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_a_1x1_convolution_may_be_a_linear_layer_elsewhere(model, request, tmp_path):
    """As kohya's program has SD 2's proj_in, which is linear here, and some others SD 1's, which is a convolution."""
    base = request.getfixturevalue(model)
    _, kohya = lora_of(base, tmp_path, "all", texts=False)
    tensors = load_file(kohya)
    turned = {
        key: x[..., None, None] if x.dim() == 2 else x.flatten(1) if x.shape[2:] == (1, 1) else x for key, x in tensors.items()
    }
    save_file(turned, tmp_path / "turned.safetensors")
    assert {x.dim() for x in turned.values()} == {0, 2, 4}
    expected, found = (flat(files.read(path, Source.open(base))) for path in (kohya, tmp_path / "turned.safetensors"))
    assert all(torch.equal(a, b) for key, pair in found.items() for a, b in zip(pair, expected[key], strict=True))
    assert found.keys() == expected.keys()


def flat(loras: files.Adapters) -> dict[str, tuple[torch.Tensor, ...]]:
    return {
        f"{part}.{layer}": (x.down, x.up, torch.tensor(x.scale)) for part, found in loras.items() for layer, x in found.items()
    }


def test_kohyas_own_names_for_xl_are_read(sdxl, tmp_path):
    """Those of the LDM layout, from a file as sd-scripts writes it."""
    generator = torch.Generator().manual_seed(0)
    widths = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 32, "mid_block.attentions.0.proj_in": 32}
    theirs = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_middle_block_1_proj_in"
    tensors = {}
    for name, width in zip(theirs, widths.values(), strict=True):
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    found = files.read(tmp_path / "kohya.safetensors", Source.open(sdxl))["unet"]
    assert {layer: x.down.shape[1] for layer, x in found.items()} == widths
    assert {x.scale for x in found.values()} == {0.5}


def test_a_missing_alpha_is_the_rank(sd1, tmp_path):
    _, kohya = lora_of(sd1, tmp_path)
    save_file({key: x for key, x in load_file(kohya).items() if not key.endswith(".alpha")}, kohya)
    assert {x.scale for x in files.read(kohya, Source.open(sd1))["unet"].values()} == {1.0}


# ---- mistakes


def test_a_lora_for_another_base_names_the_first_key_that_does_not_fit(sd1, sd2, sdxl, tmp_path, mistake):
    for path in lora_of(sd2, tmp_path / "sd2", "attention", texts=False):
        line = mistake(generate, "--model", sd1, "--prompt", "x", "--lora", path, "--output_dir", tmp_path / "out")
        assert str(path) in line and "attn2" in line.replace(".", "_") and "needs [rank, 24]" in line
    for path in lora_of(sdxl, tmp_path / "sdxl"):
        with pytest.raises(UserError, match=r"LoRA for another base.*(lora|te2|text_encoder_2|transformer_blocks)"):
            minibooth.load(sd1).load_lora(path)


def rewritten(change):
    """A spoiler that rewrites the file's tensors."""
    return lambda path: save_file(change(load_file(path)), path)


def saying(text):
    """A spoiler that leaves alpha to the metadata, which say this."""

    def spoil(path):
        tensors = {key: x for key, x in load_file(path).items() if not key.endswith(".alpha")}
        save_file(tensors, path, {"lora_adapter_metadata": text})

    return spoil


def cut(key, tensor):
    """The tensor at rank 0."""
    return tensor[:0] if "lora_down" in key else tensor[:, :0] if "lora_up" in key else tensor


UP = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
SPOILED = {
    "damaged": (lambda path: path.write_bytes(b"\x00" * 99), "not a whole safetensors file"),
    "missing": (lambda path: path.unlink(), "missing"),
    "empty": (rewritten(lambda tensors: {}), "is empty"),
    "one half": (rewritten(lambda tensors: {k: x for k, x in tensors.items() if "lora_up" not in k}), "lacks its down or up"),
    "DoRA": (rewritten(lambda tensors: tensors | {"lora_unet_x.dora_scale": torch.ones(1)}), "lora_unet_x.dora_scale"),
    "LoHa": (rewritten(lambda tensors: {"lora_unet_x.hada_w1_a": torch.ones(1)}), "lora_unet_x.hada_w1_a"),
    "unknown": (rewritten(lambda tensors: tensors | {"lora_unet_x.alpha": torch.ones(())}), "no layer here has lora_unet_x."),
    "one dimension": (rewritten(lambda tensors: tensors | {UP: torch.ones(16)}), "is [16], but"),
    "no dimension": (rewritten(lambda tensors: tensors | {UP: torch.ones(())}), "is [], but"),
    "another rank": (rewritten(lambda tensors: tensors | {UP: torch.ones(16, 9)}), "no common rank"),
    "many alphas": (rewritten(lambda tensors: tensors | {UP.replace("lora_up.weight", "alpha"): torch.ones(2)}), "is [2], but"),
    "no number": (rewritten(lambda x: x | {UP.replace("lora_up.weight", "alpha"): torch.tensor(math.nan)}), "is nan"),
    "rank 0": (rewritten(lambda tensors: {k: cut(k, x) for k, x in tensors.items()}), "no common rank"),
    "whole numbers": (rewritten(lambda tensors: {k: x.to(torch.int32) for k, x in tensors.items()}), "RuntimeError"),
    "metadata": (saying("{"), "JSONDecodeError"),
    "a pattern that is none": (saying('{"unet.alpha_pattern": 3}'), "'int' object has no attribute 'items'"),
    "a pattern that is wrong": (saying('{"unet.alpha_pattern": {"(": 1}}'), "unterminated subpattern"),
    "a pattern for ever": (saying('{"unet.alpha_pattern": {"([a-z_0-9.]+)+!": 1}}'), "might be looked for without end"),
    "alpha in words": (saying('{"unet.lora_alpha": "x", "text_encoder.lora_alpha": "x"}'), "could not convert string to float"),
    "no alpha": (saying('{"unet.lora_alpha": null, "text_encoder.lora_alpha": null}'), "TypeError: float()"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_no_lora_is_refused_in_one_line(name, sd1, tmp_path, mistake):
    spoil, said = SPOILED[name]
    _, kohya = lora_of(sd1, tmp_path)
    spoil(kohya)
    words = ["--model", sd1, "--prompt", "x", "--lora", kohya, "--output_dir", tmp_path / "out"]
    line = mistake(generate, *words)
    assert said in line and str(kohya) in line
    assert said in mistake(convert, sd1, tmp_path / "merged", "--lora", kohya)


def test_two_in_one_file_are_refused(sd1, tmp_path):
    both = [load_file(path) for path in lora_of(sd1, tmp_path, texts=False)]
    save_file(both[0] | both[1], tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"both.safetensors holds two LoRAs of unet\..*: take them apart"):
        minibooth.load(sd1).load_lora(tmp_path / "both.safetensors")


def test_a_pickle_and_a_folder_without_a_lora_are_refused(sd1, tmp_path):
    (tmp_path / "lora.pt").write_bytes(b"")
    with pytest.raises(UserError, match="lora.pt is a pickle"):
        minibooth.load(sd1).load_lora(tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"pytorch_lora_weights.safetensors is missing"):
        minibooth.load(sd1).load_lora(tmp_path)


def test_the_only_file_of_a_folder_is_its_lora(sd1, tmp_path):
    diffusers, kohya = lora_of(sd1, tmp_path)
    expected, source = files.read(kohya, Source.open(sd1)), Source.open(sd1)
    diffusers.rename(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="pytorch_lora_weights.safetensors is missing.*or no other"):  # which of the two?
        files.read(tmp_path, source)
    (tmp_path / "other.safetensors").unlink()
    (tmp_path / "notes.txt").write_text("of one file")
    assert flat(files.read(tmp_path, source)).keys() == flat(expected).keys()


def test_strengths_fit_the_loras(sd1, tmp_path, mistake):
    words = ["--model", sd1, "--prompt", "x", "--lora", "a", "b", "--lora_weight", "1", "2", "3"]
    assert "3 strengths for 2 LoRAs" in mistake(generate, *words)
    assert "1 strengths for 0 LoRAs" in mistake(generate, *words[:4], "--lora_weight", "1")


# ---- commands


def test_the_commands_take_several_with_strengths(sd1, tmp_path, capsys):
    """generate draws with them, convert merges them; the picture says which."""
    one, other = lora_of(sd1, tmp_path / "one")[1], lora_of(sd1, tmp_path / "other", "attention", alphas=(1.0,))[0].parent
    words = ["--lora", one, other, "--lora_weight", 0.5, -0.25]
    draw = ["--prompt", PROMPT, "--seed", 3, "--steps", 2, "--output_dir"]
    generate.main([*map(str, ["--model", sd1, *words, *draw, tmp_path / "live"])])
    for target in ("merged", "merged.safetensors"):
        convert.main([*map(str, [sd1, tmp_path / target, *words])])
    merged, file = (Source.open(tmp_path / name, tokenizer=sd1 / "tokenizer") for name in ("merged", "merged.safetensors"))
    assert not {name: found for name, tensors in merged.weights.items() if (found := differing(file.weights[name], tensors))}
    generate.main([*map(str, ["--model", tmp_path / "merged", *draw, tmp_path / "of-merged"])])
    plain = ["--model", sd1, *draw, tmp_path / "plain"]
    generate.main([*map(str, plain)])
    live, folder, without = (picture(tmp_path / name / "0000.png") for name in ("live", "of-merged", "plain"))
    assert np.abs(live[0] - without[0]).max() > 5
    assert np.abs(live[0] - folder[0]).max() <= 1
    assert live[1]["lora"] == f"{one} 0.5, {other} -0.25" and "lora" not in without[1]
    assert "<lora:kohya:0.5> <lora:other:-0.25>" in live[1]["parameters"]
    assert live[1]["parameters"].startswith(f"{PROMPT} <lora:kohya:0.5> <lora:other:-0.25>\n")


def picture(path: Path) -> tuple[np.ndarray, dict]:
    with Image.open(path) as image:
        return np.asarray(image, np.int16), dict(image.text)


# ---- training


def lora_files(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name}/{key}": x for path in folder.glob("*.safetensors") for key, x in load_file(path).items()}


RUNS = {
    "attention": {},
    "all": {"lora_targets": "all", "lora_alpha": 1.7, "train_text_encoder": True},
    "dropout": {"lora_dropout": 0.3, "train_text_encoder": True, "gradient_accumulation_steps": 2, "train_batch_size": 1},
    "dropout, recomputing": {"lora_dropout": 0.3, "gradient_checkpointing": True},
    "watched": {"lora_dropout": 0.3, "validation_prompt": "a sks dog", "validation_steps": 1, "num_validation_images": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_in_the_bits_of_one_never_stopped(name, dtype, tmp_path):
    changes = dict(rank=3, checkpointing_steps=2) | RUNS[name]
    settings, state = small(tmp_path, **changes), torch.get_rng_state()
    whole = train(settings, dtype)
    assert torch.equal(torch.get_rng_state(), state)
    stopped = tmp_path / "stopped" / "output"  # kohya's file is called like its folder
    for kept in ("checkpoint-2", "run.json", "metrics.jsonl"):
        stopped.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if kept == "checkpoint-2" else shutil.copy)(whole / kept, stopped / kept)
    torch.randn(7)
    changes |= {"output_dir": str(stopped), "resume_from_checkpoint": "latest", "seed": None}
    assert not differing(lora_files(train(small(tmp_path, **changes), dtype)), lora_files(whole))
    assert metrics(stopped) == metrics(whole) and len(metrics(whole)) == 5
    assert not differing(lora_files(stopped / "checkpoint-4"), lora_files(whole / "checkpoint-4"))


def test_dropout_makes_a_difference_and_recomputing_none(tmp_path):
    def of(name, **changes):
        return lora_files(train(small(tmp_path, rank=2, output_dir=str(tmp_path / name / "output"), **changes)))

    plain, dropped = of("plain"), of("dropped", lora_dropout=0.3)
    again = of("again", lora_dropout=0.3, gradient_checkpointing=True)
    assert differing(plain, dropped)
    assert max((dropped[key] - again[key]).abs().max() for key in dropped) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_stays_frozen_in_the_working_precision(dtype, tmp_path):
    job = trainer(small(tmp_path, rank=2, train_text_encoder=True, max_train_steps=2), dtype)
    job.train()
    pipe = minibooth.load(tiny(), dtype)
    for name in ("unet", "text_encoder"):
        parameters = dict(job.trained[name].named_parameters())
        own = {key: p for key, p in parameters.items() if ".adapters." in key}
        assert not differing(
            {key: p for key, p in parameters.items() if key not in own}, dict(getattr(pipe, name).named_parameters())
        )
        assert {p.dtype for p in own.values()} == {torch.float32}
        assert any(p.abs().max() > 0 for key, p in own.items() if key.endswith(".up")) or dtype == torch.float16
    assert {id(p) for group in job.optimizer.param_groups for p in group["params"]} == {
        id(p) for module in job.trained.values() for p in module.parameters() if p.requires_grad
    }


@pytest.mark.parametrize("alpha, shown", [(2.0, "2.0"), (None, "4")])
def test_what_training_leaves(alpha, shown, tmp_path, capsys):
    settings = small(tmp_path, rank=4, lora_alpha=alpha, checkpointing_steps=5, **with_class(tmp_path))
    assert run(flags(settings)) == 0
    output = Path(settings.output_dir)
    assert {path.name for path in output.iterdir()} == {
        "pytorch_lora_weights.safetensors", "output.safetensors", "checkpoint-5", "metrics.jsonl", "run.json", "report.html",
    }  # fmt: skip
    kept = {"pytorch_lora_weights.safetensors", "kohya.safetensors", "optimizer.safetensors", "state.json"}
    assert {path.name for path in (output / "checkpoint-5").iterdir()} == kept
    moments = load_file(output / "checkpoint-5" / "optimizer.safetensors")
    assert moments and all(".adapters.0." in key for key in moments)
    said = metadata(output / "output.safetensors")
    alphas = {x.item() for key, x in load_file(output / "output.safetensors").items() if key.endswith(".alpha")}
    assert alphas == {alpha or 4.0}
    expected = dict(ss_network_dim="4", ss_network_alpha=shown, ss_base_model_version="sd_v1", ss_v2="False")
    assert {key: said[key] for key in expected} == expected
    assert json.loads(said["ss_tag_frequency"]) == {"subject": {PROMPT: 1}, "class": {"a photo of dog": 1}}
    told = capsys.readouterr().out
    updates = load_file(output / "pytorch_lora_weights.safetensors")
    assert f"unet, {sum(x.numel() for x in updates.values()) / 1e6:.1f} M" in told
    assert f"--model {tiny()} --lora {output}" in told
    plain, pipe = pixels(minibooth.load(tiny())), minibooth.load(tiny())
    pipe.load_lora(output)
    assert not np.array_equal(pixels(pipe), plain)


@pytest.mark.parametrize(
    "name, version, v2, texts",
    [("sd2", "sd_v2_v", "True", {"lora_te"}), ("sdxl", "sdxl_base_v1-0", "False", {"lora_te1", "lora_te2"})],
)
def test_other_models_train_too(name, version, v2, texts, request, tmp_path):
    model = request.getfixturevalue(name)
    output = train(small(tmp_path, model, rank=2, train_text_encoder=True, max_train_steps=2))
    found = files.read(output, Source.open(model))
    assert found.keys() == {"unet", "text_encoder"} | ({"text_encoder_2"} if name == "sdxl" else set())
    moved = {layer for layer, x in found["unet"].items() if x.up.abs().max() > 0}
    still = {"to_q", "to_k"}  # a softmax over the one place of the lowest level does not feel them
    assert all(layer.split(".")[-1] in still for layer in found["unet"].keys() - moved) and len(moved) > len(found["unet"]) / 2
    kohya = output / "output.safetensors"
    names = load_file(kohya).keys()
    assert {"_".join(key.split("_")[:2]) for key in names} == {"lora_unet"} | texts
    layout = "down_blocks|mid_block|up_blocks" if name == "sd2" else "input_blocks|middle_block|output_blocks"  # the LDM one
    assert all(re.match(f"lora_te|lora_unet_({layout})_", key) for key in names)
    said = metadata(kohya)
    assert (said["ss_base_model_version"], said["ss_v2"]) == (version, v2)


def test_the_loss_goes_down(tmp_path):
    changes = dict(crops_per_image=1, rank=8, lora_targets="all", learning_rate=1e-2)
    lines = metrics(train(small(tmp_path, max_train_steps=60, **changes)))
    assert sum(line["loss"] for line in lines[-20:]) < 0.8 * sum(line["loss"] for line in lines[:20])


@pytest.mark.parametrize(
    "change", [{"rank": 3}, {"lora_targets": "all"}, {"rank": 0}, {"train_text_encoder": True}, {"lora_alpha": 1.0}]
)
def test_a_checkpoint_goes_on_only_as_what_it_is(change, tmp_path):
    settings = small(tmp_path, rank=2, checkpointing_steps=2, max_train_steps=2)
    train(settings)
    settings = small(tmp_path, **{"rank": 2, "max_train_steps": 4, "resume_from_checkpoint": "latest"} | change)
    with pytest.raises(UserError, match=f"checkpoint-2 was trained with.* --{[*change][0]}"):
        trainer(settings)

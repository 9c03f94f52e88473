"""A published folder becomes a pipeline however its files are laid out, and that folder again when saved."""

import copy
import json
import logging
import re
import shutil
import warnings

import pytest
import torch
from comparing import differing, weights
from conftest import END, content, edit_json, refusal, write_json
from safetensors.torch import load_file, save_file
from single_files import states
from small_run import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models

import minibooth
from minibooth.checkpoint import files
from minibooth.errors import UserError

NETWORKS = ("text_encoder", "unet", "vae")
STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def file_of(folder, name, infix=""):
    """A component's file."""
    return folder / name / f"{STEMS[name]}{infix}.safetensors"


def rewrite(folder, change, names=NETWORKS, infix=""):
    """Each component's file, with change(tensors) in it, under a name with `infix`."""
    for name in names:
        tensors = change(load_file(file_of(folder, name)))
        file_of(folder, name).unlink()
        save_file(tensors, file_of(folder, name, infix), metadata={"format": "pt"})
    return folder


def shard(folder):
    """Each component's file as three, with an index."""
    for name in NETWORKS:
        tensors, names = load_file(file_of(folder, name)), {}
        for i in range(3):
            part = {key: tensors[key] for key in sorted(tensors)[i::3]}
            file = file_of(folder, name, f"-{i + 1:05d}-of-00003")
            save_file(part, file)
            names |= dict.fromkeys(part, file.name)
        write_json(folder / name / f"{STEMS[name]}.safetensors.index.json", {"weight_map": names})
        file_of(folder, name).unlink()
    return folder


# ---- what a folder may look like


def test_every_tensor_of_the_files_is_in_the_networks_under_its_name(checkpoint):
    pipe = minibooth.load(checkpoint)
    for name in NETWORKS:
        assert not differing(dict(getattr(pipe, name).state_dict()), load_file(file_of(checkpoint, name)))
        assert not getattr(pipe, name).training


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_any_precision_give_networks_of_any(sd1, copy_of, stored, wanted):
    folder = rewrite(copy_of(sd1), lambda tensors: {key: x.to(stored) for key, x in tensors.items()})
    expected = {key: x.to(stored).to(wanted) for key, x in states(minibooth.load(sd1)).items()}
    assert not differing(states(minibooth.load(folder, dtype=wanted)), expected)


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def old_attention(tensors):
    """The VAE's names of 2022."""
    for new, old in OLD_NAMES.items():
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    return tensors


def position_ids(tensors):
    return tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def no_prefix(tensors):
    return {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}


LAYOUTS = {
    "shards": shard,
    "old attention": lambda folder: rewrite(folder, old_attention, ["vae"]),
    "position_ids": lambda folder: rewrite(folder, position_ids, ["text_encoder"]),
    "no prefix": lambda folder: rewrite(folder, no_prefix, ["text_encoder"]),
    "neither": lambda folder: rewrite(folder, lambda x: no_prefix(position_ids(x)), ["text_encoder"]),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_whatever_the_layout_the_networks_are_the_same(sd1, copy_of, change):
    folder = change(copy_of(sd1))
    assert content(folder) != content(sd1)
    assert not differing(states(minibooth.load(folder)), states(minibooth.load(sd1)))


def test_a_copy_of_a_pipeline_is_independent_and_can_be_saved(sd1, tmp_path):
    pipe = minibooth.load(sd1)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        other.unet.conv_in.weight.add_(1)
    assert not torch.equal(pipe.unet.conv_in.weight, other.unet.conv_in.weight)
    other.release("vae")
    other.save(tmp_path / "copy")
    again = minibooth.load(tmp_path / "copy")
    assert torch.equal(again.unet.conv_in.weight, other.unet.conv_in.weight)
    assert torch.equal(again.vae.quant_conv.weight, pipe.vae.quant_conv.weight)


def test_a_variant_is_read_where_it_is_asked_for(sd1, copy_of):
    def half(tensors):
        return {key: x.half() for key, x in tensors.items()}

    folder = rewrite(copy_of(sd1), half, infix=".fp16")
    expected = {key: x.half().float() for key, x in states(minibooth.load(sd1)).items()}
    assert not differing(states(minibooth.load(folder, variant="fp16")), expected)
    assert "fp16: see --variant" in refusal(folder)


def test_what_lacks_a_variant_that_others_have_is_read_as_it_is(sd1, copy_of):
    """As diffusers does; of Stable Diffusion 1.5 the UNet alone is there as non_ema."""
    folder = copy_of(sd1)
    shutil.copy(file_of(folder, "unet"), file_of(folder, "unet", ".ema"))
    rewrite(folder, lambda tensors: {key: x + 1 for key, x in tensors.items()}, ["unet"], infix=".non_ema")
    expected = {key: x + key.startswith("unet/") for key, x in states(minibooth.load(sd1)).items()}
    assert not differing(states(minibooth.load(folder, variant="non_ema")), expected)
    assert "the variants there are ema, non_ema" in refusal(folder)
    assert "the variants there are without a name" in refusal(sd1, variant="non_ema")


def test_what_diffusers_ema_notes_of_itself_says_nothing_of_the_network(sd1, copy_of):
    folder = copy_of(sd1)
    counters = dict(decay=0.9999, min_decay=0.0, optimization_step=100, update_after_step=5)
    edit_json(folder / "unet" / "config.json", inv_gamma=1.0, power=0.75, use_ema_warmup=True, **counters)
    assert not differing(states(minibooth.load(folder)), states(minibooth.load(sd1)))


def test_a_text_encoder_may_keep_what_only_training_needs(sd1, copy_of):
    file = copy_of(sd1) / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"logit_scale": torch.tensor(4.6)}, file)
    assert not differing(states(minibooth.load(file.parents[1])), states(minibooth.load(sd1)))


SIZES = [("0.6.0", 32, 64), ("0.8.1", 32, 64), ("0.6.0", 96, 96), ("0.6.0", [32, 32], 32), ("0.9.0", 32, 32), (None, 32, 32)]


@pytest.mark.parametrize("version, size, meant", SIZES)
def test_the_first_versions_of_diffusers_wrote_a_wrong_size(sd1, copy_of, version, size, meant):
    """As diffusers' own pipeline reads it (StableDiffusionPipeline.__init__)."""
    folder = copy_of(sd1)
    edit_json(folder / "unet" / "config.json", sample_size=size, _diffusers_version=version)
    assert minibooth.load(folder).latent_size(None, None) == (meant, meant)


def test_a_tokenizer_of_one_file_gives_the_same_ids(checkpoint, copy_of):
    folder = copy_of(checkpoint)
    made = Backend(models.BPE.from_file(*(str(folder / "tokenizer" / name) for name in ("vocab.json", "merges.txt"))))
    made.save(str(folder / "tokenizer" / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    prompts = ["a photo of sks dog", "", "a cat! " * 60]
    assert torch.equal(minibooth.load(folder).tokenizer(prompts), minibooth.load(checkpoint).tokenizer(prompts))


def test_the_prediction_type_can_be_overruled(sd1, sd2):
    assert minibooth.load(sd1).scheduler.prediction_type == "epsilon"
    assert minibooth.load(sd2).scheduler.prediction_type == "v_prediction"
    overruled = minibooth.load(sd1, prediction_type="v_prediction").scheduler
    assert overruled.prediction_type == "v_prediction"
    assert overruled.config == minibooth.load(sd1).scheduler.config | {"prediction_type": "v_prediction"}


# ---- what is refused


def a_pickle(folder):
    file_of(folder, "unet").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def truncated(folder):
    data = file_of(folder, "vae").read_bytes()
    file_of(folder, "vae").write_bytes(data[: len(data) // 2])


def a_missing_shard(folder):
    file_of(shard(folder), "unet", "-00002-of-00003").unlink()


def without(name):
    return lambda folder: (folder / name).unlink()


def saying(path, **changes):
    return lambda folder: edit_json(folder / path, **changes)


def a_lora(folder):
    without("model_index.json")(folder)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")


def nine_channels(folder):
    edit_json(folder / "unet" / "config.json", in_channels=9)
    rewrite(folder, lambda x: x | {"conv_in.weight": torch.zeros(16, 9, 3, 3)}, ["unet"])


def with_more(name, change):
    return lambda folder: rewrite(folder, lambda tensors: tensors | change(tensors), [name])


CONV = "down_blocks.0.resnets.0.conv1.weight"
BROKEN = {
    "stable diffusion 3": (
        saying("model_index.json", _class_name="StableDiffusion3Pipeline"),
        "StableDiffusion3Pipeline",
    ),
    "inpainting": (saying("model_index.json", _class_name="StableDiffusionInpaintPipeline"), "InpaintPipeline"),
    "inpainting unet": (nine_channels, "inpainting"),
    "lora": (a_lora, "LoRA"),
    "pickle": (a_pickle, "only a pickle .diffusion_pytorch_model.bin"),
    "truncated": (truncated, "vae/diffusion_pytorch_model.safetensors is not a whole"),
    "missing shard": (a_missing_shard, "00002-of-00003.safetensors is missing"),
    "missing config": (without("unet/config.json"), "unet/config.json is missing"),
    "missing scheduler": (without("scheduler/scheduler_config.json"), "scheduler/scheduler_config.json is missing"),
    "missing weights": (
        without("vae/diffusion_pytorch_model.safetensors"),
        "diffusion_pytorch_model.safetensors is missing",
    ),
    "missing vocabulary": (without("tokenizer/vocab.json"), "vocab.json"),
    "no class": (saying("model_index.json", _class_name=None), "unknown kind"),
    "activation": (saying("text_encoder/config.json", hidden_act="swish"), "hidden_act='swish'"),
    "wider": (saying("unet/config.json", cross_attention_dim=28), "unet's .*attn2.to_k.weight"),
    "deeper": (saying("vae/config.json", layers_per_block=3), "vae lacks"),
    "shallower": (saying("text_encoder/config.json", num_hidden_layers=1), "text_encoder has unexpected"),
    "levels": (saying("unet/config.json", block_out_channels=[16, 16, 32]), "unet/config.json"),
    "groups": (saying("unet/config.json", norm_num_groups=7), "unet/config.json"),
    "text": (saying("unet/config.json", layers_per_block="two"), "unet/config.json"),
    "prediction": (saying("scheduler/scheduler_config.json", prediction_type="sample"), "prediction_type='sample'"),
    "old prediction": (saying("scheduler/scheduler_config.json", predict_epsilon=False), "predict_epsilon=False"),
    "quantised": (with_more("unet", lambda x: {CONV: (9 * x[CONV]).to(torch.int8)}), f"unet's {CONV} is torch.int8, quantised"),
    "twice": (
        with_more("text_encoder", lambda x: {"embeddings.token_embedding.weight": 2 * next(iter(x.values()))}),
        "text_encoder: text_model.embeddings.token_embedding.weight is there twice, also as .*: remove the wrong one",
    ),
    "link to nowhere": (
        lambda folder: (file_of(folder, "unet").unlink(), file_of(folder, "unet").symlink_to("gone")),
        "safetensors is missing$",
    ),
    "times": (saying("scheduler/scheduler_config.json", timestep_type="continuous"), "timestep_type='continuous'"),
}


@pytest.mark.parametrize("change, reason", BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_refused_by_name(sd1, copy_of, change, reason):
    folder = copy_of(sd1)
    change(folder)
    assert re.search(reason, refusal(folder))


def test_a_text_encoder_of_another_model_is_refused(sd1, sd2, sdxl, copy_of):
    folder = copy_of(sd1)
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(sd2 / "text_encoder", folder / "text_encoder")
    assert "attends to states of 24 numbers, its text encoders give [32]" in refusal(folder)
    xl = copy_of(sdxl, "xl")
    for sizes in (None, 3, 10**7):
        edit_json(xl / "unet" / "config.json", addition_time_embed_dim=sizes)
        assert re.search(r"text_encoder_2 and sizes give \d+ \+ \d+ numbers, the UNet takes \d+", refusal(xl))


ODD = (None, "x", -1, [1], {}, True, float("inf"))  # Infinity is JSON to Python
MALFORMED = {  # of a folder's small files, keys and what they might say
    "model_index.json": {"_class_name": ([1], 7)},
    "unet/config.json": {
        "sample_size": (None, "x", [1], [1, 2, 3], -8, 1.5), "norm_num_groups": (*ODD, 0, 3), "norm_eps": (*ODD, 0),
        "attention_head_dim": (0, -1, 3, "x"), "block_out_channels": ([], [-16] * 2, 16), "in_channels": (0, -4, 10**30),
        "layers_per_block": (0, "x"), "cross_attention_dim": (None, -24), "down_block_types": (1, ["x"] * 2, [[]] * 2),
        "num_class_embeds": ("x", -1), "addition_embed_type": (1, [1]), "use_linear_projection": (1, True),
    },
    "vae/config.json": {"scaling_factor": (*ODD, 0), "block_out_channels": ([], 8), "latent_channels": (0, -4, None)},
    "text_encoder/config.json": {
        "num_attention_heads": (*ODD, 0, 5, 4.0), "hidden_act": (1, [1], {}), "layer_norm_eps": (None, "x", 0),
        "hidden_size": (0, -24), "num_hidden_layers": (None, -1, 2.5), "vocab_size": (0, "x"), "architectures": (1, [1]),
    },
    "scheduler/scheduler_config.json": {
        "_class_name": (None, 1, [1]), "beta_schedule": ([1], {}), "beta_start": ("x", [1], -0.1, 0, 1.5),
        "beta_end": ("x", -0.1, 1.5), "num_train_timesteps": ("x", 0, -1, 1.5),
        "trained_betas": ("x", 1, [1], ["x"], {}, [*[0.001] * 999, 1.5]),
    },
    "tokenizer/tokenizer_config.json": {
        "model_max_length": (None, "x", 2.5, 77.0, [1], 0, 1, -5, 78), "bos_token": (5, [1], {"a": 1}, "none"),
        "added_tokens_decoder": (5, [1], {"1": 2}, {"1": {"content": 2}}, {"1": {"content": "new"}}), "pad_token": (5, [1]),
    },
    "tokenizer/special_tokens_map.json": {"unk_token": (5, [1], {"content": 5}), "eos_token": (5, "none")},
    "tokenizer/vocab.json": {END: ([1], "x", 10**6, -1, 1.5, None), "a": ([1], "x", 10**6)},
}  # fmt: skip
NOT_JSON = ("", "{", "[]", "null", "[" * 10**5, b"\xff\xfe\x00")
WHOLE = {path: NOT_JSON for path in MALFORMED} | {
    "tokenizer/merges.txt": ("a", "a b c", "sk s</w>\nx yz", b"\xff\xfe\x00\x01", "  "),
    "tokenizer/tokenizer.json": (
        "[1]",
        '{"model": {}}',
        '{"model": 3}',
        '{"model": {"vocab": [], "merges": {}}}',
        *NOT_JSON[:2],
    ),
}


@pytest.mark.parametrize("path, key", [(path, key) for path, keys in MALFORMED.items() for key in keys])
def test_whatever_a_setting_says_it_is_a_users_mistake(copy_of, path, key):
    folder = copy_of(tiny())
    if not (folder / path).exists():
        write_json(folder / path, {})
    for value in MALFORMED[path][key]:
        edit_json(folder / path, **{key: value})
        said = refusal(folder)
        assert str(folder) in said and ("/" not in path or path.split("/")[0] in said), value


@pytest.mark.parametrize("path", WHOLE)
def test_whatever_a_small_file_holds_it_is_a_users_mistake(copy_of, path):
    folder = copy_of(tiny())
    for held in WHOLE[path]:
        (folder / path).write_bytes(held if isinstance(held, bytes) else held.encode())
        assert str(folder / path.partition("/")[0]) in refusal(folder), held


@pytest.mark.parametrize("level", [None, "x", [1], -1, 1000, 1.5])
def test_a_noise_level_that_the_unet_does_not_know_is_refused(x4, copy_of, level):
    folder = copy_of(x4)
    edit_json(folder / "model_index.json", max_noise_level=level)
    assert "max_noise_level" in refusal(folder)
    edit_json(folder / "model_index.json", max_noise_level=350)
    edit_json(folder / "low_res_scheduler" / "scheduler_config.json", beta_end="x")
    assert "low_res_scheduler/scheduler_config.json" in refusal(folder)


def test_null_says_what_leaving_out_a_setting_says_where_that_is_nothing(sd1, copy_of):
    folder = copy_of(sd1)
    silent = ("upcast_attention", "addition_time_embed_dim", "projection_class_embeddings_input_dim", "num_class_embeds")
    edit_json(folder / "unet" / "config.json", **dict.fromkeys(silent))  # as today's diffusers writes them
    assert minibooth.load(folder).unet.config == minibooth.load(sd1).unet.config


def test_a_schedule_may_say_what_goes_without_saying(sd1, copy_of):
    folder = copy_of(sd1)
    edit_json(folder / "scheduler" / "scheduler_config.json", predict_epsilon=True, tensor_format="pt", interpolation_type=None)
    assert torch.equal(minibooth.load(folder).scheduler.alphas_cumprod, minibooth.load(sd1).scheduler.alphas_cumprod)


def test_a_vocabulary_of_another_model_is_refused(sd1, copy_of):
    folder = copy_of(sd1)
    tokens = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    write_json(folder / "tokenizer" / "vocab.json", tokens | {"more": len(tokens)})
    assert re.search("copy/tokenizer: .*text encoder's; .*--tokenizer", refusal(folder))
    minibooth.load(folder, tokenizer=sd1)


def test_what_is_no_checkpoint_is_refused_by_name(sd1, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("model.ckpt", "model.zip"):
        (tmp_path / name).write_bytes(b"")
    assert "has no model_index.json, but nothing" in refusal(tmp_path / "empty")
    write_json(tmp_path / "checkpoint-2" / "state.json", {})
    assert "a run's checkpoint; to draw with it, give it to" in refusal(tmp_path / "checkpoint-2")
    assert "has no model_index.json, but config.json" in refusal(sd1 / "unet")
    assert "pickle, which is never opened" in refusal(tmp_path / "model.ckpt")
    assert "is a file of unknown kind" in refusal(tmp_path / "model.zip")
    assert "is a file of another kind" in refusal(file_of(sd1, "unet"))
    for name in ("never", "never.safetensors"):
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name} is missing: name a folder, a .safetensors file, or ")


def test_an_empty_name_is_no_model(tmp_path, monkeypatch):
    """As where a script's variable is not set: it would be this folder."""
    monkeypatch.chdir(tmp_path)
    assert "the model's name is empty" in refusal("")


# ---- saving


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "x4"])
def test_what_was_not_trained_comes_back_bit_for_bit(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    minibooth.load(folder).save(tmp_path / "saved")
    before, after = content(folder), content(tmp_path / "saved")
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} <= {name for name in before if "safetensors" in name}
    assert not differing(weights(tmp_path / "saved"), weights(folder))


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_whatever_the_layout_was_the_published_one_is_written(sd1, copy_of, tmp_path, change):
    minibooth.load(change(copy_of(sd1))).save(tmp_path / "saved")
    assert content(tmp_path / "saved").keys() == content(sd1).keys()
    assert not differing(weights(tmp_path / "saved"), weights(sd1))


def test_half_precision_files_stay_so_and_take_what_was_trained(sd1, copy_of, tmp_path):
    folder = rewrite(copy_of(sd1), lambda tensors: {key: x.half() for key, x in tensors.items()}, infix=".fp16")
    pipe = minibooth.load(folder, variant="fp16")
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    pipe.save(tmp_path / "saved")
    expected = weights(folder)
    expected["unet/conv_out.bias"] = (expected["unet/conv_out.bias"].float() + 1).half()
    assert not differing(weights(tmp_path / "saved"), expected)


def test_released_networks_are_written_all_the_same(sd1, copy_of, tmp_path):
    folder = copy_of(sd1)
    pipe = minibooth.load(folder)
    pipe.vae = pipe.text_encoder = None
    shutil.rmtree(folder)  # the files were open
    pipe.save(tmp_path / "saved")
    assert not differing(states(minibooth.load(tmp_path / "saved")), states(minibooth.load(sd1)))


def test_saving_over_a_checkpoint_replaces_it_and_keeps_other_files(sd1, sd2, copy_of):
    folder = copy_of(sd2)
    (folder / "samples").mkdir()
    (folder / "samples" / "1.png").write_bytes(b"kept")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of the old one")
    minibooth.load(sd1).save(folder)
    assert content(folder).keys() == {*content(sd1), "samples/1.png"}
    assert not differing(states(minibooth.load(folder)), states(minibooth.load(sd1)))


def test_a_pipeline_can_be_saved_over_the_folder_it_was_read_from(sd1, copy_of):
    folder = copy_of(sd1)
    pipe = minibooth.load(folder)
    for _ in range(2):
        pipe.save(folder)
    assert not differing(states(pipe), states(minibooth.load(sd1)))
    assert not differing(states(minibooth.load(folder)), states(minibooth.load(sd1)))


@pytest.mark.parametrize("survives", range(3))
def test_a_crash_in_the_middle_leaves_the_old_folder_whole(sd1, sd2, copy_of, monkeypatch, survives):
    folder, written, write = copy_of(sd2), [], files.write_weights

    def fail(*arguments, **options):
        written.append(arguments)
        if len(written) > survives:
            raise KeyboardInterrupt
        write(*arguments, **options)

    monkeypatch.setattr(files, "write_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        minibooth.load(sd1).save(folder)
    assert content(folder) == content(sd2)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def with_safety_checker(folder):
    """As Stable Diffusion 1 was published, and with a part for pictures as prompts."""
    edit_json(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    write_json(folder / "image_encoder" / "config.json", {"architectures": ["CLIPVisionModelWithProjection"]})
    write_json(folder / "safety_checker" / "config.json", {"_class_name": "StableDiffusionSafetyChecker"})
    save_file({"a": torch.zeros(1)}, folder / "safety_checker" / "model.safetensors")
    write_json(folder / "feature_extractor" / "preprocessor_config.json", {"crop_size": 224, "size": 224})
    return folder


def test_what_a_run_left_beside_the_pipeline_is_not_written_with_it(sd1, copy_of, tmp_path):
    """A run's folder is a pipeline's, too; its checkpoints are not the next run's."""
    folder = copy_of(sd1)
    for name in ("checkpoint-4/state.json", "upscaler/run.json", "class/drawn-0/manifest.json"):
        write_json(folder / name, {})
    edit_json(folder / "model_index.json", upscaler=["a", "B"])  # a name there is no reason to take what is called so
    (folder / "tokenizer" / "folder.json").mkdir()
    minibooth.load(folder).save(tmp_path / "saved")
    assert content(tmp_path / "saved").keys() == content(sd1).keys()


def test_where_a_folder_has_a_files_name_a_folder_is_written(sd1, tmp_path):
    write_json(tmp_path / "dog.safetensors" / "mine.json", {})
    minibooth.load(sd1).save(tmp_path / "dog.safetensors")
    assert content(tmp_path / "dog.safetensors") == content(sd1) | {"mine.json": b"{}\n"}


def test_a_compiled_network_is_saved_as_what_it_is(sd1, copy_of):
    folder = copy_of(sd1)
    pipe = minibooth.load(folder)
    pipe.unet = torch.compile(pipe.unet)
    pipe.save(folder)
    assert content(folder) == content(sd1)
    del pipe.unet._orig_mod.conv_in.bias
    with pytest.raises(UserError, match="unet lacks conv_in.bias"):
        pipe.save(folder)
    assert content(folder) == content(sd1)


def test_the_safety_checker_is_left_behind(sd1, copy_of, tmp_path):
    minibooth.load(with_safety_checker(copy_of(sd1))).save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["safety_checker"] == index["image_encoder"] == [None, None]
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert content(tmp_path / "saved").keys() == {*content(sd1), "feature_extractor/preprocessor_config.json"}


@pytest.mark.parametrize("change", [lambda folder: folder, *LAYOUTS.values(), with_safety_checker])
def test_diffusers_opens_what_was_saved_without_a_complaint(checkpoint, copy_of, tmp_path, caplog, change):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pipeline = diffusers.StableDiffusionPipeline  # imported here and now: what it warns of then is none of our business
    pipe = minibooth.load(change(copy_of(checkpoint)))
    pipe.save(tmp_path / "saved")
    for library in (diffusers, transformers):
        library.utils.logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        opened = pipeline.from_pretrained(tmp_path / "saved")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    said += [text for text in caplog.messages if "missing" in text.lower() or "unexpected" in text.lower()]
    assert not [text for text in said if "torchvision" not in text]  # of which transformers complains once, on import
    for name in ("unet", "vae"):
        assert not differing(dict(getattr(opened, name).state_dict()), dict(getattr(pipe, name).state_dict()))
    theirs = {key: x for key, x in opened.text_encoder.state_dict().items() if "position_ids" not in key}
    ours = dict(pipe.text_encoder.state_dict())
    if not any(key.startswith("text_model.") for key in theirs):  # transformers 5 has done away with the prefix
        ours = {key.removeprefix("text_model."): x for key, x in ours.items()}
    assert not differing(theirs, ours)

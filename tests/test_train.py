"""The command takes diffusers' command lines, leaves what diffusers opens, and tells a mistake in one line."""

import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import difference, differing, normals, reference, weights
from safetensors.torch import load_file, save_file
from small_run import flags, launch, photographs, run, small, tiny

import minibooth
from minibooth import train
from minibooth.dreambooth import prior
from minibooth.dreambooth import trainer as trainer_module
from minibooth.dreambooth.parallel import Ranks
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError

pytestmark = pytest.mark.usefixtures("few_drawing_steps")


# ---- the flags

# train_dreambooth.py's flags: what each is without a word, a word to give it, and what it is then.
VALUES = {
    "pretrained_model_name_or_path": ("", "CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4"),
    "revision": (None, "fp16", "fp16"),
    "variant": (None, "fp16", "fp16"),
    "instance_data_dir": ("", "dog", "dog"),
    "instance_prompt": ("", "a photo of sks_dog-1", "a photo of sks_dog-1"),
    "class_data_dir": (None, "path_to-class", "path_to-class"),
    "class_prompt": ("", "a photo of dog", "a photo of dog"),
    "prior_loss_weight": (1.0, "0.5", 0.5),
    "num_class_images": (100, "200", 200),
    "sample_batch_size": (4, "1", 1),
    "prior_generation_precision": (None, "bf16", "bf16"),
    "resolution": (512, "768", 768),
    "output_dir": ("dreambooth-model", "path_to-save", "path_to-save"),
    "seed": (None, "0", 0),
    "train_batch_size": (4, "1", 1),
    "num_train_epochs": (1, "3", 3),
    "max_train_steps": (None, "800", 800),
    "gradient_accumulation_steps": (1, "2", 2),
    "learning_rate": (5e-6, "2e-6", 2e-6),
    "text_encoder_lr": (None, "1e-6", 1e-6),
    "lr_scheduler": ("constant", "cosine_with_restarts", "cosine_with_restarts"),
    "lr_warmup_steps": (500, "0", 0),
    "lr_num_cycles": (1, "2", 2),
    "lr_power": (1.0, "2", 2.0),
    "adam_beta1": (0.9, "0.8", 0.8),
    "adam_beta2": (0.999, "0.99", 0.99),
    "adam_weight_decay": (1e-2, "0", 0.0),
    "adam_epsilon": (1e-8, "1e-6", 1e-6),
    "max_grad_norm": (1.0, "0.5", 0.5),
    "mixed_precision": (None, "fp16", "fp16"),
    "checkpointing_steps": (500, "100", 100),
    "checkpoints_total_limit": (None, "2", 2),
    "resume_from_checkpoint": (None, "latest", "latest"),
    "validation_prompt": (None, "A photo of sks dog in a bucket", "A photo of sks dog in a bucket"),
    "num_validation_images": (4, "1", 1),
    "validation_steps": (100, "50", 50),
    "snr_gamma": (None, "5", 5.0),
    "hub_model_id": (None, "owner/my_model-1", "owner/my_model-1"),
    "hub_token": (None, "hf_x", "hf_x"),
    "image_interpolation_mode": ("lanczos", "bicubic", "bicubic"),
    "validation_scheduler": ("DPMSolverMultistepScheduler", "DDPMScheduler", "DDPMScheduler"),
    "tokenizer_max_length": (None, "77", 77),
    "class_labels_conditioning": (None, "timesteps", "timesteps"),
}
SWITCHES = (
    "with_prior_preservation", "center_crop", "random_flip", "train_text_encoder", "gradient_checkpointing", "scale_lr",
    "use_8bit_adam", "allow_tf32", "offset_noise", "push_to_hub", "pre_compute_text_embeddings",
    "enable_xformers_memory_efficient_attention", "set_grads_to_none", "skip_save_text_encoder",
    "text_encoder_use_attention_mask",
)  # fmt: skip
SILENT = {
    "validation_epochs": "10", "dataloader_num_workers": "2", "report_to": "wandb", "logging_dir": "elsewhere",
    "local_rank": "0", "validation_scheduler": "DDPMScheduler", "validation_images": "small.png",
    "tokenizer_max_length": "77", "class_labels_conditioning": "timesteps", "repeats": "2", "cache_dir": "hub",
    "pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix",
    **dict.fromkeys((
        "output_kohya_format", "pre_compute_text_embeddings", "enable_xformers_memory_efficient_attention", "set_grads_to_none",
        "skip_save_text_encoder", "text_encoder_use_attention_mask",
    )),
}  # fmt: skip


def test_flags_have_the_defaults_of_train_dreambooth():
    defaults = vars(Settings())
    expected = {name: default for name, (default, _, _) in VALUES.items()} | dict.fromkeys(SWITCHES, False)
    assert {name: defaults[name] for name in expected} == expected
    assert {name: type(defaults[name]) for name in expected} == {name: type(value) for name, value in expected.items()}


@pytest.mark.parametrize("spelled", [lambda name: name, lambda name: name.replace("_", "-")], ids=["_", "-"])
@pytest.mark.parametrize("joined", [True, False], ids=["=", "space"])
def test_flags_are_read_in_either_spelling(spelled, joined):
    words = [f"--{spelled(name)}" for name in SWITCHES]
    for name, (_, word, _) in VALUES.items():
        words += [f"--{spelled(name)}={word}"] if joined else [f"--{spelled(name)}", word]
    settings = vars(train.parse(words))
    expected = {name: value for name, (_, _, value) in VALUES.items()} | dict.fromkeys(SWITCHES, True)
    assert {name: settings[name] for name in expected} == expected


def test_a_flag_without_effect_prints_one_note(tmp_path, capsys):
    words = [f"--{name}" if word is None else f"--{name}={word}" for name, word in SILENT.items()]
    assert run([*flags(small(tmp_path, max_train_steps=1, resolution=40)), *words, "--rank=1"]) == 0
    notes = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["note"]]
    assert sorted(said for _, said, *_ in notes) == sorted(f"--{name}:" for name in SILENT)


NEEDED = {f.name: f.metadata["needs"] for f in dataclasses.fields(Settings) if "needs" in f.metadata}


@pytest.mark.parametrize("given, other", NEEDED.items())
def test_a_flag_that_lacks_another_prints_one_note(given, other):
    words = {"class_data_dir": "class", "prior_generation_precision": "fp32", "lora_targets": "all", "num_class_images": 9}
    settings = Settings(**{given: words.get(given, 0.5)})
    assert settings.notes() == [f"--{given}: without effect: add --{other}"]
    assert dataclasses.replace(settings, **{other: True}).notes() == []
    if other in ("with_prior_preservation", "train_text_encoder"):  # a second step does not repeat it
        assert train.second_step(dataclasses.replace(settings, upscaler="x4")).notes() == []


def test_a_class_prompt_alone_trains_no_class():
    """Though it shows what the identifier is, and a metrics model looks at pictures of it."""
    settings = Settings(class_prompt="a dog")
    assert settings.notes() == ["--class_prompt: no class pictures are trained on: add --with_prior_preservation"]
    with_class = dataclasses.replace(settings, with_prior_preservation=True, upscaler="x4")
    assert with_class.notes() == train.second_step(with_class).notes() == []  # in which no class is meant


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Settings) if "lora" in f.metadata])
def test_a_command_for_the_script_that_trains_loras_is_told_what_makes_one(name):
    settings = Settings(**{name: "x"})
    assert "all weights train; for a LoRA, as by train_dreambooth_lora.py, add --rank 4" in settings.notes()
    assert not any("all weights" in note for note in dataclasses.replace(settings, rank=4).notes())


def test_two_flags_of_another_spelling_or_number_are_read():
    settings = train.parse(["--tokenizer-name", "clip", "--validation_images", "a.png", "b.png"])
    assert (settings.tokenizer, settings.validation_images) == ("clip", ("a.png", "b.png"))


def test_what_is_said_of_the_first_model_and_its_result_is_not_said_of_the_second():
    first = Settings(
        pretrained_model_name_or_path="sd", upscaler="x4", variant="fp16", revision="r", prediction_type="epsilon",
        instance_prompt="a dog", validation_prompt="a dog | a wet dog", train_text_encoder=True, with_prior_preservation=True,
        metrics_model="clip", output_dir="out", push_to_hub=True, resume_from_checkpoint="checkpoint-5",
    )  # fmt: skip
    second = Settings(
        pretrained_model_name_or_path="x4", stage="super_resolution", instance_prompt="a dog", validation_prompt="a dog",
        output_dir=str(Path("out") / "upscaler"), resume_from_checkpoint="latest",
    )  # fmt: skip
    assert train.second_step(first) == second


@pytest.mark.parametrize("words", [[], ["--rank=8"], ["--max_train_steps=7", "--learning_rate=1e-3"]])
def test_the_command_of_the_embedded_run_repeats_its_second_step(words):
    """It says all that the first step does, which the second does otherwise."""
    settings = train.first_step(given := train.given_flags(words))
    repeated = settings.given()
    assert train.second_step(train.first_step(repeated), repeated) == train.second_step(settings, given)


def test_help_explains_every_flag(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in (*VALUES, *SWITCHES, *SILENT))


# ---- the commands of diffusers' README

README = {
    "dog toy": """
        accelerate launch train_dreambooth.py \
          --pretrained_model_name_or_path=$MODEL_NAME  \
          --instance_data_dir=$INSTANCE_DIR \
          --output_dir=$OUTPUT_DIR \
          --instance_prompt="a photo of sks dog" \
          --resolution=512 \
          --train_batch_size=1 \
          --gradient_accumulation_steps=1 \
          --learning_rate=5e-6 \
          --lr_scheduler="constant" \
          --lr_warmup_steps=0 \
          --max_train_steps=400""",
    "12 GB": """
        accelerate launch train_dreambooth.py \
          --pretrained_model_name_or_path=$MODEL_NAME  \
          --instance_data_dir=$INSTANCE_DIR \
          --class_data_dir=$CLASS_DIR \
          --output_dir=$OUTPUT_DIR \
          --with_prior_preservation --prior_loss_weight=1.0 \
          --instance_prompt="a photo of sks dog" \
          --class_prompt="a photo of dog" \
          --resolution=512 \
          --train_batch_size=1 \
          --gradient_accumulation_steps=1 --gradient_checkpointing \
          --use_8bit_adam \
          --enable_xformers_memory_efficient_attention \
          --set_grads_to_none \
          --learning_rate=2e-6 \
          --lr_scheduler="constant" \
          --lr_warmup_steps=0 \
          --num_class_images=200 \
          --max_train_steps=800""",
    "text encoder": """
        accelerate launch train_dreambooth.py \
          --pretrained_model_name_or_path=$MODEL_NAME  \
          --train_text_encoder \
          --instance_data_dir=$INSTANCE_DIR \
          --class_data_dir=$CLASS_DIR \
          --output_dir=$OUTPUT_DIR \
          --with_prior_preservation --prior_loss_weight=1.0 \
          --instance_prompt="a photo of sks dog" \
          --class_prompt="a photo of dog" \
          --resolution=512 \
          --train_batch_size=1 \
          --use_8bit_adam \
          --gradient_checkpointing \
          --learning_rate=2e-6 \
          --lr_scheduler="constant" \
          --lr_warmup_steps=0 \
          --num_class_images=200 \
          --max_train_steps=800""",
}
SMALLER = ["--resolution=64", "--num_class_images=3", "--max_train_steps=2"]  # of two, the later one counts


@pytest.mark.parametrize("name", README)
def test_the_commands_of_diffusers_readme_run_as_they_stand(name, tmp_path, sd1, monkeypatch, capsys):
    monkeypatch.setenv("MODEL_NAME", str(sd1))
    monkeypatch.setenv("INSTANCE_DIR", str(photographs(tmp_path / "dog", count=5)))
    monkeypatch.setenv("CLASS_DIR", str(tmp_path / "class"))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "model"))
    words = shlex.split(os.path.expandvars(README[name]))
    assert words[:3] == ["accelerate", "launch", "train_dreambooth.py"]
    assert run(words[3:] + SMALLER) == 0
    before, after = weights(sd1), weights(tmp_path / "model")
    moved = {name.split("/")[0] for name in differing(after, before)}
    assert after.keys() == before.keys()
    assert moved == ({"unet", "text_encoder"} if name == "text encoder" else {"unet"})
    assert len([*tmp_path.glob("class/drawn-*/*.png")]) == (0 if name == "dog toy" else 3)
    *_, last = capsys.readouterr().out.splitlines()
    how = "--guidance_scale 7.5 --prompt 'a photo of sks dog in the snow'"
    assert last.endswith(f"python -m minibooth.generate --model {tmp_path / 'model'} {how}")


# ---- the embedded model


def test_without_a_model_and_photographs_the_embedded_ones_are_taken(tmp_path, monkeypatch, capsys):
    """And what is said on the command line holds all the same."""
    fields = vars(small(tmp_path, max_train_steps=7, learning_rate=0.5))
    monkeypatch.setattr(train, "EMBEDDED", {name: fields[name] for name in train.EMBEDDED if name in fields})
    monkeypatch.setitem(train.EMBEDDED, "with_prior_preservation", False)
    output = tmp_path / "output"
    said = ["--max_train_steps=1", f"--learning_rate={Settings.learning_rate}", "--upscaler="]
    monkeypatch.setitem(train.EMBEDDED, "upscaler", str(tmp_path / "nowhere"))
    assert run(["--device=cpu", f"--output_dir={output}", *said]) == 0
    assert json.loads((output / "run.json").read_text())["settings"]["learning_rate"] == Settings.learning_rate
    assert (output / "model_index.json").exists() and len((output / "metrics.jsonl").read_text().splitlines()) == 1


def test_photographs_without_a_model_are_a_mistake(tmp_path, capsys):
    assert run([f"--instance_data_dir={tmp_path}"]) == 2
    assert "--pretrained_model_name_or_path is missing" in capsys.readouterr().err


# ---- what is left


@pytest.mark.parametrize("model, sampler", [("sd1", "pndm"), ("sd2", "ddim"), ("sdxl", "euler")])
def test_diffusers_opens_the_result_and_draws_our_pictures(model, sampler, request, tmp_path):
    """By the sampler that the folder names."""
    before = request.getfixturevalue(model)
    assert run(flags(small(tmp_path, before, max_train_steps=2, train_text_encoder=True))) == 0
    moved = {name.split("/")[0] for name in differing(weights(tmp_path / "output"), weights(before))}
    assert moved == {path.name for path in before.glob("*") if path.name.startswith(("unet", "text_encoder"))}
    noise, how = normals(1, 4, 8, 8), dict(height=64, width=64, guidance_scale=5.0)
    theirs = reference(tmp_path / "output")
    expected = theirs("a photo of sks dog", num_inference_steps=4, latents=noise.clone(), **how).images
    ours = minibooth.load(tmp_path / "output").generate("a photo of sks dog", steps=4, sampler=sampler, latents=noise, **how)
    assert difference(ours, expected) <= 2


def test_run_json_repeats_the_run(tmp_path, capsys):
    """Also where the seed was drawn by lot."""
    changes = {"random_flip": True, "snr_gamma": 5.0, "noise_levels": (0, 349), "max_train_steps": 3}
    settings = small(tmp_path, seed=None, instance_prompt='-sks\'s "dog"', **changes)
    assert run(flags(settings)) == 0
    told = json.loads((tmp_path / "output" / "run.json").read_text())
    words = shlex.split(told["command"])
    assert words[:3] == ["python", "-m", "minibooth.train"]
    assert json.loads(json.dumps(vars(train.parse(words[3:])))) == told["settings"]  # which has lists for tuples
    assert told["versions"]["torch"] == torch.__version__
    assert run([*words[3:], f"--output_dir={tmp_path / 'again'}"]) == 0
    assert not differing(weights(tmp_path / "again"), weights(tmp_path / "output"))


@pytest.mark.parametrize("words", [[], ["--allow_tf32"]], ids=["off", "on"])
def test_tf32_is_for_those_who_ask(words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace())
    assert run(flags(small(tmp_path, max_train_steps=1)) + words) == 0
    assert torch.backends.cuda.matmul.allow_tf32 == bool(words)


@pytest.mark.parametrize("told, given, meant", [
    ("bf16", [], "bf16"), ("fp16", ["--mixed_precision=no"], "no"), ("no", [], None), ("fp8", [], None),
])  # fmt: skip
def test_a_precision_of_accelerate_launch_counts(told, given, meant, monkeypatch):
    """As in train_dreambooth.py: that of the command line overrules it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    assert train.parse(given).mixed_precision == meant


def test_two_seeds_make_two_models(tmp_path):
    for name in ("one", "two"):
        assert run(flags(small(tmp_path, seed=None, max_train_steps=1, output_dir=str(tmp_path / name)))) == 0
    assert differing(weights(tmp_path / "one"), weights(tmp_path / "two"))


# ---- mistakes


def broken_picture(folder: Path) -> None:
    (folder / "photographs" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")


def already(name: str) -> Callable[[Path], None]:
    """Something of this name is in the output folder."""
    return lambda folder: (folder / "output" / name).mkdir(parents=True)


def file_as_output(folder: Path) -> None:
    (folder / "output").write_text("")


def pickle(folder: Path) -> None:
    (folder / "model.ckpt").write_bytes(b"\x80\x02")


def in_8_bits(folder: Path) -> None:
    """A model whose every change would be rounded away."""
    shutil.copytree(tiny(), folder / "small")
    path = folder / "small" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: x.to(torch.float8_e4m3fn) for name, x in load_file(path).items()}, path)


def empty(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / ".DS_Store").write_bytes(b"")


def broken_class_picture(folder: Path) -> None:
    photographs(folder / "class", count=1)
    (folder / "class" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")


CLASS = ["--with_prior_preservation", "--class_prompt=a dog", "--class_data_dir={}/class"]
ONCE = ["--fused_backward_pass", "--max_grad_norm=0"]
TAKEN = (
    "metrics.jsonl", "report.html", "checkpoint-500", "unet", "model_index.json", "pytorch_lora_weights.safetensors",
    "output.safetensors", "feature_extractor", "samples/before-after.png",
)  # fmt: skip
MISTAKES = {
    "no model": (["--pretrained_model_name_or_path={}/nowhere"], None, "nowhere is missing"),
    "not a model": (["--pretrained_model_name_or_path={}/photographs"], None, "model_index.json"),
    "a pickle": (["--pretrained_model_name_or_path={}/model.ckpt"], pickle, "convert it to safetensors"),
    "a model in 8 bits": (["--pretrained_model_name_or_path={}/small"], in_8_bits, "unet is in 8 bits, too coarse to change"),
    "no photographs": (["--instance_data_dir={}/nowhere"], None, "no such folder of pictures: {}/nowhere"),
    "an empty folder": (["--instance_data_dir={}/empty"], empty, "no picture in {}/empty"),
    "a broken picture": ([], broken_picture, "cannot read picture {}/photographs/broken.jpg"),
    "a broken class picture": (CLASS, broken_class_picture, "cannot read picture {}/class/broken.png"),
    "no prompt": (["--instance_prompt="], None, "--instance_prompt is missing"),
    "no class prompt": (["--with_prior_preservation"], None, "--class_prompt"),
    "an odd resolution": (["--resolution=60"], None, "--resolution 60 is not divisible by 8"),
    "a negative resolution": (["--resolution=-64"], None, "--resolution -64"),
    "another run": ([], already("run.json"), "already holds run.json: choose another --output_dir, or go on with"),
    **{f"{it} there": ([], already(it), f"output already holds {it}: choose another --output_dir\n") for it in TAKEN},
    "no output folder": (["--output_dir="], None, "--output_dir is missing"),
    "a rate that is no number": (["--learning_rate=nan"], None, "--learning_rate nan is out of bounds"),
    "a rate beyond fp32": (["--learning_rate=1e300"], None, "--learning_rate 1e+300 is out of bounds"),
    "an infinite weight": (["--prior_loss_weight=inf"], None, "--prior_loss_weight inf is out of bounds"),
    "a negative rate": (["--learning_rate=-1"], None, "--learning_rate -1.0 is less than 0"),
    "a seed beyond all": (["--seed=18446744073709551615"], None, "--seed 18446744073709551615 is out of bounds"),
    "a first moment for ever": (["--adam_beta1=1"], None, "--adam_beta1 and --adam_beta2 must be less than 1"),
    "a moment for ever": (["--adam_beta2=1"], None, "--adam_beta2 must be less than 1"),
    "a LoRA as a single model": (["--rank=4", "--output_format=single"], None, "--output_format single is for whole models"),
    "a LoRA that drops all": (["--rank=4", "--lora_dropout=1"], None, "--lora_dropout 1.0 is not between 0 and 1"),
    "the subject as its class": (["--class_data_dir={}/photographs/../photographs"], None, "is the subject's folder"),
    "a file as output": ([], file_as_output, "--output_dir {}/output is a file"),
    "a missing checkpoint": (["--resume_from_checkpoint=checkpoint-7"], None, "checkpoint-7: no such checkpoint"),
    "an unknown device": (["--device=tpu"], None, "--device tpu"),
    "an unknown choice": (["--lr_scheduler=cosin"], None, "cosine"),
    "unknown targets": (["--rank=4", "--lora_targets=x"], None, "--lora_targets: invalid choice: 'x'"),
    "an unknown flag": (["--learningrate=1"], None, "--learningrate"),
    "an abbreviated flag": (["--learning=1"], None, "--learning"),
    "no number": (["--max_train_steps=many"], None, "--max_train_steps"),
    "no value": (["--seed"], None, "--seed"),
    "an empty batch": (["--train_batch_size=0"], None, "--train_batch_size 0 is less than 1"),
    "bf16 without autocast": (["--full_bf16"], None, "--full_bf16 needs --mixed_precision bf16"),
    "clipping in the backward pass": (["--fused_backward_pass"], None, "add --max_grad_norm 0"),
    "accumulation in the backward pass": (ONCE + ["--gradient_accumulation_steps=2"], None, "a larger --train_batch_size"),
    "fp16 in the backward pass": (ONCE + ["--mixed_precision=fp16"], None, "use --mixed_precision bf16"),
    "endless warm-up": (["--lr_scheduler=cosine"], None, "--lr_warmup_steps 500 leaves nothing of 5 steps"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_is_done(name, tmp_path, capsys):
    words, prepare, told = MISTAKES[name]
    settings = small(tmp_path)
    if prepare:
        prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(flags(settings) + [word.format(tmp_path) for word in words]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch("minibooth.train: error: .*\n", err)
    assert told.format(tmp_path) in err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


LEAST = dict.fromkeys((
    "crops_per_image", "lr_warmup_steps", "rank", "seed", "learning_rate", "text_encoder_lr", "prior_loss_weight",
    "max_grad_norm", "lr_power", "adam_beta1", "adam_beta2", "adam_weight_decay",
), 0) | dict.fromkeys((
    "train_batch_size", "num_train_epochs", "gradient_accumulation_steps", "sample_batch_size", "checkpointing_steps",
    "validation_steps", "num_validation_images", "num_class_images", "max_train_steps", "checkpoints_total_limit",
    "lr_num_cycles",
), 1) | {"snr_gamma": 1e-9, "lora_alpha": 1e-9, "adam_epsilon": 1e-30}  # fmt: skip


@pytest.mark.parametrize("name, least", LEAST.items())
def test_what_is_less_than_the_least_is_refused(name, least):
    usual = Settings(pretrained_model_name_or_path="x", instance_data_dir="x", instance_prompt="x")
    dataclasses.replace(usual, **{name: least}).check()
    with pytest.raises(UserError, match=f"--{name} {least - 1} is less than {least}"):
        dataclasses.replace(usual, **{name: least - 1}).check()


def test_a_mistake_ends_the_process_with_status_2(tmp_path):
    words, _, told = MISTAKES["no photographs"]
    given = flags(small(tmp_path)) + [word.format(tmp_path) for word in words]
    with launch("-m", "minibooth.train", *given) as process:
        out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert re.fullmatch("minibooth.train: error: .*\n", err)
    assert told.format(tmp_path) in err


def test_a_folder_that_cannot_be_written_is_named_before_pictures_are_drawn(tmp_path, capsys):
    (tmp_path / "file").touch()
    settings = small(tmp_path, output_dir=str(tmp_path / "file" / "x"))
    assert run(flags(settings)) == 2
    assert f"{settings.output_dir} is no folder that can be written" in capsys.readouterr().err.splitlines()[-1]


def test_a_class_folder_that_cannot_be_written_is_named_too(tmp_path, capsys):
    (tmp_path / "file").touch()
    prior = dict(with_prior_preservation=True, class_prompt="a dog", class_data_dir=str(tmp_path / "file"))
    assert run(flags(small(tmp_path, **prior))) == 2
    assert f"{tmp_path / 'file'} is no folder that can be written" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "unet")

    monkeypatch.setattr(trainer_module.Trainer, "save_checkpoint", full)
    assert run(flags(small(tmp_path, checkpointing_steps=1))) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "minibooth.train: error: No space left on device: unet"


def test_an_interrupt_while_class_pictures_are_drawn_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prior, "save_png", interrupted)
    settings = small(tmp_path, with_prior_preservation=True, class_prompt="a dog", num_class_images=1)
    assert run(flags(settings)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "minibooth.train: interrupted: go on with the same command"


@pytest.mark.parametrize(
    "asked, device, computes, draws",
    [
        ({}, "cpu", torch.float32, torch.float32),
        ({}, "cuda", torch.float32, torch.float16),
        ({"mixed_precision": "bf16", "prior_generation_precision": "fp32"}, "cuda", torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_the_precision_is_what_was_asked_for_or_suits_the_device(asked, device, computes, draws, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    settings = small(tmp_path, with_prior_preservation=True, class_prompt="a dog", **asked)
    made = train.trainer(settings, Ranks(torch.device(device)))
    assert (made.dtype, made.prior_dtype) == (computes, draws)


@pytest.mark.parametrize(
    "asked, device, told",
    [
        ({"mixed_precision": "bf16"}, "cuda", "no units for bf16: take --mixed_precision fp16"),
        ({"rank": 2, "lora_dropout": 0.1, "gradient_checkpointing": True}, "mps", "leave out one of them"),
    ],
    ids=["bf16", "dropout"],
)
def test_what_a_device_cannot_do_is_refused(asked, device, told, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(UserError, match=told):
        train.trainer(small(tmp_path, **asked), Ranks(torch.device(device)))
    train.trainer(small(tmp_path, **asked), Ranks(torch.device("cpu")))
    for one in [*asked] * (device == "mps"):  # without any of them it can
        train.trainer(
            small(tmp_path, **{name: value for name, value in asked.items() if name != one}), Ranks(torch.device("mps"))
        )


def test_the_first_steps_memory_is_free_in_the_second(tmp_path, monkeypatch):
    """Though a Graph, which a GPU has, holds the Trainer that holds it."""
    made = []

    class Kept(trainer_module.Trainer):
        def prepare(self):
            assert all(run() is None for run in made)
            made.append(weakref.ref(self))
            super().prepare()
            self.update = functools.partial(self.update)

    monkeypatch.setattr(train, "Trainer", Kept)
    settings = small(tmp_path, max_train_steps=1, fused_backward_pass=True, max_grad_norm=0.0)
    later = dataclasses.replace(settings, output_dir=str(tmp_path / "later"))
    for each in (settings, later):
        train.train(each, Ranks(torch.device("cpu")))
    assert len(made) == 2


def test_settings_are_all_flags():
    assert vars(train.parse(["--instance_data_dir=x"])) == vars(Settings(instance_data_dir="x"))

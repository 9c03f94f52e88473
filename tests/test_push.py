"""--push_to_hub uploads the result with a card; a refusal leaves it where it is. The hub is a stand-in on loopback."""

from pathlib import Path

import pytest
from comparing import weights
from hub_standin import dead_end
from huggingface_hub import ModelCard
from small_run import flags, photographs, run, small, train

from minibooth.dreambooth.hub import model_card, push, reserve
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Settings:
    """A finished run with a checkpoint, and class pictures in its output folder, as they are by default."""
    folder = tmp_path_factory.mktemp("trained")
    photographs(folder / "output" / "class", count=1)
    prior = {"with_prior_preservation": True, "class_prompt": "a photo of dog", "num_class_images": 1}
    settings = small(folder, max_train_steps=1, checkpointing_steps=1, **prior)
    settings.hub_token, settings.hub_model_id = "hf_secret", "owner/sks-dog"
    train(settings)
    return settings


def test_the_command_pushes_when_it_has_trained(hub, tmp_path, capsys):
    settings = small(tmp_path, max_train_steps=1, push_to_hub=True, hub_model_id="owner/sks-dog", hub_token="hf_secret")
    assert run(flags(settings)) == 0
    assert f"uploaded to {hub.endpoint}/owner/sks-dog" in capsys.readouterr().out
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.repositories["owner/sks-dog"][weights] == (tmp_path / "output" / weights).read_bytes()
    assert hub.tokens - {None} == {"Bearer hf_secret"}
    written = [path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in content for content in written)


def test_the_whole_pipeline_arrives_with_its_card_and_nothing_else(hub, trained):
    """Not the photographs, nor what shows them, nor what else lies in the folder."""
    folder = Path(trained.output_dir)
    photographs(folder / "photographs")
    photographs(folder / "samples")
    for name in (".unfinished", "notes.txt", "README.md", "another.safetensors"):
        (folder / name).write_text("my own")
    assert push(trained) == f"{hub.endpoint}/owner/sks-dog"
    arrived = hub.repositories["owner/sks-dog"]
    names = {name for name in Path(trained.pretrained_model_name_or_path).rglob("*") if name.is_file()}
    expected = {path.relative_to(trained.pretrained_model_name_or_path).as_posix() for path in names}
    assert arrived.keys() == expected | {"README.md"}
    assert all(arrived[name] == (folder / name).read_bytes() for name in expected)
    assert b"my own" not in arrived["README.md"] and (folder / "README.md").read_text() == "my own"


def test_a_lora_and_that_of_the_second_step_arrive(hub, tmp_path):
    for folder in (tmp_path / "sks [1]", tmp_path / "sks [1]" / "upscaler"):
        folder.mkdir()
        for name in (f"{folder.name}.safetensors", "pytorch_lora_weights.safetensors", "run.json"):
            (folder / name).write_text("a LoRA")
    push(small(tmp_path, upscaler="x4", rank=4, output_dir=str(tmp_path / "sks [1]"), hub_model_id="owner/sks"))
    first = {"sks [1].safetensors", "pytorch_lora_weights.safetensors"}
    second = {"upscaler/upscaler.safetensors", "upscaler/pytorch_lora_weights.safetensors"}
    assert hub.repositories["owner/sks"].keys() == first | second | {"README.md"}


def test_a_second_push_goes_to_the_same_repository(hub, trained):
    for _ in range(2):
        push(trained)
    assert hub.repositories.keys() == {"owner/sks-dog"}


def test_a_finished_run_can_be_pushed_later(hub, tmp_path, capsys):
    settings = small(tmp_path, max_train_steps=1)
    assert run(flags(settings)) == 0
    later = ["--resume_from_checkpoint=latest", "--push_to_hub", "--hub_model_id=owner/later", "--report_to=wandb"]
    assert run(flags(settings) + later) == 0
    said = capsys.readouterr().out
    assert "nothing is left to do" in said and "uploaded to" in said and "owner/later" in hub.repositories


def test_without_a_name_the_folder_gives_one(hub, trained):
    reserve(Settings(**vars(trained) | {"hub_model_id": None}))
    assert hub.repositories.keys() == {"me/output"}


def test_a_token_may_end_as_its_file_does(hub, trained):
    """An error would print it otherwise: a line's end is no part of a header."""
    push(Settings(**vars(trained) | {"hub_token": "hf_secret\r\n"}))
    assert hub.tokens - {None} == {"Bearer hf_secret"}


@pytest.mark.parametrize("prompt", ["a photo of sks \U0001f436", "a photo of sks dog", 'sks: "the" dog #1', "- sks's {dog}"])
def test_the_card_says_what_the_model_is(prompt, trained):
    settings = Settings(**vars(trained) | {"instance_prompt": prompt, "train_text_encoder": True})
    card = ModelCard(model_card(settings, "owner/sks-dog"))
    assert card.data.library_name == "diffusers"
    assert card.data.instance_prompt == prompt
    assert {"text-to-image", "dreambooth"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder here is nothing to others
    for part in ("# owner/sks-dog", prompt, "64 px", "text encoder", "prior preservation", "0.001"):
        assert part in card.text
    assert str(Path(settings.pretrained_model_name_or_path).parent) not in card.content


def test_the_card_names_a_base_model_of_the_hub(trained):
    settings = Settings(**vars(trained) | {"pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4"})
    assert ModelCard(model_card(settings, "owner/x")).data.base_model == "CompVis/stable-diffusion-v1-4"


@pytest.mark.parametrize("refusal", [401, 403])
def test_a_refusal_comes_before_the_training(refusal, hub, tmp_path, capsys):
    hub.refusal = refusal
    settings = small(tmp_path, max_train_steps=1, push_to_hub=True, hub_model_id="owner/sks-dog", hub_token="hf_wrong")
    assert run(flags(settings)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("minibooth.train: error: owner/sks-dog cannot be uploaded to")
    assert str(refusal) in last and "--hub_token" in last and "hf_wrong" not in last
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("trouble", ["refusal", "out of reach"])
def test_a_failed_upload_is_told_in_one_line_and_the_model_stays(trouble, hub, trained, monkeypatch):
    repository = reserve(trained)
    monkeypatch.setattr("minibooth.dreambooth.hub.reserve", lambda settings: repository)
    if trouble == "refusal":
        hub.refusal = 403
    else:
        dead_end(monkeypatch)
    with pytest.raises(UserError, match=f"the model is in {trained.output_dir}, but could not be uploaded") as error:
        push(trained)
    assert "\n" not in str(error.value)
    assert weights(Path(trained.output_dir)).keys() == weights(Path(trained.pretrained_model_name_or_path)).keys()

"""--push_to_hub uploads the result with a card; a refusal leaves it where it is. The hub is a stand-in on loopback."""

from pathlib import Path

import pytest
from hub_standin import serving
from huggingface_hub import ModelCard, constants
from small_run import flags, photographs, run, small, train, weights

from minibooth.dreambooth.hub import model_card, push, reserve
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, as HF_ENDPOINT would make it huggingface_hub's."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


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
    folder = Path(trained.output_dir)
    (folder / ".unfinished").write_text("half")
    repository = reserve(trained)
    assert repository == f"{hub.endpoint}/owner/sks-dog"
    push(trained, repository)
    arrived = hub.repositories["owner/sks-dog"]
    private = (".unfinished", "checkpoint-1", "class", "run.json", "metrics.jsonl", "report.html")
    assert all((folder / name).exists() for name in private)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert arrived == {name: path.read_bytes() for name, path in files.items() if not name.startswith(private)}
    assert {"README.md", "model_index.json", "vae/config.json", "tokenizer/merges.txt"} <= arrived.keys()


def test_a_second_push_goes_to_the_same_repository(hub, trained):
    for _ in range(2):
        push(trained, reserve(trained))
    assert hub.repositories.keys() == {"owner/sks-dog"}


def test_without_a_name_the_folder_gives_one(hub, trained):
    reserve(Settings(**vars(trained) | {"hub_model_id": None}))
    assert hub.repositories.keys() == {"me/output"}


@pytest.mark.parametrize("prompt", ["a photo of sks dog", 'sks: "the" dog #1', "- sks's {dog}"])
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
    if trouble == "refusal":
        hub.refusal = 403
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"the model is in {trained.output_dir}, but could not be uploaded") as error:
        push(trained, repository)
    assert "\n" not in str(error.value)
    assert weights(Path(trained.output_dir)).keys() == weights(Path(trained.pretrained_model_name_or_path)).keys()

"""Uploading a result to the hub, with a model card that says what it is."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

from minibooth.checkpoint import files
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError

NOT_UPLOADED = [".*", "*checkpoint-*", "class/*", "*run.json", "*metrics.jsonl", "*report.html"]
CARD = """---
library_name: diffusers
{base}instance_prompt: {quoted_prompt}
tags:
- text-to-image
- diffusers
- stable-diffusion
- dreambooth
- minibooth
inference: true
---

# {name}

A DreamBooth fine-tune of `{model}`, made with minibooth. The prompt that calls the subject is *{instance_prompt}*.
{trained} trained at {resolution} px{prior}, with a learning rate of {learning_rate:g}.
"""


def model_card(settings: Settings, name: str) -> str:
    """README.md of the uploaded model."""
    s, model = settings, settings.pretrained_model_name_or_path
    here, what = Path(model).exists(), "A LoRA of the UNet" if s.rank else "The UNet"
    return CARD.format(
        name=name, base="" if here else f"base_model: {model}\n", model=Path(model).name if here else model,
        instance_prompt=s.instance_prompt, quoted_prompt=json.dumps(s.instance_prompt),  # a YAML string too, whatever is in it
        trained=what + (" and the text encoder were" if s.train_text_encoder else " was"), resolution=s.resolution,
        prior=" with prior preservation" * s.with_prior_preservation, learning_rate=s.learning_rate,
    )  # fmt: skip


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """Whatever goes wrong with the hub inside becomes a UserError that says what had been wanted."""
    try:
        yield
    except Exception as error:  # the hub's, the disk's, or of the HTTP library, which differs by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} ({reason}); see --hub_token") from None


def reserve(settings: Settings) -> huggingface_hub.RepoUrl:
    """Make the repository of --hub_model_id (or of the output folder's name) if need be, before hours go into its content.

    Returns its address. Raises UserError where the hub refuses or is not there.
    """
    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    with refusals(f"{name} cannot be uploaded to"):
        return huggingface_hub.HfApi(token=settings.hub_token).create_repo(name, exist_ok=True)


def push(settings: Settings, repository: huggingface_hub.RepoUrl) -> None:
    """Upload --output_dir with a model card. Raises UserError if that fails."""
    folder = Path(settings.output_dir)
    with refusals(f"the model is in {folder}, but could not be uploaded"):
        files.write_text(folder / "README.md", model_card(settings, repository.repo_id))
        huggingface_hub.HfApi(token=settings.hub_token).upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="End of training", ignore_patterns=[*NOT_UPLOADED]
        )

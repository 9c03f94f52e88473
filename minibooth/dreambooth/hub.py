"""Uploading a result to the hub, with a model card that says what it is."""

import glob
import json
from pathlib import Path
from typing import Any

from minibooth.dreambooth.journal import PARTS, RESULTS
from minibooth.dreambooth.settings import Settings
from minibooth.errors import refusals

# What is uploaded: not photographs, what was made of them, and what else lies in the folder.
UPLOADED = [*RESULTS, *(f"{part}/*" for part in PARTS)]
CARD = Path(__file__).with_name("model_card.md").read_text("utf-8")


def model_card(settings: Settings, name: str) -> str:
    """README.md of the uploaded model."""
    s, model = settings, settings.pretrained_model_name_or_path
    here, what = Path(model).exists(), "A LoRA of the UNet" if s.rank else "The UNet"
    return CARD.format(
        name=name, base="" if here else f"base_model: {model}\n", model=Path(model).name if here else model,
        # JSON's string is a YAML string too, whatever is in it
        instance_prompt=s.instance_prompt, quoted_prompt=json.dumps(s.instance_prompt, ensure_ascii=False),
        trained=what + (" and the text encoder were" if s.train_text_encoder else " was"), resolution=s.resolution,
        prior=" with prior preservation" * s.with_prior_preservation, learning_rate=s.learning_rate,
    )  # fmt: skip


def api(settings: Settings) -> Any:
    """The hub by the token of --hub_token, without the blanks of a file's end: an error would print it with them."""
    from huggingface_hub import HfApi  # half a second

    return HfApi(token=settings.hub_token and settings.hub_token.strip())


def reserve(settings: Settings) -> Any:
    """Make the repository of --hub_model_id (or of the output folder's name) if need be, before hours go into its content.

    Returns its address. Raises UserError where the hub refuses or is not there.
    """
    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    with refusals(f"{name} cannot be uploaded to", "see --hub_model_id and --hub_token"):
        return api(settings).create_repo(name, exist_ok=True)


def push(settings: Settings) -> str:
    """Upload the result of each step, with a model card; returns its address. Raises UserError if that fails."""
    folder, repository = Path(settings.output_dir), reserve(settings)
    patterns = [pattern.format(glob.escape(folder.resolve().name)) for pattern in UPLOADED]
    patterns += [f"upscaler/{pattern.format('upscaler')}" for pattern in UPLOADED] * bool(settings.upscaler)
    with refusals(f"the model is in {folder}, but could not be uploaded", "see --hub_token"):
        hub, name = api(settings), repository.repo_id
        hub.upload_file(path_or_fileobj=model_card(settings, name).encode(), path_in_repo="README.md", repo_id=name)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="End of training", allow_patterns=patterns)
    return str(repository)

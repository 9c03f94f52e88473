"""Teach a Stable Diffusion a subject from 3-5 photographs: DreamBooth (arXiv 2208.12242)."""

import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

import torch

from minibooth import command
from minibooth.dreambooth import hub
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.trainer import Trainer

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
EMBEDDED: dict[
    str, typing.Any
] = {  # the run on the repository's own small model, where neither a model nor photographs are named
    "pretrained_model_name_or_path": str(WEIGHTS / "tiny"),
    "instance_data_dir": str(WEIGHTS / "subject" / "robot"),
    "instance_prompt": "a photo of a sks robot",
    "class_prompt": "a photo of a robot",
    "with_prior_preservation": True,
    "num_class_images": 48,
    "sample_batch_size": 16,
    "resolution": 64,
    "max_train_steps": 200,
    "learning_rate": 1e-4,
    "lr_warmup_steps": 0,
    "validation_prompt": "a photo of a sks robot in the snow | a photo of a sks robot wearing a crown on the beach",
    "seed": 0,
}
EPILOGUE = "The flags are those of diffusers' train_dreambooth.py, with its spelling (- and _ are alike) and its defaults."


def parse(argv: Sequence[str]) -> Settings:
    """Command line -> Settings; each field of the dataclass is a flag."""
    parser = command.Parser("python -m minibooth.train", __doc__, EPILOGUE)
    for f in dataclasses.fields(Settings):
        kind = next((each for each in typing.get_args(f.type) if each is not type(None)), f.type)
        how = {"action": "store_true"} if kind is bool else {"type": kind, "choices": f.metadata.get("choices")}
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **how)
    return Settings(**vars(parser.parse_args(command.normalise(argv))))


def embedded(settings: Settings) -> Settings:
    """What was left at its default replaced by EMBEDDED, if it is there and neither a model nor photographs are named."""
    there = Path(EMBEDDED["pretrained_model_name_or_path"]).is_dir()
    if settings.pretrained_model_name_or_path or settings.instance_data_dir or not there:
        return settings
    untouched = [f.name for f in dataclasses.fields(Settings) if getattr(settings, f.name) == f.default]
    return dataclasses.replace(settings, **{name: EMBEDDED[name] for name in untouched if name in EMBEDDED})


def main(argv: Sequence[str]) -> None:
    """Train as the command line says, and leave the result in --output_dir."""
    settings = embedded(parse(argv))
    device = command.device(settings.device)
    torch.backends.cuda.matmul.allow_tf32 = settings.allow_tf32
    precision = settings.prior_generation_precision or ("fp16" if device.type == "cuda" else "fp32")
    trainer = Trainer(settings, device, command.DTYPES[settings.mixed_precision or "no"], command.DTYPES[precision])
    print("\n".join(f"{name:>10}  {value}" for name, value in trainer.summary()), flush=True)
    repository = hub.reserve(settings) if settings.push_to_hub else None
    trainer.train()
    if repository:
        hub.push(settings, repository)
        print(f"uploaded to {repository}")
    prompt = f"{settings.instance_prompt} in the snow"
    model = f"{settings.pretrained_model_name_or_path} --lora {settings.output_dir}" if settings.rank else trainer.result
    print(f'draw with it:  python -m minibooth.generate --model {model} --prompt "{prompt}"')


if __name__ == "__main__":
    command.run(main, sys.argv)

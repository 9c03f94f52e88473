"""The networks of a run: which of them train, or what LoRA in them; where they lie, what they take, and how they are kept."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minibooth.checkpoint import files
from minibooth.checkpoint import lora as lora_files
from minibooth.checkpoint.source import COMPONENTS, check
from minibooth.diffusion.noise import generator
from minibooth.dreambooth import speed
from minibooth.dreambooth.optimizer import BLOCK
from minibooth.dreambooth.parallel import BLOCKS, Ranks
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError
from minibooth.models import lora
from minibooth.models.blocks import Transformer
from minibooth.models.lora import Adapter

KOHYA = "kohya.safetensors"  # a checkpoint's LoRA, with every bit
Learnt = dict[str, dict[str, Any]]  # what training changed, by network and name: tensors, or in a LoRA's run adapters


class Weights:
    """The networks of `pipe` in one run; from the checkpoint `resumed`, if there is one.

    Raises UserError for a checkpoint that holds something else than what is to be trained.
    """

    def __init__(self, settings: Settings, pipe: Any, seed: int, resumed: Path | None):
        self.settings, self.pipe, self.seed, self.resumed = settings, pipe, seed, resumed
        folder = Path(settings.output_dir)
        self.file = folder / f"{folder.resolve().name}.safetensors"  # kohya's LoRA, or the whole pipeline as one
        self.result = self.file if settings.output_format == "single" else folder  # to draw with
        trained = ["unet", *pipe.texts] if settings.train_text_encoder else ["unet"]
        self.trained: dict[str, nn.Module] = {name: getattr(pipe, name) for name in trained}
        self.lora = {name: self.adapters(name) for name in self.trained if settings.rank}
        if not settings.rank:
            pipe.source.unlock(trained)
        if resumed and not settings.rank:
            for name, network in self.trained.items():
                check(network, self.saved(name), f"{resumed}: {name}")

    def saved(self, name: str) -> files.Tensors:
        """A network's weights in the checkpoint."""
        return files.weights_of(self.resumed / name, COMPONENTS[name].stem)  # type: ignore[operator]

    def adapters(self, name: str) -> dict[str, Adapter]:
        """A network's LoRA: new, or the checkpoint's."""
        s, rng = self.settings, generator(self.seed, "lora", name)
        made = lora.fresh(self.trained[name], s.lora_targets, s.rank, s.lora_alpha or s.rank, s.lora_dropout, rng)
        if self.resumed:
            saved = lora_files.read(self.resumed / KOHYA, self.pipe.source).get(name, {})
            if lacking := made.keys() - saved.keys():
                raise UserError(f"{self.resumed} has no LoRA of {name}'s {min(lacking)}: go on from another")
            for layer, adapter in made.items():
                adapter.down.data.copy_(saved[layer].down)
                adapter.up.data.copy_(saved[layer].up)
        return made

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Bring every network to the device. One that trains has its weights in fp32 (with --full_bf16 in bf16), from the
        checkpoint, if there is one; all others are in what `precision` makes of `dtype`. With a LoRA that alone trains.
        """
        kept = torch.bfloat16 if self.settings.full_bf16 else torch.float32
        for name, network in self.pipe.networks.items():
            trains = name in self.trained
            full, own = trains and not self.lora, self.pipe.precision(name, dtype)
            network.requires_grad_(full).to(device, kept if full else own)
            if trains and self.lora:
                lora.attach(network.train(), self.lora[name], kept)
            elif full and self.resumed:
                network.load_state_dict(dict(self.saved(name)))
            speed.suit(network, device, own)
            if trains and self.settings.gradient_checkpointing:
                recompute_activations(network, dropout=self.settings.lora_dropout > 0)

    def groups(self) -> list[dict[str, Any]]:
        """For the optimizer: what trains of each network, and its peak learning rate."""
        unet = self.settings.learning_rate
        text = unet if self.settings.text_encoder_lr is None else self.settings.text_encoder_lr
        parameters = {name: [p for p in network.parameters() if p.requires_grad] for name, network in self.trained.items()}
        return [{"params": own, "peak": unet if name == "unet" else text} for name, own in parameters.items()]

    def sizes(self) -> dict[str, int]:
        """How many parameters train, by network."""
        updates = {name: sum(x.down.numel() + x.up.numel() for x in made.values()) for name, made in self.lora.items()}
        return updates or {name: sum(p.numel() for p in network.parameters()) for name, network in self.trained.items()}

    def bytes(self, dtype: torch.dtype, shards: int) -> float:
        """Of weights, gradients and moments, in a process that holds one of so many shards of what trains."""
        s, sizes = self.settings, self.sizes()
        held = {name: sum(p.numel() for p in network.parameters()) for name, network in self.pipe.networks.items()}
        still = held if self.lora else held.keys() - self.trained
        frozen = sum(held[name] / (shards if name in self.trained else 1) for name in still)
        each = (2 if s.full_bf16 else 4) * (1 if s.fused_backward_pass else 2) + (2 + 8 / BLOCK if s.use_8bit_adam else 8)
        return each * sum(sizes.values()) / shards + dtype.itemsize * frozen

    @torch.no_grad()
    def learnt(self, ranks: Ranks) -> Learnt:
        """Whole on the first rank."""
        if not self.lora:
            return {name: ranks.gather(network.state_dict()) for name, network in self.trained.items()}

        def whole(x: Adapter) -> Adapter:
            both = ranks.gather({"down": x.down, "up": x.up})
            return Adapter(both["down"], both["up"], x.alpha)

        return {name: {layer: whole(x) for layer, x in made.items()} for name, made in self.lora.items()}

    def write_checkpoint(self, folder: Path, learnt: Learnt, steps: int) -> None:
        """With every bit, as `place` and `adapters` read it."""
        if self.lora:
            lora_files.write(folder, KOHYA, learnt, self.pipe.source, self.about(steps))
            return
        for name, tensors in learnt.items():
            files.write_weights(folder / name / f"{COMPONENTS[name].stem}.safetensors", tensors)
            (folder / name / "config.json").write_bytes(self.pipe.source.small_files[f"{name}/config.json"])

    def write(self, learnt: Learnt, steps: int) -> None:
        """The result: the whole pipeline, or diffusers' file and kohya's of a LoRA."""
        if self.lora:
            lora_files.write(self.result, self.file.name, learnt, self.pipe.source, self.about(steps))
        else:
            self.pipe.source.save(self.result, learnt)  # the others as they were read, whatever they computed in

    def about(self, steps: int) -> dict[str, str]:
        """What kohya's programs, A1111 and civitai show of a LoRA."""
        s, source = self.settings, self.pipe.source
        xl = source.kind == "StableDiffusionXLPipeline"
        sd2 = not xl and self.pipe.unet.config.use_linear_projection
        v = self.pipe.scheduler.prediction_type == "v_prediction"
        prompts = {"subject": s.instance_prompt} | ({"class": s.class_prompt} if s.with_prior_preservation else {})
        told = dict(
            network_module="networks.lora", network_dim=s.rank, network_alpha=s.lora_alpha or s.rank, v2=sd2,
            base_model_version="sdxl_base_v1-0" if xl else f"sd_v{1 + sd2}{'_v' * v}", sd_model_name=Path(source.name).name,
            output_name=self.file.stem, resolution=(s.resolution, s.resolution), steps=steps,
            learning_rate=s.learning_rate, seed=self.seed,
            tag_frequency=json.dumps({name: {prompt: 1} for name, prompt in prompts.items()}),
        )  # fmt: skip
        return {f"ss_{key}": str(value) for key, value in told.items()}


class Recomputed(nn.Module):
    """A part that drops its activations, and computes them again: gradient checkpointing, Chen et al. 2016."""

    dropout = False  # whether the second time the same random numbers are needed

    def forward(self, *args: Any, **joined: Any) -> Tensor:
        if (skip := joined.get("skip")) is not None and skip.requires_grad:
            skip = joined["skip"] = skip.view_as(skip)
            skip.register_hook(torch.clone)  # else a view, which keeps the gradient of all that it is joined to
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=self.dropout, **joined)


def recompute_activations(network: nn.Module, dropout: bool = False) -> None:
    """Put gradient checkpointing on from outside.

    The blocks of a deep transformer (XL's have up to ten) are checkpointed as well, so that they are recomputed one by one.
    """
    parts: list[Any] = [part for part in network.modules() if isinstance(part, BLOCKS)]
    stacks = [part.transformer_blocks for part in parts if isinstance(part, Transformer)]
    for part in (*parts, *(block for stack in stacks if len(stack) > 1 for block in stack)):
        part.__class__, part.dropout = speed.mixed(Recomputed, type(part)), dropout  # type: ignore[arg-type]

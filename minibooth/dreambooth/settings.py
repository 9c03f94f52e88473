"""Everything a run can be told: the flags of diffusers' DreamBooth scripts, with train_dreambooth.py's defaults, as one table.

Copied command lines are the commonest input, so a flag that has no effect here is accepted and noted, never refused.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minibooth.dreambooth.data import INTERPOLATION
from minibooth.dreambooth.learning_rate import SCHEDULES
from minibooth.errors import refuse
from minibooth.models.lora import TARGETS

PRECISIONS, MIXED, FORMATS = ("no", "fp32", "fp16", "bf16"), ("no", "fp16", "bf16"), ("folder", "single")
COMPILES = "auto", "on", "off"
PRIOR, GRIDS = "with_prior_preservation", "validation_prompt"
MOST = {int: 2.0**53, float: 3e38}  # beyond, numbers run out


def flag(default: Any, help: str, **more: Any) -> Any:
    """A setting: default and help; `more` goes to argparse (choices, nargs), `check` (its least value) or `notes` (the flag it
    needs to mean anything; lora: only diffusers' scripts for LoRAs have it).
    """
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Settings:
    """One run of python -m minibooth.train."""

    pretrained_model_name_or_path: str = flag("", "a folder in the diffusers layout, a single file, or owner/name on the hub")
    revision: str | None = flag(None, "the hub's branch, tag or commit")
    variant: str | None = flag(None, "infix of the weight files to read, fp16 for instance")
    tokenizer: str | None = flag(None, "folder with CLIP's vocabulary [the model's own, tokenizer/ beside it, or the hub's]")
    prediction_type: str | None = flag(None, "overrules what the model says of itself", choices=("epsilon", "v_prediction"))
    instance_data_dir: str = flag("", "folder with the subject's 3-5 photographs")
    instance_prompt: str = flag("", 'prompt with the identifier: "a photo of sks dog"')
    class_data_dir: str | None = flag(None, "class pictures, topped up to --num_class_images [OUTPUT_DIR/class]", needs=PRIOR)
    class_prompt: str = flag("", 'prompt of the class: "a photo of dog"')
    with_prior_preservation: bool = flag(False, "also train on class pictures, so that the class keeps its variety")
    prior_loss_weight: float = flag(1.0, "lambda of the paper", least=0, needs=PRIOR)
    num_class_images: int = flag(100, "class pictures; missing ones are drawn by the model itself", least=1, needs=PRIOR)
    sample_batch_size: int = flag(4, "class pictures, and those of a grid, drawn at a time", least=1)
    prior_generation_precision: str | None = flag(
        None, "of class pictures [fp16 on cuda, else fp32]", choices=PRECISIONS, needs=PRIOR
    )
    class_guidance_scale: float = flag(7.5, "how strictly drawn class pictures follow their prompt", needs=PRIOR)
    stage: str | None = flag(None, "what is trained [what the model is for]", choices=("text_to_image", "super_resolution"))
    upscaler: str = flag("", "an x4-upscaler to train afterwards on the same photographs: OUTPUT_DIR/upscaler")
    noise_levels: tuple[int, int] = flag((0, 0), "least and most noise on what an upscaler is shown; it had 0 349", nargs=2)
    resolution: int = flag(512, "side of the training crops in pixels; an upscaler's are cut at the pictures' full detail")
    center_crop: bool = flag(False, "cut at the centre instead of anywhere")
    random_flip: bool = flag(False, "mirror half of the crops, at random")
    image_interpolation_mode: str = flag("lanczos", "filter that resizes photographs", choices=tuple(INTERPOLATION))
    crops_per_image: int = flag(8, "different crops encoded per picture; 0 cuts and encodes anew at every step", least=0)
    output_dir: str = flag("dreambooth-model", "where everything goes")
    output_format: str = flag("folder", "or a single file NAME/NAME.safetensors for A1111 and ComfyUI", choices=FORMATS)
    seed: int | None = flag(None, "repeats a run exactly [drawn by lot]", least=0)
    train_text_encoder: bool = flag(False, "train the text encoder too")
    text_encoder_lr: float | None = flag(None, "its learning rate [--learning_rate]", least=0, needs="train_text_encoder")
    rank: int = flag(0, "train a LoRA of this rank (4 is usual), with a learning rate of about 1e-4; 0: all weights", least=0)
    lora_alpha: float | None = flag(
        None, "alpha of the LoRA, whose strength is alpha / rank [the rank]", least=1e-9, needs="rank"
    )
    lora_dropout: float = flag(0.0, "share of a layer's inputs that its LoRA does not see in a training step", needs="rank")
    lora_targets: str = flag("attention", "or all linear layers and convolutions", choices=tuple(TARGETS), needs="rank")
    train_batch_size: int = flag(4, "subject pictures a step and process; for the prior as many of the class besides", least=1)
    num_train_epochs: int = flag(1, "passes over the pictures, where --max_train_steps is not given", least=1)
    max_train_steps: int | None = flag(None, "steps in all [--num_train_epochs]", least=1)
    gradient_accumulation_steps: int = flag(1, "batches whose gradients are averaged into one step", least=1)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass, to save memory")
    learning_rate: float = flag(5e-6, "peak learning rate", least=0)
    scale_lr: bool = flag(False, "multiply the learning rate by batch size, accumulation and processes")
    lr_scheduler: str = flag("constant", "course of the learning rate", choices=tuple(SCHEDULES))
    lr_warmup_steps: int = flag(500, "steps of linear warm-up (not for constant)", least=0)
    lr_num_cycles: int = flag(1, "restarts of cosine_with_restarts", least=1)
    lr_power: float = flag(1.0, "power of polynomial", least=0)
    use_8bit_adam: bool = flag(False, "AdamW's moments in 8 bits, a quarter of their memory (a LoRA's in part: 2/3 at rank 8)")
    adam_beta1: float = flag(0.9, "decay of the first moment", least=0)
    adam_beta2: float = flag(0.999, "decay of the second moment", least=0)
    adam_weight_decay: float = flag(1e-2, "decoupled weight decay", least=0)
    adam_epsilon: float = flag(1e-8, "epsilon of AdamW", least=1e-30)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 leaves them", least=0)
    full_bf16: bool = flag(False, "weights and gradients in bf16, rounded stochastically; wants --mixed_precision bf16")
    fused_backward_pass: bool = flag(False, "update each weight as its gradient comes; wants --max_grad_norm 0")
    offset_noise: bool = flag(False, "add 0.1 times a constant per channel to the noise")
    snr_gamma: float | None = flag(None, "min-SNR weighting of the loss; 5.0 is usual", least=1e-9)
    mixed_precision: str | None = flag(None, "autocast; weights stay in fp32, but for --full_bf16", choices=MIXED)
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere and later GPUs")
    compile: str = flag("auto", "auto: a GPU starts a step as one graph; on: norms are compiled, too; off", choices=COMPILES)
    device: str | None = flag(None, "cuda, mps or cpu [the best there]")
    parallel: str | None = flag(None, "for torchrun: all weights in each process, or a shard [ddp]", choices=("ddp", "fsdp"))
    checkpointing_steps: int = flag(500, "steps between checkpoints", least=1)
    checkpoints_total_limit: int | None = flag(None, "keep this many, the newest", least=1)
    resume_from_checkpoint: str | None = flag(None, 'a checkpoint-N folder, or "latest"')
    validation_prompt: str | None = flag(None, "draw it (or several, with | between) as training goes: samples/step-N.png")
    num_validation_images: int = flag(4, "pictures of each validation prompt", least=1, needs=GRIDS)
    validation_guidance_scale: float = flag(7.5, "how strictly its pictures follow the prompt", needs=GRIDS)
    validation_steps: int = flag(100, "steps between grids", least=1, needs=GRIDS)
    metrics_model: str | None = flag(None, "a CLIP or DINO that measures each grid, for metrics.jsonl", needs=GRIDS)
    push_to_hub: bool = flag(False, "upload the result")
    hub_model_id: str | None = flag(None, "owner/name to upload to [the output folder's name]")
    hub_token: str | None = flag(None, "the hub's token, if you are not logged in")
    # Accepted without effect.
    validation_epochs: int | None = flag(None, "without effect: see --validation_steps", lora=True)
    pre_compute_text_embeddings: bool = flag(False, "without effect: a frozen text encoder's output is always kept")
    dataloader_num_workers: int = flag(0, "without effect: pictures are encoded once, before training")
    enable_xformers_memory_efficient_attention: bool = flag(False, "without effect: PyTorch's own attention is used")
    set_grads_to_none: bool = flag(False, "without effect")
    local_rank: int = flag(-1, "without effect")
    report_to: str = flag("none", "without effect: metrics go to OUTPUT_DIR/metrics.jsonl")
    logging_dir: str = flag("logs", "without effect: metrics go to OUTPUT_DIR/metrics.jsonl")
    repeats: int = flag(1, "without effect: --max_train_steps or --num_train_epochs say how long a run is", lora=True)
    optimizer: str = flag("AdamW", "without effect: the only one", choices=("AdamW", "adamw"))
    output_kohya_format: bool = flag(False, "without effect: a LoRA comes as diffusers' file and as kohya's", lora=True)
    pretrained_vae_model_name_or_path: str | None = flag(None, "without effect: the model's own, in fp32 where fp16 overflows")
    cache_dir: str | None = flag(None, "without effect: HF_HOME says where the hub's files are kept")
    skip_save_text_encoder: bool = flag(False, "without effect: the result is a whole pipeline")
    validation_scheduler: str = flag("DPMSolverMultistepScheduler", "without effect: DPM-Solver++ draws")
    validation_images: tuple[str, ...] = flag((), "without effect: an upscaler is shown the photographs", nargs="+")
    tokenizer_max_length: int | None = flag(None, "without effect: a prompt has as many tokens as the model's tokenizer says")
    text_encoder_use_attention_mask: bool = flag(False, "without effect: DeepFloyd IF's, which is not here")
    class_labels_conditioning: str | None = flag(None, "without effect: DeepFloyd IF's, which is not here")

    def check(self) -> None:
        """Refuse what cannot run. Raises UserError."""
        needed = "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir"
        refuse({f"--{name} is missing": not getattr(self, name) for name in needed})
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        refuse({f"--{name} {x} is out of bounds": not abs(x) < MOST.get(type(x), math.inf) for name, x in numbers.items()})
        least = {f.name: f.metadata["least"] for f in dataclasses.fields(self) if "least" in f.metadata and f.name in numbers}
        refuse({f"--{name} {numbers[name]} is less than {low}": numbers[name] < low for name, low in least.items()})
        once, accumulated = self.fused_backward_pass, self.gradient_accumulation_steps > 1
        refuse({
            '--with_prior_preservation needs --class_prompt, such as "a photo of dog"':
                self.with_prior_preservation and not self.class_prompt,
            f"--resolution {self.resolution} is not divisible by 8": self.resolution % 8 or self.resolution <= 0,
            "--output_format single is for whole models; a LoRA comes as diffusers' file and as kohya's":
                self.rank and self.output_format == "single",
            f"--lora_dropout {self.lora_dropout} is not between 0 and 1": not 0 <= self.lora_dropout < 1,
            "--adam_beta1 and --adam_beta2 must be less than 1": max(self.adam_beta1, self.adam_beta2) >= 1,
            f"--class_data_dir {self.class_data_dir} is the subject's folder: name another, for pictures of its class":
                self.class_data_dir and Path(self.class_data_dir).resolve() == Path(self.instance_data_dir).resolve(),
            "--full_bf16 needs --mixed_precision bf16": self.full_bf16 and self.mixed_precision != "bf16",
            "--fused_backward_pass never has all gradients at once, to clip them: add --max_grad_norm 0":
                once and self.max_grad_norm,
            "--fused_backward_pass keeps no gradients to accumulate: take a larger --train_batch_size": once and accumulated,
            "--fused_backward_pass cannot take back an update that overflowed in fp16: use --mixed_precision bf16":
                once and self.mixed_precision == "fp16",
        })  # fmt: skip

    def given(self) -> dict[str, Any]:
        """What is not as it is by default."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def notes(self) -> list[str]:
        """A line for each flag that was given and has no effect, and one where a command for a LoRA trains all weights."""
        given = self.given()
        known = {f.name: f.metadata for f in dataclasses.fields(self) if f.name in given}
        said = {name: own["help"] for name, own in known.items() if name in WITHOUT_EFFECT}
        lacking = {name: own["needs"] for name, own in known.items() if own.get("needs", name) not in given}
        said |= {name: f"without effect: add --{other}" for name, other in lacking.items()}
        if self.class_prompt and not self.with_prior_preservation and self.stage != "super_resolution":
            said["class_prompt"] = f"no class pictures are trained on: add --{PRIOR}"
        copied = not self.rank and any("lora" in own for own in known.values())
        notes = [f"--{name}: {help}" for name, help in said.items()]
        return notes + ["all weights train; for a LoRA, as by train_dreambooth_lora.py, add --rank 4"] * copied

    def validation_prompts(self) -> list[str]:
        """Those that --validation_prompt joins."""
        return [prompt.strip() for prompt in (self.validation_prompt or "").split("|")]

    def samples(self, processes: int) -> int:
        """The subject's samples in a step."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def steps(self, pictures: int, processes: int) -> int:
        """Training steps, where an epoch is a pass over the larger of the two sets of pictures."""
        return self.max_train_steps or self.num_train_epochs * math.ceil(pictures / self.samples(processes))


WITHOUT_EFFECT = frozenset(f.name for f in dataclasses.fields(Settings) if f.metadata["help"].startswith("without effect"))

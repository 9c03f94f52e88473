"""DreamBooth's training: photograph -> latent -> noise -> UNet -> loss -> step. Ruiz et al. 2022, arXiv 2208.12242.

Whatever does not train is computed once, before the loop. All randomness is keyed by (seed, step, sample), so a resumed run
ends in the bits of one that was never stopped, and drawing pictures on the way changes nothing.

Shapes: B subject samples a step (2B rows with prior preservation), Z latent channels, h x w latent size, N tokens, D width.
"""

import contextlib
import dataclasses
import functools
import json
import math
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from minibooth.checkpoint import files
from minibooth.checkpoint import lora as lora_files
from minibooth.checkpoint.load import COMPONENTS, Source
from minibooth.diffusion import load
from minibooth.diffusion.images import grid, save_png
from minibooth.diffusion.noise import generator, seeded
from minibooth.diffusion.text_to_image import Condition
from minibooth.dreambooth import compiling, report, stages
from minibooth.dreambooth.data import find_pictures
from minibooth.dreambooth.identifier import doubts
from minibooth.dreambooth.journal import Journal
from minibooth.dreambooth.latents import Latents
from minibooth.dreambooth.learning_rate import learning_rate
from minibooth.dreambooth.metrics import Watch
from minibooth.dreambooth.objective import dreambooth_loss
from minibooth.dreambooth.optimizer import BLOCK, AdamW, moments, restore
from minibooth.dreambooth.parallel import BLOCKS, Ranks
from minibooth.dreambooth.prior import DRAWING, ClassPictures
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError
from minibooth.models import lora
from minibooth.models.lora import Adapter

OFFSET_NOISE = 0.1
KOHYA = "kohya.safetensors"  # a checkpoint's LoRA, with every bit
SAME = ("use_8bit_adam", "full_bf16")  # what a checkpoint's tensors are stored by


class Trainer:
    """One run of Settings on `device`, with autocast to `dtype` where that is not fp32; class pictures in `prior_dtype`.

    Where it is one of many processes, `ranks` knows of the others.

    Raises UserError for whatever would stop the run later and can be known now.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
        prior_dtype: torch.dtype,
        ranks: Ranks | None = None,
    ):
        settings.check()
        self.device, self.dtype, self.ranks = device, dtype, ranks or Ranks(device)
        self.journal = Journal(settings)
        self.resumed = self.journal.to_resume()
        state = files.read_json(self.resumed / "state.json") if self.resumed else {"step": 0}
        if self.resumed and (self.resumed / KOHYA).exists() != bool(settings.rank):
            raise UserError(f"{self.resumed} is {'not ' * bool(settings.rank)}a LoRA's: go on with the same --rank as before")
        for name in SAME:
            if self.resumed and state.get(name, False) != getattr(settings, name):
                raise UserError(f"{self.resumed} was trained with{'out' * (not state.get(name))} --{name}: go on as it began")
        self.start: int = state["step"]
        if self.ranks.same(self.start) != self.start:
            raise UserError(f"--output_dir {settings.output_dir} is not the same folder for all processes: take a shared one")
        self.seed = self.ranks.same(state.get("seed", secrets.randbits(31)) if settings.seed is None else settings.seed)
        self.settings = s = self.journal.settings = dataclasses.replace(settings, seed=self.seed)

        pictures, self.skipped = find_pictures(Path(s.instance_data_dir))
        how = s.variant, s.revision, s.tokenizer
        self.pipe = load(Source.open(s.pretrained_model_name_or_path, *how, prediction_type=s.prediction_type))
        self.stage = stages.of(self.pipe)(s, self.pipe, pictures)
        self.watch = Watch(s.metrics_model, pictures, device) if s.metrics_model and s.validation_prompt else None
        self.sets, self.prompts = [Latents("subject", pictures, self.stage, self.seed)], [s.instance_prompt]
        if s.with_prior_preservation:
            self.prior, self.prior_dtype = ClassPictures(s, self.pipe.source, prior_dtype), prior_dtype
            self.stage.check(self.prior.pictures, drawn=len(self.prior.missing))
            self.sets.append(Latents("class", self.prior.pictures, self.stage, self.seed))
            self.prompts.append(s.class_prompt)
        self.steps = s.steps(max(len(latents.pictures) for latents in self.sets), self.ranks.count)
        self.texts = [name for name in self.pipe.networks if name.startswith("text_encoder")]
        self.trained = {name: getattr(self.pipe, name) for name in ["unet"] + self.texts * s.train_text_encoder}
        self.lora = {name: self.adapters(name) for name in self.trained if s.rank}

    @property
    def result(self) -> Path:
        """What the run leaves for drawing: the output folder, or the single file in it."""
        folder = self.journal.folder
        return folder if self.settings.output_format == "folder" else folder / f"{folder.resolve().name}.safetensors"

    def prepare(self) -> None:
        """Everything before the first step: class pictures, networks in place, the optimizer, encoded prompts and pictures."""
        s = self.settings
        if s.with_prior_preservation and self.prior.missing:
            self.ranks.wait()  # until all know what is missing
            pipe = load(self.pipe.source, self.prior_dtype, self.device)
            if compiling.worth(s.compile, self.device, DRAWING["steps"] * len(self.prior.missing) // s.sample_batch_size):
                pipe.unet.compile()
            self.prior.draw(pipe, self.ranks.number, self.ranks.count)
            del pipe
            self.ranks.wait()
        for name in self.pipe.networks:
            self.place(name, trains=name in self.trained)
        self.networks = self.ranks.join(self.trained, self.dtype)
        rates = dict.fromkeys(self.texts, s.learning_rate if s.text_encoder_lr is None else s.text_encoder_lr)
        rates["unet"] = s.learning_rate
        parameters = {name: [p for p in module.parameters() if p.requires_grad] for name, module in self.trained.items()}
        groups = [{"params": trained, "peak": rates[name]} for name, trained in parameters.items()]
        betas = s.adam_beta1, s.adam_beta2
        self.optimizer = AdamW(groups, betas, s.adam_epsilon, s.adam_weight_decay, s.use_8bit_adam, self.seed)
        if s.fused_backward_pass:
            self.optimizer.step_in_backward()
        if self.ranks.shards == 1 and compiling.worth(s.compile, self.device, self.steps - self.start):
            self.compile()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.resumed:
            restore(self.optimizer, self.trained, files.Tensors([self.resumed / "optimizer.safetensors"]))
            if scale := files.read_json(self.resumed / "state.json")["scaler"]:  # empty where it was not in fp16
                self.scaler.load_state_dict(scale)
        self.encode()

    def compile(self) -> None:
        """From now on a step is few graphs: a text encoder, where it trains; add noise, ask the UNet, compare; the update."""
        torch._dynamo.config.optimize_ddp = not self.settings.gradient_checkpointing  # it cannot cut such a graph
        for name in self.trained.keys() & self.texts:
            getattr(self.pipe, name).compile(fullgraph=True, dynamic=False)
        self.objective = torch.compile(self.objective, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
        self.optimizer.kernel = torch.compile(self.optimizer.kernel, fullgraph=True, dynamic=True)

    def adapters(self, name: str) -> dict[str, Adapter]:
        """A network's LoRA: new, or the checkpoint's. Raises UserError for one of another rank or other targets."""
        s, rng = self.settings, generator(self.seed, "lora", name)
        made = lora.fresh(self.trained[name], s.lora_targets, s.rank, s.lora_alpha or s.rank, s.lora_dropout, rng)
        if self.resumed:
            saved = lora_files.read(self.resumed / KOHYA, self.pipe.source).get(name, {})
            if {layer: x.down.shape for layer, x in saved.items()} != {layer: x.down.shape for layer, x in made.items()}:
                raise UserError(f"{self.resumed} holds a LoRA of another --rank or other --lora_targets: go on with the same")
            for layer, adapter in made.items():
                adapter.down.data.copy_(saved[layer].down)
                adapter.up.data.copy_(saved[layer].up)
        return made

    def place(self, name: str, trains: bool) -> None:
        """Bring a network to the device: in the working precision, but where it trains, in that of the weights that are
        kept (from the checkpoint, if any).

        With a LoRA, that alone is what trains.
        """
        full, kept = trains and not self.settings.rank, torch.bfloat16 if self.settings.full_bf16 else torch.float32
        module = getattr(self.pipe, name).requires_grad_(full).to(self.device, kept if full else self.dtype)
        if trains and not full:
            lora.attach(module.train(), self.lora[name], kept)
        elif full and self.resumed:
            module.load_state_dict(dict(files.weights_of(self.resumed / name, COMPONENTS[name].stem)))
        if trains and self.settings.gradient_checkpointing:
            recompute_activations(module)

    @torch.no_grad()
    def encode(self) -> None:
        """Encode prompts and pictures once, then let go of the networks that have nothing left to do."""
        s, pipe = self.settings, self.pipe
        self.condition: Condition | None = None
        if not s.train_text_encoder:
            self.condition = pipe.condition(self.prompts)
            self.validation = self.validation_conditions()
            for name in self.texts:
                pipe.release(name)
        batches = range(self.start * s.gradient_accumulation_steps, self.steps * s.gradient_accumulation_steps)
        for latents in self.sets:
            latents.prepare(pipe.vae, (n for batch in batches for n in self.numbers(batch)))
        if not s.validation_prompt:
            pipe.release("vae")

    def train(self) -> None:
        """The whole run, from the first step (or the checkpoint's next) to the saved pipeline.

        Ctrl-C ends it with a checkpoint and KeyboardInterrupt. Raises UserError where the loss is no longer finite.
        """
        s, journal = self.settings, self.journal
        self.prepare()
        if self.ranks.first:
            journal.open(self.start, self.ranks.command)
        if not self.start:
            self.validate(0)
        self.report()
        often = 0.1 if sys.stderr.isatty() else 10
        with (
            interrupts() as interrupted,
            tqdm(total=self.steps, initial=self.start, mininterval=often, desc="training") as bar,
        ):
            for step in range(self.start, self.steps):
                began = time.perf_counter()
                rates = self.set_learning_rates(step)
                losses = self.step(step)
                seconds = time.perf_counter() - began
                done = step + 1
                if self.ranks.first:
                    journal.log(step=done, **losses, lr=rates[0], seconds=round(seconds, 4))
                pace = s.samples(self.ranks.count) * len(self.sets) / seconds
                bar.set_postfix({**losses, "lr": rates[0], "pictures/s": pace}, refresh=False)
                bar.update()
                if done % s.validation_steps == 0 or done == self.steps:
                    self.validate(done)
                    self.report()
                stopped = self.ranks.any(interrupted)
                if done % s.checkpointing_steps == 0 or stopped:
                    self.save_checkpoint(done)
                if stopped and done < self.steps:
                    self.report()
                    raise KeyboardInterrupt(f"go on with the same command and --resume_from_checkpoint latest (step {done})")
        self.save()

    def step(self, step: int) -> dict[str, float]:
        """One update of the weights. Returns the loss and its two parts, means over the accumulated batches and the ranks."""
        s = self.settings
        total = dict.fromkeys(("loss", "subject", "prior"), 0.0)
        for part in range(s.gradient_accumulation_steps):
            last = part + 1 == s.gradient_accumulation_steps
            with contextlib.nullcontext() if last else self.networks.no_sync():
                losses = self.networks(self.losses, step * s.gradient_accumulation_steps + part)
                self.scaler.scale(losses["loss"] / s.gradient_accumulation_steps).backward()
            total = {name: total[name] + losses[name].item() / s.gradient_accumulation_steps for name in total}
        total = self.ranks.mean(total)
        if not math.isfinite(total["loss"]):
            good = [path for number, path in self.journal.checkpoints() if number < step]  # a finite loss came after them
            remedy = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint was written before"
            raise UserError(f"the loss is {total['loss']} at step {step + 1}: lower --learning_rate or use bf16; {remedy}")
        self.scaler.unscale_(self.optimizer)
        if s.max_grad_norm:
            nn.utils.clip_grad_norm_((p for module in self.trained.values() for p in module.parameters()), s.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)  # fresh gradients each step cost a third of it on a CPU: page faults
        return total

    def numbers(self, batch: int) -> range:
        """Of the samples in the run's `batch`-th batch, those of this rank."""
        first = (batch * self.ranks.count + self.ranks.number) * self.settings.train_batch_size
        return range(first, first + self.settings.train_batch_size)

    def losses(self, batch: int) -> dict[str, Tensor]:
        """The objective on this rank's part of the run's `batch`-th batch: B subject samples, then B class samples."""
        numbers = self.numbers(batch)
        samples = [self.sample(latents, n) for latents in self.sets for n in numbers]
        x0, noise, t, *told = (torch.cat(column).to(self.device) for column in zip(*samples, strict=True))
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast, seeded(self.device, self.seed, "dropout", numbers.start):
            condition = self.condition or self.pipe.condition(self.prompts)
            condition = tuple(each.repeat_interleave(len(numbers), dim=0) for each in condition)
            return self.objective(x0, noise, t, condition, *told)

    def objective(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition, *told: Tensor) -> dict[str, Tensor]:
        """The loss of a batch and its parts; on tensors alone, so that it can be compiled as one graph."""
        s, scheduler = self.settings, self.pipe.scheduler
        prediction = self.stage.predict(scheduler.add_noise(x0, noise, t), t, condition, *told)
        weight = s.prior_loss_weight if s.with_prior_preservation else None
        return dreambooth_loss(prediction, scheduler.target(x0, noise, t), t, scheduler, weight, s.snr_gamma)

    def sample(self, latents: Latents, n: int) -> tuple[Tensor, ...]:
        """The run's n-th sample: latent x0 and noise [1, Z, h, w], timestep [1], and what else the UNet is told, [1, ...].

        Depends on (seed, n) alone.
        """
        rng = generator(latents.seed, latents.name, "sample", n)
        posterior, known = latents[n]
        x0 = posterior.sample(rng)
        noise = torch.randn(x0.shape, generator=rng)
        t = torch.randint(self.pipe.scheduler.num_train_timesteps, (1,), generator=rng)
        if self.settings.offset_noise:
            noise = noise + OFFSET_NOISE * torch.randn(*x0.shape[:2], 1, 1, generator=rng)
        return x0, noise, t, *self.stage.tell(known, rng)

    def set_learning_rates(self, step: int) -> list[float]:
        """Give the optimizer this step's rates, one per trained network."""
        s = self.settings
        scale = s.samples(self.ranks.count) if s.scale_lr else 1
        for group in self.optimizer.param_groups:
            peak = group["peak"] * scale
            rate = learning_rate(s.lr_scheduler, peak, step, self.steps, s.lr_warmup_steps, s.lr_num_cycles, s.lr_power)
            group["lr"] = rate
        return [group["lr"] for group in self.optimizer.param_groups]

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """samples/step-N.png: the validation prompt from the same noise each time; the training's randomness is untouched.

        With a metrics model the bare class is drawn too, and their figures are logged.
        """
        s = self.settings
        if not s.validation_prompt:
            return
        self.networks.eval()  # no dropout
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast, torch.compiler.set_stance("force_eager"):  # other shapes than a step's: a graph that is seldom needed
            rows = self.networks(self.show)
        self.networks.train()
        if not self.ranks.first:
            return
        if self.watch:
            of_class = rows.pop() if s.class_prompt else []
            self.journal.log(step=step, **self.watch.look([picture for row in rows for picture in row], of_class))
        about = {"prompt": s.validation_prompt, "step": str(step), "seed": str(self.seed)}
        path = self.journal.folder / "samples" / f"step-{step}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(grid([picture for row in rows for picture in row], columns=len(rows[0])), path, about)
        before = path.with_name("step-0.png")
        if step == self.steps and before.exists():
            save_png(grid([Image.open(before), Image.open(path)], columns=2), path.with_name("before-after.png"), about)

    def show(self) -> list[list[Image.Image]]:
        """Rows of pictures for the validation prompts, from the same noise each time."""
        conditions, unconditional = self.validation if self.condition else self.validation_conditions()
        return self.stage.show(conditions, unconditional, range(self.seed, self.seed + self.settings.num_validation_images))

    def report(self) -> None:
        """report.html as of now; a run does not end because its page cannot be written."""
        if not self.ranks.first:
            return
        try:
            report.write(self.journal.folder)
        except (OSError, ValueError) as error:
            tqdm.write(f"report.html was not written: {error}", file=sys.stderr)

    def validation_conditions(self) -> tuple[list[Condition], Condition]:
        """The validation prompts (to be watched, with the class prompt), and what guidance leads away from, encoded."""
        s = self.settings
        prompts = (s.validation_prompt or "").split("|") + [s.class_prompt] * bool(self.watch and s.class_prompt)
        return [self.pipe.condition([prompt.strip()]) for prompt in prompts], self.pipe.unconditional(None)

    def save_checkpoint(self, step: int) -> None:
        """checkpoint-N with all that the next step depends on; older ones go only when it is whole."""
        weights, adapters = self.learnt()
        state = self.ranks.whole(moments(self.optimizer, self.trained))
        if not self.ranks.first:
            return
        with files.replacing(self.journal.folder / f"checkpoint-{step}") as folder:
            if adapters:
                self.save_lora(folder, KOHYA, adapters)
            for name, tensors in weights.items():
                files.write_weights(folder / name / f"{COMPONENTS[name].stem}.safetensors", tensors)
                (folder / name / "config.json").write_bytes(self.pipe.source.files[f"{name}/config.json"])
            files.write_weights(folder / "optimizer.safetensors", state)
            how = {name: getattr(self.settings, name) for name in SAME}
            about = {"step": step, "seed": self.seed, "scaler": self.scaler.state_dict(), **how}
            (folder / "state.json").write_text(json.dumps(about))
        self.journal.prune()

    def save(self) -> None:
        """The result."""
        folder = self.journal.folder
        weights, adapters = self.learnt()
        if not self.ranks.first:
            return
        if adapters:
            self.save_lora(folder, f"{folder.resolve().name}.safetensors", adapters)
        else:
            self.pipe.source.save(self.result, weights)  # the others as they were read, whatever they computed in
            if self.result != folder:  # what a single file lacks
                self.pipe.source.save_vocabulary(folder)

    @torch.no_grad()
    def learnt(self) -> tuple[dict[str, dict[str, Tensor]], lora_files.Adapters]:
        """Whole on the first rank, by network: the weights of those that train, or else their LoRA."""
        if not self.lora:
            return {name: self.ranks.whole(module.state_dict()) for name, module in self.trained.items()}, {}

        def whole(x: Adapter) -> Adapter:
            both = self.ranks.whole({"down": x.down, "up": x.up})
            return Adapter(both["down"], both["up"], x.alpha)

        return {}, {name: {layer: whole(x) for layer, x in made.items()} for name, made in self.lora.items()}

    def save_lora(self, folder: Path, name: str, adapters: lora_files.Adapters) -> None:
        """diffusers' file, and kohya's as `name` with what his programs, A1111 and civitai show of a LoRA."""
        s, source = self.settings, self.pipe.source
        xl = source.kind == "StableDiffusionXLPipeline"
        sd2 = not xl and self.pipe.unet.config.use_linear_projection
        tags = {latents.name: {prompt: 1} for latents, prompt in zip(self.sets, self.prompts, strict=True)}
        about = dict(
            network_module="networks.lora", network_dim=s.rank, network_alpha=s.lora_alpha or s.rank, v2=sd2,
            base_model_version="sdxl_base_v1-0" if xl else "sd_v2" if sd2 else "sd_v1", sd_model_name=Path(source.name).name,
            output_name=Path(s.output_dir).resolve().name, resolution=(s.resolution, s.resolution), steps=self.steps,
            learning_rate=s.learning_rate, seed=self.seed, tag_frequency=json.dumps(tags),
        )  # fmt: skip
        lora_files.write(folder, name, adapters, {f"ss_{key}": str(value) for key, value in about.items()})

    def summary(self) -> list[tuple[str, str]]:
        """What will run, as rows of a table."""
        s = self.settings
        sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in self.pipe.networks.items()}
        updates = {name: sum(x.down.numel() + x.up.numel() for x in made.values()) for name, made in self.lora.items()}
        trained = updates or {name: sizes[name] for name in self.trained}
        shards = {name: self.ranks.shards if name in self.trained else 1 for name in sizes}
        frozen = sum(size / shards[name] for name, size in sizes.items() if updates or name not in trained)
        each = (2 if s.full_bf16 else 4) * (1 if s.fused_backward_pass else 2) + (2 + 8 / BLOCK if s.use_8bit_adam else 8)
        memory = each * sum(trained.values()) / self.ranks.shards + self.dtype.itemsize * frozen
        batch = " + ".join([str(s.train_batch_size)] * len(self.sets))
        batch += f" in each of {self.ranks.count} processes" * (self.ranks.count > 1)
        rows = [
            ("model", f"{self.pipe.source.name}, predicts {self.pipe.scheduler.prediction_type}"),
            ("trains", ", ".join(f"{name}, {size / 1e6:.1f} M parameters" for name, size in trained.items())),
            (
                "steps",
                f"{self.start} to {self.steps}, batch {batch}, {s.resolution} px, learning rate {s.learning_rate:g}",
            ),
            ("device", f"{self.device}, {str(self.dtype).removeprefix('torch.')}"),
            ("memory", f"{memory / 2**30:.1f} GiB of weights, gradients and moments, besides activations"),
            *((latents.name, f"{len(latents.pictures)} pictures") for latents in self.sets),
        ]
        if s.with_prior_preservation and self.prior.missing:
            rows.append(("", f"{len(self.prior.missing)} of them are drawn first, to {self.prior.folder}"))
        if self.skipped:
            rows.append(("skipped", ", ".join(path.name for path in self.skipped)))
        notes = [*s.notes(), *doubts(self.pipe.tokenizer, s.instance_prompt, s.class_prompt)]
        return rows + [("note", note) for note in notes]


def recompute_activations(module: nn.Module) -> None:
    """Gradient checkpointing (Chen et al. 2016) from outside: these parts forget what they computed and do it again."""
    for part in module.modules():
        if isinstance(part, BLOCKS):
            forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
            part.forward = forward  # type: ignore[method-assign]


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, so that a step is finished before one acts on them; a second one is not waited for."""
    caught: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

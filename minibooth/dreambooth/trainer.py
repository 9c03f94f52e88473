"""DreamBooth's training: photograph -> latent -> noise -> UNet -> loss -> step. Ruiz et al. 2022, arXiv 2208.12242.

Whatever does not train is computed once, before the loop. All randomness is keyed by what it is for and the sample's number, so
a resumed run ends in the bits of one that was never stopped, and drawing pictures on the way changes nothing.

Shapes: B subject samples of a batch and process (2B rows with prior preservation), Z latent channels, h x w latent size.
"""

import contextlib
import dataclasses
import gc
import json
import math
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minibooth.checkpoint import files
from minibooth.checkpoint.source import Source
from minibooth.diffusion import load
from minibooth.diffusion.images import grid, save_png
from minibooth.diffusion.noise import generator, seeded
from minibooth.diffusion.pipeline import Condition
from minibooth.dreambooth import report, speed, stages
from minibooth.dreambooth.data import find_pictures
from minibooth.dreambooth.identifier import prompt_warnings
from minibooth.dreambooth.journal import Journal, common
from minibooth.dreambooth.latents import Latents
from minibooth.dreambooth.learning_rate import learning_rate
from minibooth.dreambooth.metrics import Watch
from minibooth.dreambooth.objective import dreambooth_loss
from minibooth.dreambooth.optimizer import AdamW, moments, restore
from minibooth.dreambooth.parallel import Ranks
from minibooth.dreambooth.prior import ClassPictures
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.weights import Learnt, Weights
from minibooth.errors import Terminated, UserError

OFFSET_NOISE = 0.1  # Guttenberg 2023, "Diffusion with offset noise"


class Trainer:
    """One run of Settings on `device`.

    Networks compute in `dtype`, under autocast unless all weights are in it; class pictures are drawn in `prior_dtype`. Where
    this is one of many processes, `ranks` knows of the others.

    Raises UserError for whatever would stop the run later and can be known now.
    """

    def __init__(
        self, settings: Settings, device: torch.device, dtype: torch.dtype, prior_dtype: torch.dtype, ranks: Ranks | None = None
    ):
        settings.check()
        self.device, self.dtype, self.ranks = device, dtype, ranks or Ranks(device)
        self.journal = Journal(settings)
        self.resumed, self.state = self.journal.resume()
        self.start: int = self.state["step"]
        if self.ranks.broadcast(self.start) != self.start:
            raise UserError(f"--output_dir {settings.output_dir} is not the same folder for all processes: take a shared one")
        seed = self.state.get("seed", secrets.randbits(31)) if settings.seed is None else settings.seed
        self.seed = self.ranks.broadcast(seed)
        self.settings = s = self.journal.settings = dataclasses.replace(settings, seed=self.seed)

        pictures, self.skipped = find_pictures(Path(s.instance_data_dir))
        how = {name: getattr(s, name) for name in ("variant", "revision", "tokenizer", "prediction_type")}
        self.pipe = load(Source.open(s.pretrained_model_name_or_path, **how))
        self.stage = stages.of(self.pipe)(s, self.pipe, pictures)
        self.watch = Watch(s.metrics_model, pictures, device) if s.metrics_model and s.validation_prompt else None
        self.sets, self.prompts = [Latents("subject", pictures, self.stage, self.seed)], [s.instance_prompt]
        if s.with_prior_preservation:
            self.prior, self.prior_dtype = ClassPictures(s, self.pipe.source, prior_dtype), prior_dtype
            self.stage.check(self.prior.pictures, drawn=len(self.prior.missing))
            self.sets.append(Latents("class", self.prior.pictures, self.stage, self.seed))
            self.prompts.append(s.class_prompt)
        self.steps = s.steps(max(len(latents.pictures) for latents in self.sets), self.ranks.world_size)
        if self.start > self.steps:
            raise UserError(f"{self.resumed} is past the last step, {self.steps}: raise --max_train_steps")
        if s.lr_scheduler not in ("constant", "constant_with_warmup") and s.lr_warmup_steps >= self.steps:
            raise UserError(f"--lr_warmup_steps {s.lr_warmup_steps} leaves nothing of {self.steps} steps; set it to 0")
        self.scale = s.samples(self.ranks.world_size) if s.scale_lr else 1  # of learning rates
        self.pipe.tokenizer([*self.prompts, s.validation_prompt or ""])  # which refuses what is no text
        self.weights = Weights(s, self.pipe, self.seed, self.resumed)
        self.trained = self.weights.trained

    def prepare(self) -> None:
        """Everything before the first step: class pictures, networks in place, encoded prompts and pictures, the optimizer."""
        if self.settings.with_prior_preservation and self.prior.missing:
            self.draw_class_pictures()
        self.weights.place(self.device, self.dtype)
        if not self.ranks.sharded:
            speed.channels_last(self.pipe.unet, self.device)
        self.networks = self.ranks.join(self.trained, self.dtype)
        self.encode()
        self.make_optimizer()

    def draw_class_pictures(self) -> None:
        """Those that are missing, by the model before its training; each rank draws a part."""
        self.ranks.wait()  # until all know what is missing
        pipe = load(self.pipe.source, self.prior_dtype, self.device)
        speed.draw_faster(pipe, self.settings, self.device)
        self.prior.draw(pipe, self.ranks.rank, self.ranks.world_size)
        del pipe
        gc.collect()  # the UNet and its Graph hold each other: nothing else frees their memory
        self.ranks.wait()

    def make_optimizer(self) -> None:
        """AdamW for what trains, in the checkpoint's state; its update compiled, and a whole step recorded, where that pays."""
        s, groups = self.settings, self.weights.groups()
        betas = s.adam_beta1, s.adam_beta2
        self.optimizer = AdamW(groups, betas, s.adam_epsilon, s.adam_weight_decay, s.use_8bit_adam, self.seed, s.max_grad_norm)
        if s.fused_backward_pass:
            self.optimizer.step_in_backward()
        # `update` is ours then, no kernel of PyTorch's
        if speed.compilable(s, self.device, pays=self.device.type == "cuda" and (s.use_8bit_adam or s.full_bf16)):
            self.optimizer.compile()
            for network in self.trained.values() if s.compile == "on" else ():
                speed.compile_layers(network)
        scaled = self.dtype == torch.float16  # an update that overflowed is left out, as the host decides
        if self.ranks.world_size == 1 and not scaled and speed.replayable(s, self.device):
            for group in self.optimizer.param_groups:
                group["lr"] = torch.zeros((), device=self.device)
            self.update = speed.Graph(self.update)  # type: ignore[method-assign]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        if self.resumed:
            restore(self.optimizer, self.trained, files.Tensors([self.resumed / "optimizer.safetensors"]))
            if scale := self.state.get("scaler"):  # empty where it was not in fp16
                self.scaler.load_state_dict(scale)

    @torch.no_grad()
    def encode(self) -> None:
        """Encode prompts and pictures once, then let go of the networks that have nothing left to do."""
        s, pipe = self.settings, self.pipe
        self.condition: Condition | None = None
        self.tokens = pipe.tokens(self.prompts)
        if not s.train_text_encoder:
            self.condition = pipe.encode(*self.tokens)
            self.validation = self.validation_conditions()
            for name in pipe.texts:
                pipe.release(name)
        batches = range(self.start * s.gradient_accumulation_steps, self.steps * s.gradient_accumulation_steps)
        for latents in self.sets:
            latents.prepare(pipe.vae, (n for batch in batches for n in self.sample_indices(batch)))
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
        with interrupts() as interrupted, tqdm(total=self.steps, initial=self.start, mininterval=often, desc="training") as bar:
            for step in range(self.start, self.steps):
                began = time.perf_counter()
                rates = self.set_learning_rates(step)
                losses = self.step(step)
                seconds = time.perf_counter() - began
                done = step + 1
                if self.ranks.first:
                    journal.log(step=done, **losses, lr=rates[0], seconds=round(seconds, 4))
                pace = s.samples(self.ranks.world_size) * len(self.sets) / seconds
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
                    latest = f"go on with the same command and --resume_from_checkpoint latest (step {done})"
                    raise interruption(latest, interrupted)
            self.save()
        if self.ranks.any(interrupted):
            raise interruption(f"all {self.steps} steps were done, and {journal.folder} holds the result", interrupted)

    def step(self, step: int) -> dict[str, float]:
        """One update of the weights. Returns the loss and its two parts, means over the accumulated batches and the ranks."""
        first, names = step * self.settings.gradient_accumulation_steps, ("loss", "subject", "prior")
        batches = [self.batch(first + part) for part in range(self.settings.gradient_accumulation_steps)]
        with seeded(self.device, self.seed, "dropout", self.sample_indices(first).start):
            total = self.update(*(x for batch in batches for x in batch))
        found = self.ranks.mean(dict(zip(names, total.tolist(), strict=True)))  # only now does a GPU have to be waited for
        if not math.isfinite(found["loss"]):
            raise self.diverged(f"the loss is {found['loss']}", step + 1)
        return found

    def diverged(self, what: str, step: int) -> UserError:
        """What ends a run whose numbers are no longer finite."""
        good = [path for number, path in self.journal.checkpoints() if number < step - 1]  # a finite loss came after them
        remedy = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint was written before"
        reason = "lower --learning_rate, use bf16, or take a model whose weights are whole"
        return UserError(f"{what} at step {step}: {reason}; {remedy}")

    def batch(self, batch: int) -> tuple[Tensor, ...]:
        """This rank's part of the run's `batch`-th batch, on the device: B subject samples, then B class samples."""
        samples = [self.sample(latents, n) for latents in self.sets for n in self.sample_indices(batch)]
        return tuple(torch.cat(column).to(self.device) for column in zip(*samples, strict=True))

    def sample(self, latents: Latents, n: int) -> tuple[Tensor, ...]:
        """The run's n-th sample: latent x0 and noise [1, Z, h, w], timestep [1], and what else the UNet is told, [1, ...].

        Depends on the seed, which set it is and n alone.
        """
        rng = generator(latents.seed, latents.name, "sample", n)
        posterior, known = latents[n]
        x0 = posterior.sample(rng)
        noise = torch.randn(x0.shape, generator=rng)
        t = torch.randint(self.pipe.scheduler.num_train_timesteps, (1,), generator=rng)
        if self.settings.offset_noise:
            noise = noise + OFFSET_NOISE * torch.randn(*x0.shape[:2], 1, 1, generator=rng)
        return x0, noise, t, *self.stage.conditioning(known, rng)

    def sample_indices(self, batch: int) -> range:
        """Of the samples in the run's `batch`-th batch, those of this rank."""
        first = (batch * self.ranks.world_size + self.ranks.rank) * self.settings.train_batch_size
        return range(first, first + self.settings.train_batch_size)

    def update(self, *batches: Tensor) -> Tensor:
        """All that a device does in a step on one or more `batch`es, one after the other: [loss, subject, prior], means.

        The same kernels run whatever the values are, and none is waited for, so that it can be captured as a CUDA graph.
        """
        parts = self.settings.gradient_accumulation_steps
        size, total = len(batches) // parts, torch.zeros(3, device=self.device)
        for part in range(parts):
            with contextlib.nullcontext() if part + 1 == parts else self.networks.no_sync():
                # `losses`, called through what DDP or FSDP made of the networks, so that they see a forward pass
                losses = self.networks(self.losses, *batches[part * size : (part + 1) * size])
                self.scaler.scale(losses["loss"] / parts).backward()
            total += torch.stack([x.detach() for x in losses.values()]) / parts
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total

    def losses(self, x0: Tensor, noise: Tensor, t: Tensor, *added: Tensor) -> dict[str, Tensor]:
        """Eq. 2 on a `batch` (B or 2B rows of what `sample` gives), and its parts; called through what makes processes one."""
        s, scheduler = self.settings, self.pipe.scheduler
        with self.autocast():
            condition = self.condition or self.pipe.encode(*self.tokens)
            # one row each for subject and class -> one for each sample, in the batch's order
            condition = tuple(each.repeat_interleave(len(x0) // len(self.sets), dim=0) for each in condition)
            prediction = self.stage.predict(scheduler.add_noise(x0, noise, t), t, condition, *added)
            weight = s.prior_loss_weight if s.with_prior_preservation else None
            return dreambooth_loss(prediction, scheduler.target(x0, noise, t), t, scheduler, weight, s.snr_gamma)

    def autocast(self) -> torch.autocast:
        """Into the working precision, where some weights are kept in another."""
        needed, kind = self.dtype != torch.float32 and not self.settings.full_bf16, self.device.type
        # The cache would hold a copy of every weight while a grid is drawn; only to a CPU casting them anew takes long.
        return torch.autocast(kind, self.dtype, enabled=needed, cache_enabled=kind == "cpu")

    def set_learning_rates(self, step: int) -> list[float]:
        """Give the optimizer this step's rates, one per trained network."""
        s, rates = self.settings, []
        for group in self.optimizer.param_groups:
            peak = group["peak"] * self.scale
            rate = learning_rate(s.lr_scheduler, peak, step, self.steps, s.lr_warmup_steps, s.lr_num_cycles, s.lr_power)
            rates.append(rate)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        return rates

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """samples/step-N.png: the validation prompt from the same noise each time; the training's randomness is untouched.

        With a metrics model the bare class is drawn too, and their figures are logged.
        """
        s = self.settings
        if not s.validation_prompt:
            return
        self.networks.eval()  # no dropout
        with self.autocast(), torch.compiler.set_stance("force_eager"):  # other shapes than a step's, and seldom
            rows = self.networks(self.show)
        self.networks.train()
        if not self.ranks.first:
            return
        of_class = rows.pop() if self.watch and s.class_prompt else []
        pictures = [picture for row in rows for picture in row]
        if self.watch:
            self.journal.log(step=step, **self.watch.measure(pictures, of_class))
        about = {"prompt": s.validation_prompt, "step": str(step), "seed": str(self.seed)}
        about |= {"caption": self.stage.caption} if self.stage.caption else {}
        path = self.journal.folder / "samples" / f"step-{step}.png"
        save_png(grid(pictures, columns=len(rows[0])), path, about)
        if step == self.steps:
            with contextlib.suppress(Exception):  # no picture of step 0, or a broken one
                both = [Image.open(path.with_name("step-0.png")), Image.open(path)]
                save_png(grid(both, columns=2), path.with_name("before-after.png"), about)

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
        except Exception as error:
            tqdm.write(f"report.html was not written: {error}", file=sys.stderr)

    def validation_conditions(self) -> tuple[list[Condition], Condition]:
        """The validation prompts (to be watched, with the class prompt), and what guidance leads away from, encoded."""
        s = self.settings
        prompts = s.validation_prompts() + [s.class_prompt] * bool(self.watch and s.class_prompt)
        return [self.pipe.condition([prompt]) for prompt in prompts], self.pipe.unconditional(None)

    def save_checkpoint(self, step: int) -> None:
        """checkpoint-N with all that the next step depends on; older ones go only when it is whole."""
        learnt = self.learnt(step)
        state = self.ranks.gather(moments(self.optimizer, self.trained))
        if not self.ranks.first:
            return
        with files.replacing(self.journal.folder / f"checkpoint-{step}") as folder:
            self.weights.write_checkpoint(folder, learnt, self.steps)
            files.write_weights(folder / "optimizer.safetensors", state)
            about = {"step": step, "seed": self.seed, "scaler": self.scaler.state_dict(), **common(self.settings)}
            (folder / "state.json").write_text(json.dumps(about))
        self.journal.prune()

    def save(self) -> None:
        """The result."""
        learnt = self.learnt(self.steps)
        if self.ranks.first:
            self.weights.write(learnt, self.steps)
            self.journal.note(finished=True)

    def learnt(self, step: int) -> Learnt:
        """What training changed up to a step, whole on the first rank. Raises UserError where it is not finite."""
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        if self.ranks.any(not all(p.isfinite().all() for p in parameters)):
            raise self.diverged("the weights are not finite", step)
        return self.weights.learnt(self.ranks)

    def summary(self) -> list[tuple[str, str]]:
        """What will run, as rows of a table."""
        s = self.settings
        memory = self.weights.bytes(self.dtype, self.ranks.world_size if self.ranks.sharded else 1)
        batch = " + ".join([str(s.train_batch_size)] * len(self.sets))
        batch += f" in each of {self.ranks.world_size} processes" * (self.ranks.world_size > 1)
        rows = [
            ("model", f"{self.pipe.source.name}, predicts {self.pipe.scheduler.prediction_type}"),
            ("trains", ", ".join(f"{name}, {size / 1e6:.1f} M parameters" for name, size in self.weights.sizes().items())),
            ("steps", f"{self.start} to {self.steps}, batch {batch}, {s.resolution} px"),
            ("rate", f"{s.learning_rate * self.scale:g}, {s.lr_scheduler}"),
            ("device", f"{self.device}, {str(self.dtype).removeprefix('torch.')}"),
            ("memory", f"{memory / 2**30:.1f} GiB of weights, gradients and moments, besides activations"),
            *((latents.name, f"{len(latents.pictures)} pictures") for latents in self.sets),
        ]
        if s.with_prior_preservation and self.prior.missing:
            rows.append(("", f"{len(self.prior.missing)} of them are drawn first, to {self.prior.folder}"))
        if self.skipped:
            rows.append(("skipped", ", ".join(path.name for path in self.skipped)))
        notes = [*s.notes(), *self.stage.warnings(), *prompt_warnings(self.pipe.tokenizer, s.instance_prompt, s.class_prompt)]
        notes += self.pipe.tokenizer.truncation_warnings([s.instance_prompt, s.class_prompt, *s.validation_prompts()])
        return rows + [("note", note) for note in notes]


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, so that a step is finished before one acts on them; a second one is not waited for."""
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler)

    with contextlib.ExitStack() as undo:
        for number in (signal.SIGINT, signal.SIGTERM):
            if (previous := signal.getsignal(number)) != signal.SIG_IGN:
                undo.callback(signal.signal, number, previous)
                signal.signal(number, handle)
        yield caught


def interruption(words: str, caught: Sequence[int]) -> KeyboardInterrupt:
    """What ends a run that caught these signals."""
    return (Terminated if signal.SIGTERM in caught else KeyboardInterrupt)(words)

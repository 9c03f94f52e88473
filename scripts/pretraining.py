"""What the scripts that make weights/ share: a network on its way, and the folder it ends in.

Shapes: B batch, H x W picture size.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from world import Mark, Scene, draw_all

from minibooth import command
from minibooth.checkpoint import files
from minibooth.checkpoint.source import Source
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.dreambooth.speed import Graph
from minibooth.models.tokenizer import END, START
from minibooth.models.vae import VAE

LIBRARY_CLASSES = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "low_res_scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def start(parser: command.Parser, argv: Sequence[str], seed: int) -> argparse.Namespace:
    """The script's flags, --threads among them, with PyTorch seeded and a thread to each operation."""
    parser.add_argument("--threads", type=command.within(1), default=os.cpu_count(), help="cores to use (default all)")
    args = parser.parse_args(command.normalise(argv))
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # threads share out the batch instead (Training)
    command.ready_folder(args.work)
    return args


def drawn(
    path: Path, scenes: Sequence[Scene], size: int, workers: int, marks: Iterable[Mark | None] = repeat(None)
) -> np.ndarray:
    """The scenes' pictures, uint8 [N, size, size, 3], drawn once and kept in a file."""
    if not path.exists():
        images = draw_all(scenes, size, workers, marks)
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, images)
    return np.load(path)


def to_batch(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2) / 127.5 - 1


def generator_on(device: torch.device, rng: torch.Generator) -> torch.Generator:
    """A generator as it is, or one of the device, which draws there what would be slow to bring."""
    return rng if device.type == "cpu" else torch.Generator(device).manual_seed(rng.initial_seed())


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures [B, 3, H, W] in [-1, 1], dB."""
    return (-10 * (0.25 * (x - y).square().mean(dim=(1, 2, 3))).log10()).mean().item()


@torch.no_grad()
def reconstructed(vae: VAE, x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] through the VAE and back."""
    parts = x.to(vae.quant_conv.weight.device).split(16)
    return torch.cat([vae.decode(vae.encode(part).mean) for part in parts]).clamp(-1, 1).to(x.device)


def averages(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a training's file. Raises UserError where it is missing."""
    return {name.removeprefix("average."): x for name, x in files.Tensors([path]).items() if name.startswith("average.")}


def vocabulary(tokens: dict[str, bytes]) -> dict[str, int]:
    """What a text encoder's configuration says of its tokenizer's files."""
    ids = json.loads(tokens["vocab.json"])
    return {"vocab_size": len(ids), "bos_token_id": ids[START], "eos_token_id": ids[END]}


def noised(scheduler: DDPMScheduler, x0: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [B, Z, h, w] at timesteps spread evenly over the schedule: x_t, t, target, weights [B, 1, 1, 1]."""
    places = torch.arange(len(x0), device=x0.device) + torch.rand(len(x0), generator=noise, device=x0.device)
    t = (places * (1000 / len(x0))).long()
    eps = torch.randn(x0.shape, generator=noise, device=x0.device)
    snr = scheduler.snr(t)
    weight = (snr.clamp(max=5) + 1) / (snr + 1)  # min-SNR's limit on the last, easy details; the rest counts alike
    return scheduler.add_noise(x0, eps, t), t, scheduler.target(x0, eps, t), weight[:, None, None, None]


def weighted(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean squared error."""
    return (weight * (prediction.float() - target).square()).mean()


def export(
    out: Path, index: dict, configs: dict[str, dict], networks: Mapping[str, nn.Module], tokens: dict[str, bytes]
) -> None:
    """Write the diffusers layout in fp16: `index` and the configurations, with what is measured put in, and the networks."""
    measured = {"vae": {"scaling_factor": networks["vae"].config.scaling_factor}, "text_encoder": vocabulary(tokens)}
    classes = {"tokenizer": ["transformers", "CLIPTokenizer"], **{part: LIBRARY_CLASSES[part] for part in configs}}
    small = {"model_index.json": json.dumps(index | classes, indent=2).encode()}
    small |= {f"tokenizer/{name}": data for name, data in tokens.items()}
    for part, config in configs.items():
        name = "scheduler_config.json" if part.endswith("scheduler") else "config.json"
        small[f"{part}/{name}"] = json.dumps(config | measured.get(part, {}), indent=2).encode()
    Source(str(out), small, {part: network.state_dict() for part, network in networks.items()}).save(out, {}, torch.float16)


def start_at_zero(network: nn.Module, names: tuple[str, ...]) -> None:
    """Zero the layers so named: what is added to a residual stream starts at nothing, as in Ho et al. 2020's code."""
    for name, module in network.named_modules():
        if name.endswith(names):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def newton_schulz(x: Tensor) -> Tensor:
    """About the orthogonal matrices nearest to those of x [K, rows, ...], by Newton and Schulz; columns are all other axes."""
    rows = x.flatten(2).bfloat16()
    wide = rows if rows.shape[1] < rows.shape[2] else rows.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.775 * square) @ wide
    return (wide if rows.shape[1] < rows.shape[2] else wide.mT).reshape(x.shape).to(x.dtype)


class Training:
    """A network on its way: optimiser, moving average and clock, all in one file from which a restart goes on.

    loss(network, *batch) is a scalar. On a CPU each thread takes its share of the batch: two threads of one core each
    beat operations spread over two cores by 40 %. On a GPU a step is one graph of kernels, since starting them one by one
    would take longer than they do. Matrices learn by Muon (Jordan et al. 2024), which moves in every direction alike: the
    VAE reaches in 500 steps what it does not in 4,000 by Adam, to which light and dark are all. Vectors and embeddings
    learn by Adam at a tenth of the rate. The rate is constant and falls to zero over the last two thirds of the budget;
    with a larger budget it comes up again.
    """

    def __init__(self, path: Path, network: nn.Module, loss: Callable[..., Tensor], rate: float, minutes: float, threads: int):
        self.path, self.network, self.loss, self.rate, self.budget = path, network, loss, rate, 60 * minutes
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.parameters, self.averages = dict(network.named_parameters()), dict(self.average.named_parameters())
        self.momentum = {name: torch.zeros_like(x) for name, x in self.parameters.items()}
        vectors = {name: x for name, x in self.parameters.items() if x.dim() < 2 or "embedding.weight" in name}
        self.square = {name: torch.zeros_like(x) for name, x in vectors.items()}
        alike: dict[tuple, list[str]] = {}
        for name, x in self.parameters.items():
            alike.setdefault((name in vectors, x.shape), []).append(name)
        self.groups = [*alike.values()]  # of one shape and kind: they are updated together
        self.clock = torch.zeros(3, dtype=torch.float64)  # steps, samples seen, seconds
        self.device = next(network.parameters()).device
        self.now = torch.zeros(4, device=self.device)  # the step's rate, Adam's two corrections, the average's weight
        self.run_step = Graph(self.work) if self.device.type == "cuda" else self.work
        self.shares = threads if self.device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.shares)
        if path.exists():
            for name, x in load_file(path).items():
                self.state[name].copy_(x)

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything a restart needs, in place."""
        parts = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "momentum": self.momentum,
            "square": self.square,
            "clock": {"": self.clock},
        }
        return {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}

    @property
    def seconds(self) -> float:
        """Time spent so far, over all calls."""
        return self.clock[2].item()

    def gradients(self, share: Sequence[Tensor], size: int) -> tuple[Tensor, Sequence[Tensor]]:
        """One thread's part of a step on a batch of that size."""
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):  # the cache is common to all threads
            loss = self.loss(self.network, *share) * len(share[0]) / size
        return loss.detach(), torch.autograd.grad(loss, list(self.parameters.values()))

    @torch.no_grad()
    def update(self, names: Sequence[str], gradients: list[Tensor]) -> None:
        """A step of parameters of one shape along their gradients."""
        rate, first, second, weight = self.now.unbind()
        tables = self.momentum, self.parameters, self.averages
        old = [[table[name] for name in names] for table in tables]
        momentum, parameter, average = (torch.stack(column) for column in old)
        gradient = torch.stack(gradients)
        momentum.lerp_(gradient, 0.05)
        if names[0] in self.square:
            squares = [self.square[name] for name in names]
            square = torch.stack(squares).lerp_(gradient.square(), 0.01)
            torch._foreach_copy_(squares, square.unbind())
            parameter -= 0.1 * rate / first * momentum / ((square / second).sqrt() + 1e-8)
        else:
            tall = max(1.0, len(parameter[0]) / parameter[0, 0].numel()) ** 0.5
            parameter -= rate * tall * newton_schulz(gradient.lerp(momentum, 0.95))
        average += weight * (parameter - average)
        for column, new in zip(old, (momentum, parameter, average), strict=True):
            torch._foreach_copy_(column, new.unbind())

    def work(self, *batch: Tensor) -> Tensor:
        """The operations of a step; returns the loss."""
        spread = self.pool.map if self.shares > 1 else map  # another thread's would not be captured
        shares = zip(*(x.chunk(self.shares) for x in batch), strict=True)
        losses, parts = zip(*spread(self.gradients, shares, repeat(len(batch[0]))), strict=True)
        whole = {name: sum(same) for name, *same in zip(self.parameters, *parts, strict=True)}
        list(spread(self.update, self.groups, [[whole[name] for name in names] for names in self.groups]))
        return torch.stack(losses).sum()

    def step(self, batch: Sequence[Tensor]) -> Tensor:
        """One update; returns the loss."""
        self.clock += torch.tensor([1, len(batch[0]), 0])
        step, left = self.clock[0].item(), 1 - self.seconds / self.budget
        rate = self.rate * max(0.0, min(1.0, step / 100, 1.5 * left))
        weight = max(9 / (step + 9), 2e-4)  # an average over about the last tenth of all steps
        self.now.copy_(torch.tensor([rate, 1 - 0.95**step, 1 - 0.99**step, weight]))
        return self.run_step(*(x.to(self.device) for x in batch))

    def run(self, draw: Callable[[int], Sequence[Tensor]], show: Callable[[], None]) -> None:
        """Train on draw(step) until the budget is spent, with a line a minute, the state every third, a show every tenth.

        It ends with a show, also where the budget was spent before.
        """
        losses: list[Tensor] = []
        last = logged = kept = shown = time.monotonic()
        while self.seconds < self.budget:
            losses.append(self.step(batch := draw(int(self.clock[0]))))
            if len(losses) % 16 == 0:
                losses[-1].item()  # a GPU is not left far behind, or the clock would be wrong
            now = time.monotonic()
            self.clock[2] += now - last
            last = now
            over = self.seconds >= self.budget
            if now - logged > min(60, self.budget / 10) or over:
                loss, speed = torch.stack(losses).mean().item(), len(losses) * len(batch[0]) / (now - logged)
                done = f"{self.seconds / 60:.1f} of {self.budget / 60:g} min, step {self.clock[0]:.0f}"
                print(f"{self.path.stem}: {done}, {speed:.1f} samples/s, loss {loss:.4f}", flush=True)
                losses, logged = [], now
            if now - kept > 180 or over:
                files.write_weights(self.path, self.state)
                kept = now
            if now - shown > 600:
                show()
                shown = now
        show()

"""What a training step takes and holds, counted on tensors without storage; and what this machine could do.

    python scripts/counting.py --pretrained_model_name_or_path FOLDER --resolution 512 \\
        --instance_data_dir PHOTOGRAPHS --instance_prompt "a photo of sks dog"

The flags are those of minibooth.train. FOLDER is one in the diffusers layout, here; neither its weights nor the photographs
are read.
Runs two steps, optimizer included, as a GPU with flash attention would in bf16 (under autocast, but with --full_bf16), and
prints the second's peak.
Besides it a process on a GPU holds CUDA's own memory (about half a GiB) and what its allocator loses to fragments.
"""

import contextlib
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minibooth import command, train
from minibooth.checkpoint.source import COMPONENTS, INDEX, KINDS, Source
from minibooth.dreambooth.optimizer import AdamW
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.weights import recompute_activations
from minibooth.errors import UserError
from minibooth.models import lora

IN_BF16 = "conv2d", "linear", "scaled_dot_product_attention", "group_norm", "layer_norm"


def described(folder: Path) -> Source:
    """A model's configurations, whether or not it has weights. Raises UserError for no folder in the diffusers layout."""
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} is no folder in the diffusers layout here")
    return Source(str(folder), {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.json")})


def filled(model: Path, folder: Path) -> Path:
    """A model's folder; where it has configurations alone, a copy in `folder` with random weights."""
    source = described(model)
    if any(model.glob("unet/*.safetensors")):
        return model
    copy = Path(shutil.copytree(model, folder / "model"))
    for name in KINDS[source.kind]:
        state = {key: torch.randn(x.shape) * x[0].numel() ** -0.5 for key, x in source.skeleton(name).state_dict().items()}
        save_file(state, copy / name / f"{COMPONENTS[name].stem}.safetensors", {"format": "pt"})
    return copy


def networks(s: Settings) -> dict[str, Any]:
    """The UNet, and the text encoder where it trains, on meta, as the trainer prepares them."""
    source = described(Path(s.pretrained_model_name_or_path))
    if source.kind == "StableDiffusionUpscalePipeline" or ("XL" in source.kind and s.train_text_encoder):
        raise UserError(f"{source.name}: neither an upscaler nor XL's text encoders are counted")
    texts = [name for name in KINDS[source.kind] if name.startswith("text_encoder")] * s.train_text_encoder
    found = {name: source.skeleton(name).train().requires_grad_(not s.rank) for name in ("unet", *texts)}
    for network in found.values():
        if s.rank:
            lora.attach(network, lora.fresh(network, s.lora_targets, s.rank, 1.0, 0.0, torch.Generator()))
        if s.gradient_checkpointing:
            recompute_activations(network)
    return found


def step(s: Settings, found: dict[str, Any]) -> None:
    """A step's forward and backward pass on meta."""
    unet, kinds = found["unet"], 1 + s.with_prior_preservation
    rows, latent, config = kinds * s.train_batch_size, s.resolution // 8, unet.config
    dtype = unet.conv_in.weight.dtype
    with torch.device("meta"):
        x, t = torch.empty(rows, config.in_channels, latent, latent, dtype=dtype), torch.empty(rows, dtype=torch.long)
        context = torch.empty(rows, 77, config.cross_attention_dim, dtype=dtype)
        if "text_encoder" in found:
            context = found["text_encoder"](torch.empty(kinds, 77, dtype=torch.long)).repeat_interleave(s.train_batch_size, 0)
        told: tuple[Tensor, ...] = ()
        if config.addition_embed_type:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            told = torch.empty(rows, pooled, dtype=dtype), torch.empty(rows, 6)
        loss = unet(x, t, context, *told).float().square().mean()
    loss.backward()


def seconds(step: Callable[[], Any], device: str) -> float:
    """How long it takes, to its last operation."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def rates(device: str, dtype: torch.dtype, rows: int, latent: int) -> dict[str, float]:
    """What the machine reaches: operations a second of matrix products and of 3x3 convolutions, bytes a second of copies."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x, weight = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((rows, 320, latent, latent), (320, 320, 3, 3)))
    block = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(block)
    work: dict[str, tuple[int, Callable[[], Any]]] = {
        "matmul": (2 * n**3, lambda: a @ b),
        "convolution": (2 * 9 * 320 * x.numel(), lambda: F.conv2d(x, weight, padding=1)),
        "copy": (2 * block.numel() * 4, lambda: target.copy_(block)),
    }
    return {name: amount / min(seconds(step, device) for _ in range(8)) for name, (amount, step) in work.items()}


def floor(s: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """The least seconds that a step can take here: its operations at the machine's rates, then AdamW's reads and writes."""
    found = networks(s)
    with FlopCounterMode(display=False) as counter:
        step(s, found)
    counted = {str(name): flop for name, flop in counter.get_flop_counts()["Global"].items()}
    trained = sum(p.numel() for network in found.values() for p in network.parameters() if p.requires_grad)
    rows, side = s.train_batch_size * (1 + s.with_prior_preservation), s.resolution // 8
    either = [rates(s.device or "cpu", each, rows, side) for each in {dtype, torch.float32}]  # a CPU may do bf16 in fp32
    rate = {name: max(found[name] for found in either) for name in either[0]}
    convolutions, total = sum(flop for name, flop in counted.items() if "convolution" in name), sum(counted.values())
    parts = {"convolution": convolutions, "matmul": total - convolutions, "copy": 28 * trained}
    least = sum(amount / rate[name] for name, amount in parts.items())
    return {"seconds": [least], "work": parts, "rates": rate}


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """What a GPU would run, on meta: products and normalisations in bf16, and flash attention."""

    def cast(name: str) -> Any:
        function = {"scaled_dot_product_attention": flash}.get(name, getattr(F, name))

        def chosen(*args: Any, **options: Any) -> Tensor:
            return function(*(x.to(torch.bfloat16) if isinstance(x, Tensor) else x for x in args), **options)

        return mock.patch.object(F, name, chosen)

    def flash(*args: Any, is_causal: bool) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(*args, is_causal=is_causal)[0]

    with contextlib.ExitStack() as stack:
        for name in IN_BF16:
            stack.enter_context(cast(name))
        yield


class Held(TorchDispatchMode):
    """Bytes of all tensors that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.hold(x)
        return result

    def hold(self, x: Tensor) -> None:
        """Count a tensor, until it is gone."""
        storage = x.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, number: int, size: int) -> None:
        self.known.discard(number)
        self.now -= size


def memory(s: Settings) -> dict[str, float]:
    """GiB: weights, moments, what a step needs besides (gradients, activations, what the update takes), and the peak."""
    found, kept = networks(s), torch.bfloat16 if s.full_bf16 else torch.float32
    parameters = [p for network in found.values() for p in network.parameters()]
    for p in parameters:
        p.data = p.data.to(kept if p.requires_grad else torch.bfloat16)
    with Held() as held, gpu_kernels():
        for p in parameters:
            held.hold(p)
        weights, trained = sum(p.nbytes for p in parameters), [p for p in parameters if p.requires_grad]
        groups = [{"params": trained, "lr": 1e-6}]
        optimizer = AdamW(groups, (0.9, 0.999), 1e-8, 0.01, s.use_8bit_adam)
        if s.fused_backward_pass:
            optimizer.step_in_backward()
        for _ in range(2):
            held.peak = held.now
            step(s, found)
            optimizer.step()
            optimizer.zero_grad()
    moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    sizes = {"weights": weights, "moments": moments, "besides": held.peak - weights - moments, "peak": held.peak}
    return {name: size / 2**30 for name, size in sizes.items()}


def main(argv: Sequence[str]) -> None:
    """Print the GiB that a run with these flags takes, and of what."""
    settings = train.parse(argv)
    settings.check()
    print(memory(settings))


if __name__ == "__main__":
    command.run(main, sys.argv)

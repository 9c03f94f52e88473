"""Speed put on from outside: layers as the device likes them, a GPU's kernels started together, torch.compile.

What is compiled are the networks' blocks: many are alike, and each kind is compiled once, and kept for a second run.

Shapes: B batch, C channels in and O out, K = C times the kernel's size, L places of what comes out.
"""

import functools
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibooth.dreambooth.parallel import BLOCKS
from minibooth.dreambooth.settings import Settings

MOST_KINDS = 256  # of blocks, by shapes and settings; SD 1 has 18, as many again to draw with, and for each size of a batch


def compilable(settings: Settings, device: torch.device, pays: bool = False) -> bool:
    """Whether to compile, as --compile says; "auto" is where it `pays`."""
    return (settings.compile == "on" or (pays and settings.compile == "auto")) and compiler(device.type)


@functools.cache
def compiler(kind: str) -> bool:
    """Whether there is what compiles for this kind of device, and a place to keep what it makes. Says in a line what lacks."""
    name = os.environ.get("CXX", "g++")
    missing = [name] * (not shutil.which(name)) + ["triton"] * (kind == "cuda" and not importlib.util.find_spec("triton"))
    if missing:
        print(f"not compiled, for lack of {' and '.join(missing)}: every step takes longer")
        return False
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "minibooth" / "compiled"))
    return True


def replayable(settings: Settings, device: torch.device) -> bool:
    """Whether what a GPU does again and again is to be a `Graph`."""
    return device.type == "cuda" and settings.compile != "off"


def blocks(network: nn.Module) -> None:
    """Compile a network's blocks, in place."""
    torch._dynamo.config.recompile_limit = MOST_KINDS
    torch._dynamo.config.optimize_ddp = False  # which would cut them
    for part in network.modules():
        if isinstance(part, BLOCKS):
            part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]


class Conv2d(nn.Conv2d):
    """As a product [O, K] x [K, B L], where a CPU is faster with that: for 1x1, and for far more weights than places, which
    PyTorch's own convolution brings into another order and back.
    """

    def forward(self, x: Tensor) -> Tensor:
        pads: Any = self.padding
        sides = zip(x.shape[2:], pads, self.kernel_size, self.stride, strict=True)
        size = [(side + 2 * pad - kernel) // step + 1 for side, pad, kernel, step in sides]
        if self.kernel_size == (1, 1):
            columns = x.flatten(2)
        elif self.in_channels * self.out_channels > 5000 * len(x) * size[0] * size[1]:
            columns = F.unfold(x, self.kernel_size, padding=pads, stride=self.stride)
        else:
            return super().forward(x)
        y = self.weight.flatten(1) @ columns.transpose(0, 1).flatten(1)
        y = y if self.bias is None else y + self.bias[:, None]
        return y.view(-1, len(x), *size).transpose(0, 1).contiguous()


class GroupNorm(nn.GroupNorm):
    """In its input's precision, where autocast would do all of it in fp32: the kernel takes the means in that, which is all
    that needs it, and so moves half of the bytes and keeps half for the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """As `GroupNorm`: in its input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


PRODUCTS: dict[type, type] = {nn.Conv2d: Conv2d}
AS_GIVEN: dict[type, type] = {nn.GroupNorm: GroupNorm, nn.LayerNorm: LayerNorm}


def suit(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Have a network's layers compute as the device is fastest at, in fp32 or under autocast to `dtype`."""
    kinds = AS_GIVEN if dtype != torch.float32 else PRODUCTS if device.type == "cpu" else {}
    for layer in network.modules():
        layer.__class__ = kinds.get(type(layer), type(layer))


def channels_last(network: nn.Module, device: torch.device) -> None:
    """Lay out convolutions' weights, and so what they return, as a GPU's matrix units take them."""
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def draw_faster(pipe: Any, settings: Settings, device: torch.device) -> None:
    """Have a pipeline draw in a `Graph`, compiled, where that is wanted."""
    channels_last(pipe.unet, device)
    channels_last(pipe.vae, device)
    if compilable(settings, device):
        blocks(pipe.unet)
    if replayable(settings, device):
        pipe.unet.forward = Graph(pipe.unet.forward)


class Graph:
    """A function of tensors on a GPU, whose thousands of kernels are started as one: a CUDA graph.

    WARM times it runs as it is, until all that is made at first is there (compiled code, workspaces); then it is captured, and
    from then on replayed on a copy of what it gets; so for each set of shapes. It returns one tensor.
    """

    WARM = 2

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.stream = function, torch.cuda.Stream()
        self.calls: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(x.shape for x in inputs)
        self.calls[shapes] += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function(*inputs) if self.calls[shapes] <= self.WARM else self.replay(shapes, inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def replay(self, shapes: tuple, inputs: Sequence[Tensor]) -> Tensor:
        """The function's result by its graph, which is captured if there is none yet."""
        if shapes not in self.graphs:
            graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="relaxed"):  # other threads may go on
                result = self.function(*held)
            self.graphs[shapes] = graph, held, result
        graph, held, result = self.graphs[shapes]
        torch._foreach_copy_(held, [*inputs])
        graph.replay()
        return result.clone()

"""Speed put on from outside: layers as the device likes them, a GPU's kernels started together, torch.compile.

What is compiled are the layers whose kernels can be one: many are alike, and each kind is compiled once, and kept for a
second run.

Shapes: B batch, C channels in and O out, K = C times the kernel's size, L places of what comes out; M and N any numbers.
"""

import functools
import importlib.util
import math
import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from minibooth.dreambooth.settings import Settings
from minibooth.models import blocks, ops

FUSED = nn.GroupNorm | nn.LayerNorm | blocks.GEGLU  # what is compiled
MOST_KINDS = 256  # of a layer, by shapes and settings; of NormSiLU SD 1 has 14, as many to draw with, as many for each batch


def compilable(settings: Settings, device: torch.device, pays: bool = False) -> bool:
    """Whether to compile, as --compile says; "auto" is where it `pays`."""
    return (settings.compile == "on" or (pays and settings.compile == "auto")) and compiler(device.type)


@functools.cache
def compiler(kind: str) -> bool:
    """Whether there is what compiles for this kind of device, and a place to keep what it makes. Prints what is missing."""
    name = os.environ.get("CXX", "g++")
    there: dict[str, Any] = {name: shutil.which(name), "Python.h": Path(sysconfig.get_path("include"), "Python.h").exists()}
    if kind == "cuda":
        there["triton"] = importlib.util.find_spec("triton")
        there["a GPU of capability 7.0"] = torch.cuda.get_device_capability() >= (7, 0)
    if missing := [what for what, found in there.items() if not found]:
        print(f"not compiled, for lack of {' and '.join(missing)}: every step takes longer")
        return False
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "minibooth" / "compiled"))
    return True


def replayable(settings: Settings, device: torch.device) -> bool:
    """Whether what a GPU does again and again is to be a `Graph`."""
    return device.type == "cuda" and settings.compile != "off"


def compile_layers(network: nn.Module) -> None:
    """Compile a network's layers, after they were suited to the device, in place."""
    torch._dynamo.config.recompile_limit = MOST_KINDS
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, FUSED)]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)


class Product(torch.autograd.Function):
    """a [M, K] @ b [N, K]^T, or with a window (stride, padding) the convolution of pictures b by kernels a. Sums are taken in
    fp32, as units for bf16 take them. Of a and b only what a gradient needs is kept, in the precision it came in.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, window: tuple | None = None) -> Tensor:
        of_a, of_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(a if of_b else None, b if of_a else None)
        ctx.shapes, ctx.window = (a.shape, b.shape), window
        with torch.autocast(a.device.type, enabled=False):
            return F.conv2d(b.float(), a.float(), None, *window) if window else F.linear(a.float(), b.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), shapes, window = ctx.saved_tensors, ctx.shapes, ctx.window
        of_a = None if b is None else conv2d_weight(b.float(), shapes[0], grad, *window) if window else grad @ b.float()
        of_b = None if a is None else conv2d_input(shapes[1], a.float(), grad, *window) if window else grad.T @ a.float()
        return of_a, of_b, None


def wanted(x: Tensor) -> torch.dtype:
    """What a layer's result on a CPU is to be in: autocast's precision, or without it x's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class Linear(nn.Linear):
    """As a `Product`, for processors without units for half precision."""

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return (y if self.bias is None else y + self.bias).to(wanted(x))


class Conv2d(nn.Conv2d):
    """As a product of matrices, [O, K] and [B L, K], where a CPU is faster with that: for 1x1, and for far more weights than
    places, which PyTorch's own convolution brings into another order and back. In fp32 only the backward pass gains, so where
    there is none PyTorch's own is left to do it. In an emulated precision every convolution is a `Product`.
    """

    def forward(self, x: Tensor) -> Tensor:
        pads: Any = self.padding
        sides = zip(x.shape[2:], pads, self.kernel_size, self.stride, strict=True)
        size = [(side + 2 * pad - kernel) // step + 1 for side, pad, kernel, step in sides]
        dtype, one = wanted(x), self.kernel_size == (1, 1)
        slow = emulated(dtype)
        matrices = one or self.in_channels * self.out_channels > 5000 * len(x) * math.prod(size)
        if matrices and (dtype != torch.float32 or torch.is_grad_enabled()):
            # a place's gradient is a sum over the kernel's: in fp32, too
            columns = x if one else F.unfold(x.float(), self.kernel_size, padding=pads, stride=self.stride).to(x.dtype)
            columns = columns.flatten(2).transpose(0, 1).flatten(1).T
            y = (Product.apply if slow else F.linear)(self.weight.flatten(1), columns)
            y = y.view(-1, len(x), *size).transpose(0, 1)
        elif slow:
            y = Product.apply(self.weight, x, (self.stride, pads))
        else:
            return super().forward(x)
        return (y if self.bias is None else y + self.bias[:, None, None]).to(dtype).contiguous()


class Attention(blocks.Attention):
    """In fp32, for processors without units for half precision."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return ops.attention(q, k, v, self.heads, upcast=True)


class GroupNorm(nn.GroupNorm):
    """In its input's precision, where autocast would do all of it in fp32: the kernel takes the means in that, which is all
    that needs it, and so moves half of the bytes and keeps half for the backward pass. Compiled by a formula of our own.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if torch.compiler.is_compiling():
                return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """As `GroupNorm`: in its input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


PRODUCTS: dict[type, type] = {nn.Conv2d: Conv2d}
IN_FP32: dict[type, type] = PRODUCTS | {nn.Linear: Linear, blocks.Attention: Attention}
AS_GIVEN: dict[type, type] = {nn.GroupNorm: GroupNorm, nn.LayerNorm: LayerNorm}


UNITS = {torch.bfloat16: "bf16", torch.float16: "amx_fp16"}  # as the names of a processor's abilities end


@functools.cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether a CPU has no units for products in this precision: PyTorch then takes four times as long as in fp32, or more."""
    able = [name for name, has in torch.cpu.get_capabilities().items() if has]
    return dtype in UNITS and not any(name.endswith(UNITS[dtype]) for name in able)


@functools.cache
def mixed(*kinds: Any) -> Any:
    """A class that inherits from all of these, the first foremost; always the same one."""
    return type("".join(kind.__name__ for kind in kinds), kinds, {})


def suit(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Have a network's layers compute as the device is fastest at, in `dtype` or under autocast to it."""
    kinds = AS_GIVEN if dtype != torch.float32 or device.type != "cpu" else {}
    if device.type == "cpu":
        kinds = kinds | (IN_FP32 if emulated(dtype) else PRODUCTS)
    for layer in network.modules():
        for plain, fast in kinds.items():
            if isinstance(layer, plain) and not isinstance(layer, fast):
                layer.__class__ = fast if type(layer) is plain else mixed(type(layer), fast)  # type: ignore[arg-type]


def channels_last(network: nn.Module, device: torch.device) -> None:
    """Lay out convolutions' weights, and so what they return, as a GPU's matrix units take them."""
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def draw_faster(pipe: Any, settings: Settings, device: torch.device) -> None:
    """Have a pipeline draw in a `Graph`, compiled, where that is wanted."""
    for network in (pipe.unet, pipe.vae):
        suit(network, device, pipe.dtype)
        channels_last(network, device)
    if compilable(settings, device):
        compile_layers(pipe.unet)
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

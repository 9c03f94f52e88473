"""Speed put on from outside: a GPU's kernels started together; torch.compile, which keeps what it made for a second run.

What is compiled are the networks' blocks: many are alike, and each kind is compiled once.
"""

import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minibooth.dreambooth.parallel import BLOCKS
from minibooth.dreambooth.settings import Settings

KINDS = 256  # of blocks, by shapes and settings, at most; SD 1 has 18, as many again to draw with, and for each size of a batch


def compilable(settings: Settings, device: torch.device, pays: bool = False) -> bool:
    """Whether to compile, as --compile says; "auto" is where it `pays`. Says so in a line where that cannot be done."""
    if settings.compile != "on" and not (pays and settings.compile == "auto"):
        return False
    compiler = os.environ.get("CXX", "g++")
    missing = [compiler] * (not shutil.which(compiler))
    missing += ["triton"] * (device.type == "cuda" and not importlib.util.find_spec("triton"))
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
    torch._dynamo.config.recompile_limit = KINDS
    torch._dynamo.config.optimize_ddp = False  # which would cut them
    for part in network.modules():
        if isinstance(part, BLOCKS):
            part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]


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

    WARM times it runs as it is, until all that it makes at first is there (moments, compiled code); then it is captured, and
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

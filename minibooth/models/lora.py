"""LoRA (Hu et al. 2021): a layer's weight W stays as it is, and W + scale * up @ down is used in its place.

A network changes in place: chosen layers turn into `LoRALinear` or `LoRAConv2d`, whose weight and bias keep their names, and
which hold any number of adapters, of any ranks. A file never sees them: in a state_dict such a layer is the plain one that
it amounts to, with the sum as its weight.

Shapes: r rank, I and O a layer's inputs and outputs (features or channels), k x k a convolution's kernel.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = {  # which layers of a UNet or a text encoder, by their names
    "attention": re.compile(r".*\.(to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj)"),
    "all": re.compile(r"(down_blocks|mid_block|up_blocks|text_model\.encoder)\..*"),  # all that kohya's programs know
}


class Adapter(nn.Module):
    """What is added to one layer: down [r, I] or [r, I, k, k] and up [O, r] or [O, r, 1, 1]; up @ down counts `scale` times."""

    def __init__(self, down: Tensor, up: Tensor, alpha: float, weight: float = 1.0, dropout: float = 0.0):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.alpha, self.dropout = alpha, dropout
        self.scale = weight * alpha / len(down)

    def _save_to_state_dict(self, *args: Any) -> None:
        """Nothing of its own: it is in the layer's weight there."""


@torch.no_grad()
def merged(weight: Tensor, adapters: Iterable[Adapter]) -> Tensor:
    """weight + the sum of scale * up @ down, added in fp32, in the weight's dtype and on its device."""
    total = weight.float()
    for adapter in adapters:
        up, down = (x.to(weight.device, torch.float32).flatten(1) for x in (adapter.up, adapter.down))
        total = total + adapter.scale * (up @ down).reshape(weight.shape)
    return total.to(weight.dtype)


class LoRA(nn.Module):
    """What the two kinds of layers share."""

    weight: Tensor
    adapters: Iterable[Any]
    low_rank: Callable[[Tensor, Tensor, Tensor], Tensor]  # x through down, then up

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for adapter in self.adapters:
            dropped = F.dropout(x, adapter.dropout, self.training)
            y = y + adapter.scale * self.low_rank(dropped, adapter.down, adapter.up)
        return y

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = merged(self.weight, self.adapters)


class LoRALinear(LoRA, nn.Linear):
    """A linear layer with adapters."""

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)


class LoRAConv2d(LoRA, nn.Conv2d):
    """A convolution with adapters: theirs has its kernel, and is followed by a 1x1 one."""

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, down, None, self.stride, self.padding), up)


LAYERS: dict[type, type] = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


def layers(network: nn.Module) -> dict[str, Any]:
    """The layers that can have adapters, or have them, by their dotted names."""
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, tuple(LAYERS))}


def fresh(
    network: nn.Module, targets: str, rank: int, alpha: float, dropout: float, generator: torch.Generator
) -> dict[str, Adapter]:
    """An adapter in fp32 for each of the `targets`, up 0, so that nothing changes yet, and down normal with deviation 1 / r.

    As diffusers' train_dreambooth_lora.py has it (peft's "gaussian"): its learning rates carry over with it.
    """
    found = {}
    for path, layer in layers(network).items():
        if TARGETS[targets].fullmatch(path):
            outputs, *inputs = layer.weight.shape
            down = torch.randn(rank, *inputs, generator=generator) / rank
            found[path] = Adapter(down, torch.zeros(outputs, rank, *[1] * (len(inputs) - 1)), alpha, dropout=dropout)
    return found


def attach(network: nn.Module, adapters: Mapping[str, Adapter], dtype: torch.dtype | None = None) -> None:
    """Give layers, by their names, one adapter more each: on the layer's device, in `dtype` or the layer's."""
    for path, adapter in adapters.items():
        layer: Any = network.get_submodule(path)
        if not isinstance(layer, LoRA):
            layer.__class__ = LAYERS[type(layer)]
            layer.adapters = nn.ModuleList()
        layer.adapters.append(adapter.to(layer.weight.device, dtype or layer.weight.dtype))

"""The few operations that the networks share, each a formula in plain PyTorch.

Shapes: B batch, C channels, N tokens, D width, H heads.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm of [B, C, h, w], weight and bias [C] (Wu & He 2018), by channels' means and variances, which add up to groups'.

    Compiled it reads a picture whose channels come last as it lies, where PyTorch's own formula copies or strides.
    """
    variance, mean = (each.unflatten(1, (groups, -1)) for each in torch.var_mean(x.float(), dim=(2, 3), correction=0))
    centre = mean.mean(2, keepdim=True)
    variance = (variance + (mean - centre).square()).mean(2, keepdim=True)
    scale = weight.unflatten(0, (groups, -1)) * (variance + eps).rsqrt()
    shift = bias.unflatten(0, (groups, -1)) - centre * scale
    return (x * scale.flatten(1)[..., None, None] + shift.flatten(1)[..., None, None]).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """[..., 2D] -> [..., D]: the first half, gated by the exact (erf) GELU of the second. Shazeer 2020, eq. 5."""
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(D / H)) v over [B, N, D]; `upcast` does it in fp32 (SD 2.1 overflows in fp16).

    Under autocast PyTorch casts back; its kernels for GPUs then take products in half precision and their sums in fp32.
    """
    dtype = v.dtype
    q, k, v = (rearrange(x.float() if upcast else x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "b h n d -> b n (h d)").to(dtype)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[B] -> [B, width] in fp32: cosines, then sines, of t at frequencies 1 .. 1/10000. Vaswani et al. 2017, 3.5."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

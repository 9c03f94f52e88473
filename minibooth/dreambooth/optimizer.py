"""AdamW (Loshchilov & Hutter 2019), with ways to save memory, and its state as a checkpoint holds it.

bytes per parameter      weight  gradient  moments
                         4       4         8
--use_8bit_adam                            2 + 1/256  a byte each, a scale per block: Dettmers et al. 2022, arXiv 2110.02861
--full_bf16              2       2                    rounded stochastically, so without masters in fp32
--fused_backward_pass            0                    applied and freed as soon as it is there: LOMO, arXiv 2306.09782

Shapes: n elements of a slice of a parameter, b = n / 2048 blocks.
"""

import collections
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minibooth.diffusion.noise import generator
from minibooth.dreambooth.parallel import shard
from minibooth.errors import UserError

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the two moments
BLOCK, SMALLEST = 2048, 4096  # elements that share a scale; elements of the smallest parameter with moments in 8 bits
STRIDE = 0x9E3779B1 - (1 << 32)  # added to the key at each step: far, and odd, so that 2^32 steps have as many keys
SLICE = collections.defaultdict(lambda: 1 << 20, cpu=1 << 18)  # elements updated at a time: worth a launch; within a cache


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW: its numbers, where weights and moments are in fp32. Gradients are first clipped to `max_norm`, unless
    that is 0, all as one vector. groups: as torch's take them, with "lr" or with rates set before each step.

    With `eight_bit`, parameters of SMALLEST elements or more, if they are whole blocks, keep their moments in 8 bits. Those in
    bf16 are updated in fp32 and rounded up or down at random, so that the mean is right; the random bits depend on `seed`,
    step and place alone.
    """

    def __init__(
        self, groups: Any, betas: tuple[float, float], epsilon: float, decay: float, eight_bit: bool = False, seed: int = 0,
        max_norm: float = 0.0,
    ):  # fmt: skip
        super().__init__(groups, dict(lr=0.0, betas=betas, eps=epsilon, weight_decay=decay))
        self.eight_bit, self.max_norm = eight_bit, max_norm
        self.kernel: Callable[..., None] = update
        numbered = enumerate(p for group in self.param_groups for p in group["params"])
        self.keys = {p: generator(seed, "rounding", number).initial_seed() >> 2 for number, p in numbered}
        self.state.update({p: self.fresh(p) for p in self.keys})  # before activations can lie in between

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        ready = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        excess = (norm([p.grad for some in ready for p in some]) / self.max_norm).clamp(min=1) if self.max_norm else None
        for some, group in zip(ready, self.param_groups, strict=True):
            self.advance(some, group, excess)

    def compile(self) -> None:
        """From now on an update is few kernels: one graph for all slices, rates and steps."""
        self.kernel = torch.compile(update, fullgraph=True, dynamic=True)

    def step_in_backward(self) -> None:
        """From now on update a parameter, and drop its gradient, as soon as that is whole."""
        own = weakref.proxy(self)  # what a parameter's hook holds, Python does not see, and would never free

        @torch.no_grad()
        def now(p: Tensor, number: int) -> None:
            own.advance([p], own.param_groups[number])
            p.grad = None

        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(functools.partial(now, number=number))

    def fresh(self, p: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step."""
        eight = self.eight_bit and p.numel() >= SMALLEST and p.numel() % BLOCK == 0
        dtype = torch.uint8 if eight else torch.float32
        form = torch.preserve_format if dtype == p.dtype else torch.contiguous_format  # blocks are of the usual order
        state = {name: torch.zeros_like(p, dtype=dtype, memory_format=form) for name in SIGNED}
        scales = {f"{name}_scale": torch.zeros(p.numel() // BLOCK, device=p.device) for name in SIGNED if eight}
        return state | scales | {"step": torch.zeros((), device=p.device)}

    def advance(self, parameters: Sequence[Any], group: dict[str, Any], excess: Tensor | None = None) -> None:
        """One step of some of a group's parameters: by torch's own kernel, the fastest there, of those all in fp32.

        excess: the gradients' norm over `max_norm`, at least 1; gradients are divided by it as they are read.
        """
        (beta1, beta2), rate, decay, epsilon = group["betas"], group["lr"], group["weight_decay"], group["eps"]
        kinds: dict[bool, list[Any]] = {True: [], False: []}
        for p in parameters:
            kinds[self.state[p]["exp_avg"].dtype == p.dtype].append(p)
        if steps := [self.state[p]["step"] for p in parameters]:
            torch._foreach_add_(steps, 1)
        if plain := kinds[True]:
            first, second, steps = ([self.state[p][name] for p in plain] for name in (*SIGNED, "step"))
            how = dict(lr=rate, beta1=beta1, beta2=beta2, weight_decay=decay, eps=epsilon, amsgrad=False, maximize=False)
            grads = [p.grad for p in plain]
            if excess is not None and excess.device.type == "mps":  # its kernel of torch 2.11 does not look at grad_scale
                torch._foreach_div_(grads, excess)
                excess = None
            torch._fused_adamw_(plain, grads, first, second, [], steps, **how, grad_scale=excess)
        for p in kinds[False]:
            row, key = p[0].numel(), self.keys[p]
            least = BLOCK // math.gcd(BLOCK, row)  # rows that are whole blocks
            rows = least * max(1, SLICE[p.device.type] // (least * row))
            told = excess, self.state[p]["step"], rate, decay, beta1, beta2, epsilon
            parts = p.split(rows), p.grad.split(rows), *(self.slices(p, name, rows * row) for name in SIGNED)
            for number, (part, grad, *both) in enumerate(zip(*parts, strict=True)):
                flat, flat_grad = (x.reshape(both[0][0].shape) for x in (part, grad))
                self.kernel(flat, flat_grad, *both, *told, key + number * rows * row)
                if not part.is_contiguous():  # channels come last: `flat` is a copy
                    part.copy_(flat.view_as(part))

    def slices(self, p: Tensor, name: str, size: int) -> Iterator[tuple[Tensor, ...]]:
        """A moment in slices, each as `update` takes it."""
        values, scales, blocks = self.state[p][name], self.state[p].get(f"{name}_scale"), size // BLOCK
        if scales is None:
            return zip(values.view(-1).split(size))
        both = values.view(-1, BLOCK).split(blocks), scales.split(blocks)
        return zip(*both, *map(itertools.repeat, code(SIGNED[name], p.device)), strict=False)


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """Their length as one vector, in fp32. On a CPU by rows: PyTorch's norm of 15 M numbers takes longer, and is 5e-4 off."""
    by_row = functools.partial(torch.linalg.vector_norm, dim=1, dtype=torch.float32)
    rows = [by_row(x.flatten(1)) if x.is_cpu and x.dim() > 1 else x for x in gradients]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(rows, 2, torch.float32)))


def update(
    p: Tensor, g: Tensor, first: tuple[Tensor, ...], second: tuple[Tensor, ...], excess: Tensor | None,
    step: Tensor, rate: float | Tensor, decay: float, beta1: float, beta2: float, epsilon: float, key: int,
) -> None:  # fmt: skip
    """A step, the `step`-th, of a slice p by its gradient g, in place; fit for torch.compile, and for a CUDA graph.

    Moments are (values [n],), with p and g [n], or in 8 bits (codes [b, BLOCK], scales [b], *code), with p and g [b, BLOCK]:
    in rows of blocks no place has to be divided by BLOCK to find its scale. excess: as in `advance`.
    """
    weight, m, v = p.float(), decoded(*first), decoded(*second)
    g = g.float() if excess is None else g.float() / excess
    seen, seen2 = (-torch.expm1(step * math.log(max(beta, 1e-300))) for beta in (beta1, beta2))  # 1 - beta^step
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    weight.mul_(1 - rate * decay).sub_(m.div(v.sqrt().div_(seen2.sqrt()).add_(epsilon)).mul_(rate / seen))
    if p.dtype == torch.bfloat16:  # the upper half of fp32's bits
        bits = random_bits(p, step.int() * STRIDE + key)
        p.view(torch.int16).copy_((weight.view(torch.int32) + bits).bitwise_right_shift_(16))
    encode(m, *first)
    encode(v, *second)


def random_bits(like: Tensor, key: int | Tensor) -> Tensor:
    """16 random bits for each element, int32: a hash of key + place, 32 bits of it, so the same on every device.

    The hash is triple32 of github.com/skeeto/hash-prospector, up to its last multiplication.
    """
    x = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view_as(like).add_(key)
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_((factor ^ 1 << 31) - (1 << 31))
    return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


@functools.cache
def code(signed: bool, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Dynamic quantisation's levels in [-1, 1] or (0, 1]: 7 decades, each of twice as many, evenly spaced, as the one below.

    Second moments have no level 0 here: beside a large one in its block a small one would be 0, and its parameter would jump.
    Also the code of the level nearest to any number in [-1, 1], by the upper half of its fp32 bits [65536].
    """
    edges = [torch.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1) for decade in range(7)]
    positive = torch.cat([10.0 ** (decade - 6) * (x[1:] + x[:-1]) / 2 for decade, x in enumerate(edges)])
    levels = torch.cat([positive, torch.tensor([1.0, 0.0][: 1 + signed]), -positive[: len(positive) * signed]]).sort().values
    middles = torch.arange(1 << 16, dtype=torch.int32) << 16 | 1 << 15
    codes = torch.bucketize(middles.view(torch.float32), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return levels.to(device), codes.to(device)


def looked_up(table: Tensor, places: Tensor) -> Tensor:
    """table[places]. Indexing is slow where it is not compiled; compiled, index_select divides for every element."""
    if torch.compiler.is_compiling():
        return table[places]
    return table.index_select(0, places.view(-1)).view_as(places)


def decoded(values: Tensor, *eight: Tensor) -> Tensor:
    """A moment in fp32: itself, if it is not in 8 bits."""
    if not eight:
        return values
    scales, levels, _ = eight
    return looked_up(levels, values.int()).mul_(scales[:, None])


def encode(x: Tensor, values: Tensor, *eight: Tensor) -> None:
    """Put a moment x where `decoded` finds it; what was x is lost."""
    if eight:
        scales, _, codes = eight
        scales.copy_(x.abs().amax(1))
        bits = x.div_(scales.clamp(min=1e-38)[:, None]).view(torch.int32).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        values.copy_(looked_up(codes, bits))


def moments(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """AdamW's state as named tensors, "unet.conv_in.weight.exp_avg" and so on."""
    named = nn.ModuleDict(modules).named_parameters()
    return {f"{name}.{key}": value for name, p in named for key, value in optimizer.state[p].items()}


def restore(optimizer: AdamW, modules: Mapping[str, nn.Module], saved: Mapping[str, Tensor]) -> None:
    """Put back what `moments` gave, whole. Raises UserError where that is something else."""
    for name, value in moments(optimizer, modules).items():
        if name not in saved or saved[name].shape != value.shape:
            raise UserError(f"optimizer.safetensors of the checkpoint does not hold this run's {name}: go on from another")
        value.copy_(shard(saved[name], value))

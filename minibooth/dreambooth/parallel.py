"""Many processes as one run: those that torchrun started, joined by PyTorch's own DDP or FSDP2.

Each rank trains on its own samples of every batch, and gradients and losses are means over the ranks. As a sample's randomness
is its number's, W ranks with B samples each do what one process does with W B. Only the first rank writes and prints.

ddp     every rank keeps all weights, gradients and moments: Li et al. 2020, arXiv 2006.15704
fsdp    each keeps a shard; a block's weights are whole while it computes: Zhao et al. 2023, arXiv 2304.11277
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError, refuse
from minibooth.models.blocks import ResnetBlock, Transformer, Upsample
from minibooth.models.clip import Layer

WAIT = timedelta(hours=2)  # for another process, such as the one that writes a checkpoint
BLOCKS = ResnetBlock | Transformer | Upsample | Layer  # what is sharded, or computed again, as one


class Networks(nn.Module):
    """The networks that train, as one: networks(f, *args) is f(*args), which calls them as it likes."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.networks = nn.ModuleDict(networks)  # which FSDP2 of torch 2.11 does not take for a network itself

    def forward(self, f: Any, *args: Any) -> Any:
        return f(*args)

    def no_sync(self) -> AbstractContextManager[None]:
        """As DDP's: within, gradients are summed up, but not yet averaged over the ranks."""
        return contextlib.nullcontext()


class Ranks:
    """A process that trains alone; the subclasses are one of many, `rank` of `world_size`."""

    rank, world_size, sharded = 0, 1, False
    first = True  # whether this is the rank that writes
    command = "python"

    def __init__(self, device: torch.device):
        self.device = device

    def join(self, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> Any:
        """`Networks` whose gradients are means over the ranks; to be called before there is an optimizer."""
        return Networks(networks)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Over the ranks."""
        return values

    def broadcast(self, value: int) -> int:
        """The first rank's value."""
        return value

    def any(self, flag: object) -> bool:
        """Whether it is true of any rank."""
        return self.mean({"any": float(bool(flag))})["any"] > 0

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that may be sharded, put together for the first rank; all others take part, and get them on meta."""
        return tensors

    def guard(self, folder: str) -> AbstractContextManager[None]:
        """Where another process has ended, raises UserError, naming the last checkpoint in the output folder."""
        return contextlib.nullcontext()


class Replicas(Ranks):
    """One of many processes that each keep all weights."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0
        self.command = f"torchrun --nproc-per-node {self.world_size}"

    def join(self, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> Any:
        unread = "text_encoder_2" in networks  # XL does not read its text encoders' last layers
        return DistributedDataParallel(Networks(networks), find_unused_parameters=unread, gradient_as_bucket_view=True)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        total = torch.tensor([*values.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world_size).tolist(), strict=True))

    def broadcast(self, value: int) -> int:
        told = torch.tensor(value, device=self.device)
        dist.broadcast(told, 0)
        return int(told)

    @contextlib.contextmanager
    def guard(self, folder: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun is about to end us: not before the message
            found = sorted(Path(folder).glob("**/checkpoint-*/state.json"), key=lambda path: path.stat().st_mtime)
            last = f"{found[-1].parent} is whole" if found else "no checkpoint was written yet"
            remedy = f"go on with the same command and --resume_from_checkpoint latest ({last})"
            raise UserError(f"another process of the run has ended: {remedy}; {str(error)[:200]}") from error


class Shards(Replicas):
    """One of many processes that keep a shard each."""

    sharded = True

    def join(self, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        joined, mesh = Networks(networks), init_device_mesh(self.device.type, (self.world_size,))
        computes = None if dtype == torch.float32 else dtype
        how = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in [*(module for module in joined.modules() if isinstance(module, BLOCKS)), joined]:
            fully_shard(part, mesh=mesh, mp_policy=how, reshard_after_forward=True)
        return joined

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        target = "cpu" if self.first else "meta"
        return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).to(target) for name, x in tensors.items()}


def shard(x: Tensor, like: Any) -> Tensor:
    """What this rank has of a whole tensor, if it has but a shard of `like`."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def start(settings: Settings, device: torch.device) -> Iterator[Ranks]:
    """This process among those that torchrun started, as its environment tells; alone, where it did not.

    Raises UserError for what cannot be done by many.
    """
    usual = "" if "WORLD_SIZE" in os.environ else "0"
    told = {name: os.environ.get(name, usual) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    if not all(map(str.isdecimal, told.values())):
        raise UserError(f"{told} is not as torchrun sets it: start with torchrun, or unset these variables")
    count, local = int(told["WORLD_SIZE"]), int(told["LOCAL_RANK"])
    sharded = settings.parallel == "fsdp"
    if settings.parallel and not count:
        raise UserError(f"--parallel {settings.parallel} needs many: torchrun --nproc-per-node 2 -m minibooth.train ...")
    if count < 2:
        if device.index is not None:
            torch.cuda.set_device(device)  # a `Graph` records what is started on the current one
        yield Ranks(device)
        return
    refuse({
        "--fused_backward_pass updates weights before their gradients are averaged over the processes: leave it out":
            settings.fused_backward_pass,
        "--use_8bit_adam shares a scale among many elements, which --parallel fsdp would cut: take --parallel ddp":
            sharded and settings.use_8bit_adam,
        "--full_bf16 rounds by a weight's place, which --parallel fsdp would move: take --parallel ddp":
            sharded and settings.full_bf16,
        f"{device.type} is one device: add --device cpu": device.type == "mps",
        f"process {local} has no GPU: --nproc-per-node {torch.cuda.device_count()} is the most, or add --device cpu":
            device.type == "cuda" and local >= torch.cuda.device_count(),
    })  # fmt: skip
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # Windows has no NCCL
    dist.init_process_group("nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo", timeout=WAIT)
    with contextlib.ExitStack() as quiet:
        if dist.get_rank():
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        yield (Shards if sharded else Replicas)(device)
    dist.destroy_process_group()

"""Randomness as an argument: generators keyed by what they are for, and the normals they draw.

Noise is always drawn in float32 on the CPU and moved afterwards, so that a seed means the same picture on every device
and in every precision. One generator per sample, keyed by the seed, its purpose and the sample's number, makes a
sample's noise independent of its batch and of the number of processes.

B is the batch size.
"""

import contextlib
import hashlib
import secrets
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minibooth.errors import UserError

Generators = torch.Generator | Sequence[torch.Generator] | None


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but `seed` and `key`: generator(0, "noise", step, sample).

    Keys differ by type, order and boundaries (1 is not "1"; "ab" is not "a", "b") and are hashed with SHA-256, so that
    two keys give unrelated streams, the same ones in every process. Raises TypeError for a part that is neither int nor
    str: its text might change from one run to the next.
    """
    for part in (seed, *key):
        if type(part) not in (int, str):
            raise TypeError(f"a generator's key takes int and str, not {part!r} ({type(part).__name__})")
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch keeps 32 bits of a CPU seed


def seeds_from(first: int | None, count: int) -> range:
    """The seeds of `count` pictures, one after the other, from one drawn by lot where `first` is None.

    Raises UserError for no pictures, and for seeds that torch does not take as they are.
    """
    first = secrets.randbits(32) if first is None else first
    if not count or first < 0 or first + count > 2**64:
        raise UserError(f"{count} pictures from seed {first} on cannot be drawn: take one or more, and a seed of 0 to 2^64 - 1")
    return range(first, first + count)


@contextlib.contextmanager
def seeded(device: torch.device, seed: int, *key: int | str) -> Iterator[None]:
    """Within, torch's global generators are seeded by (seed, *key), since dropout takes no other; then as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generator(seed, *key).initial_seed())
        yield


def gaussian(shape: Sequence[int], generators: Generators = None) -> Tensor:
    """Standard normals of `shape`, [B, ...], in float32 on the CPU.

    generators: None (torch's global one), one CPU generator for the whole tensor, or a sequence of B, one per sample.
    Raises ValueError if their number is not B.
    """
    if generators is None or isinstance(generators, torch.Generator):
        return torch.randn(*shape, generator=generators, dtype=torch.float32)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}: give one, or one per sample")
    return torch.cat([torch.randn(1, *shape[1:], generator=each, dtype=torch.float32) for each in generators])

"""Safetensors and small files, in and out. Nothing is ever unpickled, no name in an index leaves its folder, and whatever
is written appears under its name only when it is whole.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from minibooth.errors import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class Tensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files as a mapping from name to tensor, each mapped from disk when asked for.

    The files stay open, so they can be read even after somebody has moved or replaced them.
    """

    def __init__(self, files: list[Path]):
        self._owner: dict[str, Any] = {}
        for path in files:
            try:
                handle = safetensors.safe_open(path, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a whole safetensors file ({error}); download or convert it again") from None
            self._owner |= dict.fromkeys(handle.keys(), handle)

    def __getitem__(self, name: str) -> Tensor:
        return self._owner[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


class Renamed(Mapping[str, Tensor]):
    """A mapping of tensors under other names: {name here: name there}."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weights_of(folder: Path, stem: str, variant: str | None = None) -> Tensors:
    """Open `stem[.variant].safetensors` of a folder, or the shards that its index lists.

    Raises UserError where there is none (naming the variants or the pickle found instead), where a shard is missing or lies
    outside the folder, or where a file is damaged.
    """
    infix = f".{variant}" if variant else ""
    single, index = folder / f"{stem}{infix}.safetensors", folder / f"{stem}.safetensors.index{infix}.json"
    if single.is_file():
        return Tensors([single])
    if index.is_file():
        names = read_json(index).get("weight_map")
        shards = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
        if not shards:
            raise UserError(f"{index} lists no files; download it again")
        for shard in shards:
            if shard != Path(shard).name or shard == "..":
                raise UserError(f"{index} points outside its folder ({shard}); do not use this checkpoint")
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard} is missing, though {index.name} lists it; download it again")
        return Tensors([folder / shard for shard in shards])
    found = sorted(path.name for path in folder.glob("*") if path.suffix in {".safetensors", *PICKLES})
    if found and all(name.endswith(PICKLES) for name in found):
        raise UserError(f"{folder} holds only a pickle ({found[0]}), which is never opened here; convert it to safetensors")
    variants = {m[1] for name in found if (m := re.fullmatch(rf"{stem}\.?(\w*?)(?:-\d+-of-\d+)?\.safetensors", name))}
    there = ", ".join(name or "without a name" for name in sorted(variants))
    raise UserError(f"{single} is missing{f'; the variants there are {there}: see --variant' if there else ''}")


def read_json(path: Path) -> dict:
    """A JSON file's object. Raises UserError where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, name: Path | str) -> dict:
    """The object that JSON text holds; `name` is for the error."""
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{name} holds no JSON object")
    return parsed


def write_weights(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> None:
    """Write one safetensors file; each tensor in the dtype that `like` has it in."""
    ready = {}
    for name, tensor in tensors.items():
        dtype = like[name].dtype if like and name in like else tensor.dtype
        ready[name] = tensor.detach().to("cpu", dtype).contiguous()
    with replacing(path) as temporary:
        save_file(ready, temporary, metadata={"format": "pt"})


@contextlib.contextmanager
def replacing(path: Path, merge: bool = False) -> Iterator[Path]:
    """Hands out a temporary name for a file or a folder to be made there, and moves it to `path` at the end.

    What is there is replaced as a whole; with `merge`, a folder's entries one by one, so that its others stay.
    """
    merge = merge and path.is_dir()
    parent = path if merge else path.parent  # a folder may be a mount: what moves into it must be made in it
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    new = scratch / "new"
    try:
        yield new
        moves = [(new, path)]
        if merge:  # folders first, so that a checkpoint's model_index.json comes last
            moves = [(entry, path / entry.name) for entry in sorted(new.iterdir(), key=Path.is_file)]
        with contextlib.ExitStack() as undo:  # where a move fails, the others are taken back
            for source, target in moves:
                if target.is_dir():
                    old = scratch / f"old-{target.name}"
                    os.rename(target, old)
                    undo.callback(os.rename, old, target)
                os.replace(source, target)
                undo.callback(os.rename, target, source)
            undo.pop_all()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """A short fingerprint of weights, from a thousand values of each tensor, so that it is quick at any size."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        flat = flat[:: max(1, len(flat) // 1024)].contiguous().view(torch.uint8).cpu()
        digest.update(name.encode() + flat.numpy().tobytes())
    return digest.hexdigest()[:16]

"""Safetensors and small files, in and out. Nothing is ever unpickled, no name in an index leaves its folder, and whatever
is written appears under its name only when it is whole.
"""

import contextlib
import hashlib
import json
import mmap
import operator
import os
import re
import shutil
import tempfile
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from minibooth.errors import UserError, blaming

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HALF = ".half-"  # begins the name of what is not whole yet, or no more: that to be, a dot and eight characters follow
DTYPES = {  # as files call them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Recipe = Callable[[Mapping[str, Tensor]], Tensor]


class Tensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files as a mapping from name to tensor, each read when asked for.

    A tensor is the file's own pages, which cost nothing until it is used, and no memory of the process once it is gone. A
    file is mapped in parts, each as long as somebody holds a tensor of it; one mapping a tensor would be too many. The files
    stay open, so they can be read even after somebody has moved or replaced them. `meta`: dtypes and shapes, as tensors on
    meta.
    """

    PART = 1 << 27  # bytes; more, where its last tensor ends beyond

    def __init__(self, files: list[Path]):
        self.metadata: dict[str, str] = {}
        self.meta: dict[str, Tensor] = {}
        self._places: dict[str, tuple[tuple[BinaryIO, int], int]] = {}  # in which part of which file, and its first byte there
        self._ends: dict[tuple[BinaryIO, int], int] = {}  # of each part, in it
        self._mapped = weakref.WeakValueDictionary[tuple[BinaryIO, int], mmap.mmap]()
        for path in files:
            if path.suffix in PICKLES:
                raise UserError(f"{path} is a pickle, which is never opened here; convert it to safetensors")
            try:
                file = path.open("rb")
                weakref.finalize(self, file.close)
                safetensors.safe_open(path, framework="pt", backend="pread")  # looks whether it is whole
            except (safetensors.SafetensorError, OSError) as error:
                broken = f"is not a whole safetensors file ({error}); download or convert it again"
                raise UserError(f"{path} {f'cannot be read: {error}' if isinstance(error, OSError) else broken}") from None
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            self.metadata |= header.pop("__metadata__", None) or {}
            begin = file.tell()
            with blaming(path):
                for name, x in header.items():
                    if x["dtype"] not in DTYPES:
                        raise UserError(f"{name} is stored as {x['dtype']}; supported: {', '.join(DTYPES)}")
                    number, offset = divmod(begin + x["data_offsets"][0], self.PART)
                    end = begin + x["data_offsets"][1] - number * self.PART
                    self._places[name] = (file, number), offset
                    self._ends[file, number] = max(end, self._ends.get((file, number), 0))
                    self.meta[name] = torch.empty(x["shape"], dtype=DTYPES[x["dtype"]], device="meta")

    def __getitem__(self, name: str) -> Tensor:
        (part, offset), like = self._places[name], self.meta[name]
        if not like.numel():
            return torch.empty_like(like, device="cpu")
        if (pages := self._mapped.get(part)) is None:
            file, start = part[0].fileno(), part[1] * self.PART
            pages = self._mapped[part] = mmap.mmap(file, self._ends[part], access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(pages, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __deepcopy__(self, memo: Any) -> "Tensors":
        return self  # what it reads does not change


class View(Mapping[str, Tensor]):
    """Tensors of another mapping under other names and in other forms: {name: how to make it of those}, when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], recipes: Mapping[str, Recipe]):
        self._tensors, self._recipes = tensors, recipes

    def __getitem__(self, name: str) -> Tensor:
        return self._recipes[name](self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    @property
    def meta(self) -> "View":
        """The same of dtypes and shapes alone."""
        return View(meta(self._tensors), self._recipes)


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> View:
    """Tensors under other names: {name here: name there}."""
    return View(tensors, {name: operator.itemgetter(there) for name, there in names.items()})


def distinct(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(name here, name there) as `renamed` takes them. Raises UserError where two have the same name here."""
    found: dict[str, str] = {}
    for name, there in names:
        if found.setdefault(name, there) != there:
            raise UserError(f"{name} is there twice, also as {there}: remove the wrong one")
    return found


def meta(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same mapping with dtypes and shapes to look at, but nothing read: tensors on meta, or those in memory anyway."""
    if isinstance(tensors, ChainMap):
        return ChainMap(*map(meta, tensors.maps))  # type: ignore[arg-type]
    return getattr(tensors, "meta", tensors)


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
    raise absent(single, [path.name for path in folder.glob("*") if path.is_file()])


def variants(names: Iterable[str], stem: str) -> set[str]:
    """The variants of a component's weights among its folder's names of files; the usual one's is empty."""
    found = (re.fullmatch(rf"{stem}\.?([\w-]*?)(?:-\d+-of-\d+)?\.safetensors", name) for name in names)
    return {match[1] for match in found if match}


def absent(single: Path, names: Iterable[str]) -> UserError:
    """What to say of missing weights, where these files are in their place."""
    found = sorted(name for name in names if name.endswith((".safetensors", *PICKLES)))
    if found and all(name.endswith(PICKLES) for name in found):
        return UserError(f"{single.parent} holds only a pickle ({found[0]}), never opened here; convert it to safetensors")
    there = ", ".join(name or "without a name" for name in sorted(variants(found, single.name.split(".")[0])))
    return UserError(f"{single} is missing{f'; the variants there are {there}: see --variant' if there else ''}")


def read_json(path: Path) -> dict:
    """A JSON file's object. Raises UserError where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, name: Path | str) -> dict:
    """The object that JSON text holds; `name` is for the error."""
    with blaming(name):
        return {**json.loads(data)}


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write one safetensors file, tensor by tensor: no more than one is read at a time.

    Each gets the dtype that `like` has it in; a floating-point one gets `dtype`, where that is given, but for a single file's
    schedule (betas, alphas_cumprod, ...), whose names have no dot: it would be spoilt.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    shapes, dtypes, end = meta(tensors), {}, 0
    for name, tensor in shapes.items():
        own = meta(like)[name].dtype if like and name in like else tensor.dtype
        dtypes[name] = dtype if dtype and own.is_floating_point and "." in name else own
    order = sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name))  # so that each starts at a multiple of its item's
    for name in order:
        start, end = end, end + shapes[name].numel() * dtypes[name].itemsize
        code = next(code for code, known in DTYPES.items() if known == dtypes[name])
        header[name] = {"dtype": code, "shape": [*shapes[name].shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = tensors[name].detach().to("cpu", dtypes[name]).flatten().view(torch.uint8)
            stream.write(data.numpy().data)


@contextlib.contextmanager
def replacing(path: Path, merge: bool = False) -> Iterator[Path]:
    """Hands out a temporary name for a file or a folder to be made there, and moves it to `path` at the end.

    What is there is replaced as a whole; with `merge`, a folder's entries one by one, so that its others stay.
    """
    merge = merge and path.is_dir()
    parent = path if merge else path.parent  # a folder may be a mount: what moves into it must be made in it
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{HALF}{path.name[:60]}.", dir=parent))
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
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace")  # a path may hold what is no text


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """A short fingerprint of weights, from one or two thousand values of each tensor, so that it is quick at any size."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        flat = flat[:: max(1, len(flat) // 1024)].contiguous().view(torch.uint8).cpu()
        digest.update(name.encode() + flat.numpy().tobytes())
    return digest.hexdigest()[:16]

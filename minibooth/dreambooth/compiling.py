"""Speed put on from outside: whether torch.compile pays, and where it keeps what it made, so that a second run starts warm."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch

ENOUGH = 500  # calls on a GPU that save more than a minute of compiling; a CPU's convolutions are no faster for it


def worth(choice: str, device: torch.device, calls: int) -> bool:
    """Whether to compile what is to be called so often, as --compile says. Says so in a line where that cannot be done."""
    if choice == "off" or (choice == "auto" and (device.type != "cuda" or calls < ENOUGH)):
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

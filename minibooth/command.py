"""What all commands share: flags in either spelling, the choice of device and dtype, and how a failed run ends."""

import argparse
import ctypes
import io
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from minibooth.errors import Terminated, UserError

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # the repository's own models and pictures
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # malloc.h
MEMORY = re.compile("MemoryError|out of memory|allocate memory|ALLOC_FAILED")  # as Python, PyTorch and cuBLAS say it


def ready_torch() -> None:
    """Settings that make PyTorch faster and leaner. To be called before any operation: running threads do not pick them up.

    Large tensors lie in huge pages, which fault less, and what is free is kept for the next ones, where the C library can:
    a step of Stable Diffusion's UNet takes 0.87 of its time. Numbers below 1e-38, of which the gradients of attention are
    full and with which products take ten times as long, count as zero: a step of the tiny model takes 0.6 to 0.75.
    A GPU's memory is mapped as it is needed, without gaps, which in SDXL's weights and moments were 0.14 GiB.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # glibc's
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
    torch.set_flush_denormal(True)


def terminate(number: int, frame: object) -> NoReturn:
    """What SIGTERM does."""
    raise Terminated


def ready_process() -> None:
    """Signals that unwind the stack, so that nothing half-made stays; streams that take any word, even where 2>&- closed one.

    Each line is written at once: where it cannot be, `run` is still there to end the process.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, terminate)):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, handler)
    sys.stdout, sys.stderr = (x or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") for x in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> NoReturn:
    """main(argv[1:]) as a process: a mistake the user can mend ends in one line and status 2, a bug in its traceback.

    Ctrl-C ends in status 130, SIGTERM in 143, and a closed standard output in 141, as in other programs.
    """
    ready_torch()
    ready_process()
    try:
        main(argv[1:])
        sys.exit(0)
    except UserError as error:
        status, words = 2, f"error: {error}"
    except BrokenPipeError:
        os._exit(141)  # all is put away by now, but for words that would fail once more
    except OSError as error:
        if not error.strerror:  # not the system's
            raise
        status, words = 2, f"error: {error.strerror}: {error.filename2 or error.filename or 'while writing'}"
    except (MemoryError, RuntimeError) as error:
        if not MEMORY.search(repr(error)):
            raise
        status, words = 2, f"error: not enough memory: take a smaller size or batch; {str(error)[:200]}".removesuffix("; ")
    except KeyboardInterrupt as interrupt:
        status, word = (143, "terminated") if isinstance(interrupt, Terminated) else (130, "interrupted")
        words = ": ".join([word, *interrupt.args])
    visible = (c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(words.split()))  # it may quote a stranger's file
    print(f"minibooth.{Path(argv[0]).stem}: {''.join(visible)}", file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse without guesses: no flag is abbreviated, and a mistake is a UserError instead of a page of usage."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None):
        super().__init__(prog, None, description, epilog, allow_abbrev=False)
        self.register("type", Path, path)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the flags")


def path(text: str) -> Path:
    """A flag's path. The empty one is no folder's: where a script's variable is not set, Path would take this one, "."."""
    if not text:
        raise argparse.ArgumentTypeError("name a file or a folder, not ''")
    return Path(text)


def within(least: float, most: float = 10**5) -> Callable[[str], float]:
    """The type of a flag that takes numbers from `least` to `most`, whole if `least` is."""

    def number(text: str) -> float:
        if least <= (value := type(least)(text)) <= most:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not within {least} and {most}")

    return number


def ready_folder(folder: Path) -> None:
    """Make a folder, if it is not there. Raises UserError where nothing can be written to it: better now than after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} is no folder that can be written ({error.strerror}): name another") from None


MODEL = "a folder in the diffusers layout, a single file, or owner/name on the hub"
SOURCE = "variant", "revision", "tokenizer", "prediction_type"


def source_flags(parser: Parser) -> None:
    """The flags that say how a model is read, SOURCE, as `load` and `Source.open` take them."""
    parser.add_argument("--variant", help="of the weights' files to read, such as fp16")
    parser.add_argument("--revision", help="of a model on the hub: branch, tag or commit")
    parser.add_argument("--tokenizer", metavar="D", help="folder with CLIP's vocabulary [the model's, or the hub's]")
    parser.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], help="overrules the model's own word")


def lora_flags(parser: Parser) -> None:
    """The flags that name LoRAs: see `loras`."""
    parser.add_argument("--lora", nargs="+", default=[], metavar="L", help="LoRAs: files of diffusers' or kohya's, or folders")
    parser.add_argument("--lora_weight", nargs="+", type=within(-1e3, 1e3), metavar="W", help="strength of all, or of each [1]")


def loras(flags: argparse.Namespace) -> list[tuple[str, float]]:
    """The LoRAs and their strengths. Raises UserError where the numbers of the two do not fit."""
    given, count = flags.lora_weight or [1.0], len(flags.lora)
    if len(given) not in (1, count) or (flags.lora_weight and not count):
        raise UserError(f"--lora_weight has {len(given)} strengths for {count} LoRAs: give one, or one for each")
    return list(zip(flags.lora, given * count if len(given) == 1 else given, strict=True))


def normalise(argv: Sequence[str]) -> list[str]:
    """Long flags with underscores: --num-images=4 becomes --num_images=4; values stay, but for a ~ at their start."""
    flags = [word.partition("=") if word.startswith("--") else ("", "", word) for word in argv]
    return [flag[:2] + flag[2:].replace("-", "_") + equals + os.path.expanduser(value) for flag, equals, value in flags]


def device(name: str | None = None) -> torch.device:
    """The device of that name, or the best there: cuda, mps, cpu. Raises UserError for one that is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # there may be one without a driver for this PyTorch
    usable = ["cuda"][:gpus] + [f"cuda:{i}" for i in range(gpus)] + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name and name not in usable:
        raise UserError(f"--device {name} is not there; {', '.join(usable)} would do")
    return torch.device(name or usable[0])

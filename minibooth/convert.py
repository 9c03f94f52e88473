"""Turn a checkpoint into the other layout or precision: a folder (diffusers), or one file (A1111, ComfyUI)."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minibooth import command
from minibooth.checkpoint import lora
from minibooth.checkpoint.source import Source, is_single_file
from minibooth.errors import UserError


def parser() -> command.Parser:
    """The command's flags."""
    parser = command.Parser("python -m minibooth.convert", __doc__)
    add = parser.add_argument
    add("source", metavar="SRC", help=command.MODEL)
    add("target", metavar="DST", type=Path, help="x.safetensors for a single file, anything else for a folder")
    add("--dtype", choices=["fp32", "fp16", "bf16"], help="what the weights are written in [as they are]")
    command.lora_flags(parser)
    add("--ema", action="store_true", help="of a single file, take the averaged weights (model_ema)")
    command.source_flags(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Convert as the command line says, one tensor in memory at a time."""
    flags = parser().parse_args(command.normalise(argv))
    if (target := flags.target).exists() or target.is_symlink():
        raise UserError(f"{target} is there already; choose another name, or remove it first")
    is_single_file(target)  # or it is refused
    command.ready_folder(target.parent)
    source = Source.open(flags.source, **{name: getattr(flags, name) for name in (*command.SOURCE, "ema")})
    lora.merge(source, command.loras(flags))
    source.save(target, {}, command.DTYPES.get(flags.dtype))
    print(target)


if __name__ == "__main__":
    command.run(main, sys.argv)

"""python -m minibooth: the commands, with a line on each."""

import ast
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("train", "generate", "upscale", "convert", "evaluate", "identifiers")


def main(argv: Sequence[str] = ()) -> None:
    """Print each command's name and the first line of its docstring, without importing it; words are a mistake."""
    if argv and argv[0] not in ("-h", "--help"):
        remedy = argv[0] if argv[0] in COMMANDS else "<command>, one of " + ", ".join(COMMANDS)
        print(f"minibooth: error: {argv[0]} is no option; use python -m minibooth.{remedy}", file=sys.stderr)
        sys.exit(2)
    print("DreamBooth for Stable Diffusion. Each command explains its flags with --help.\n")
    for name in COMMANDS:
        said = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")))
        print(f"  python -m minibooth.{name:<12}{(said or '').splitlines()[0]}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody to read what is printed ends it quietly
    main(sys.argv[1:])

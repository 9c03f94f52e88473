"""python -m minibooth: the commands, with a line on each."""

import ast
from pathlib import Path

COMMANDS = ("train", "generate", "upscale", "convert", "evaluate", "identifiers")


def main() -> None:
    """Print each command's name and the first line of its docstring, without importing it."""
    print("DreamBooth for Stable Diffusion. Each command explains its flags with --help.\n")
    for name in COMMANDS:
        said = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")))
        print(f"  python -m minibooth.{name:<12}{(said or '').splitlines()[0]}")


if __name__ == "__main__":
    main()

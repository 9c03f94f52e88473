"""python -m minibooth: the commands, with a line on each."""

import ast
from collections.abc import Iterator
from pathlib import Path


def commands() -> Iterator[tuple[str, str]]:
    """The commands' names, each with the first line of its docstring: the modules of this folder that have a `main`."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        if "main" in functions and path.stem != "__main__":
            yield path.stem, (ast.get_docstring(module) or "").partition("\n")[0]


def main() -> None:
    print("DreamBooth for Stable Diffusion. Each command explains its flags with --help.\n")
    for name, line in commands():
        print(f"  python -m minibooth.{name:<12}{line}")


if __name__ == "__main__":
    main()

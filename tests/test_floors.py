"""The house stands: an import points to a lower floor or to the same folder, and nothing is ever unpickled."""

import ast
import tokenize
from pathlib import Path

import pytest

import minibooth

PACKAGE = Path(minibooth.__file__).parent
FLOORS = ["errors", "models", "checkpoint", "diffusion", "dreambooth", "commands"]
BANNED = {"diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "pickle", "dill", "joblib", "shelve"}
MODULES = sorted(PACKAGE.rglob("*.py"))
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def floor(parts):
    """Of a module's dotted name, as parts: ["minibooth", "models", "unet"] stands on models; commands are on top."""
    folder = parts[1] if len(parts) > 1 else ""
    return FLOORS.index(folder if folder in FLOORS else "commands")


def parts_of(path):
    """The dotted name of a module's file, as parts."""
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Every module that a file imports, wherever in it; `from a import b` as a.b where that is a module of ours."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports by dots"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                place = PACKAGE.parent.joinpath(*inner.split("."))
                yield inner if place.with_suffix(".py").is_file() or place.is_dir() else node.module


def test_imports_point_downwards():
    for path in MODULES:
        own = parts_of(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != PACKAGE.name:
                assert parts[0] not in BANNED, f"{path} imports {name}"
            elif len(own) == 1:  # the front door
                assert floor(parts) < FLOORS.index("commands"), f"the front door imports {name}"
            else:
                assert parts != [PACKAGE.name], f"{path} imports the front door"
                below, beside = floor(parts) < floor(own), parts[:-1] == own[:-1] or parts[: len(own)] == own
                assert below or (beside and floor(parts) == floor(own)), f"{path} imports {name}"


def test_nothing_is_unpickled():
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load"), ("torch", "save")}, path


def test_a_module_says_what_it_is():
    assert [path for path in MODULES if not ast.get_docstring(tree(path))] == []


def test_every_folder_is_a_floor():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert folders == set(FLOORS[1:-1])


def code_lines(path):
    """Of a file, those that are neither blank nor of comments, imports and docstrings."""
    with tokenize.open(path) as stream:
        tokens = [token for token in tokenize.generate_tokens(stream.readline) if token.type not in NO_CODE]
    lines = {n for token in tokens for n in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree(path)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text or isinstance(node, ast.Import | ast.ImportFrom):
            lines -= {*range(node.lineno, node.end_lineno + 1)}
    return len(lines)


def test_it_is_small():
    """As the README says."""
    assert sum(map(code_lines, MODULES)) < 4000


def test_all_of_it_is_installed():
    """By pip install ., which takes what setup.cfg names; an editable one shows no gap."""
    setupcfg = pytest.importorskip("setuptools.config.setupcfg")
    options = setupcfg.read_configuration(PACKAGE.parent / "setup.cfg")["options"]
    named = {package.replace(".", "/"): [] for package in options["packages"]}
    named |= {package.replace(".", "/"): patterns for package, patterns in options["package_data"].items()}
    for path in PACKAGE.glob("**/[!.]*.*"):
        if path.suffix != ".pyc" and path.is_file():
            patterns = ["*.py", *named[path.parent.relative_to(PACKAGE.parent).as_posix()]]
            assert any(path.match(pattern) for pattern in patterns), path

"""The house: who imports whom in the package, imports inside of functions included, and how long the files are."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import sam3_hf

PACKAGE = Path(sam3_hf.__file__).parent
LONGEST_FILE = 600


class Arrow(NamedTuple):
    """An import of a module of the same package."""

    source: str
    target: str
    relative: bool
    lazy: bool  # inside of a function


def modules_of(package: Path) -> dict[str, Path]:
    """The files of a package by the names of their modules."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def arrows_of(package: Path) -> list[Arrow]:
    modules = modules_of(package)
    found = []
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        lazy = {id(node) for function in functions for node in ast.walk(function)}
        home = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree):
            for target in _targets(node, home, modules):
                relative = isinstance(node, ast.ImportFrom) and node.level > 0
                found.append(Arrow(name, target, relative, id(node) in lazy))
    return found


def _targets(node: ast.AST, home: str, modules: dict[str, Path]) -> list[str]:
    """The modules of the package that an import statement of a module in the package `home` runs."""
    if isinstance(node, ast.Import):
        named = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(home.split(".")[: len(home.split(".")) - node.level + 1]) if node.level else ""
        base = ".".join(filter(None, [base, node.module]))
        named = [name if (name := f"{base}.{alias.name}") in modules else base for alias in node.names]
    else:
        return []
    return sorted({name for name in named if name in modules})


def graph_of(package: Path) -> dict[str, set[str]]:
    """
    {module: the modules that it imports}, a package standing for its `__init__.py`. That runs as well when a module of
    the package is imported from outside of it.
    """
    modules = modules_of(package)
    graph = {name: set() for name in modules}
    for arrow in arrows_of(package):
        parts = arrow.target.split(".")
        around = {".".join(parts[:length]) for length in range(1, len(parts))}
        entered = {name for name in around if not f"{arrow.source}.".startswith(f"{name}.")}
        graph[arrow.source] |= ({arrow.target} | entered) - {arrow.source}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def is_flat(name: str) -> bool:
    """Whether a module travels with saved folders."""
    return name.endswith("_sam3_lite")


def test_there_are_no_circles():
    assert circle_in(graph_of(PACKAGE)) == []


def test_data_does_not_know_evaluation():
    up = [arrow for arrow in arrows_of(PACKAGE) if "sam3_hf.data" in arrow.source and ".evaluation" in arrow.target]
    assert up == []


def test_what_does_not_train_does_not_know_the_trainer():
    kinds = ("sam3_hf.prediction.", "sam3_hf.commands.label", "sam3_hf.commands.predict")
    found = [a for a in arrows_of(PACKAGE) if a.source.startswith(kinds) and ".training" in a.target]
    assert found == []


def test_what_travels_with_saved_folders_needs_nothing_else_to_be_imported():
    eager = [arrow for arrow in arrows_of(PACKAGE) if is_flat(arrow.source) and not arrow.lazy]
    assert len(eager) > 10
    assert [arrow for arrow in eager if not (arrow.relative and is_flat(arrow.target))] == []


def test_no_file_holds_two_ideas():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules_of(PACKAGE).items()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


@pytest.mark.parametrize("closing", ["from . import first", "from .first import x", "import house.first", "import os"])
def test_a_circle_through_a_function_and_a_sub_package_is_seen(tmp_path, closing):
    files = {
        "__init__.py": "",
        "first.py": "from .room.second import y\nx = 1\n",
        "room/__init__.py": "from ..third import z\n",
        "room/second.py": "y = 1\n",
        "third.py": f"def f():\n    {closing}\n\nz = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    circle = circle_in(graph_of(tmp_path / "house"))
    assert set(circle) == (set() if closing == "import os" else {"house.first", "house.room", "house.third"})

"""The shape of the code: no circle of imports, no name for two things, no file that is too long to read at once."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES = 300
ROLES = {"__init__", "__main__", "base", "config", "registry"}
"""File names that say what a file is to its folder, and may be in several."""


@cache
def _modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package by its dotted name, a package by the name of its folder."""
    found = {}
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = (path, ast.parse(path.read_text()))
    return found


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield every import, those in functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in _modules() else node.module


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_no_circle_of_imports_counting_those_in_functions() -> None:
    graph = {
        name: {other for other in _imported(tree) if other in _modules()} - {name}
        for name, (_, tree) in _modules().items()
    }
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]], "the search finds one"
    assert _circles(graph) == []


def test_no_public_name_stands_for_two_things() -> None:
    """Classes and functions of modules; each command of the command line has its own `add`."""
    places = defaultdict(list)
    for name, (_, tree) in _modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    del places["add"]
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_no_two_files_have_the_same_name() -> None:
    places = defaultdict(list)
    for name, (path, _) in _modules().items():
        places[path.stem].append(name)
    assert {stem: names for stem, names in places.items() if len(names) > 1 and stem not in ROLES} == {}


def test_no_file_has_more_than_300_lines() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, (path, _) in _modules().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}

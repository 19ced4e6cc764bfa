"""Which file may import which, and use whose private members."""

from __future__ import annotations

import ast
import graphlib
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rosa_lightning"
ROWS = (
    ("cli",),
    ("comparison",),
    ("module", "inspection"),
    ("adapted",),
    ("evaluation", "training", "adapters"),
    ("data", "roae"),
    ("tasks", "models", "dls"),
    ("utils",),
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(("rosa_lightning", *path.with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}
PRIVATE = {
    *("roae/tracing.py", "training/head.py", "training/compile.py", "training/recompute.py"),
    "cli/main.py",
}
"""Files whose headings name the private members of other libraries that they use."""
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields"}
"""Public in spite of their names: of os, and of named tuples."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text())


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it: modules, and what comes from them."""
    found = set()
    package = ("rosa_lightning", *path.parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_from_its_own_subpackage_or_a_row_below(path):
    own = path.parts[0].removesuffix(".py")
    if own.startswith("__"):
        return
    others = {name.split(".")[1] for name in imported(path) if name.startswith("rosa_lightning.")}
    assert {name for name in others - {own} if LEVEL[name] <= LEVEL[own]} == set()
    assert not {name for name in imported(path) if name.startswith("unittest")}
    if own == "dls":
        roots = {name.partition(".")[0] for name in imported(path)} - {"rosa_lightning"}
        assert others <= {"dls"}
        assert roots <= sys.stdlib_module_names | {"torch", "lightning"}


def test_no_file_imports_itself_by_way_of_others():
    graph = {
        name: {other for other in imported(path) & MODULES.keys() if other != name}
        for name, path in MODULES.items()
    }
    try:
        cycle = graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1]
    assert cycle is None


def is_private(name: object) -> bool:
    hidden = isinstance(name, str) and name.startswith("_") and not name.startswith("__")
    return hidden and name not in DOCUMENTED | {"_"}


def private_names(path: Path) -> Iterator[str]:
    """Private names that a file imports, or takes from an object without defining them itself."""
    defined, used = set(), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (defined if own and isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):
            used |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    yield from filter(is_private, used - defined)
    for name in imported(path):
        yield from filter(is_private, name.split("."))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_private_members_of_others_are_used_in_five_files_alone(path):
    if path.as_posix() not in PRIVATE:
        assert {*private_names(path)} == set()


@pytest.mark.parametrize("name", sorted({path.parts[0] for path in FILES if len(path.parts) > 1}))
def test_a_subpackage_has_the_names_that_it_lists(name):
    package = importlib.import_module(f"rosa_lightning.{name}")
    assert package.__doc__
    for public in getattr(package, "__all__", ()):
        assert getattr(package, public) is not None
    assert not hasattr(package, "no_such_name")

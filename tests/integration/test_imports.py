"""Which subpackage may import which."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rosa_lightning"
ROWS = (
    ("cli",),
    ("module", "inspection"),
    ("adapted",),
    ("evaluation", "training", "adapters"),
    ("data", "roae"),
    ("tasks", "models", "dls"),
    ("utils",),
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
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
        own_imports = sys.stdlib_module_names | {"torch", "lightning"}
        assert {name.partition(".")[0] for name in imported(path)} <= own_imports

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rosa_lightning"

FLOORS = {
    "agreement": 0,
    "stopping": 0.1,
    "rope": 0,
    "rows": 0,
    "opening": 0,
    "strict_json": 0,
    "streamed": 0.1,
    "errors": 0.1,
    "strict_yaml": 0.5,
    "parser": 1,
    "configuration": 0.8,
    "quantization": 0,
    "live": 0,
    "fake": 0,
    "standin": 0,
    "modes": 0,
    "small": 0,
    "meeting": 0,
    "folder": 0.1,
    "finite": 0.1,
    "name_patterns": 0,
    "peft_files": 0.2,
    "layers": 0,
    "length": 0,
    "scores": 0,
    "selection": 0,
    "budget": 0,
    "selector": 0.5,
    "rules": 0.6,
    "gradients": 0,
    "moments": 0,
    "preconditions": 0.1,
    "answers": 0,
    "hub_rows": 0,
    "benchmarks": 0.2,
    "tasks": 0.4,
    "own_tasks": 0.6,
    "leakage": 0.5,
    "text_tokens": 0,
    "chat": 1.2,
    "templates": 1.4,
    "vocabulary": 0,
    "capture": 0.3,
    "replay": 0.4,
    "probe": 0.6,
    "feedforward": 0.6,
    "roae": 1,
    "rng": 1,
    "schedule": 1,
    "flops": 0,
    "throughput": 3.9,
    "raster": 1,
    "history": 1,
    "plan": 1.5,
    "surgery": 2,
    "packed": 2.5,
    "sources": 2,
    "source_rows": 2.1,
    "records": 2.2,
    "encoding": 2,
    "batching": 2.2,
    "token_cache": 2.2,
    "mixture": 2,
    "training_data": 2.4,
    "grouping": 2.3,
    "loading": 2.4,
    "packing": 2.5,
    "own_batches": 2.6,
    "microbatches": 2.6,
    "charts": 2,
    "lora_fit": 2.4,
    "lora": 2.5,
    "origin": 2.6,
    "base_files": 1,
    "base": 2.5,
    "norms": 2.5,
    "conditions": 2.7,
    "adapter": 3,
    "metrics": 3,
    "checkpoint": 3,
    "entries": 3,
    "resume": 0,
    "sharding": 3,
    "checkpoint_io": 3.1,
    "compiled": 3.5,
    "sweep": 3,
    "memory": 3.1,
    "activations": 3,
    "summary": 3.5,
    "decontamination": 3,
    "tally": 0,
    "audit": 3,
    "audit_tables": 3.5,
    "evaluate": 3.4,
    "likelihood": 3,
    "reading": 1,
    "head": 1,
    "recompute": 0,
    "prefix": 2,
    "forward": 3,
    "greedy": 2,
    "results": 3.2,
    "export": 3.5,
    "remembered": 3.5,
    "guard": 3.6,
    "module": 4,
    "data": 4,
    "dls": 4,
    "monitor": 4,
    "answering": 3.6,
    "predictions": 3.5,
    "bench": 4.5,
    "bench_tables": 4.6,
    "report": 4.5,
    "commands": 4.7,
    "cli": 5,
    "__init__": 6,
    "__main__": 6,
}
"""A file imports from lower floors only; fractions order the files of one floor.

``tiny`` holds resources, and any floor may read it.
"""

FILES = sorted(PACKAGE.glob("*.py"))


def imported(path: Path) -> set[str]:
    """Names of the package's modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "rosa_lightning":
                found |= {f"rosa_lightning.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("rosa_lightning.")}


def packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, the standard library left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_has_a_floor_and_imports_downwards_only(path):
    floor = FLOORS[path.stem]
    for name in imported(path) - {"tiny"}:
        assert FLOORS[name] < floor, f"{path.stem} (floor {floor}) imports {name}"


@pytest.mark.parametrize(
    "name",
    [
        "rope",
        "layers",
        "scores",
        "selection",
        "budget",
        "gradients",
        "moments",
        "answers",
        "hub_rows",
    ],
)
def test_the_lowest_floor_needs_torch_and_the_standard_library_alone(name):
    assert packages(PACKAGE / f"{name}.py") <= {"torch"}


REUSABLE = {
    "agreement",
    "layers",
    "scores",
    "selection",
    "budget",
    "selector",
    "rules",
    "gradients",
    "length",
    "moments",
    "preconditions",
    "dls",
}
"""What another project can take as it stands: layer selection and its parts."""


@pytest.mark.parametrize("name", sorted(REUSABLE))
def test_layer_selection_needs_nothing_else_of_this_package(name):
    assert imported(PACKAGE / f"{name}.py") <= REUSABLE - {"dls"}
    assert packages(PACKAGE / f"{name}.py") <= {"torch", "lightning", "rosa_lightning"}

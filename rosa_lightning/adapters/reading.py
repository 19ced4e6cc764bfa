"""Reads the files of an adapter, JSON and safetensors, within bounds; errors are one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rosa_lightning.models.finite import check_weights
from rosa_lightning.utils.files import check_input, memory_bytes, read_text
from rosa_lightning.utils.strict_json import parse
from rosa_lightning.utils.text import one_line


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise whatever goes wrong while a file is read as a ValueError that names it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        reason = one_line(error).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{path} cannot be read: {reason}. Give a folder with all files of the adapter, or "
            "export it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    with naming(path):
        plain = parse(read_text(path))
        if not isinstance(plain, dict):
            raise ValueError("it holds no JSON object")
        return plain


def read_header(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    with _open(path) as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; finite numbers, and indices."""
    with _open(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        # SHiRA keeps where its weights stand as indices.
        whole = (torch.int32, torch.int64)
        indices = {k for k, one in tensors.items() if k.endswith("indices") and one.dtype in whole}
        check_weights({key: value for key, value in tensors.items() if key not in indices})
        return tensors


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    with naming(path):
        check_input(path)
        size, most = path.stat().st_size, memory_bytes() // 2
        if size > most:
            raise ValueError(f"it has {size:,} bytes, and at most {most:,} are read")
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file

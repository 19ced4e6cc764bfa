"""Where a base lies, by its name: a hub id, a folder, a GGUF file, ``smollm2`` or ``tiny``."""

import re
import warnings
from functools import lru_cache
from pathlib import Path

from torch import nn

from rosa_lightning.models import tiny
from rosa_lightning.models.gguf import PACKAGED, gguf_folder, is_gguf
from rosa_lightning.utils.text import one_line

_PATIENCE = {True: 5.0, False: 30.0}
"""Seconds that the hub may take to answer at all, by whether its cache has the weights."""


def base_name(model: nn.Module) -> str:
    """What a loaded base is called: hub id, folder, or ``tiny``; its class if it has no name."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    return "tiny" if name == str(tiny.folder()) else whole_name(name) or type(model).__name__


def whole_name(base: str) -> str:
    """A base's name that holds in any working folder: absolute paths for local ones."""
    is_local = base not in ("", "tiny", PACKAGED) and (Path(base).is_dir() or is_gguf(base))
    return str(Path(base).resolve()) if is_local else base


def location(base: str, revision: str | None = None) -> str:
    """What `transformers` loads: a folder, or a hub id."""
    if base == "tiny":
        return str(tiny.folder())
    if is_gguf(base):
        return str(gguf_folder(base))
    if is_hub_id(base):
        _check_hub(base, revision or "main")
    return base


def is_hub_id(base: str) -> bool:
    """Whether a base's name is one of the hub, and no folder, file or package."""
    is_local = base == "tiny" or is_gguf(base) or Path(base).exists()
    return not is_local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None


@lru_cache
def _check_hub(base: str, revision: str) -> None:
    """Where the hub cannot be reached, go on with its cache: at once, and not after retries.

    Raises OSError where the cache does not hold the base at this revision.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.is_offline_mode():
        return
    cached = _cached_files(base, revision)
    has_weights = any(name.endswith((".safetensors", ".bin")) for name in cached)
    try:
        HfApi().model_info(base, timeout=_PATIENCE[has_weights])
    except (HfHubHTTPError, HFValidationError):
        return  # what loads the base says more
    except Exception as error:  # of its HTTP client, without a common base
        reason = one_line(error, 80)
        if not cached:
            raise OSError(
                f"there is no such folder, and the hub cannot be reached ({reason})."
            ) from error
        constants.HF_HUB_OFFLINE = True
        warnings.warn(
            f"the hub cannot be reached ({reason}), so {base} is loaded from its cache, as with "
            "HF_HUB_OFFLINE=1. Nothing else is fetched or pushed until the next start.",
            stacklevel=2,
        )


def _cached_files(base: str, revision: str) -> list[str]:
    """Names of the files of a repository that the hub's cache holds at a revision."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=base, repo_type="model"))
    reference = folder / "refs" / revision
    commit = reference.read_text() if reference.is_file() else revision
    return [path.name for path in folder.glob(f"snapshots/{commit}/*")]

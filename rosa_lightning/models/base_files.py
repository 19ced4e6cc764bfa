"""The files of a base, looked at before a library reads them and builds what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rosa_lightning.utils.files import check_archive, check_input, check_name, open_input

_MOST = (
    # Each layer is built, on the meta device too; the deepest models have some hundreds.
    (re.compile(r"(num_|n_)?((hidden|encoder|decoder)_)?(layers?|blocks)|num_\w*layers"), 4096),
    (re.compile(r"\w*(size|dim|heads?|d_model|n_embd|n_inner|rank|experts|width)\w*"), 2**24),
    # Some classes keep a table of positions.
    (re.compile(r"\w*positions?\w*"), 2**27),
)
"""Names of a configuration's numbers, and how large they may be."""
_LONGEST_LIST = 2**16


def check_files(location: str) -> None:
    """Check that the files of a folder can be read to their end; those of a hub's cache can.

    Args:
        location: The folder, or a hub id.

    Raises:
        OSError: One is no regular file.
        ValueError: A file of weights unpacks to more than it is.
    """
    check_name(location)
    folder = Path(location)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_dir():
            check_input(path)
            if path.suffix in (".bin", ".pt", ".pth"):
                _check_pickle(path)


def check_base_files(location: str, revision: str) -> None:
    """Check the files of a base, and that its configuration says a model of a size that is.

    Args:
        location: Its folder or hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        OSError: As `check_files`, or there is no configuration.
        ValueError: As `check_files` and `check_sizes`.
    """
    from transformers import PretrainedConfig

    check_files(location)
    loaded: Any = PretrainedConfig
    config, _ = loaded.get_config_dict(location, revision=revision)
    check_sizes(config)


def check_sizes(config: Any) -> None:
    """Raise ValueError for a number of a configuration that no model has; names it."""
    for name, value in _numbers(config):
        if isinstance(value, list):
            if len(value) > _LONGEST_LIST:
                raise ValueError(f"its configuration has a list {name} of {len(value):,}.")
            continue
        for pattern, most in _MOST:
            if pattern.fullmatch(name) and value > most:
                raise ValueError(
                    f"its configuration says {name}={str(value)[:30]}, and no model has more than "
                    f"{most:,}."
                )


def _numbers(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Whole numbers and lists in a configuration, by the names that stand next to them."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _numbers(value, str(key))
    elif isinstance(config, list):
        yield name, config
        for value in config[:_LONGEST_LIST]:
            yield from _numbers(value, name)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield name, config


def _check_pickle(path: Path) -> None:
    """Weights that torch has pickled: those in its format since 1.6 unpack to what they are."""
    with open_input(path) as file:
        is_archive = file.read(2) == b"PK"
        file.seek(0)
        if is_archive:
            check_archive(file, path)

"""Imported by the process that others are forked from: what trainings and commands import."""

import contextlib
import functools
import io
import sys
from pathlib import Path

import docstring_parser
import torch

from rosa_lightning.cli.main import main
from tests import conftest

__all__ = ["conftest"]

torch.set_num_threads(1)
for name in ("parse", "parse_from_object"):
    setattr(docstring_parser, name, functools.cache(getattr(docstring_parser, name)))
sys.argv = ["rosa"]
config = str(Path(__file__).parents[1] / "configs" / "tiny.yaml")
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["fit", "--config", config, "--print_config"])

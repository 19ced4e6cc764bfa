from __future__ import annotations

import pytest
import torch

from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.tasks.records import plain_name
from rosa_lightning.utils.errors import ConfigurationError, explain


def raised(function, *args, **kwargs) -> BaseException:
    try:
        function(*args, **kwargs)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def raise_(error: BaseException, over: BaseException | None = None):
    raise error from over


def test_what_the_package_refuses_is_told():
    assert explain(raised(RoAEConfig, rank=0)).startswith("rank=0 is not a whole number")
    wrapped = raised(raise_, RuntimeError("around"), raised(RoAEConfig, rank=0))
    assert explain(wrapped).startswith("rank=0")


def test_an_operation_that_fails_in_the_package_is_a_defect():
    """The same class from the same file, but no refusal: it says nothing of what was given."""
    error = raised(plain_name, 5)
    assert isinstance(error, AttributeError)
    assert explain(error) is None
    assert explain(raised(RoAEConfig.__init__)) is None  # a TypeError of the call itself


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, IndexError, RuntimeError])
def test_errors_of_libraries_are_defects(kind):
    assert explain(raised(raise_, kind("x"))) is None
    assert explain(raised(torch.zeros(2).reshape, 3)) is None


def test_what_the_machine_lacks_is_told():
    assert "No space" in explain(raised(raise_, OSError(28, "No space left on device", "f.ckpt")))
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")):
        assert "memory is spent" in explain(raised(raise_, error))
        assert "\n" not in explain(raised(raise_, error))


class Refusing(torch.utils.data.Dataset):
    def __init__(self, broken: bool):
        self.broken = broken

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return plain_name(5) if self.broken else RoAEConfig(rank=0)


@pytest.mark.parametrize("broken", [False, True])
def test_what_a_worker_refuses_is_told_as_if_there_were_none(broken):
    loader = torch.utils.data.DataLoader(Refusing(broken), num_workers=1)
    told = explain(raised(list, loader))
    assert told is None if broken else told.startswith("rank=0 is not a whole number")


def test_a_configuration_error_is_told_wherever_it_comes_from():
    from rosa_lightning.cli.process import configuration_errors

    def make():
        with configuration_errors("it cannot be made", "Mend it."):
            raise ZeroDivisionError("by zero")

    error = raised(make)
    assert isinstance(error, ConfigurationError)
    assert explain(error) == "it cannot be made: ZeroDivisionError: by zero. Mend it."


def test_a_full_disk_without_a_name_is_said_with_what_to_do():
    told = explain(OSError(28, "No space left on device"))
    assert told == (
        "a file of the run cannot be written: No space left on device. Make room, or set "
        "trainer.default_root_dir to another place."
    )
    assert explain(OSError(28, "No space left on device", "a.ckpt")).endswith("'a.ckpt'")

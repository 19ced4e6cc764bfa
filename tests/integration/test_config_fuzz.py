"""The shipped configurations, changed at random: one line, or a run that does as it was told."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rosa_lightning.cli.main import RoSACLI, main
from tests.conftest import write_records
from tests.hostile import limited

SHIPPED = {
    name: yaml.safe_load((Path(__file__).parents[2] / "configs" / f"{name}.yaml").read_text())
    for name in ("tiny", "rosa")
}
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.5, 2**40, 10**30, float("nan"), float("inf")),
    *("", "x", "no", "5", "1e-3x", "a\x00b", "\u00e9", "os.system", "nonsense.Klass", "tiny"),
    *([], {}, [1], ["a", None], {"a": 1}, {"class_path": "os.system"}, [[[]]]),
    {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1}},
]
KINDS = ("drop", "retype", "retype", "misspell", "nest", "duplicate", "swap", "lift")
SECONDS = 120
QUICK = {
    "trainer.limit_train_batches": "1",
    "trainer.limit_val_batches": "1",
    "trainer.max_epochs": "1",
    "trainer.logger": "false",
}
"""What keeps a training to a moment."""
LOCAL = {"model.base": "tiny", "data.sources": "a.json", "data.test_sources": "null"}
"""What the configuration of a hub model needs to be trained here."""


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys: Any = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield (*here, key)
        if isinstance(value[key], dict | list):
            yield from paths(value[key], (*here, key))


def misspell(config: Any, path: tuple[Any, ...]) -> None:
    """Change the last key of a path; of an item of a list, the key of the list."""
    while not isinstance(path[-1], str):
        path = path[:-1]
    for step in path[:-1]:
        config = config[step]
    config[f"{path[-1][:-1]}q"] = config.pop(path[-1])


def mutated(config: dict[str, Any], draw: random.Random) -> tuple[str, str]:
    """The text of a changed configuration, and what was changed."""
    config = copy.deepcopy(config)
    path = draw.choice(list(paths(config)))
    place: Any = config
    for key in path[:-1]:
        place = place[key]
    key, kind = path[-1], draw.choice(KINDS)
    dotted = ".".join(map(str, path))
    if kind == "drop":
        del place[key]
    elif kind == "retype":
        place[key] = draw.choice(VALUES)
        dotted += f"={place[key]!r}"
    elif kind == "misspell":
        misspell(config, path)
    elif kind == "nest":
        place[key] = draw.choice([[place[key]], {"value": place[key]}, {str(key): place[key]}])
    elif kind == "swap":
        other = draw.choice(list(paths(config)))
        found: Any = SHIPPED["rosa"]
        for step in other:
            found = found[step] if isinstance(found, dict) and step in found else None
        place[key] = copy.deepcopy(found)
        dotted += f"={found!r}"
    elif kind == "lift":
        config[str(key)] = place[key]
    text = yaml.safe_dump(config, sort_keys=False)
    if kind == "duplicate":
        top = draw.choice(list(config))
        text += yaml.safe_dump({top: config[top]})
    return text, f"{kind} {dotted}"


def given(text: str) -> dict[tuple[str, ...], Any]:
    """The plain values of a configuration, by key."""

    def leaves(value: Any, here: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from leaves(inner, (*here, key))
        elif not isinstance(value, list | dict):
            yield here, value

    return dict(leaves(yaml.safe_load(text), ()))


def same(key: tuple[str, ...], wanted: Any, found: Any) -> bool:
    """Whether a value was taken: as it is, or as the number or text that the setting asks for."""
    if key == ("seed_everything",) and wanted is True:
        return isinstance(found, int)  # Lightning chooses one
    if isinstance(wanted, str) and isinstance(found, bool):
        wanted = yaml.safe_load(wanted)
    return wanted == found or str(wanted) == str(found) or (wanted != wanted and found != found)


class Checked(RoSACLI):
    """Trains no step but where asked to, and keeps the configuration as it was understood."""

    steps = False
    understood: Any = None

    def _run_subcommand(self, subcommand: str) -> None:
        type(self).understood = self.config[subcommand]
        if self.steps:
            super()._run_subcommand(subcommand)


def check(name: str, seed: int, capsys: Any, *, trains: bool) -> None:
    """One case: refused in one line, or taken as it stands, and trained with if so asked."""
    draw = random.Random(f"{name} {seed}")
    text, what = mutated(SHIPPED[name], draw)
    Path("c.yaml").write_text(text)
    Checked.understood, Checked.steps = None, trains
    options = (QUICK | (LOCAL if name == "rosa" else {})) if trains else {}
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    capsys.readouterr()
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = main(["fit", "--config", "c.yaml", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    except BaseException as error:
        raise AssertionError(f"{name} {seed}: {what}: a traceback") from error
    errors = capsys.readouterr().err
    if status:
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, f"{name} {seed}: {what}: {errors[-500:]}"
        assert len(lines[0]) > len("error: ") + 8, f"{name} {seed}: {what}: {lines}"
        return
    assert not what.startswith("duplicate"), f"{name} {seed}: {what}: one of two was passed over"
    for key, value in given(text).items():
        if any(".".join(key).startswith(option) for option in options):
            continue
        place: Any = Checked.understood
        for step in key:
            place = place.get(step) if hasattr(place, "get") else vars(place).get(step)
        assert same(key, value, place), (
            f"{name} {seed}: {what}: {key} is {place!r}, and not {value!r}"
        )


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.setattr("rosa_lightning.cli.main.RoSACLI", Checked)
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "a.json", 4)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("seeds", [range(15), pytest.param(range(15, 265), marks=pytest.mark.slow)])
def test_a_changed_configuration_is_refused_in_one_line_or_taken_as_it_stands(name, seeds, capsys):
    for seed in seeds:
        check(name, seed, capsys, trains=name == "tiny" and seed % 10 == 0)

"""What is answered before torch and Lightning are imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rosa_lightning.__main__ import main as module_main
from rosa_lightning.cli.main import main
from rosa_lightning.cli.names import COMMANDS, first_look, general_help, known_settings, unknown


@pytest.mark.parametrize("command", COMMANDS)
def test_no_setting_that_the_parser_knows_is_called_unknown(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = re.findall(r"^  --([\w.]+)|, --([\w.]+)", capsys.readouterr().out, re.M)
    names = {first or second for first, second in options}
    assert len(names) > 2
    with pytest.raises(SystemExit):
        main([command, "--print_config"])
    given = yaml.safe_load(capsys.readouterr().out) or {}
    names |= given.keys()
    for group in ("model", "data", "dls", "trainer"):
        inner = given.get(group) or {}
        names |= {f"{group}.{name}" for name in inner}
        nested = {k: v for k, v in inner.items() if f"{group}.{k}" in known_settings()}
        names |= {f"{group}.{k}.{name}" for k, v in nested.items() for name in v or ()}
    groups = known_settings()
    assert [name for name in names if unknown(name, groups) is not None] == []


@pytest.mark.parametrize("name", ["tiny", "rosa", "smollm2", "compare"])
def test_the_shipped_configurations_are_left_to_the_parser(name):
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    assert first_look(["fit", "--config", str(path)]) is None


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["fitt"], "fit"),
        (["fit", "--modle.base", "x"], "model.base"),
        (["fit", "--model.bsae=x"], "model.base"),
        (["fit", "--model.roae.rnk", "4"], "model.roae.rank"),
        (["fit", "--trainer.max_stps", "4"], "trainer.max_steps"),
        (["fit", "--data.stop", "total"], "data.loading.stop"),
        (["fit", "--config", "typo.yaml"], "data.batch_size"),
        (["fit", "--max_steps", "4"], "trainer.max_steps"),
        (["fit", "--batchsize", "4"], "data.batch_size"),
        (["fit", "--model.rank", "4"], "model.roae.rank"),
        (["compare", "--comparison.lerning_rates", "[1]"], "comparison.learning_rates"),
    ],
)
def test_a_typo_names_what_is_near(args, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("model:\n  base: tiny\ndata:\n  batchsize: 4\n")
    assert first_look(args).endswith(f" Did you mean {near}?")


@pytest.mark.parametrize("name", ["data.foo", "comparison.output", "model.roae.r", "lr"])
def test_where_nothing_is_near_the_help_is_named(name):
    listed = "COMMAND --help lists those of a command."
    assert first_look(["compare", f"--{name}", "4"]).endswith(listed)


@pytest.mark.parametrize(
    "args",
    [
        ["fit", "--trainer.callbacks+=x", "--trainer.logger.save_dir", "y"],
        ["fit", "--optimizer.lr", "1", "--model.peft.init_args.r", "4"],
        ["fit", "--config", "no such file"],
        ["fit", "--config", "model: {base: tiny}"],
        ["--config", "x"],
    ],
)
def test_what_is_not_plainly_wrong_is_left_to_the_parser(args):
    assert first_look(args) is None


@pytest.mark.parametrize(
    ("args", "status"), [([], 0), (["--help"], 0), (["fitt"], 2), (["fit", "--modle.base", "x"], 2)]
)
def test_neither_torch_nor_lightning_is_imported_for_help_and_typos(args, status):
    code = (
        "import sys\nfrom rosa_lightning.__main__ import main\n"
        "try:\n    main()\nfinally:\n"
        "    assert not {'torch', 'lightning', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (general_help() in done.stdout) == (not status)
    assert len(done.stderr.splitlines()) == (1 if status else 0)


def test_compare_says_that_it_starts_before_the_imports(monkeypatch, capsys):
    said = []

    def run():
        said.append(capsys.readouterr().err)
        return 0

    monkeypatch.setattr("rosa_lightning.cli.main.main", run)
    for command in ("compare", "report"):
        monkeypatch.setattr(sys, "argv", ["rosa", command])
        with pytest.raises(SystemExit):
            module_main()
    assert said == ["compare: starting; what is planned follows in some seconds\n", ""]

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rosa_lightning import DynamicLayerSelection
from rosa_lightning.cli.main import complete_strategy, main
from tests.conftest import byte_tokenizer, write_records


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch, tmp_path):
    """Lightning warns about other arguments on the command line, and runs write where they are."""
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(base_folder, sources) -> dict:
    return {
        "model": {"base": str(base_folder), "roae": {"rank": 4}},
        "data": {"sources": sources, "batch_size": 4, "val_fraction": 0.1},
        "dls": {"interval": 5},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


def run(command: str, settings: dict, *arguments: str) -> int:
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return main([command, "--config", "config.yaml", *arguments])


def refused(capsys, command: str, settings: dict, *arguments: str) -> str:
    """The one line that a refused command prints on stderr, without a traceback."""
    try:
        status = run(command, settings, *arguments)
    except SystemExit as exit_:
        status = exit_.code
    assert status in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_fit_leaves_logs_and_an_adapter_only_checkpoint(settings):
    assert run("fit", settings) == 0
    folder = Path("lightning_logs/version_0")
    assert list(folder.glob("events.out.tfevents.*"))
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    assert checkpoint.stat().st_size < 200_000


def test_the_curves_begin_with_the_base_when_asked_for(settings):
    settings["validate_first"] = True
    assert run("fit", settings) == 0
    (events,) = Path("lightning_logs").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert log.Scalars("val/loss")[0].step == 0
    assert list(events.parent.glob("checkpoints/*.ckpt"))


def test_a_run_without_a_logger_leaves_the_working_folder_alone(settings):
    Path("config.yaml").write_text("mine")
    mine = Path("settings.yaml")
    mine.write_text(yaml.safe_dump(settings))
    for _ in range(2):
        options = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
        assert main(["fit", "--config", str(mine), *options]) == 0
    assert Path("config.yaml").read_text() == "mine"


def test_validate_test_and_predict_take_the_checkpoint(settings, tmp_path):
    settings["model"].setdefault("evaluation", {})["max_new_tokens"] = 3
    settings["data"]["test_sources"] = [
        {"path": str(write_records(tmp_path / "t.json", 5)), "task": "gsm8k"}
    ]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": f"Say {n}."} for n in range(5)]))
    settings["data"]["predict_sources"] = [str(prompts)]
    assert run("fit", settings) == 0
    (checkpoint,) = map(str, Path("lightning_logs").rglob("*.ckpt"))
    for command in ("validate", "test", "predict"):
        assert run(command, settings, "--ckpt_path", checkpoint) == 0
    (results,) = Path().rglob("results.json")
    assert json.loads(results.read_text())["results"][0]["n"] == 5
    files = [path for path in Path().rglob("predictions.jsonl") if path.parent != results.parent]
    (predictions,) = files
    records = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [f"Say {n}." for n in range(5)]
    assert not list(Path().rglob("*.rank0"))


def test_optimizer_and_schedule_are_replaced_from_the_command_line(settings, capsys):
    arguments = ["--optimizer", "SGD", "--optimizer.lr", "0.5", "--optimizer.momentum", "0.9"]
    schedule = ["--lr_scheduler", "ConstantLR", "--lr_scheduler.factor", "0.25"]
    settings["trainer"]["callbacks"] = None
    assert run("fit", settings, *arguments, *schedule) == 0
    (path,) = Path("lightning_logs").rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["momentum"] == 0.9
    assert group["lr"] == pytest.approx(0.5 * 0.25)


def test_print_config_round_trips(settings, capsys):
    outputs = []
    for name in ("first.yaml", "second.yaml"):
        source = "config.yaml" if not outputs else "first.yaml"
        Path("config.yaml").write_text(yaml.safe_dump(settings))
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "--config", source, "--print_config"])
        assert exit_.value.code == 0
        outputs.append(capsys.readouterr().out)
        Path(name).write_text(outputs[-1])
    assert outputs[0] == outputs[1]
    assert yaml.safe_load(outputs[0])["model"]["roae"]["rank"] == 4


def test_help_shows_what_the_attributes_of_nested_settings_mean(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Share of each head's RoPE pairs that is adapted" in text
    assert text.startswith("usage: python -m rosa_lightning fit [--config FILE] [--KEY VALUE ...]")


@pytest.mark.parametrize(
    ("change", "nearest"),
    [
        (lambda c: c["model"].update(basee="x"), "model.base"),
        (lambda c: c["model"]["roae"].update(low_frq_ratio=0.5), "model.roae.low_freq_ratio"),
        (lambda c: c["data"].update(batchsize=4), "data.batch_size"),
        (lambda c: c["trainer"].update(max_stps=4), "trainer.max_steps"),
        (lambda c: c["dls"].update(intervall=4), "dls.interval"),
        (lambda c: c.update(optimizer={"class_path": "AdamW", "init_args": {"lrr": 0.1}}), "lr"),
    ],
)
def test_a_mistyped_key_names_the_nearest_right_one(settings, change, nearest, capsys):
    change(settings)
    assert refused(capsys, "fit", settings).endswith(f" Did you mean {nearest}?")


def test_a_mistyped_option_and_command_are_one_line(settings, capsys):
    line = refused(capsys, "fit", settings, "--model.roae.rnk", "3")
    assert line.endswith("Did you mean model.roae.rank?")
    with pytest.raises(SystemExit):
        main(["fitt"])
    assert "invalid choice: 'fitt'" in capsys.readouterr().err


def test_a_base_without_rope_is_one_line(settings, tmp_path, capsys):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 258}
    made = transformers.GPT2Config(bos_token_id=1, eos_token_id=256, pad_token_id=257, **sizes)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    line = refused(capsys, "fit", settings, "--model.base", str(tmp_path / "base"))
    assert "RoPE" in line
    assert "GPT2" in line


def test_a_command_without_sources_names_the_setting(settings, capsys):
    assert "nothing to test: data.test_sources" in refused(capsys, "test", settings)


def test_exercises_that_cannot_be_answered_are_named_before_the_base_is_loaded(
    settings, tmp_path, capsys, monkeypatch
):
    def no_base(*_, **__):
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("rosa_lightning.adapted.load_base", no_base)
    records = [{"instruction": "Is it?", "answer": "true"}] * 2
    records.append({"instruction": "Is it " + "so " * 200 + "?", "answer": "true"})
    Path("boolq.json").write_text(json.dumps(records))
    settings["data"] |= {"test_sources": [{"path": "boolq.json"}], "max_length": 4000}
    line = refused(capsys, "test", settings)
    assert "task boolq: record 3 of source boolq has a prompt of" in line
    assert "Set data.max_length below 512" in line


def test_the_logs_of_another_run_are_kept_and_a_resumed_run_may_add_to_its_own(settings, capsys):
    settings["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": ".", "version": 7},
    }
    assert run("fit", settings) == 0
    assert "holds the logs of another run" in refused(capsys, "fit", settings)
    (checkpoint,) = map(str, Path("lightning_logs").rglob("*.ckpt"))
    assert run("fit", settings, "--ckpt_path", checkpoint, "--trainer.max_steps", "3") == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["rosa", "tiny"])
def test_the_shipped_configurations_train_on_a_small_set(name, base_folder, tmp_path):
    config = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    source = write_records(tmp_path / "few.json", 30)
    base = ["--model.base", str(base_folder), "--data.sources", f"[{{path: {source}}}]"]
    limits = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", str(config), *base, *limits]) == 0


def test_the_traceback_is_shown_when_asked_for(settings, monkeypatch):
    monkeypatch.setenv("ROSA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="rank=0"):
        run("fit", settings, "--model.roae.rank", "0")


def test_a_defect_keeps_its_traceback(settings, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a defect")

    monkeypatch.setattr("torch.nn.functional.cross_entropy", broken)
    with pytest.raises(ValueError, match="a defect"):
        run("fit", settings)


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "rosa_lightning", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(
        line in done.stdout
        for line in ("fit         Train adapters.", "validate", "test", "predict")
    )


CALL = "{class_path: os.system, init_args: {command: touch called}}"


@pytest.mark.parametrize(
    "given",
    [
        ["--data.tokenizer", CALL],
        ["--optimizer", CALL],
        ["--optimizer", "{class_path: torch.hub.load, init_args: {source: local}}"],
        ["--lr_scheduler", CALL],
        ["--lr_scheduler", "{class_path: LambdaLR, init_args: {lr_lambda: os.system}}"],
        ["--trainer.callbacks", f"[{CALL}]"],
        ["--trainer.logger", CALL],
        ["--trainer.plugins", f"[{CALL}]"],
        ["--trainer.strategy", CALL],
        ["--trainer.profiler", CALL],
        ["--data.sources", f"[{{path: {CALL}}}]"],
        ["--data.tasks", f"[{{name: t, format: {CALL}}}]"],
        ["--data.sources", CALL],
    ],
    ids=lambda given: " ".join(given)[:50],
)
def test_a_configuration_calls_no_function(settings, capsys, given):
    assert refused(capsys, "fit", settings, *given)
    assert not Path("called").exists()


def test_a_configuration_file_calls_no_function(settings, capsys):
    settings["data"]["tokenizer"] = yaml.safe_load(CALL)
    assert "data.tokenizer" in refused(capsys, "fit", settings)
    assert not Path("called").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("model:\n  dtype: auto\nmodel:\n  base: a\n", "more.yaml, line 3: the key model"),
        ("model: 2\n", "model is 2"),
        ("model:\n  roae: 2\n", "model.roae is 2"),
        ("model:\n  base: 5\n", "model.base"),
        ("data:\n  sources: 5\n", "data.sources"),
        ("optimizer: 2\n", "optimizer"),
        ("1: 2\n", "1"),
        ("", "more.yaml is empty"),
        ("a: !!python/object:os.system {}\n", "python/object"),
    ],
)
def test_a_configuration_that_says_nothing_clear_ends_in_one_line_with_status_2(
    settings, capsys, more, words
):
    Path("more.yaml").write_text(more)
    with pytest.raises(SystemExit) as exit_:
        run("fit", settings, "--config", "more.yaml")
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model.roae.rank", "0"], "rank"),
        (["--model.roae.low_freq_ratio", "1.5"], "low_freq_ratio"),
        (["--model.roae.rank", "x"], "error: model.roae.rank: x is given; expected int.$"),
        (["--model.roae.dims", "x"], "dims: x is given; expected one of low, high, random, all.$"),
        (["--trainer.precision", "8"], "trainer.precision: 8 is given; expected one of 64, 32"),
        (["--trainer.logger.save_dir", "x"], "logger: save_dir without a class_path is given"),
        (["--model.roae", "2"], "model.roae: '2' is neither"),
        (["--model.base", "no/such-model"], "base 'no/such-model' could not be loaded"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt"),
        (["--ckpt_path", "a\0b"], "null character"),
        (["--config", "a\0b"], "cannot be read"),
        (["--data.sources", "[{path: missing.json}]"], "missing.json does not exist"),
        (["--data.sources", "[{hub: nobody/nothing}]"], "nobody/nothing"),
        (["--data.sources", "[]"], "data.sources names no source"),
        (["--data.sources", "[{path: 5}]"], "A data source has path 5; expected a text"),
        (["--data.sources", "{path: '5'}"], "error: 5 does not exist"),
        (["--data.sources", "{path: a, stream: 'no'}"], "Source a has stream 'no'; expected true"),
        (["--data.tasks", "[{name: mood, format: lable}]"], "data.tasks.*format.*lable"),
        (["--data.seed", str(2**70)], "more than 64 bits. Set another data.seed"),
        (["--seed_everything", str(2**40)], "seed_everything cannot be used: 1099511627776"),
        (["--optimizer.lr", "1e-3x"], "optimizer: .*lr.*1e-3x is given; expected one of float"),
        (["--optimizer.lr", "-1"], "the optimizer cannot be made: .*-1"),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], "the run has no end"),
        (["--trainer.accelerator", "gpu"], "accelerator=gpu: .* finds no GPU .* cpu or auto"),
        (["--trainer.accelerator", "foo"], "the trainer cannot be made: .*'foo'"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches=0 is below 1"),
        (["--trainer.val_check_interval", "1000"], "less than or equal to the number"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(settings, given, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    line = refused(capsys, "fit", settings, *given)
    assert re.search(words, line), line


@pytest.mark.parametrize(
    "given",
    [
        ["--model.evaluation.num_beams", "0"],
        ["--model.evaluation.protocols", "[]"],
        ["--model.evaluation.protocols", "[guess]"],
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line(settings, given, capsys):
    assert given[0].rpartition(".")[2] in refused(capsys, "test", settings, *given)


def test_records_longer_than_the_base_reads_are_warned_of_in_a_training_too(settings):
    given = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    with pytest.warns(UserWarning, match=r"data.max_length=513 is beyond the 512 tokens"):
        run("fit", settings, "--data.max_length", "513", *given)
    assert run("fit", settings, "--data.max_length", "512", *given) == 0


@pytest.mark.parametrize(
    "given", ["q.txt", "[q.txt]", "{path: q.txt}", "[{path: q.txt}]", "+q.txt"]
)
def test_one_source_is_a_list_of_one(settings, given, tmp_path):
    """Though the file's lines, or what they say as YAML, look like a list of sources."""
    Path("q.txt").write_text("[a.json, b.json]\n{path: c.json}\n")
    settings["model"].setdefault("evaluation", {})["max_new_tokens"] = 1
    settings["trainer"]["logger"] = False
    if given.startswith("+"):
        settings["data"]["predict_sources"] = given[1:]  # in the file
        assert run("predict", settings) == 0
    else:
        assert run("predict", settings, "--data.predict_sources", given) == 0
    asked = [
        json.loads(line)["prompt"] for line in Path("predictions.jsonl").read_text().splitlines()
    ]
    assert asked == ["[a.json, b.json]", "{path: c.json}"]


def test_keys_of_earlier_versions_name_those_of_today(settings, capsys):
    for old, new in (
        ("model.share_prefix", "model.speed.share_prefix"),
        ("model.max_nonfinite_steps", "max_nonfinite_steps"),
        ("data.template", "data.prompt_style"),
        ("data.stop", "data.loading.stop"),
        ("dls.moments", "dls.optimizer_state"),
    ):
        with pytest.raises(SystemExit):
            run("fit", settings, f"--{old}", "1")
        assert f"Did you mean {new}?" in capsys.readouterr().err


def test_classes_of_earlier_versions_name_those_of_today(settings, capsys):
    for key, old, new in (
        ("lr_scheduler", "schedule.WarmupCosine", "WarmupCosine"),
        ("trainer.callbacks", "ThroughputMonitor", "TokenThroughputMonitor"),
    ):
        with pytest.raises(SystemExit):
            run("fit", settings, f"--{key}", f"rosa_lightning.{old}")
        assert f"write rosa_lightning.{new}" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"moments": "reset"}, {"score_smoothing": 0.0}])
def test_a_selection_among_the_callbacks_of_an_earlier_configuration_is_told_its_place(
    options, settings, capsys
):
    selection = {"class_path": "rosa_lightning.DynamicLayerSelection", "init_args": options}
    settings["trainer"]["callbacks"] = [selection]
    with suppress(SystemExit):
        assert run("fit", settings) != 0
    error = capsys.readouterr().err
    assert "dls:" in error
    assert len(error.strip().splitlines()) == 1


def test_every_fit_selects_layers_as_told_at_the_top_level(settings):
    del settings["dls"]
    assert run("fit", settings, "--dls.interval", "1", "--dls.num_active", "1") == 0
    (path,) = Path.cwd().rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)["callbacks"]["DynamicLayerSelection"]
    assert saved["num_selections"] == 2


class Reads(Callback):
    """Keeps what the module was told on the command line."""

    skips: int | None = None

    def on_fit_start(self, trainer, pl_module):
        type(self).skips = pl_module.max_nonfinite_steps


def test_the_number_of_steps_that_may_be_left_out_reaches_the_module(settings):
    settings["trainer"]["callbacks"] = [{"class_path": "tests.cli.test_main.Reads"}]
    assert run("fit", settings, "--max_nonfinite_steps", "3") == 0
    assert Reads.skips == 3


@pytest.mark.parametrize(
    ("policy", "trains", "wanted"),
    [("top_k", True, True), ("top_k", False, False), ("all", True, False)],
)
def test_ddp_looks_for_unused_parameters_only_where_layers_are_frozen(policy, trains, wanted):
    selection = DynamicLayerSelection(policy=policy)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", strategy="ddp", devices=1, callbacks=[selection], **quiet)
    complete_strategy(trainer, trains=trains)
    assert bool(trainer.strategy._ddp_kwargs.get("find_unused_parameters")) == wanted

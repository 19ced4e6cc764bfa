from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from lightning.pytorch.accelerators import CPUAccelerator
from torch import nn

from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.adapters.files import load_adapter
from rosa_lightning.cli.inspect import _tokens_at_once
from rosa_lightning.cli.main import main
from rosa_lightning.models.loading import load_base
from rosa_lightning.module import RoSAModule
from rosa_lightning.roae.inject import inject_roae, roae_layers
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.utils.files import atomic_directory
from tests.conftest import rosa_module


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)


SHORT_STEP = ["--data.batch_size", "2", "--response_length", "4"]
"""A step that inspect measures soon: not in parts."""


def run(capsys, *arguments: str) -> tuple[int, str, list[str]]:
    """Status, what was printed, and the error lines of a command."""
    try:
        status = main(list(arguments))
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    streams = capsys.readouterr()
    errors = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    return status, streams.out, errors


@pytest.fixture(scope="module")
def trained(base_folder, sources, tmp_path_factory) -> Path:
    """The folder of a short run: config.yaml and last.ckpt."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "model": {"base": str(base_folder), "roae": {"rank": 4, "low_freq_ratio": 0.5}},
        "data": {"sources": sources, "batch_size": 4, "val_fraction": 0.1},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "", "version": "run"},
            },
        },
    }
    (folder / "given.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rosa"])
        assert main(["fit", "--config", str(folder / "given.yaml")]) == 0
    (checkpoint,) = (folder / "run" / "checkpoints").glob("*.ckpt")
    checkpoint.rename(folder / "run" / "last.ckpt")
    return folder / "run"


@pytest.fixture(scope="module")
def expected(trained) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and the trained model's logits on them."""
    module = RoSAModule.load_from_checkpoint(trained / "last.ckpt")
    ids_BT = torch.randint(200, (2, 12), generator=torch.Generator().manual_seed(0))
    assert any(layer.roae_B.any() for _, layer in roae_layers(module))
    return ids_BT, module.eval()(ids_BT).logits


def test_a_checkpoint_alone_is_enough_to_merge(trained, expected, capsys):
    arguments = ["--ckpt_path", str(trained / "last.ckpt"), "--output", "out/merged"]
    status, printed, _ = run(capsys, "export", "--format", "merged", *arguments)
    assert status == 0
    assert "greedy tokens agree" in printed
    merged = transformers.AutoModelForCausalLM.from_pretrained("out/merged").eval()
    ids_BT, logits = expected
    torch.testing.assert_close(merged(ids_BT).logits, logits, atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained("out/merged").eos_token == "<eos>"


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_an_export_has_its_base_s_own_tokenizer(format, base_folder, tmp_path, capsys):
    shutil.copytree(base_folder, "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained("base")
    tokenizer.pad_token = None
    tokenizer.save_pretrained("base")
    inject_roae(model := load_base("base"), RoAEConfig(rank=2))
    export_adapter(model, "adapter", "rosa")
    merge = ["--model.adapter", "adapter", "--format", format]
    assert run(capsys, "export", *merge, "--output", "out")[0] == 0
    files = [path.name for path in Path("base").glob("*token*")]
    assert len(files) >= 2
    assert all(Path("out", name).read_bytes() == Path("base", name).read_bytes() for name in files)

    # One that training was told to take instead.
    given = ["--data.tokenizer", str(base_folder), "--output", "given"]
    assert run(capsys, "export", *merge, *given)[0] == 0
    assert transformers.AutoTokenizer.from_pretrained("given").pad_token == "<pad>"

    Path("base/tokenizer.json").write_text("{")
    status, _, errors = run(capsys, "export", *merge, "--output", "broken")
    assert (status, len(errors)) == (1, 1)
    assert "the tokenizer of base" in errors[0]
    for name in files:
        Path("base", name).unlink()
    status, printed, _ = run(capsys, "export", *merge, "--output", "bare")
    assert status == 0
    assert "\nwithout a tokenizer, as the base has none" in printed
    assert not list(Path("bare").glob("*token*"))


def test_only_a_finished_folder_is_pushed_and_only_if_asked(trained, capsys, hub):
    given = ["--ckpt_path", str(trained / "last.ckpt")]
    assert run(capsys, "export", *given, "--output", "kept")[0] == 0
    assert hub.calls == []
    status, printed, _ = run(capsys, "export", *given, "--output", "a", "--push", "ann/reader")
    assert status == 0
    assert "pushed to https://huggingface.co/ann/reader" in printed
    files = sorted(path.name for path in Path("a").iterdir())
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} <= {*files}
    assert hub.calls[-1] == ("upload_folder", "ann/reader", files)
    assert "# ann/reader\n" in Path("a/README.md").read_text()

    hub.fails["upload_folder"] = ConnectionError("gone")
    status, printed, errors = run(capsys, "export", *given, "--output", "b", "--push", "ann/b")
    assert (status, len(errors)) == (1, 1)
    assert "b is written, and could not be pushed to ann/b: gone. Push it with hf" in errors[0]
    assert sorted(path.name for path in Path("b").iterdir()) == files

    hub.fails["whoami"] = ConnectionError("gone")  # said before anything is loaded or written
    status, _, errors = run(capsys, "export", *given, "--output", "c", "--push", "ann/c")
    assert (status, len(errors)) == (1, 1)
    assert not Path("c").exists()


@pytest.mark.parametrize("format", ["rosa", "peft"])
def test_an_exported_adapter_goes_on_in_every_command(
    format, trained, base_folder, expected, capsys
):
    # The configuration that the run has saved, too.
    config = ["--config", str(trained / "config.yaml")]
    checkpoint = ["--ckpt_path", str(trained / "last.ckpt")]
    run(capsys, "export", *config, *checkpoint, "--format", format, "--output", "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder).eval()
    load_adapter(base, "out")
    ids_BT, logits = expected
    assert torch.equal(base(ids_BT).logits, logits)
    _, by_checkpoint, _ = run(capsys, "inspect", *checkpoint, *SHORT_STEP)
    _, by_adapter, _ = run(capsys, "inspect", "--model.adapter", "out", *SHORT_STEP)
    assert by_adapter == by_checkpoint
    assert "4 of 8 RoPE pairs" in by_adapter

    again = ["--model.adapter", "out", "--format", "merged", "--output", "merged"]
    assert run(capsys, "export", *again)[0] == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    torch.testing.assert_close(merged(ids_BT).logits, logits, atol=1e-5, rtol=1e-5)

    more = ["--model.adapter", "out", "--trainer.logger", "false", "--trainer.max_steps", "1"]
    assert run(capsys, "fit", *config, *more)[0] == 0


def test_wrong_command_lines_end_in_one_line(trained, tmp_path, capsys):
    checkpoint = str(trained / "last.ckpt")
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, "bare.ckpt")
    torch.save([1], "list.ckpt")
    Path("there").mkdir()
    cases = {
        ("--ckpt_path", checkpoint, "--output", "there"): "output=there exists already",
        ("--ckpt_path", checkpoint): "required: --output",
        ("--ckpt_path", "text.ckpt", "--output", "o"): "text.ckpt is no checkpoint",
        ("--ckpt_path", "bare.ckpt", "--output", "o"): "holds no RoSA adapter",
        ("--ckpt_path", "list.ckpt", "--output", "o"): "list.ckpt",
        ("--output", "o", "--model.base", "tiny"): "no adapter is given. Set ckpt_path",
        ("--output", "o", "--model.adapter", "gone"): "there is no such folder. Give a folder",
        ("--ckpt_path", checkpoint, "--output", "o", "--push", "me"): "Give USER/me",
        ("--output", "o", "--private", "true"): "private is an option of push",
        ("--output", "o", "--dequantize", "true"): "dequantize is an option of format merged",
        ("--output", "o", "--format", "merged", "--max_shard_size", "5XB"): "is no size of a file",
        ("--output", "o", "--model.bse", "tiny"): "Did you mean model.base?",
    }
    for arguments, message in cases.items():
        status, _, errors = run(capsys, "export", *arguments)
        assert status in (1, 2), arguments
        assert len(errors) == 1, arguments
        assert message in errors[0]
    assert not Path("o").exists()


def test_a_checkpoint_cannot_switch_remote_code_on(trained, base_folder, capsys, monkeypatch):
    content = torch.load(trained / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["trust_remote_code"] = True
    torch.save(content, "evil.ckpt")
    trusted = []

    def load_base(*_, trust_remote_code, **__):
        trusted.append(trust_remote_code)
        raise OSError

    monkeypatch.setattr("rosa_lightning.adapted.load_base", load_base)
    run(capsys, "export", "--ckpt_path", "evil.ckpt", "--output", "o")
    assert trusted == [False]


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory) -> Path:
    """The folder of the adapter as exported for PEFT."""
    folder = tmp_path_factory.mktemp("adapters") / "peft"
    export_adapter(RoSAModule.load_from_checkpoint(trained / "last.ckpt").model, folder, "peft")
    return folder


def data_alone(trained: Path) -> list[str]:
    """The configuration of the run but for its model."""
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    kept = {"data": settings["data"], "trainer": settings["trainer"]}
    Path("data.yaml").write_text(yaml.safe_dump(kept))
    return ["--config", "data.yaml"]


def test_an_adapter_brings_its_base_and_settings_to_every_command(trained, adapter, capsys):
    given = [*data_alone(trained), "--model.adapter", str(adapter), "--model.roae.dropout", "0.1"]
    assert run(capsys, "validate", *given, "--trainer.logger", "false")[0] == 0
    status, printed, _ = run(capsys, "fit", *given, "--print_config")
    assert status == 0
    roae = yaml.safe_load(printed)["model"]["roae"]
    assert (roae["rank"], roae["low_freq_ratio"], roae["dropout"]) == (4, 0.5, 0.1)


def test_a_run_begun_from_an_adapter_goes_on_without_its_folder(trained, adapter, capsys):
    shutil.copytree(adapter, "mine")
    logged = ["--trainer.logger.save_dir", "logs", "--trainer.logger.version", "a"]
    config = data_alone(trained)
    run(capsys, "fit", *config, "--model.adapter", "mine", *logged, "--trainer.max_steps", "1")
    shutil.rmtree("mine")
    (checkpoint,) = map(str, Path("logs/a/checkpoints").glob("*.ckpt"))
    again = ["--config", "logs/a/config.yaml", "--ckpt_path", checkpoint]
    more = ["--trainer.logger", "false", "--trainer.max_steps", "2"]
    assert run(capsys, "fit", *again, *more)[0] == 0
    exported = ["--format", "rosa", "--output", "out"]
    assert run(capsys, "export", *again, *exported)[0] == 0


def test_no_base_and_no_such_checkpoint_are_one_line_before_anything_is_loaded(trained, capsys):
    cases = {
        (): "no base is given. Set model.base",
        ("--model.adapter", "."): "holds no adapter: neither",
        ("--ckpt_path", "last_run/none.ckpt"): "ckpt_path=last_run/none.ckpt does not exist",
        ("--ckpt", "none.ckpt"): "Did you mean ckpt_path?",
    }
    for arguments, message in cases.items():
        status, _, errors = run(capsys, "fit", *data_alone(trained), *arguments)
        assert status in (1, 2)
        assert len(errors) == 1
        assert message in errors[0]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_export_that_is_stopped_leaves_nothing_behind(
    number, status, adapter, capsys, monkeypatch
):
    def slow(model, folder, *_, **__):
        with atomic_directory(folder) as written:
            (written / "half").write_text("...")
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 5)  # let the handler run

    monkeypatch.setattr("rosa_lightning.cli.commands.export_adapter", slow)
    handler = signal.getsignal(signal.SIGTERM)
    # In the background of a shell Ctrl-C is ignored from the start.
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert (
            run(capsys, "export", "--model.adapter", str(adapter), "--output", "deep/out")[0]
            == status
        )
    finally:
        signal.signal(signal.SIGINT, interrupted)
    assert not list(Path().iterdir())
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_configuration_from_a_pipe_is_read(trained, capsys):
    os.mkfifo("pipe")
    settings = f"model: {{base: tiny}}\ndata: {{batch_size: 3}}\nckpt_path: {trained / 'last.ckpt'}"
    writer = threading.Thread(target=Path("pipe").write_text, args=(settings,))
    writer.start()
    base = yaml.safe_load((trained / "config.yaml").read_text())["model"]["base"]
    status, printed, _ = run(capsys, "inspect", "--config", "pipe", "--model.base", base)
    writer.join()
    assert status == 0
    assert "Batch of 3 x" in printed
    assert "4 of 8 RoPE pairs" in printed


def test_inspect_needs_no_weights(base_folder, tmp_path, capsys):
    (tmp_path / "shell").mkdir()
    (tmp_path / "shell" / "config.json").write_text((base_folder / "config.json").read_text())
    step = ["--data.batch_size", "2", "--data.max_length", "16", "--response_length", "4"]
    step += ["--trainer.accelerator", "cpu", "--model.speed.microbatch_tokens", "16"]
    status, printed, _ = run(capsys, "inspect", "--model.base", "shell", *step)
    assert status == 0
    for expected in ("self_attn.q_proj", "2 of 8 RoPE pairs", "in parts of 1 row\n", "peak"):
        assert expected in printed


@pytest.mark.parametrize(
    ("given", "settings", "wanted"),
    [
        ("auto", {"accelerator": "cpu"}, 2048),
        (100, {"accelerator": "cpu"}, 100),
        (None, {"accelerator": "cpu"}, None),
        ("auto", {"accelerator": "gpu"}, None),
        (100, {"accelerator": "cpu", "precision": "16-mixed"}, 100),  # Lightning takes bfloat16
        (100, {"accelerator": "gpu", "precision": "16-mixed"}, None),
        (100, {"accelerator": "gpu", "precision": "bf16-mixed"}, 100),
        (100, {"accelerator": "cpu", "strategy": "fsdp"}, None),
        ("auto", {"accelerator": CPUAccelerator()}, 2048),
    ],
)
def test_inspect_knows_how_many_tokens_a_training_runs_at_once(given, settings, wanted):
    module = rosa_module("tiny", microbatch_tokens=given)
    assert _tokens_at_once(module, settings, nn.Linear(2, 2)) == wanted


def test_inspect_draws_the_rotated_states(trained, sources, capsys):
    more = ["--ckpt_path", str(trained / "last.ckpt"), "--activations", "deep/norms.png"]
    status, printed, _ = run(
        capsys, "inspect", "--config", str(trained / "config.yaml"), *more, "--num_batches", "1"
    )
    assert status == 0
    assert Path("deep/norms.png").read_bytes().startswith(b"\x89PNG")
    assert "tensorboard --logdir deep/norms" in printed
    assert list(Path("deep/norms").glob("events.out.tfevents.*"))
    Path("file").write_text("mine")
    cases = {
        "a.jpg": "is not the name of a PNG file",
        "deep/norms.png": "deep/norms.png exists already",
        "file/a.png": "file is no folder",
    }
    for path, message in cases.items():
        status, _, errors = run(capsys, "inspect", "--model.base", "tiny", "--activations", path)
        assert status == 1
        assert message in errors[0]


def line_of(printed: str, name: str) -> str:
    return next(line for line in printed.splitlines() if line.strip().startswith(name))


@pytest.mark.parametrize("scheme", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_inspect_of_a_quantised_base_needs_no_weights_and_no_library(
    scheme, capsys, monkeypatch, base_folder
):
    monkeypatch.setattr("rosa_lightning.models.loading.quantization_config", None)
    base = ["--model.base", str(base_folder), *SHORT_STEP]
    _, plain, _ = run(capsys, "inspect", *base)
    status, printed, _ = run(capsys, "inspect", *base, "--model.quantization", scheme)
    assert status == 0
    assert "KiB" in line_of(printed, f"weights, {scheme}")
    assert "KiB" in line_of(printed, "weights, float32")
    parameters, _, _ = plain.partition("Batch of")
    assert printed.startswith(parameters)


def test_inspect_refuses_in_one_line_before_it_prints(base_folder, capsys):
    config = json.loads((base_folder / "config.json").read_text())
    Path("packed").mkdir()
    packed = {**config, "quantization_config": {"quant_method": "awq", "bits": 4}}
    Path("packed/config.json").write_text(json.dumps(packed))
    base = ["--model.base", str(base_folder)]
    cases = {
        (*base, "--trainer.precision", "64-true", "--model.quantization", "nf4"): "64-true cannot",
        (*base, "--response_length", "512"): "length=512 and response_length=512 make no batch",
        ("--model.base", "nowhere"): "base 'nowhere' could not be loaded",
        ("--model.base", "packed", "--model.quantization", "nf4"): "is quantised already",
    }
    for arguments, message in cases.items():
        status, printed, errors = run(capsys, "inspect", *arguments)
        assert (status, printed, len(errors)) == (1, "", 1), arguments
        assert message in errors[0]


def test_report_writes_a_page_of_a_run_and_needs_no_base(trained, capsys):
    status, printed, _ = run(capsys, "report", str(trained), "--output", "page.html")
    assert status == 0
    assert printed.strip() == "page.html"
    assert "train/loss" in Path("page.html").read_text()

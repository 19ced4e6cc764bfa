from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from rosa_lightning.adapters.metadata import tokenizer_digest
from rosa_lightning.cli.main import main
from tests.conftest import byte_tokenizer, save_base, write_records

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)


def chat_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def command(name: str, *arguments: str, **settings) -> int:
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    return main([name, "--config", "c.yaml", *arguments])


QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat base, an adapter trained on it in the chat style, and both exports."""
    folder = tmp_path_factory.mktemp("chat")
    save_base(folder / "base")
    chat_tokenizer().save_pretrained(folder / "base")
    write_records(folder / "r.json", 12)
    argv, sys.argv = sys.argv, ["rosa"]
    settings = {
        "model": {"base": str(folder / "base"), "roae": {"rank": 2}},
        "data": {
            "sources": {"path": str(folder / "r.json"), "task": "gsm8k"},
            "prompt_style": "chat",
            "max_length": 96,
            "batch_size": 4,
            "loading": {"cache_dir": None},
        },
        "trainer": {
            **QUIET,
            "max_steps": 1,
            "log_every_n_steps": 1,
            "precision": "bf16-mixed",
            "logger": False,
            "default_root_dir": str(folder),
        },
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(folder / "c.yaml")]) == 0
    (path,) = folder.rglob("*.ckpt")
    path.rename(folder / "it.ckpt")
    checkpoint = torch.load(folder / "it.ckpt", weights_only=True)
    # An adapter that adds nothing would be answered for as the base.
    for name, value in checkpoint["state_dict"].items():
        if name.endswith("roae_B"):
            value.fill_(0.01)
    torch.save(checkpoint, folder / "it.ckpt")
    for form in ("rosa", "peft"):
        output = ["--format", form, "--output", str(folder / form)]
        assert main(["export", "--ckpt_path", str(folder / "it.ckpt"), *output]) == 0
    sys.argv = argv
    return folder


def of(folder: Path, kind: str) -> list[str]:
    if kind == "checkpoint":
        return ["--ckpt_path", str(folder / "it.ckpt")]
    return ["--model.adapter", str(folder / kind)]


def results_of(folder: Path, *arguments: str, **data) -> tuple[dict, list[str]]:
    """``results.json`` of a test with little said, and the texts that the model was given."""
    from rosa_lightning import module as home
    from rosa_lightning.evaluation import evaluator

    asked: list[str] = []
    own = evaluator.generate

    def write(model, tokenizer, batch, *rest, **options):
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        asked.extend(tokenizer.decode(ids[mask.bool()]) for ids, mask in rows)
        return own(model, tokenizer, batch, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (home, evaluator):
            patch.setattr(module, "generate", write)
        status = command(
            "test",
            *arguments,
            model={"evaluation": {"max_new_tokens": 2}},
            data={"test_sources": {"path": str(folder / "r.json"), "task": "gsm8k"}, **data},
            trainer={**QUIET, "logger": False},
        )
    assert status == 0
    return json.loads(Path("results.json").read_text()), asked


@pytest.mark.parametrize("kind", ["checkpoint", "rosa", "peft"])
def test_what_was_trained_in_the_chat_style_is_tested_in_it(trained, kind):
    found, asked = results_of(trained, *of(trained, kind))
    assert len(asked) == 12
    assert all(text.startswith("<user>Say ") and text.endswith("<assistant>") for text in asked)
    kept = found["template"], found["max_length"], found["precision"]
    assert kept == ("chat", 96, "bf16-mixed")
    assert found["tokenizer_digest"] == tokenizer_digest(chat_tokenizer())


def test_what_contradicts_is_taken_and_warned_of_in_a_line_each(trained):
    given = {"prompt_style": "plain", "max_length": 64}
    with pytest.warns(UserWarning, match="was trained with") as caught:
        found, asked = results_of(trained, *of(trained, "checkpoint"), **given)
    assert found["template"] == "plain"
    assert not any("<user>" in text for text in asked)
    lines = [str(one.message) for one in caught if "was trained with" in str(one.message)]
    assert [line.split(":")[0] for line in lines] == [
        "data.prompt_style is plain, and the adapter was trained with chat",
        "data.max_length is 64, and the adapter was trained with 96",
    ]


def test_another_tokenizer_is_warned_of(trained, tmp_path):
    other = chat_tokenizer()
    other.chat_template = CHAT.replace("<assistant>", "<model>")
    other.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="trained with another one"):
        results_of(trained, *of(trained, "rosa"), tokenizer=str(tmp_path / "other"))


def test_other_commands_take_it_too_and_training_goes_on_in_it(trained, capsys):
    adapter = ["--model.adapter", str(trained / "rosa")]
    with pytest.warns(UserWarning, match="data.max_length is 40, and the adapter was trained with"):
        main(["audit", *adapter, "--data.sources", "demo", "--data.max_length", "40"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *adapter, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["data"]["prompt_style"], printed["data"]["max_length"]) == ("chat", 96)
    assert printed["trainer"]["precision"] == "bf16-mixed"


def test_from_python_a_loaded_module_warns_of_another_style(trained):
    from lightning.pytorch import Trainer

    from rosa_lightning import ReasoningDataModule, RoSAModule

    module = RoSAModule.load_from_checkpoint(trained / "it.ckpt", evaluation={"max_new_tokens": 1})
    Path("q.txt").write_text("Why?\n")
    data = ReasoningDataModule(predict_sources="q.txt", max_length=96, prompt_style="plain")
    trainer = Trainer(logger=False, enable_progress_bar=False, precision="bf16-mixed")
    with pytest.warns(UserWarning, match="data.prompt_style is plain, and the adapter was trained"):
        trainer.predict(module, data)


def test_checkpoints_of_earlier_versions_load_and_damaged_ones_are_told(trained, capsys):
    content = torch.load(trained / "it.ckpt", weights_only=True)
    del content["rosa"]["conditions"]
    torch.save(content, "old.ckpt")
    found, _ = results_of(trained, "--ckpt_path", "old.ckpt")
    assert found["template"] == "alpaca"
    for damaged in (3, {"max_length": "long"}, {"template": ["chat"]}):
        content["rosa"]["conditions"] = damaged
        torch.save(content, "damaged.ckpt")
        assert main(["test", "--ckpt_path", "damaged.ckpt"]) == 1
        assert "damaged.ckpt: its metadata is damaged" in capsys.readouterr().err

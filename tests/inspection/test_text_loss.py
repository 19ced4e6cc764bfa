"""The loss on plain texts, against that of plain transformers on the merged model."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosa_lightning import ReasoningDataModule, RoSAModule, TextLoss
from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.data.sources import Source
from rosa_lightning.inspection import text_loss
from rosa_lightning.inspection.text_loss import read_texts
from rosa_lightning.models.loading import load_tokenizer
from rosa_lightning.utils.files import file_digest

TEXTS = ["Ada has 12 apples and gives 5 of them away.", "x", "How many? " * 40]


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A validation of a trained adapter with texts, read in parts of 16 tokens; and the module."""
    folder = tmp_path_factory.mktemp("texts")
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    module = RoSAModule("tiny")
    module.configure_model()
    for name, weight in module.named_parameters():
        if "roae_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        limit_val_batches=1,
        enable_progress_bar=False,
        callbacks=[TextLoss(str(file))],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_loss, "MAX_TOKENS", 16)
        (metrics,) = trainer.validate(module, ReasoningDataModule(batch_size=2), verbose=False)
    return folder, module, metrics, file


def test_it_is_the_loss_of_transformers_on_the_merged_model(validated, tmp_path):
    folder, module, metrics, file = validated
    merged = tmp_path / "merged"
    export_adapter(module.model.eval(), merged, "merged", tokenizer=load_tokenizer("tiny"))
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    total, number = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for start in range(0, ids.shape[1], 16):
            part = ids[:, start : start + 16]
            if (size := part.shape[1] - 1) > 0:
                with torch.no_grad():
                    loss = model(input_ids=part, labels=part).loss
                total, number = total + float(loss) * size, number + size
    found = json.loads((folder / "text_loss.json").read_text())
    assert found["loss"] == pytest.approx(total / number, rel=1e-4)
    assert found["tokens"] == number
    assert metrics["val/text_loss"] == pytest.approx(found["loss"])
    assert found["texts"] == file_digest(file)


def test_each_text_has_its_sum_and_its_tokens(validated):
    folder, *_ = validated
    found = json.loads((folder / "text_loss.json").read_text())
    sums, numbers = zip(*found["by_text"], strict=True)
    assert len(sums) == len(TEXTS)
    assert found["loss"] == pytest.approx(sum(sums) / sum(numbers))


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\n\n  \ntwo\n", ["one", "two"]),
        ("a.jsonl", '{"text": "one"}\n{"text": " "}\n{"text": "two", "id": 3}\n', ["one", "two"]),
        ("a.json", '[{"text": "one"}]', ["one"]),
    ],
)
def test_texts_of_each_kind_of_file(tmp_path, name, content, texts):
    (tmp_path / name).write_text(content)
    assert read_texts(Source(path=str(tmp_path / name))) == texts


def test_as_many_texts_as_asked_for_are_drawn_and_always_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(str(number) for number in range(50)))
    source = Source(path=str(tmp_path / "a.txt"), max_examples=5)
    drawn = read_texts(source)
    assert len(set(drawn)) == 5
    assert drawn == read_texts(source)
    assert drawn == sorted(drawn, key=int)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n', "2 has no field text .* body"),
        ("a.jsonl", '["one"]\n', "1 has .* a list"),
        ("a.txt", "\n \n", "holds no text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(Source(path=str(tmp_path / name)))

"""A conversation in the terminal."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosa_lightning.cli import chat
from rosa_lightning.cli.main import main
from rosa_lightning.data.encoding import Encoder
from rosa_lightning.evaluation.generation import Sampling
from rosa_lightning.models import tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def said(monkeypatch, capsys):
    """Run `chat` on lines; returns what it writes."""

    def run(lines, *options):
        monkeypatch.setattr(sys, "argv", ["rosa"])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        status = main(["chat", "--model.base=tiny", "--trainer.accelerator=cpu", *options])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


def conversation(monkeypatch, size=512, system=None):
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    tokenizer.chat_template = TEMPLATE
    asked = []

    def answers(model, tokenizer, batch, longest, **options):
        asked.append(batch["input_ids"][0].tolist())
        return [f"answer {len(asked)}"]

    monkeypatch.setattr(chat, "generate", answers)
    model = AutoModelForCausalLM.from_pretrained(tiny.folder())
    encoder = Encoder(tokenizer, "chat", max_length=size, with_response=False)
    return chat.Conversation(model, encoder, 16, Sampling(), system), tokenizer, asked


@pytest.mark.parametrize("system", [None, "be brief"])
def test_the_model_reads_the_whole_conversation_by_its_template(monkeypatch, system):
    talk, tokenizer, asked = conversation(monkeypatch, system=system)
    history = [] if system is None else [{"role": "system", "content": system}]
    for number, message in enumerate(["one", "and two", "three"], start=1):
        talk.answer(message)
        history.append({"role": "user", "content": message})
        options = {"add_generation_prompt": True, "return_dict": False}
        assert asked[-1] == tokenizer.apply_chat_template(history, **options)
        history.append({"role": "assistant", "content": f"answer {number}"})
    talk.begin()
    talk.answer("one")
    assert asked[-1] == asked[0]


def test_a_long_conversation_loses_its_start(monkeypatch, caplog):
    talk, tokenizer, asked = conversation(monkeypatch, size=60)
    for number in range(12):
        talk.answer(f"message {number}")
    assert len(asked[-1]) <= 60 < len(tokenizer("".join(t.content for t in talk.turns)).input_ids)
    assert tokenizer.decode(asked[-1]).startswith("<user>")


def test_prompt_and_answer_fit_what_the_base_reads(said, monkeypatch):
    seen = []

    def answers(model, tokenizer, batch, longest, **options):
        seen.append((batch["input_ids"].shape[1], longest, model.config.max_position_embeddings))
        return ["so"]

    monkeypatch.setattr(chat, "generate", answers)
    said(["many words " * 3000], "--prompt_style=plain", "--model.evaluation.max_new_tokens=40")
    [(asked, longest, size)] = seen
    assert longest == 40
    assert asked + longest == size


def test_an_answer_is_stopped_and_the_conversation_goes_on(said, monkeypatch):
    def answers(model, tokenizer, batch, longest, **options):
        if "long" in tokenizer.decode(batch["input_ids"][0]):
            raise KeyboardInterrupt
        return ["so"]

    monkeypatch.setattr(chat, "generate", answers)
    status, written, _ = said(["one", "a long one", "two"], "--prompt_style=alpaca")
    assert (status, written) == (0, "so\n\nso\n")


def test_greedy_answers_are_those_of_transformers(said):
    status, written, _ = said(
        ["How many has Ada?", "Hello", "/new", "How many has Ada?", "/exit", "not read"],
        *("--temperature=0", "--prompt_style=plain", "--model.evaluation.max_new_tokens=6"),
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    model = AutoModelForCausalLM.from_pretrained(tiny.folder())
    expected = {}
    for message in ("How many has Ada?", "Hello"):
        ids = tokenizer(f"{message}\n", return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        expected[message] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    first, other = expected.values()
    assert (status, written) == (0, f"{first}\n{other}\n{first}\n")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--temperature=-1", "temperature=-1.0 is not at least 0"),
        ("--top_p=0", "top_p=0.0 is not above 0"),
        ("--system=brief", "system takes prompt_style: chat"),
    ],
)
def test_wrong_options_are_one_line(said, option, message):
    status, _, errors = said([], option, "--prompt_style=plain")
    assert status == 1
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors

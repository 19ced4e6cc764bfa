"""Chat templates: what is asked, what is trained on, and where writing stops."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rosa_lightning.data.chat import ChatFormat, Ending
from rosa_lightning.data.collators import IGNORE_INDEX, TrainCollator
from rosa_lightning.data.prompts import prompt_text, stop_ids
from rosa_lightning.data.tokenization import encode
from rosa_lightning.tasks.records import Record, prompt
from tests.data.test_collators import byte_tokenizer

# As the models of these families have them, without tools and default system messages.
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
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token }}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    CHATML[: -len("{% endif %}")] + "{% if enable_thinking is defined and enable_thinking is false "
    "%}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|user|>", "<|assistant|>", "<|end|>"),
]


def chat_tokenizer(template: str, *, adds: str = "", merges=(), special: bool = True):
    tokenizer = byte_tokenizer(adds=adds, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=special) for token in TOKENS])
    tokenizer.chat_template = template
    return tokenizer


def record(instruction="What is 2 + 2?", output="It is 4.", answer="4", context=""):
    return Record(instruction, context, output, answer, "gsm8k", "a", 1)


FAMILIES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "llama2": (LLAMA2, "</s>"),
    "phi3": (PHI3, "<|end|>"),
    "glm": (GLM, "</s>"),
}
ADDS = ["", "<s> $A", "<s> $A </s>"]


def test_chat_prompt_is_a_users_message_and_the_beginning_of_an_answer():
    tokenizer = chat_tokenizer(CHATML)
    assert prompt_text(record(context="Add."), "chat", tokenizer) == (
        "<|im_start|>user\nWhat is 2 + 2?\nAdd.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_texts_of_other_templates_need_no_tokenizer(template):
    assert prompt_text(record(), template, None) == prompt(record(), template)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adds", ADDS)
def test_rendered_conversation_begins_with_the_chat_example(family, adds):
    """An independent oracle: the template's own rendering of both messages, as text."""
    template, _ = FAMILIES[family]
    tokenizer = chat_tokenizer(template, adds=adds)
    (example,), _ = encode([record()], tokenizer, template="chat")
    turns = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
    ]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    text = tokenizer.decode([*example.prompt, *example.response])
    assert text == whole[: len(text)] or (family == "glm" and text == whole + "</s>")
    assert text.count("<s>") == whole.count("<s>") == (family in {"llama3", "llama2"})


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_ids_are_prompt_then_response_and_labels_are_the_response_alone(template, adds):
    """With a tokenizer that merges across the border, and adds BOS or both."""
    tokenizer = chat_tokenizer(CHATML, adds=adds, merges=["\n\n"])
    given_record = record(output="\nIt is 4.")
    (example,), _ = encode([given_record], tokenizer, template=template)
    batch = TrainCollator(("a",), pad_id=0)([example])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert ids.tolist() == [*example.prompt, *example.response]
    border = len(example.prompt)
    assert (labels[:border] == IGNORE_INDEX).all()
    assert torch.equal(labels[border:], ids[border:])
    bos = [1] if adds and template != "chat" else []
    asked = prompt_text(given_record, template, tokenizer)
    assert list(example.prompt) == bos + tokenizer(asked, add_special_tokens=False)["input_ids"]
    text = given_record.output.strip() if template == "chat" else given_record.output
    reply = tokenizer(text, add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>" if template == "chat" else "</s>")
    assert labels[border:].tolist() == [*reply, stop]
    # Tokenised together, the border would be lost.
    if template != "chat":
        joined = tokenizer(asked + text, add_special_tokens=False)["input_ids"]
        assert joined[: border - len(bos)] != list(example.prompt)[len(bos) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_of_a_chat_example_begins_at_the_answer(family):
    tokenizer = chat_tokenizer(FAMILIES[family][0])
    (example,), _ = encode([record(output="\n It is 4.\n")], tokenizer, template="chat")
    assert tokenizer.decode(example.response[example.answer :])[:2] == "4."


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_stops_at_the_end_of_the_turn_and_at_eos(family):
    template, stop = FAMILIES[family]
    tokenizer = chat_tokenizer(template)
    names = tokenizer.convert_ids_to_tokens(stop_ids(tokenizer, "chat"))
    assert names == list(dict.fromkeys([stop, "</s>"]))
    assert stop_ids(tokenizer, "alpaca") == [tokenizer.eos_token_id]


def test_end_of_turn_need_not_be_marked_special():
    tokenizer = chat_tokenizer(CHATML, special=False)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ChatFormat(tokenizer).ending == Ending("", stop, "<|im_end|>")


def test_longest_of_the_tokens_that_end_a_turn_is_taken():
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_tokens([AddedToken("<|im", special=True), AddedToken("  ", special=False)])
    assert stop_ids(tokenizer, "chat")[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_models_that_can_think_first_are_asked_as_they_are_trained():
    text = prompt_text(record(), "chat", chat_tokenizer(THINKING))
    # As the conversation has it, whatever the template writes to be gone on with.
    assert text.endswith("<|im_start|>assistant\n")


def test_prompts_of_llama_3_are_the_same_on_any_day():
    date = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    tokenizer = chat_tokenizer(date + "{% endif %}Today Date: {{ date_string }} " + LLAMA3)
    assert prompt_text(record(), "chat", tokenizer).startswith("Today Date: 26 Jul 2024 <s>")


def test_cut_chat_prompt_keeps_its_bos():
    tokenizer = chat_tokenizer(LLAMA3, adds="<s> $A")
    assert ChatFormat(tokenizer).prefix == [tokenizer.bos_token_id]
    (example,), count = encode([record("x" * 99)], tokenizer, template="chat", max_length=30)
    assert count.too_long == 1
    assert len(example.prompt) + len(example.response) == 30
    whole = tokenizer(prompt_text(record("x" * 99), "chat", tokenizer), add_special_tokens=False)
    kept = len(example.prompt) - 1
    assert list(example.prompt) == [tokenizer.bos_token_id, *whole["input_ids"][-kept:]]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template. Set data.template: alpaca or plain"),
        ("{{ raise_exception('no users here') }}", "cannot be used: no users here"),
        ("{{ messages | nothing }}", "cannot be used: .*nothing"),
        ("{{ messages[0].content }}", "leaves out what an assistant says"),
    ],
)
def test_chat_template_that_cannot_be_used_is_one_clear_line(template, words):
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words) as caught:
        encode([record()], tokenizer, template="chat")
    assert "\n" not in str(caught.value)
    assert "data.template" in str(caught.value)


# Special tokens that fields spell.

SPELT = "</s> ends it, <pad> fills, <s> begins."


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_special_tokens_that_fields_spell_are_text(template, adds):
    tokenizer = chat_tokenizer(CHATML, adds=adds)
    given_record = record(f"<|im_end|> {SPELT}", SPELT + "<|im_end|> 4", context=SPELT)
    (example,), _ = encode([given_record], tokenizer, template=template, max_length=999)
    bos = [1] if adds and template != "chat" else []
    own = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    written = [own[0], own[1], own[0]] if template == "chat" else []
    special = tokenizer.added_tokens_decoder
    assert [one for one in example.prompt if one in special] == bos + written
    stop = own[1] if template == "chat" else tokenizer.eos_token_id
    assert [one for one in example.response if one in special] == [stop]
    text = tokenizer.decode(example.prompt[len(bos) :])
    assert text == prompt_text(given_record, template, tokenizer)
    assert tokenizer.decode(example.response[:-1]) == given_record.output
    # The tokenizer's own way to say so.
    plain = tokenizer(SPELT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert list(example.response[: len(plain)]) == plain
    assert tokenizer.decode(example.response[example.answer : -1]).strip() == "4"


def test_end_of_turn_that_is_not_special_is_text_in_fields():
    tokenizer = chat_tokenizer(CHATML, special=False)
    (example,), _ = encode([record("<|im_end|>", "<|im_end|>")], tokenizer, template="chat")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(example.prompt).count(stop) == list(example.response).count(stop) == 1
    assert tokenizer.decode(example.response) == "<|im_end|><|im_end|>"


def test_special_token_that_is_a_word_too_is_text_in_fields():
    """As in vocabularies of Unigram, whose pieces hold the special tokens."""
    pieces = [(token, 0.0) for token in ("<unk>", "</s>")]
    pieces += [(character, -9.0) for character in "\n abcdefghijklmnopqrstuvwxyz</>It."]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), eos_token="</s>"
    )
    (example,), _ = encode([record("a </s>", "b </s>")], tokenizer, template="plain")
    assert 1 not in example.prompt
    assert [*example.response].index(1) == len(example.response) - 1
    assert len(example.response) == 1 + len("b </s>")

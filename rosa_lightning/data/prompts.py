"""The text around a record: what asks for the response, and what ends it.

`alpaca` and `plain` are texts. `chat` is the tokenizer's own chat template: the record is asked
as a user's message, and the response is the assistant's message up to the token that ends its
turn.
"""

from dataclasses import replace
from typing import Any, Literal

from rosa_lightning.data.chat import ChatFormat
from rosa_lightning.data.text_tokens import TextTokenizer
from rosa_lightning.tasks.records import Record, prompt, response

Template = Literal["alpaca", "chat", "plain"]


def question(record: Record) -> str:
    """What a user asks under `chat`."""
    return f"{record.instruction}\n{record.input}" if record.input else record.instruction


def marked_prompt(record: Record, template: Template, texts: TextTokenizer) -> str:
    """The text before the response, with marks around special tokens that fields spell."""
    instruction, context = texts.mark(record.instruction), texts.mark(record.input)
    return prompt(replace(record, instruction=instruction, input=context), template)  # type: ignore[arg-type]


def prompt_text(record: Record, template: Template, tokenizer: Any) -> str:
    """The text before the response, with every special token of its own under `chat`.

    Raises ValueError where the tokenizer has no chat template, or one that cannot be used.
    """
    if template == "chat":
        return ChatFormat(tokenizer).text(question(record))
    return prompt(record, template)


def response_text(record: Record, template: Template) -> str:
    """The text to train on. Under `chat` without outer white space: the template sets its own."""
    return response(record).strip() if template == "chat" else response(record)


def stop_ids(tokenizer: Any, template: Template) -> list[int]:
    """Tokens that end what a model writes: the one it was trained to end with, and EOS."""
    ends = [ChatFormat(tokenizer).ending.stop] if template == "chat" else []
    return list(dict.fromkeys([*ends, tokenizer.eos_token_id]))


def check_template(tokenizer: Any, template: Template) -> None:
    """Raises ValueError where the tokenizer has no such template, or one that cannot be used."""
    stop_ids(tokenizer, template)

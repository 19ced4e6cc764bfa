"""The text around a record: what asks for the response, and what ends it.

`alpaca` and `plain` are texts. `chat` is the tokenizer's own chat template: the record is asked
as a user's message, and the response is the assistant's message up to the token that ends its
turn.
"""

from dataclasses import dataclass
from typing import Any, Literal

from rosa_lightning.tasks import Record, prompt, response

Template = Literal["alpaca", "chat", "plain"]

_REPLY = "ROSA-REPLY"
"""Stands for the assistant's text where its surroundings are read off a rendered conversation."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What follows the text of a response."""

    text: str
    """Text before the stop token, mostly none."""
    stop: int
    """The token that ends the response, the last with loss."""


def prompt_text(record: Record, template: Template, tokenizer: Any) -> str:
    """The text before the response, with every special token of its own under `chat`.

    Raises ValueError where the tokenizer has no chat template, or one that fails.
    """
    if template != "chat":
        return prompt(record, template)
    asked = f"{record.instruction}\n{record.input}" if record.input else record.instruction
    return _rendered(tokenizer, [("user", asked)], add_generation_prompt=True)


def chat_prefix(tokenizer: Any) -> list[int]:
    """The id of the BOS that the chat template begins with, where it does."""
    bos, text = tokenizer.bos_token, _rendered(tokenizer, [("user", "Q")])
    return [tokenizer.bos_token_id] if bos and text.startswith(bos) else []


def response_text(record: Record, template: Template) -> str:
    """The text to train on. Under `chat` without outer white space: the template sets its own."""
    return response(record).strip() if template == "chat" else response(record)


def ending(tokenizer: Any, template: Template) -> Ending:
    """What ends a response: EOS; under `chat` the first special token after the assistant's text.

    What a chat template puts after that token is not trained on: generation has stopped there.
    A template that ends a turn without a special token leaves it to EOS.
    """
    eos = Ending("", tokenizer.eos_token_id)
    if template != "chat":
        return eos
    turns = [("user", "Q"), ("assistant", _REPLY)]
    _, found, after = _rendered(tokenizer, turns).rpartition(_REPLY)
    if not found:
        raise ValueError(
            "The tokenizer's chat template leaves out what an assistant says. Set data.template: "
            "alpaca, or data.tokenizer to one with another chat template."
        )
    special = {tokenizer.eos_token: tokenizer.eos_token_id}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.content.strip():  # some tokenizers add runs of spaces
            special[token.content] = number
    starts = [(after.index(token), -len(token), token) for token in special if token in after]
    if not starts:
        return eos
    start, _, first = min(starts)
    return Ending(after[:start], special[first])


def stop_ids(tokenizer: Any, template: Template) -> list[int]:
    """Tokens that end what a model writes: the one it was trained to end with, and EOS."""
    ends = [ending(tokenizer, template).stop, tokenizer.eos_token_id]
    return list(dict.fromkeys(ends))


def check_template(tokenizer: Any, template: Template) -> None:
    """Raises ValueError where the tokenizer has no such template, or one that cannot be used."""
    ending(tokenizer, template)


def _rendered(tokenizer: Any, turns: list[tuple[str, str]], **options: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "data.template is chat, but the tokenizer has no chat template. Set data.template: "
            "alpaca or plain, or data.tokenizer to that of a chat model."
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False,
            # Read by templates of models that can think first: the records' responses do not.
            enable_thinking=False,
            # Read by Llama 3's templates, else with today's date in newer ones: a run that is
            # resumed tomorrow shall see the same tokens. This is their own default.
            date_string="26 Jul 2024",
            **options,
        )
    except Exception as error:  # Jinja's, or whatever a template raises
        raise ValueError(
            f"The tokenizer's chat template cannot be used: {' '.join(str(error).split())}. "
            "Set data.template: alpaca or plain."
        ) from error
    return text

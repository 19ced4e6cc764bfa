"""Prompt styles: the text around a record, its token ids, and the tokens that end a response.

A new style is a subclass of `PromptStyle` with an entry in `STYLES`.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from rosa_lightning.data.text_tokens import TextTokenizer, Tokens, prompt_prefix
from rosa_lightning.models.kv_cache import common_start
from rosa_lightning.tasks.records import Record

StyleName = Literal["alpaca", "chat", "plain"]


class EncodedRecord(NamedTuple):
    """A prompt and its response in token ids."""

    prompt: list[int]
    """All tokens before the response, without the style's prefix."""
    text: str
    """The response as the style writes it."""
    reply: Tokens
    """The response and the token that ends it."""
    rewritten: bool = False
    """Whether the style changes the response, outer white space aside."""


class PromptStyle:
    """The instruction and its input, each on a line of its own (`plain`).

    Prompt and response are tokenized apart and joined as ids, so the border between them is exact
    for tokenizers that would merge across it too. Special tokens that a field spells are encoded
    as text.
    """

    next_prompt: tuple[str, ...] = ()
    """What a model writes when it has answered and makes up the next instruction."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def texts(self) -> TextTokenizer:
        """Encodes text in which fields are marked."""
        return TextTokenizer(self.tokenizer)

    @cached_property
    def prefix(self) -> list[int]:
        """Tokens at the beginning that a prompt keeps when it is cut: BOS, if any."""
        return prompt_prefix(self.tokenizer)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response; it is trained to end with the first.

        Raises ValueError where the tokenizer does not have this style.
        """
        return [self.tokenizer.eos_token_id]

    def apply(self, instruction: str, context: str) -> str:
        """The text before the response."""
        return f"{instruction}\n{context}\n" if context else f"{instruction}\n"

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Token ids of the prompts, without the prefix."""
        mark = self.texts.mark
        found = self.texts(self.apply(mark(one.instruction), mark(one.input)) for one in records)
        return [tokens.ids for tokens in found]

    def encode(self, records: Sequence[Record]) -> Iterator[EncodedRecord]:
        """Prompts and responses in token ids."""
        replies = self.texts(self.texts.mark(record.output) for record in records)
        for record, prompt, reply in zip(records, self.prompts(records), replies, strict=True):
            yield EncodedRecord(
                prompt, record.output, Tokens([*reply.ids, *self.stop_ids], reply.starts)
            )

    def response(self, text: str, *, end: bool = False) -> list[int]:
        """Token ids of a response as they follow a prompt; `end` adds the token that ends it."""
        (found,) = self.texts([self.texts.mark(text)])
        return [*found.ids, *self.stop_ids] if end else found.ids


class AlpacaStyle(PromptStyle):
    """Alpaca's instruction template, as LLM-Adapters' `generate_prompt` words it (`alpaca`)."""

    next_prompt = ("### Instruction:",)
    _BEFORE = "Below is an instruction that describes a task"
    _WRITE = "Write a response that appropriately completes the request.\n\n"

    def apply(self, instruction: str, context: str) -> str:
        """The text before the response."""
        asked = f"### Instruction:\n{instruction}\n\n"
        if not context:
            return f"{self._BEFORE}. {self._WRITE}{asked}### Response:\n"
        paired = f"{self._BEFORE}, paired with an input that provides further context. "
        return f"{paired}{self._WRITE}{asked}### Input:\n{context}\n\n### Response:\n"


_ASKED, _REPLY = "ROSA-ASKED", "ROSA-REPLY"
"""Stand for the user's and the assistant's text where their surroundings are looked at."""
_REPLIES = (
    *(_REPLY, "an", "It is", "The", "To", "Yes", "true", "We", "I", "A", "B", "So", "Let"),
    *("42", "(A)", '"so"', "'so'", "-1", "$x$", "\\(x\\)", "*", "# A", "<a>", "[1]", "{a}", "="),
    *("é", "Я", "λ", "ש", "ع", "अ", "한", "あ", "是", "🙂"),
)
"""Replies that begin in different ways: a tokenizer may merge some with what stands before."""
_MOST_MERGED = 16
"""Characters before a reply that may be merged with it."""
_OPTIONS: dict[str, Any] = {
    # Read by templates of models that can think first: the records' responses do not.
    "enable_thinking": False,
    # Llama 3's templates write today's date by default: a run that is resumed tomorrow must see
    # the same tokens. This is the date of the older ones.
    "date_string": "26 Jul 2024",
}


class _Ending(NamedTuple):
    """What follows a reply."""

    text: str
    """Text before the stop token, mostly none."""
    stop: int
    token: str = ""
    """The stop token as the template writes it; empty where it is added to that."""


class _Border(NamedTuple):
    """Where prompts end."""

    behind: list[int]
    """Tokens behind it if the reply is `_REPLY`."""
    merged: int
    """Characters behind it that stand before the reply, as some replies are merged with them."""


class ChatStyle(PromptStyle):
    """The tokenizer's own chat template: a user's message and the assistant's reply (`chat`).

    A conversation is rendered and tokenized as a whole, so that its ids are those of
    `apply_chat_template`; `add_generation_prompt` is not looked at. The prompt is the tokens that
    stand before the reply whatever the reply is: the space of "[/INST] Yes" belongs to the reply's
    first token. A reply that is merged with the end of its prompt is tokenized by itself, as the
    prompt of an evaluation does not know of the merge. Nothing behind the first special token after
    the reply is trained on.
    """

    @cached_property
    def texts(self) -> TextTokenizer:
        """Encodes text in which fields are marked."""
        return TextTokenizer(self.tokenizer, (self._ending.token,))

    @cached_property
    def prefix(self) -> list[int]:
        """Tokens at the beginning that a prompt keeps when it is cut: BOS, if any."""
        (found,) = self._until_border([self._around(_ASKED)[0]])
        own, bos = prompt_prefix(self.tokenizer), [self.tokenizer.bos_token_id]
        return next((start for start in (own, bos) if start and start == found[: len(start)]), [])

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response: the template's end of a turn, and EOS."""
        return list(dict.fromkeys([self._ending.stop, self.tokenizer.eos_token_id]))

    def apply(self, instruction: str, context: str) -> str:
        """The text before the response."""
        asked = self.texts.mark(_question(instruction, context))
        return self.texts.unmark(self._around(asked)[0])

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Token ids of the prompts, without the prefix."""
        users = [self.texts.mark(_question(one.instruction, one.input)) for one in records]
        found = self._until_border([self._around(user)[0] for user in users])
        return [prompt[len(self.prefix) :] for prompt in found]

    def encode(self, records: Sequence[Record]) -> Iterator[EncodedRecord]:
        """Prompts and responses in token ids; white space around a response is the template's."""
        users = [_question(one.instruction, one.input) for one in records]
        for one in self._conversations(users, [one.output.strip() for one in records]):
            yield one._replace(prompt=one.prompt[len(self.prefix) :])

    def response(self, text: str, *, end: bool = False) -> list[int]:
        """Token ids of a response as they follow a prompt; `end` adds the token that ends it."""
        (found,) = self._conversations(["Q"], [text], end=end)
        return found.reply.ids

    def _conversations(
        self, users: Sequence[str], replies: Sequence[str], *, end: bool = True
    ) -> list[EncodedRecord]:
        texts = self.texts
        users, replies = ([*map(texts.mark, some)] for some in (users, replies))
        around = [self._around(user) for user in users]
        prompts = self._until_border([before for before, _ in around])
        written = [
            self._written(user, reply, *own)
            for user, reply, own in zip(users, replies, around, strict=True)
        ]
        ending = self._ending.text + self._ending.token if end else ""
        added = [] if self._ending.token or not end else [self._ending.stop]
        wholes = texts(
            before + reply + ending for (before, _), (reply, _) in zip(around, written, strict=True)
        )
        found = []
        for prompt, (before, _), (reply, rewritten), whole in zip(
            prompts, around, written, wholes, strict=True
        ):
            if whole.ids[: len(prompt)] == prompt:
                tokens = whole.behind(len(prompt), len(texts.unmark(before)))
            else:
                merged = before[len(before) - self._border.merged :]
                tokens = texts.following(merged + reply + ending).behind(0, len(merged))
            tokens.ids.extend(added)
            found.append(EncodedRecord(prompt, texts.unmark(reply), tokens, rewritten))
        return found

    @cached_property
    def _ending(self) -> _Ending:
        """The first special token after a reply; EOS for a template that writes none there."""
        after = self._surroundings[1]
        eos = self.tokenizer.eos_token
        special = {eos: self.tokenizer.eos_token_id}
        for number, token in self.tokenizer.added_tokens_decoder.items():
            if token.content.strip():  # some tokenizers add runs of spaces
                special[token.content] = number
        starts = [(after.index(token), -len(token), token) for token in special if token in after]
        if not starts:
            return _Ending("", special[eos])
        start, _, first = min(starts)
        return _Ending(after[:start], special[first], first)

    @cached_property
    def _surroundings(self) -> tuple[str, str]:
        """The text before and after the reply `_REPLY` to `_ASKED`."""
        text = self._rendered(_ASKED, _REPLY)
        before, _, after = text.partition(_REPLY)
        fault = ""
        if _REPLY not in text:
            fault = "leaves out what an assistant says, or alters it"
        elif _REPLY in after:
            fault = "writes what an assistant says more than once"
        elif _ASKED not in before:
            fault = "leaves out what a user says"
        else:
            other = self._rendered(_ASKED, _REPLIES[1])
            if not (other.startswith(before) and other.endswith(after)):
                fault = "writes other text around what an assistant says if that is another"
        if fault:
            raise ValueError(
                f"The tokenizer's chat template {fault}, so what to train on cannot be told. Set "
                "data.prompt_style: alpaca, or data.tokenizer to one with another chat template."
            )
        return before, after

    @cached_property
    def _border(self) -> _Border:
        before, after = self._surroundings
        written = {reply: self._rendered(_ASKED, reply) for reply in _REPLIES}
        intact = [reply for reply in _REPLIES if written[reply] == before + reply + after]
        starts = [tokens.ids for tokens in self.texts(before + reply for reply in intact)]
        # An unknown word may be the same token whatever it is.
        size = min(len(common_start(starts)), min(map(len, starts)) - 1)
        (found,) = self.texts([before + _REPLY])
        shorter = (before[: len(before) - count] for count in range(_MOST_MERGED))
        merged = [tokens.ids == found.ids[:size] for tokens in self.texts(shorter)]
        return _Border(found.ids[size:], merged.index(True) if True in merged else 0)

    def _until_border(self, befores: Sequence[str]) -> list[list[int]]:
        """Token ids up to the border, of texts that stand before replies."""
        behind, merged = self._border
        wholes = self.texts(before + _REPLY for before in befores)
        found = []
        for before, whole in zip(befores, wholes, strict=True):
            if whole.ids[-len(behind) :] == behind:
                found.append(whole.ids[: -len(behind)])
            else:  # what is asked is merged with what stands close to the reply
                found.append(self.texts([before[: len(before) - merged]])[0].ids)
        return found

    def _around(self, user: str) -> tuple[str, str]:
        before, _, after = self._rendered(user, _REPLY).rpartition(_REPLY)
        return before, after

    def _written(self, user: str, reply: str, before: str, after: str) -> tuple[str, bool]:
        """What the template makes of a reply, and whether that is another text."""
        text = self._rendered(user, reply)
        inside = text.removeprefix(before).removesuffix(after)
        if before + inside + after == text and (inside or not reply):
            return inside, inside.strip() != reply.strip()
        # In another place than that of other replies, which is where a model is asked for it.
        return reply, True

    def _rendered(self, user: str, reply: str) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "data.prompt_style is chat, but the tokenizer has no chat template. Set "
                "data.prompt_style: alpaca or plain, or data.tokenizer to that of a chat model."
            )
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, **_OPTIONS)
        except Exception as error:  # Jinja's, or whatever a template raises
            raise ValueError(
                f"The tokenizer's chat template cannot be used: {' '.join(str(error).split())}. "
                "Set data.prompt_style: alpaca or plain."
            ) from error
        return text


def _question(instruction: str, context: str) -> str:
    return f"{instruction}\n{context}" if context else instruction


STYLES: dict[str, type[PromptStyle]] = {
    "alpaca": AlpacaStyle,
    "chat": ChatStyle,
    "plain": PromptStyle,
}

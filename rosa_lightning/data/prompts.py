"""Prompt styles: the text around a record, its token ids, and the tokens that end a response.

A new style is a subclass of `PromptStyle` with an entry in `STYLES`. What a record's fields say
stays text: a special token that one spells (``</s>`` in a record about HTML) is encoded as the
characters that it is, while special tokens that a chat template writes are encoded as such.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from rosa_lightning.data.text_tokens import TextTokenizer, Tokens, prompt_prefix
from rosa_lightning.models.kv_cache import common_start
from rosa_lightning.tasks.records import Record, Turn

StyleName = Literal["alpaca", "chat", "plain"]

# --- styles ---------------------------------------------------------------------------------


class EncodedRecord(NamedTuple):
    """A prompt and its response in token ids."""

    prompt: list[int]
    """All tokens before the response, without the style's prefix."""
    text: str
    """The response as the style writes it."""
    reply: Tokens
    """The response and the token that ends it."""
    rewritten: bool = False
    """Whether the style changes a response, outer white space aside."""
    earlier: tuple[tuple[int, int], ...] = ()
    """First and past the last token, in the prompt, of each earlier reply and what ends it."""


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
        """Token ids of the prompts, without the prefix; ValueError for conversations."""
        if turns := next((record for record in records if record.turns), None):
            raise ValueError(
                f"source {turns.source}, record {turns.index} is a conversation of "
                f"{len(turns.turns) + 1} turns, which only the prompt style chat writes. Set "
                "data.prompt_style: chat."
            )
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


_HOLE = "\U000f0002"
"""Stands for earlier replies where their surroundings are looked at."""
_ASKED, _REPLY = "ROSA-ASKED", "ROSA-REPLY"
"""Stand for the user's and the assistant's text where their surroundings are looked at."""
_ALONE = (Turn("user", _ASKED),)
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
    """The tokenizer's own chat template: a user's message or several turns, and the reply (`chat`).

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
        return TextTokenizer(self.tokenizer, self._ending.token)

    @cached_property
    def prefix(self) -> list[int]:
        """Tokens at the beginning that a prompt keeps when it is cut: BOS, if any."""
        (found,) = self._until_border([self._around(_ALONE)[0]])
        own, bos = prompt_prefix(self.tokenizer), [self.tokenizer.bos_token_id]
        starts = (start for start in (own, bos) if start and start == found.ids[: len(start)])
        return next(starts, [])

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response: the template's end of a turn, and EOS."""
        return list(dict.fromkeys([self._ending.stop, self.tokenizer.eos_token_id]))

    def apply(self, instruction: str, context: str) -> str:
        """The text before the response."""
        asked = Turn("user", self.texts.mark(_question(instruction, context)))
        return self.texts.unmark(self._around([asked])[0])

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Token ids of the prompts, without the prefix."""
        found = self._until_border([self._asked(one)[1][0] for one in records])
        return [prompt.ids[len(self.prefix) :] for prompt in found]

    def encode(self, records: Sequence[Record]) -> Iterator[EncodedRecord]:
        """Prompts and responses in token ids; white space around a response is the template's."""
        replies = [one.output.strip() for one in records]
        yield from self._conversations([self._asked(one) for one in records], replies)

    def response(self, text: str, *, end: bool = False) -> list[int]:
        """Token ids of a response as they follow a prompt; `end` adds the token that ends it."""
        turns = [Turn("user", "Q")]
        (encoded,) = self._conversations([(turns, self._around(turns))], [text], end=end)
        return encoded.reply.ids

    def _asked(self, record: Record) -> tuple[list[Turn], tuple[str, str]]:
        """All turns before the reply, fields marked, and the text before and after the reply."""
        turns = record.turns or (Turn("user", _question(record.instruction, record.input)),)
        stripped = (t.content.strip() if t.role == "assistant" else t.content for t in turns)
        found = [Turn(t.role, self.texts.mark(s)) for t, s in zip(turns, stripped, strict=True)]
        try:
            return found, self._around(found)
        except ValueError as error:
            where = f"source {record.source}, record {record.index}"
            raise ValueError(f"{where} ({', '.join(t.role for t in turns)}): {error}") from error

    def _conversations(
        self,
        asked: Sequence[tuple[Sequence[Turn], tuple[str, str]]],
        replies: Sequence[str],
        *,
        end: bool = True,
    ) -> Iterator[EncodedRecord]:
        """Turns, which are marked, as `_asked` gives them, and replies, which are not yet."""
        texts = self.texts
        replies = [*map(texts.mark, replies)]
        written = [self._written(*one, reply) for one, reply in zip(asked, replies, strict=True)]
        befores = [before for _, (before, _) in asked]
        ending = self._ending.text + self._ending.token if end else ""
        added = [] if self._ending.token or not end else [self._ending.stop]
        prompts = self._until_border(befores)
        rows = zip(befores, written, strict=True)
        wholes = texts(before + reply + ending for before, (reply, _) in rows)
        for (turns, _), before, prompt, (reply, rewritten), whole in zip(
            asked, befores, prompts, written, wholes, strict=True
        ):
            if whole.ids[: len(prompt.ids)] == prompt.ids:
                tokens = whole.behind(len(prompt.ids), len(texts.unmark(before)))
            else:
                merged = before[len(before) - self._border.merged :]
                tokens = texts.following(merged + reply + ending).behind(0, len(merged))
            tokens.ids.extend(added)
            spans, changed = self._earlier(turns, before)
            yield EncodedRecord(
                prompt.ids[len(self.prefix) :],
                texts.unmark(reply),
                tokens,
                rewritten or changed,
                tuple(self._tokens_in(prompt, before, span) for span in spans),
            )

    def _earlier(self, turns: Sequence[Turn], before: str) -> tuple[list[tuple[int, int]], bool]:
        """Where replies among the turns stand in their text, each with what ends it.

        And whether the template rewrites any; one that is not found is left out.
        """
        replies = [turn.content for turn in turns if turn.role == "assistant"]
        if not replies:
            return [], False
        hole = _HOLE
        while any(hole in turn.content for turn in turns):
            hole += _HOLE
        holes = [Turn(t.role, hole if t.role == "assistant" else t.content) for t in turns]
        first, *parts = self._around(holes)[0].split(hole)
        if len(parts) != len(replies) or not before.startswith(first):
            return [], True
        ending = self._ending.text + self._ending.token
        found, start, rewritten = list[tuple[int, int]](), len(first), False
        for reply, part in zip(replies, parts, strict=True):
            length = len(reply) if before.startswith(reply, start) else 0
            stop = before.find(part, start + length)
            if stop < 0:
                return found, True
            rewritten |= before[start:stop].strip() != reply
            found.append((start, stop + len(ending) * part.startswith(ending)))
            start = stop + len(part)
        return found, rewritten

    def _tokens_in(self, prompt: Tokens, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """First and past the last token of an earlier reply, counted behind the prefix.

        It begins where the prompt of a reply would end.
        """
        befores = [text[: span[0] - self._border.merged], text[: span[1]]]
        if prompt.starts is None:
            alone = [tokens.ids for tokens in self.texts(befores)]
            start, stop = (len(common_start([ids, prompt.ids])) for ids in alone)
        else:
            first, last = (len(self.texts.unmark(before)) for before in befores)
            start, stop = prompt.covering(first) or 0, bisect_left(prompt.starts, last)
        return start - len(self.prefix), stop - len(self.prefix)

    @cached_property
    def _ending(self) -> _Ending:
        """The first special token after a reply; EOS for a template that writes none there."""
        after = self._surroundings[1]
        special = {self.tokenizer.eos_token: self.tokenizer.eos_token_id}
        for number, token in self.tokenizer.added_tokens_decoder.items():
            if token.content.strip():  # some tokenizers add runs of spaces
                special[token.content] = number
        starts = [(after.index(token), -len(token), token) for token in special if token in after]
        if not starts:
            return _Ending("", self.tokenizer.eos_token_id)
        start, _, first = min(starts)
        return _Ending(after[:start], special[first], first)

    @cached_property
    def _surroundings(self) -> tuple[str, str]:
        """The text before and after the reply `_REPLY` to `_ASKED`."""
        text, other = (self._rendered(_ALONE, reply) for reply in _REPLIES[:2])
        before, _, after = text.partition(_REPLY)
        is_framed = other.startswith(before) and other.endswith(after)
        if not is_framed or text.count(_REPLY) != 1 or _ASKED not in before:
            raise ValueError(
                "The tokenizer's chat template does not write each message once and as it is, in "
                "the same text whatever it says, so what to train on cannot be told. Set "
                "data.prompt_style: alpaca, or data.tokenizer to one with another chat template."
            )
        return before, after

    @cached_property
    def _border(self) -> _Border:
        before, after = self._surroundings
        written = {reply: self._rendered(_ALONE, reply) for reply in _REPLIES}
        intact = [reply for reply in _REPLIES if written[reply] == before + reply + after]
        starts = [tokens.ids for tokens in self.texts(before + reply for reply in intact)]
        # An unknown word may be the same token whatever it is.
        size = min(len(common_start(starts)), min(map(len, starts)) - 1)
        (found,) = self.texts([before + _REPLY])
        shorter = (before[: len(before) - count] for count in range(_MOST_MERGED))
        merged = [tokens.ids == found.ids[:size] for tokens in self.texts(shorter)]
        return _Border(found.ids[size:], merged.index(True) if True in merged else 0)

    def _until_border(self, befores: Sequence[str]) -> list[Tokens]:
        """Tokens up to the border, of texts that stand before replies."""
        behind, merged = self._border
        wholes = self.texts(before + _REPLY for before in befores)
        found = []
        for before, whole in zip(befores, wholes, strict=True):
            if whole.ids[-len(behind) :] == behind:
                size = len(whole.ids) - len(behind)
                found.append(Tokens(whole.ids[:size], whole.starts and whole.starts[:size]))
            else:  # what is asked is merged with what stands close to the reply
                found.append(self.texts([before[: len(before) - merged]])[0])
        return found

    def _around(self, turns: Sequence[Turn]) -> tuple[str, str]:
        before, _, after = self._rendered(turns, _REPLY).rpartition(_REPLY)
        return before, after

    def _written(
        self, turns: Sequence[Turn], around: tuple[str, str], reply: str
    ) -> tuple[str, bool]:
        """What the template makes of a reply, and whether that is another text."""
        before, after = around
        text = self._rendered(turns, reply)
        inside = text.removeprefix(before).removesuffix(after)
        if before + inside + after == text and (inside or not reply):
            return inside, inside.strip() != reply.strip()
        # In another place than that of other replies, which is where a model is asked for it.
        return reply, True

    def _rendered(self, turns: Sequence[Turn], reply: str) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "data.prompt_style is chat, but the tokenizer has no chat template. Set "
                "data.prompt_style: alpaca or plain, or data.tokenizer to that of a chat model."
            )
        messages = [turn._asdict() for turn in (*turns, Turn("assistant", reply))]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **_OPTIONS)
        except Exception as error:  # Jinja's, or whatever a template raises
            hint = "Set data.prompt_style: alpaca or plain"
            if len(messages) > 2:
                hint = "Take such conversations out, or set data.tokenizer to one that has them"
            raise ValueError(
                f"The tokenizer's chat template cannot be used: {' '.join(str(error).split())}. "
                f"{hint}."
            ) from error
        return text


def _question(instruction: str, context: str) -> str:
    return f"{instruction}\n{context}" if context else instruction


STYLES: dict[str, type[PromptStyle]] = {
    "alpaca": AlpacaStyle,
    "chat": ChatStyle,
    "plain": PromptStyle,
}

"""A tokenizer's own chat template: what is asked, what is trained on, and where writing stops.

All of it is found by rendering whole conversations, a question and its reply, as a model was
trained on them. What stands before the reply is the prompt, in training and in evaluation; what a
template writes for ``add_generation_prompt`` is not looked at. So a template that opens a
``<think>`` for generation, and writes none before a reply, is trained and asked without one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from rosa_lightning.data.text_tokens import TextTokenizer, Tokens, prompt_prefix
from rosa_lightning.models.kv_cache import common_start

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
    # Read by Llama 3's templates, else with today's date in newer ones: a run that is resumed
    # tomorrow shall see the same tokens. This is their own default.
    "date_string": "26 Jul 2024",
}


@dataclass(frozen=True, slots=True)
class Ending:
    """What follows the text of a response."""

    text: str
    """Text before the stop token, mostly none."""
    stop: int
    """The token that ends the response, the last with loss."""
    token: str = ""
    """The stop token as the template writes it; empty where it is added to what that writes."""


class Turn(NamedTuple):
    """A question and its reply."""

    prompt: list[int]
    """Token ids of all that stands before the reply."""
    text: str
    """The reply as the template writes it."""
    reply: Tokens
    """The reply and what ends it. Tokens begin where they do in `text`, or before it."""
    rewritten: bool
    """Whether the template makes another text of the reply, outer white space aside, or would write
    it in another place than other replies."""


class _Border(NamedTuple):
    """Where prompts end."""

    behind: list[int]
    """Tokens behind it if the reply is `_REPLY`."""
    merged: int
    """Characters behind it that stand before the reply, as some replies are merged with them."""


@dataclass(frozen=True)
class ChatFormat:
    """Conversations as a tokenizer's chat template writes them.

    A conversation is tokenised as a whole, so that its ids are those of ``apply_chat_template``.
    Its prompt is the tokens before the reply that are there whatever the reply is: the space of
    "[/INST] Yes" is part of the reply's first token, and a model predicts it. If this reply alone
    is merged with the end of its prompt, it is tokenised by itself, as who asks does not know of
    the merge: the text is that of the template, only its ids are others.
    """

    tokenizer: Any
    """A tokenizer of `transformers`."""

    @cached_property
    def ending(self) -> Ending:
        """What ends a reply: the first special token after it.

        What the template puts after that token is not trained on: generation has stopped there. A
        template that ends a turn without a special token leaves it to EOS.

        Raises:
            ValueError: There is no chat template, or none that can be trained on.
        """
        after = self._surroundings[1]
        eos = self.tokenizer.eos_token
        special = {eos: self.tokenizer.eos_token_id}
        for number, token in self.tokenizer.added_tokens_decoder.items():
            if token.content.strip():  # some tokenizers add runs of spaces
                special[token.content] = number
        starts = [(after.index(token), -len(token), token) for token in special if token in after]
        if not starts:
            return Ending("", special[eos])
        start, _, first = min(starts)
        return Ending(after[:start], special[first], first)

    @cached_property
    def prefix(self) -> list[int]:
        """The tokens at the beginning that a prompt must keep when it is cut: BOS, if any."""
        (found,) = self.prompts([_ASKED])
        own, bos = prompt_prefix(self.tokenizer), [self.tokenizer.bos_token_id]
        return next((start for start in (own, bos) if start and start == found[: len(start)]), [])

    def text(self, user: str) -> str:
        """What is written before the reply to a question."""
        return self._texts.unmark(self._around(self._texts.mark(user))[0])

    def prompts(self, users: Sequence[str]) -> list[list[int]]:
        """Token ids of what stands before the replies to questions."""
        around = [self._around(self._texts.mark(user)) for user in users]
        return self._until_border([before for before, _ in around])

    def turns(
        self, users: Sequence[str], replies: Sequence[str], *, end: bool = True
    ) -> list[Turn]:
        """Conversations of one question and one reply.

        Args:
            users: What is asked.
            replies: What is replied.
            end: Whether to end the reply.
        """
        users, replies = ([*map(self._texts.mark, some)] for some in (users, replies))
        around = [self._around(user) for user in users]
        prompts = self._until_border([before for before, _ in around])
        written = [
            self._written(user, reply, *own)
            for user, reply, own in zip(users, replies, around, strict=True)
        ]
        ending = self.ending.text + self.ending.token if end else ""
        added = [] if self.ending.token or not end else [self.ending.stop]
        wholes = self._texts(
            before + reply + ending for (before, _), (reply, _) in zip(around, written, strict=True)
        )
        found = []
        for row, whole in enumerate(wholes):
            prompt, before, (reply, rewritten) = prompts[row], around[row][0], written[row]
            if whole.ids[: len(prompt)] == prompt:
                tokens = whole.behind(len(prompt), len(self._texts.unmark(before)))
            else:
                merged = before[len(before) - self._border.merged :]
                tokens = self._texts.following(merged + reply + ending).behind(0, len(merged))
            tokens.ids.extend(added)
            found.append(Turn(prompt, self._texts.unmark(reply), tokens, rewritten))
        return found

    @cached_property
    def _texts(self) -> TextTokenizer:
        return TextTokenizer(self.tokenizer, (self.ending.token,))

    @cached_property
    def _surroundings(self) -> tuple[str, str]:
        """What is written before and after the reply to `_ASKED`."""
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
                "data.template: alpaca, or data.tokenizer to one with another chat template."
            )
        return before, after

    @cached_property
    def _border(self) -> _Border:
        before, after = self._surroundings
        written = {reply: self._rendered(_ASKED, reply) for reply in _REPLIES}
        intact = [reply for reply in _REPLIES if written[reply] == before + reply + after]
        starts = [tokens.ids for tokens in self._texts(before + reply for reply in intact)]
        # An unknown word may be the same token whatever it is.
        size = min(len(common_start(starts)), min(map(len, starts)) - 1)
        (found,) = self._texts([before + _REPLY])
        shorter = (before[: len(before) - count] for count in range(_MOST_MERGED))
        merged = [tokens.ids == found.ids[:size] for tokens in self._texts(shorter)]
        return _Border(found.ids[size:], merged.index(True) if True in merged else 0)

    def _until_border(self, befores: Sequence[str]) -> list[list[int]]:
        """Token ids up to the border, of texts that stand before replies."""
        behind, merged = self._border
        wholes = self._texts(before + _REPLY for before in befores)
        found = []
        for before, whole in zip(befores, wholes, strict=True):
            if whole.ids[-len(behind) :] == behind:
                found.append(whole.ids[: -len(behind)])
            else:  # what is asked is merged with what stands close to the reply
                found.append(self._texts([before[: len(before) - merged]])[0].ids)
        return found

    def _around(self, user: str) -> tuple[str, str]:
        """What is written before and after the reply to a question."""
        before, _, after = self._rendered(user, _REPLY).rpartition(_REPLY)
        return before, after

    def _written(self, user: str, reply: str, before: str, after: str) -> tuple[str, bool]:
        """What a template makes of a reply, and whether that is another text."""
        text = self._rendered(user, reply)
        inside = text.removeprefix(before).removesuffix(after)
        if before + inside + after == text and (inside or not reply):
            return inside, inside.strip() != reply.strip()
        # In another place than that of other replies, which is where a model is asked for it.
        return reply, True

    def _rendered(self, user: str, reply: str) -> str:
        """A whole conversation.

        Raises:
            ValueError: There is no chat template, or one that fails.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "data.template is chat, but the tokenizer has no chat template. Set "
                "data.template: alpaca or plain, or data.tokenizer to that of a chat model."
            )
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, **_OPTIONS)
        except Exception as error:  # Jinja's, or whatever a template raises
            raise ValueError(
                f"The tokenizer's chat template cannot be used: {' '.join(str(error).split())}. "
                "Set data.template: alpaca or plain."
            ) from error
        return text

"""``chat``: a conversation with a base or a trained adapter, in the terminal."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import TextStreamer

from rosa_lightning.cli.commands import CommandContext, check_base, loaded_model
from rosa_lightning.cli.configuration import check_accelerator
from rosa_lightning.data.encoding import Encoder
from rosa_lightning.data.prompts import STYLES, StyleName
from rosa_lightning.evaluation.generation import Sampling, generate
from rosa_lightning.models.loading import context_length
from rosa_lightning.tasks.records import Record, Turn

_DEFAULT_CONTEXT = 2048
"""Tokens of prompt and answer, where the base does not say how many it reads."""


def chat(
    context: CommandContext,
    *,
    ckpt_path: str | None = None,
    prompt_style: StyleName | None = None,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
) -> None:
    """Talk to a base or a trained adapter: a message a line; /new forgets, /exit or Ctrl-D ends.

    Ctrl-C stops an answer, which is then forgotten with its question.

    Args:
        context: The model to talk to.
        ckpt_path: Checkpoint that holds the adapter; its settings are the defaults of ``model``.
        prompt_style: Text around the messages; by default that of the adapter's training, else
            chat, if the tokenizer has a template. Only chat has a history.
        system: What the model is told before the first message, with the style chat.
        temperature: Divides the logits before an answer is drawn; 0 takes the likeliest token.
        top_p: Tokens are drawn from the likeliest ones that hold this probability together.
    """
    module = context.module
    check_base(module)
    sampling = Sampling(temperature, top_p)
    model = loaded_model(module, ckpt_path).eval().to(_device(context))
    tokenizer = context.data.tokenizer
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = context.data.text_tokenizer if tokenizer else module.tokenizer
    trained = module.training_conditions and module.training_conditions.prompt_style
    style: Any = prompt_style or trained or ("chat" if tokenizer.chat_template else "plain")
    if style not in STYLES:  # of another release
        raise ValueError(f"prompt_style={style} is unknown. Give one of {', '.join(STYLES)}.")
    if system is not None and style != "chat":
        raise ValueError(f"system takes prompt_style: chat, and this is {style}. Leave it out.")
    options = {"revision": module.revision, "trust_remote_code": module.trust_remote_code}
    size = context_length(module.base, **options) or _DEFAULT_CONTEXT
    longest = min(module.evaluation.max_new_tokens, size // 2)
    encoder = Encoder(
        tokenizer,
        style,
        max_length=size - longest,
        with_response=False,
        num_rows=module.num_embeddings,
    )
    conversation = Conversation(model, encoder, longest, sampling, system)
    about = "" if style == "chat" else f" The prompt style {style} answers each message by itself."
    sys.stderr.write(
        f"A message a line; /new forgets what was said, /exit or Ctrl-D ends.{about}\n"
    )
    for message in _messages():
        if message == "/new":
            conversation.begin()
        elif message:
            try:
                conversation.answer(message)
            except KeyboardInterrupt:  # ends the answer; a second one, or one at the prompt, all
                sys.stdout.write("\n")


@dataclass
class Conversation:
    """Messages and answers so far."""

    model: Any
    encoder: Encoder
    max_new_tokens: int
    sampling: Sampling
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.turns = [] if self.system is None else [Turn("system", self.system)]

    def answer(self, message: str) -> str:
        """Write an answer as it comes, and remember it with the message."""
        has_history = self.encoder.style_name == "chat"
        asked = (*self.turns, Turn("user", message)) if has_history else ()
        record = Record(message, "", "", None, "", "chat", 1, turns=asked if self.turns else ())
        (example,) = self.encoder([record])
        if example.too_long:
            rank_zero_info(
                "(the conversation is longer than the model reads; its start is left out)"
            )
        ids_1T = torch.tensor([example.asked], device=self.model.device)
        tokenizer, style = self.encoder.tokenizer, self.encoder.style
        # What a style's next prompt looks like would be written before it is recognised.
        streamer: Any = None
        if not style.next_prompt:
            make: Any = TextStreamer
            streamer = make(tokenizer, skip_prompt=True, skip_special_tokens=True)
        (text,) = generate(
            self.model,
            tokenizer,
            {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)},
            self.max_new_tokens,
            sampling=self.sampling,
            stop=style.next_prompt,
            stop_ids=style.stop_ids,
            streamer=streamer,
        )
        if streamer is None:
            sys.stdout.write(f"{text.strip()}\n")
        if has_history:
            self.turns += [Turn("user", message), Turn("assistant", text)]
        return text


def _messages() -> Iterator[str]:
    """Lines that the user types, or that a pipe holds, until the end or /exit."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with suppress(ImportError):  # not on every system; with it lines can be edited
            import readline  # noqa: F401
    while True:
        try:
            message = input(prompt).strip()
        except EOFError:
            return
        if message == "/exit":
            return
        yield message


def _device(context: CommandContext) -> torch.device:
    """Where the trainer would run."""
    named = str(context.trainer.get("accelerator") or "auto").lower()
    check_accelerator(named)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if "cpu" in named or accelerator is None else accelerator

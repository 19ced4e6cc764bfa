"""`TextLoss`: the loss of a model on plain texts, by which forgetting is measured.

Axes: T tokens, V vocabulary.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F

from rosa_lightning.data.rows import kind_of, read_rows
from rosa_lightning.data.sources import Source
from rosa_lightning.tasks.records import TASKS
from rosa_lightning.utils.files import atomic_write, file_digest

TEXT_LOSS = "text_loss.json"
MAX_TOKENS = 512
"""Longest part of a text that is read at once, in tokens; shorter where a base takes fewer."""


class TextLoss(Callback):
    """Computes the loss on plain texts at each validation, and writes it as ``text_loss.json``.

    A text is tokenised as the tokenizer does by itself, without a prompt, and cut into parts of at
    most `MAX_TOKENS` tokens, which do not see each other. Every token counts but the first of a
    part, which nothing foretells. The loss is the mean over all tokens that count, in nats, and is
    logged as ``val/text_loss``. The file holds it as ``loss``, beside ``tokens``, ``texts`` (a
    digest of them) and ``by_text``, the sum and the number of tokens of each text.

    Args:
        texts: A file of texts: .txt, a text a line; .jsonl, .json or .parquet, in the field text.
        path: The file to write; by default text_loss.json in the run's log folder.
    """

    def __init__(self, texts: str, path: str | None = None) -> None:
        super().__init__()
        self.texts, self.path = texts, path
        self._texts: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the texts, before the model is loaded."""
        self._texts = read_texts(Source(path=self.texts))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute, log and write the loss; all ranks do, as a model may lie in shards."""
        module: Any = pl_module
        tokenizer = module.text_info().tokenizer or module.tokenizer
        config: Any = module.ensure_model().config
        most = min(MAX_TOKENS, getattr(config, "max_position_embeddings", None) or MAX_TOKENS)
        with trainer.precision_plugin.forward_context():
            by_text = [text_loss(module, tokenizer, text, most) for text in self._texts]
        tokens = sum(number for _, number in by_text)
        if not tokens:
            raise ValueError(f"no text in {self.texts} has two tokens. Give longer texts.")
        loss = sum(total for total, _ in by_text) / tokens
        module.log("val/text_loss", loss, sync_dist=True)
        if trainer.is_global_zero:
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            found = {"texts": file_digest(self.texts), "loss": loss, "tokens": tokens}
            content = json.dumps({**found, "by_text": by_text}).encode()
            atomic_write(folder / TEXT_LOSS if self.path is None else Path(self.path), content)


@torch.no_grad()
def text_loss(module: Any, tokenizer: Any, text: str, most: int) -> tuple[float, int]:
    """Loss of a text, summed over its tokens that count, in nats, and their number.

    The module takes ``input_ids``, shape (1, T), T at most ``most``, and gives ``logits``, shape
    (1, T, V).
    """
    ids = tokenizer(text)["input_ids"]
    total, number = 0.0, 0
    for start in range(0, len(ids), most):
        part_T = torch.tensor(ids[start : start + most], device=module.device)
        if len(part_T) > 1:
            logits_TV = module(input_ids=part_T[None]).logits[0, :-1].float()
            total += float(F.cross_entropy(logits_TV, part_T[1:], reduction="sum"))
            number += len(part_T) - 1
    return total, number


def read_texts(source: Source) -> list[str]:
    """The texts of a source: the field ``text`` of its rows, or the lines of a .txt file.

    Of more than its max_examples, as many are drawn, always the same.

    Raises:
        OSError, ValueError: It cannot be read, or has no text.
    """
    texts = list(_texts(source))
    if not texts:
        raise ValueError(f"{source.location} holds no text. Give a file that has some.")
    limit = source.max_examples
    if limit is None or limit >= len(texts):
        return texts
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[place] for place in sorted(order[:limit].tolist())]


def _texts(source: Source) -> Iterator[str]:
    is_lines = Path(source.path or "").suffix.lower() == ".txt"
    field = "instruction" if is_lines else "text"  # as lines are read for prompts
    for where, row in read_rows(source, TASKS["text"], "predict").rows:
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = kind_of(row) if not isinstance(row, dict) else ", ".join(map(str, row))
            raise ValueError(
                f"{where} has no field text that holds a text, but {found}. Expected "
                '{"text": "..."}.'
            )
        if text.strip():
            yield text

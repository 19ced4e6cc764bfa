"""Compare a tokenizer's ids with the rows of a base's embedding."""

from collections.abc import Iterable
from typing import Any

from torch import nn

_FIX = (
    "Set data.tokenizer to the base's own tokenizer, or model.base to a model whose embedding was "
    "resized for this one."
)


def num_embeddings(model: nn.Module) -> int | None:
    """Rows of a language model's embedding; None where it is not known."""
    try:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # a model of one's own, or one that has several
        return None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def check_vocabulary(tokenizer: Any, num_rows: int | None) -> None:
    """Raise ValueError for a tokenizer whose vocabulary or end of sequence has no embedding rows.

    Added tokens may lie beyond: many a tokenizer has some that its model does not know. Texts that
    use one are refused when they are tokenised, by `check_ids`.
    """
    if num_rows is None:
        return
    if tokenizer.vocab_size > num_rows:
        raise ValueError(
            f"the tokenizer has a vocabulary of {tokenizer.vocab_size} tokens, but the embedding "
            f"of the base has {num_rows} rows, so it is that of another model. {_FIX}"
        )
    check_ids([tokenizer.eos_token_id], tokenizer, num_rows, "the tokenizer's end of sequence")


def beyond(tokenizer: Any, num_rows: int | None) -> bool:
    """Whether a tokenizer has ids for which there is no row."""
    if num_rows is None:
        return False
    last = max(tokenizer.added_tokens_decoder, default=0)
    return bool(max(last, tokenizer.vocab_size - 1) >= num_rows)


def check_ids(ids: Iterable[int], tokenizer: Any, num_rows: int, what: str) -> None:
    """Raise ValueError, which begins with `what`, if one of the ids has no embedding row."""
    largest = max(ids)
    if largest >= num_rows:
        raise ValueError(
            f"{what}: token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, "
            f"but the embedding of the base has {num_rows} rows. {_FIX}"
        )


def padding_id(tokenizer: Any, num_rows: int | None) -> int:
    """A token to pad with that has a row; padding is masked everywhere, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):  # [PAD] may have no row
        if isinstance(token, int) and (num_rows is None or token < num_rows):
            return token
    return 0

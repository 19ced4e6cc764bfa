"""Tokenised records kept on disk, found again by all that their tokens depend on.

A file holds the token ids of one sequence of records. Its name is a digest of the records' texts,
the tokenizer and the encoder's settings, so a change of any of them is another file, and no file
is ever out of date. Files are mapped into memory: ranks of a node, and runs, share their pages.

Axes: N records kept, M tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import numpy as np
import tokenizers
import transformers
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from rosa_lightning.data.prompts import prompt_text
from rosa_lightning.data.streamed import Streamed
from rosa_lightning.data.tokenization import Encoder, Example, OverlongCount, encode_all
from rosa_lightning.tasks.records import Record
from rosa_lightning.utils.files import atomic_write, check_name, open_input, open_lock
from rosa_lightning.utils.strict_json import parse

ENCODING = 2
"""Raise it when `Encoder`, or what it calls, makes other tokens of the same record."""

_MAGIC = b"rosa-tokens\n"
_RECORDS_AT_A_TIME = 1000
_BAR_FROM = 20_000
"""Records from which on a bar shows how far tokenisation is."""


class TokenTable(Sequence[Example]):
    """Examples whose token ids stand in a few arrays, each made when it is asked for.

    Args:
        records: What the examples are made from.
        kept: Which of them, ascending; (N,) int32.
        ends: Where the tokens of each prompt and each response end; (N, 2) int64.
        answers: Index in each response of the answer's first token; (N,) int32.
        tokens: All token ids, record after record; (M,) int32.
    """

    def __init__(
        self,
        records: Sequence[Record],
        kept: NDArray[np.int32],
        ends: NDArray[np.int64],
        answers: NDArray[np.int32],
        tokens: NDArray[np.int32],
    ) -> None:
        self._records, self._kept, self._ends = records, kept, ends
        self._answers, self._tokens = answers, tokens

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, prompt and response together; (N,)."""
        return np.diff(self._ends[:, 1], prepend=0)

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        start = int(self._ends[number - 1, 1]) if number else 0
        middle, end = self._ends[number].tolist()
        record = self._records[int(self._kept[number])]
        return Example(
            record, self._ids(start, middle), self._ids(middle, end), int(self._answers[number])
        )

    def _ids(self, start: int, end: int) -> array[int]:
        return array("i", self._tokens[start:end].tobytes())


def cache_folder(setting: str | None) -> Path | None:
    """Where ``data.cache_dir`` means: None for nowhere, ``auto`` for the user's cache folder."""
    if setting is None:
        return None
    if setting != "auto":
        return Path(os.path.expanduser(setting))
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):  # a user without a home, in a container say
        return None
    return Path(caches) / "rosa_lightning"


def encode_cached(
    records: Sequence[Record], encoder: Encoder, folder: Path | None
) -> tuple[Sequence[Example], OverlongCount]:
    """As `encode_all`, from the cache where it holds these records.

    Streamed records, and tokenizers that cannot be described by their content (those not written
    in Rust), are encoded anew each time. Of several processes that want the same file one makes
    it, and the others wait.

    Args:
        records: What to encode.
        encoder: How.
        folder: Where the cache is; None for no cache.
    """
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if folder is None or not len(records) or isinstance(records, Streamed) or backend is None:
        return encode_all(records, encoder)
    check_name(folder)
    path = folder / f"{_digest(records, encoder)}.tokens"
    known = max(backend.get_vocab().values(), default=-1) + 1
    try:
        found = _read(path, records, known)
        if found is not None:
            return found
        with _alone(path):
            return _read(path, records, known, say=False) or _write(path, records, encoder)
    except OSError as error:
        rank_zero_warn(
            f"tokenised data cannot be kept in {folder}: {error}. Set data.cache_dir to a folder "
            "that can be written to, or to null."
        )
        return encode_all(records, encoder)


def _digest(records: Sequence[Record], encoder: Encoder) -> str:
    """A digest of all that the tokens depend on."""
    tokenizer = encoder.tokenizer
    backend = tokenizer.backend_tokenizer
    # Left by an earlier call, and undone by any that gives neither.
    backend.no_truncation()
    backend.no_padding()
    settings = [
        *(ENCODING, tokenizers.__version__, transformers.__version__, type(tokenizer).__name__),
        *(encoder.template, encoder.max_length, encoder.overlong, encoder.with_response),
        *(encoder._prefix, encoder.bound),
        getattr(tokenizer, "split_special_tokens", False),
        # What a template makes of a record, which may change with the day.
        prompt_text(records[0], encoder.template, tokenizer),
        tokenizer.chat_template if encoder.template == "chat" else None,
    ]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=20)
    digest.update(backend.to_str().encode())
    for some in _parts(records):
        digest.update(json.dumps([_content(record) for record in some]).encode())
    return digest.hexdigest()


def _content(record: Record) -> list[Any]:
    """What of a record the tokens depend on, and its number, which messages name."""
    own = record.own_task
    task = [own.name, own.format, own.labels, own.aliases, own.response] if own else record.task
    return [record.index, record.instruction, record.input, record.output, record.answer, task]


def _parts(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    for start in range(0, len(records), _RECORDS_AT_A_TIME):
        yield records[start : start + _RECORDS_AT_A_TIME]


# --- files ----------------------------------------------------------------------------------


def _write(
    path: Path, records: Sequence[Record], encoder: Encoder
) -> tuple[TokenTable, OverlongCount]:
    """Encode the records into a file, and map it."""
    kept, ends, answers, tokens = array("i"), array("q"), array("i"), array("i")
    count = OverlongCount()
    for number, some in enumerate(_shown(records)):
        examples, counted = encoder(some)
        count.add(counted)
        place, left = number * _RECORDS_AT_A_TIME, iter(examples)
        example = next(left, None)
        for offset, record in enumerate(some):
            if example is None or example.record is not record:
                continue  # dropped
            kept.append(place + offset)
            for ids in (example.prompt, example.response):
                tokens.extend(ids)
                ends.append(len(tokens))
            answers.append(example.answer)
            example = next(left, None)
    arrays = (ends, kept, answers, tokens)
    checksum = 0
    for part in arrays:
        checksum = zlib.crc32(part, checksum)
    sizes = {"records": len(kept), "tokens": len(tokens), "checksum": checksum}
    header = json.dumps({**sizes, "count": asdict(count)}).encode()
    start = _MAGIC + len(header).to_bytes(4, "little") + header
    atomic_write(path, start + bytes(-len(start) % 8), *arrays)
    return _table(path, records, None)


def _shown(records: Sequence[Record]) -> Iterable[Sequence[Record]]:
    """The records part by part, behind a progress bar where there are many."""
    if len(records) < _BAR_FROM:
        return _parts(records)
    steps = -(-len(records) // _RECORDS_AT_A_TIME)
    console = Console(stderr=True)
    return track(_parts(records), "Tokenizing", total=steps, console=console, transient=True)


def _read(
    path: Path, records: Sequence[Record], known: int, *, say: bool = True
) -> tuple[TokenTable, OverlongCount] | None:
    """What a file holds; None if there is none, or a damaged one, which is said or not.

    ``known`` is above all ids that the tokenizer knows.
    """
    try:
        return _table(path, records, known)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if say:
            rank_zero_warn(f"{path} is damaged ({error}), so its records are tokenised anew.")
        return None


def _table(
    path: Path, records: Sequence[Record], known: int | None
) -> tuple[TokenTable, OverlongCount]:
    # Mapped, then seen as plain arrays, whose slices are cheaper.
    with open_input(path) as file:
        content: NDArray[np.uint8] = np.memmap(file, np.uint8, "r").view(np.ndarray)
    start = len(_MAGIC) + 4
    if content[: len(_MAGIC)].tobytes() != _MAGIC:
        raise ValueError("it does not begin as it should")
    end = start + int.from_bytes(content[len(_MAGIC) : start].tobytes(), "little")
    header = parse(content[start:end].tobytes().decode())
    rows, num_tokens = header["records"], header["tokens"]
    body = content[end + -end % 8 :]
    whole = isinstance(rows, int) and isinstance(num_tokens, int) and min(rows, num_tokens) >= 0
    size = rows * 24 + num_tokens * 4 if whole else -1
    if len(body) != size or zlib.crc32(body.data) != header["checksum"]:
        raise ValueError("its content is not what was written")
    ends_, kept_, answers_, tokens_ = np.split(body, np.cumsum([rows * 16, rows * 4, rows * 4]))
    kept, answers, tokens = (part.view(np.int32) for part in (kept_, answers_, tokens_))
    ends = ends_.view(np.int64).reshape(rows, 2)
    if known is not None:
        _check_arrays(kept, ends, answers, tokens, len(records), known)
    count = OverlongCount(**header["count"])
    return TokenTable(records, kept, ends, answers, tokens), count


def _check_arrays(
    kept: NDArray[np.int32],
    ends: NDArray[np.int64],
    answers: NDArray[np.int32],
    tokens: NDArray[np.int32],
    num_records: int,
    known: int,
) -> None:
    """See that what somebody has written, with a checksum that fits, can be looked up at all."""
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < known):
        raise ValueError("it holds token ids that the tokenizer does not know")
    places = np.concatenate([[-1], kept, [num_records]])
    borders = np.concatenate([[0], ends.ravel()])
    if (
        (np.diff(places) <= 0).any()
        or (np.diff(borders) < 0).any()
        or borders[-1] != len(tokens)
        or (answers < 0).any()
        or (answers > ends[:, 1] - ends[:, 0]).any()
    ):
        raise ValueError("its records are not those that were written")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process of a node at a time work on a file.

    Where there are no such locks, all work: files appear whole, so the last one stays.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with open_lock(lock) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Who waits for it has it still, and finds the file that it was for.
            lock.unlink(missing_ok=True)

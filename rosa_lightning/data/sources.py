"""What a data source is: a local file or a hub data set, of a task, with a weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from glob import has_magic
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rosa_lightning.tasks.custom import nearest
from rosa_lightning.tasks.records import TASKS, Task, find_task

Purpose = Literal["train", "test", "predict", "audit"]
"""What records are for: a response to train on, a gold answer, only a question, or to be looked at
whatever they lack."""

SETTINGS: dict[Purpose, str] = {
    "train": "sources",
    "test": "test_sources",
    "predict": "predict_sources",
}
"""The setting that names the sources of a purpose."""


COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed files, with what decompresses them."""
FIELDS = (
    *("messages", "conversations", "system", "instruction", "input", "output", "answer"),
    *("prompt", "response", "completion", "question", "text"),
)
"""Fields of the kinds of rows that are known, beside those of tasks."""


def file_kind(path: Path) -> str:
    """The suffix of a file, that of its content where it is compressed: .jsonl of a.jsonl.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    # Parquet compresses by itself, and is read by position.
    is_table = inner is not path and inner.suffix.lower() == ".parquet"
    return path.suffix.lower() if is_table else inner.suffix.lower()


def is_pattern(location: str) -> bool:
    """Whether a path stands for all files that match it."""
    return has_magic(location) and not Path(location).exists()


def purpose_of(stage: str) -> Purpose:
    """What records are for in a stage of Lightning's, which gives an enumeration or its value."""
    value = str(getattr(stage, "value", stage))
    return "test" if value == "test" else "predict" if value == "predict" else "train"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data source: a local file (`path`) or a Hugging Face data set (`hub`)."""

    name: str | None = None
    """Name in logs and tables; by default the file's name or the hub id's last part."""
    path: str | None = None
    """Local file, or a folder or pattern (data/*.jsonl) of several: .json (a list of objects),
    .jsonl, .parquet, .csv, or .txt, which is one text to train on and one prompt a line to predict.
    All but .parquet may be compressed (.gz, .zst)."""
    hub: str | None = None
    """Hugging Face data set id, such as openai/gsm8k."""
    subset: str | None = None
    """Configuration of the hub data set, where it has several."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set."""
    task: str | None = None
    """Benchmark, which sets the answer format; by default told from the name, else text."""
    columns: dict[str, str] | None = None
    """Columns by the field that each stands for, such as {prompt: question, response: answer};
    the others are not read. By default columns are named as the fields."""
    weight: float | None = None
    """Share in training, relative to the other sources; by default the number of records."""
    max_examples: int | None = None
    """Most records to use, chosen by data.seed; by default all."""
    stream: bool | None = None
    """To train: leave the records on disk and read each when it is its turn. By default, from
    256 MiB on. Not for .json, which is read whole."""

    @cached_property
    def label(self) -> str:
        """The name, given or told from the path or hub id."""
        if self.name or not self.path:
            return self.name or str(self.hub).split("/")[-1]
        path = Path(self.path)
        while has_magic(path.name):
            path = path.parent
        return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).stem or "files"

    @cached_property
    def benchmark(self) -> str:
        """The task, given or told from label, hub id or subset; `text` where these name none."""
        if self.task is not None:
            return find_task(self.task) or self.task  # or the user's own
        told = (self.label, (self.hub or "").split("/")[-1], self.subset or "")
        return next((task for name in told if (task := find_task(name))), "text")

    @property
    def location(self) -> str:
        """Where the records are, for messages."""
        return self.path or f"hub data set {self.hub}"


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    SourceLike = dict[str, Any] | Source | str
    """A source, its fields, or its path; or demo."""
    TaskLike = dict[str, Any]
    TokenizerLike = str | PreTrainedTokenizerBase
else:
    # What a configuration can say. With a class among these types jsonargparse would read a file
    # that is named as a configuration, fill fields with those of an earlier one, and call what a
    # class_path names; and with Any it would make a number of '5', and import what is named.
    SourceLike, TaskLike, TokenizerLike = dict | str, dict, str


def as_source(
    value: Source | Mapping[str, Any] | str | Path, tasks: Mapping[str, Task] = TASKS
) -> Source:
    """A `Source` from itself, from its fields in a mapping, or from a path; checked.

    Its task is one of `tasks`, and named as there where it is the user's own.

    Raises TypeError for another type, of a field too, and for a field that a source does not have,
    ValueError for fields that contradict each other or lie outside their range.
    """
    if isinstance(value, str | Path):
        value = {"path": str(value)}
    if isinstance(value, Mapping):
        known = [field.name for field in fields(Source)]
        for key in value:
            if key not in known:
                raise TypeError(
                    f"A data source has no field {key!r}{nearest(str(key), known)}. "
                    f"Its fields are {', '.join(known)}."
                )
        is_path = isinstance(value.get("path"), Path)
        value = Source(**{**value, "path": str(value["path"])} if is_path else value)
    if not isinstance(value, Source):
        raise TypeError(
            f"A data source is given as {value!r}; expected its fields, such as "
            "{path: FILE, weight: 0.5}."
        )
    _check_fields(value, tasks)
    own = find_task(value.task or value.label, {k: v for k, v in tasks.items() if k not in TASKS})
    return value if own is None else replace(value, task=own)


# Not in __post_init__: jsonargparse would wrap these errors in twenty lines of its own.
def _check_fields(source: Source, tasks: Mapping[str, Task]) -> None:
    """Check what a file or a command line may hold."""
    for key in ("name", "path", "hub", "subset", "split", "revision", "task"):
        text = getattr(source, key)
        if (text is not None or key == "split") and not (
            isinstance(text, str) and text and "\0" not in text
        ):
            error = ValueError if isinstance(text, str) else TypeError
            raise error(
                f"A data source has {key} {text!r}; expected a text, in quotes where it looks like "
                f"something else, such as {key}: 'five'."
            )
    if (source.path is None) == (source.hub is None):
        given = "neither path nor hub" if source.path is None else "both path and hub"
        raise ValueError(
            f"A data source names {given}. Give exactly one: path: FILE, or hub: OWNER/NAME."
        )
    number, limit, stream = source.weight, source.max_examples, source.stream
    if number is not None and not (type(number) in (int, float) and 0 <= number < math.inf):
        raise ValueError(
            f"Source {source.label} has weight {number!r}; expected a number of at least 0. Leave "
            "it out to weigh the source by its number of records."
        )
    if limit is not None and not (type(limit) is int and limit >= 1):
        raise ValueError(
            f"Source {source.label} has max_examples {limit!r}; expected a whole number of at "
            "least 1. Leave it out to use all records, or the source to use none."
        )
    if not isinstance(stream, bool | None):
        raise TypeError(
            f"Source {source.label} has stream {stream!r}; expected true or false, without "
            "quotes. Leave it out to stream files from 256 MiB on."
        )
    if stream and source.path and file_kind(Path(source.path)) == ".json":
        raise ValueError(
            f"Source {source.label} has stream: true, but a .json file is one list, read whole. "
            "Write it one object a line as .jsonl, or as .parquet, or leave stream out."
        )
    _check_columns(source, tasks)
    if source.task is not None and find_task(source.task, tasks) is None:
        raise ValueError(
            f"Source {source.label} has task {source.task!r}{nearest(source.task, tasks)}. "
            f"There are {', '.join(tasks)}. Define others under data.tasks."
        )


def _check_columns(source: Source, tasks: Mapping[str, Task]) -> None:
    if source.columns is None:
        return
    task = tasks.get(source.benchmark)
    known = [*FIELDS, *(task.fields if task else ())]
    example = "such as columns: {prompt: question, response: answer}"
    if not isinstance(source.columns, Mapping) or not source.columns:
        raise TypeError(
            f"Source {source.label} has columns {source.columns!r}; expected column names by "
            f"field, {example}."
        )
    for key, column in source.columns.items():
        if key not in known:
            raise ValueError(
                f"Source {source.label} has columns for {key!r}{nearest(str(key), known)}, which "
                f"is no field of a row. The fields are {', '.join(known)}."
            )
        if not isinstance(column, str) or not column:
            raise TypeError(
                f"Source {source.label} has columns {key}: {column!r}; expected the name of a "
                f"column, {example}."
            )


def demo_source(split: Literal["train", "test"]) -> Source:
    """The embedded demonstration set, which `data.sources: demo` means."""
    file = resources.files("rosa_lightning") / "models" / "tiny" / f"demo_{split}.jsonl"
    return Source(name="demo", path=str(file), task="demo")


def source_list(key: str, given: Any, tasks: Mapping[str, Task] = TASKS) -> list[Source]:
    """The sources that a setting names, one or a list; names must differ, as counts go by them."""
    if given is None:
        return []
    if isinstance(given, str | Path | Mapping | Source):
        given = [given]
    if not isinstance(given, Sequence):
        raise TypeError(
            f"{key} is {given!r}; expected demo, a source or a list of sources. "
            f"Set data.{key}: [{{path: FILE.jsonl}}]."
        )
    sources = [
        demo_source("train" if key == "sources" else "test")
        if isinstance(value, str) and value == "demo"
        else as_source(value, tasks)
        for value in given
    ]
    names = [source.label for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Two sources in data.{key} are named {name!r}. Give each a name: "
                "[{name: first, path: ...}, {name: second, path: ...}]."
            )
    for source in sources:
        if source.stream and key != "sources":
            raise ValueError(
                f"Source {source.label} in data.{key} has stream: true; only training sources "
                "are streamed. Leave it out."
            )
    return sources


def weighted_sources(sources: list[Source], temperature: float | None = None) -> list[Source]:
    """The sources that take part in training.

    Raises ValueError if there is none, if some have a weight and others not, or if shares are
    said twice, by weights and by a temperature.
    """
    if not sources:
        raise ValueError("data.sources names no source. Set it to demo or to a list of sources.")
    weighted = [source.label for source in sources if source.weight is not None]
    without = [source.label for source in sources if source.weight is None]
    if weighted and temperature is not None:
        raise ValueError(
            f"loading.temperature={temperature} sets the shares by size, but there are weights in "
            f"data.sources ({', '.join(weighted)}). Take out one or the other."
        )
    if weighted and without:
        raise ValueError(
            f"In data.sources some sources have a weight and others not ({', '.join(without)}). "
            "Give each one a weight, or none."
        )
    used = [source for source in sources if source.weight != 0]
    if not used:
        raise ValueError(
            "The weights in data.sources sum to zero. Give one source a weight above 0."
        )
    return used

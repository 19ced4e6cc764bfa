"""Records on disk behave as records in memory do, and take no memory."""

import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.data.streamed import ArrowRows, Lines, Streamed, select

LINES = st.lists(st.sampled_from([b"", b" ", b"\t\r", b"a", b'"\xe2\x80\xa8"', b"long " * 30]))


def numbered(row, number):
    return number, row


def lines_of(folder, content):
    path = folder / "lines"
    path.write_bytes(content)
    return Lines(path)


def every(rows):
    return list(rows.read(np.arange(len(rows))))


@given(written=LINES, end=st.sampled_from([b"", b"\n"]), mark=st.booleans())
def test_lines_are_those_that_are_not_blank(tmp_path_factory, written, end, mark):
    folder = tmp_path_factory.mktemp("lines")
    rows = lines_of(folder, b"\xef\xbb\xbf" * mark + b"\n".join(written) + end)
    expected = [line for line in written if line.strip()]
    assert len(rows) == len(expected)
    assert every(rows) == expected


@given(wanted=st.lists(st.integers(0, 99), max_size=30))
def test_lines_are_read_at_any_positions(tmp_path_factory, wanted):
    content = b"\n\n".join(b"line %d" % number for number in range(100))
    rows = lines_of(tmp_path_factory.mktemp("lines"), content)
    assert list(rows.read(np.array(wanted, dtype=np.uint32))) == [b"line %d" % n for n in wanted]


@pytest.mark.parametrize("change", [b"", b"a\n" * 3, b"a\n" * 50])
def test_file_that_has_changed_is_an_error(tmp_path, change):
    rows = lines_of(tmp_path, b"ab\n" * 20)
    (tmp_path / "lines").write_bytes(change)
    with pytest.raises(ValueError, match="lines has changed since it was first read"):
        every(rows)


def test_index_takes_about_a_byte_a_line(tmp_path):
    rows = lines_of(tmp_path, b"a\n" * 80_000)
    assert len(pickle.dumps(rows)) < 90_000


def test_rows_of_arrow_files_are_mappings(tmp_path):
    import datasets

    expected = [{"n": number, "text": f"row {number}"} for number in range(2500)]
    rows = ArrowRows(datasets.Dataset.from_list(expected))
    assert every(rows) == expected
    assert list(rows.read(np.array([7, 3], dtype=np.uint32))) == [expected[7], expected[3]]


@pytest.fixture
def streamed(tmp_path):
    return Streamed(lines_of(tmp_path, b"\n".join(b"%d" % n for n in range(30))), numbered)


def test_streamed_items_are_a_sequence(streamed):
    expected = [(number + 1, b"%d" % number) for number in range(30)]
    assert list(streamed) == expected
    assert [streamed[index] for index in range(-30, 30)] == expected * 2
    assert list(streamed[3:20:4]) == expected[3:20:4]
    with pytest.raises(IndexError):
        streamed[30]


def test_selected_and_mapped_items_keep_their_numbers(streamed):
    odd = np.arange(30) % 2 == 1
    texts = select(streamed, odd).map(partial(str.format, "{0[0]}"))
    assert isinstance(texts, Streamed)
    assert list(texts[5:]) == [str(number) for number in range(12, 31, 2)]
    assert select(list("abc"), np.array([True, False, True])) == ["a", "c"]


def test_streamed_items_can_be_sent_to_worker_processes(streamed):
    assert list(pickle.loads(pickle.dumps(streamed))) == list(streamed)


# Memory.

MEASURED = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from tests.data.test_collators import byte_tokenizer
from rosa_lightning.data.datamodule import ReasoningDataModule

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

def read(path, stream):
    data = ReasoningDataModule(
        sources=[{{"path": path, "stream": stream}}], tokenizer=byte_tokenizer(), max_length=4096
    )
    data.setup("fit")
    batches = iter(data.train_dataloader())
    for _ in range(100):
        assert 0 < len(next(batches)["index"]) <= 16
    assert len(next(iter(data.val_dataloader()))["index"]) == 16
    return sum(map(len, data._train + data._val))

read({small!r}, {stream})
before = peak()
records = read({large!r}, {stream})
print(json.dumps([records, peak() - before]))
"""


def write_rows(path: Path, count: int, length: int) -> None:
    filler = "word " * (length // 5)
    with path.open("w") as file:
        for number in range(count):
            row = {"instruction": f"Question {number}?", "output": filler, "answer": str(number)}
            file.write(json.dumps(row) + "\n")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("stream", "count", "least", "most"),
    # The second shows that the measure tells what is held in memory.
    [(True, 2_000_000, -1, 150), (False, 40_000, 150, 10_000)],
)
def test_memory_stays_flat_while_a_file_of_two_gigabytes_is_read(
    tmp_path, stream, count, least, most
):
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    write_rows(small, 2000, 1000)
    write_rows(large, count, 1000)
    assert large.stat().st_size > count * 1050
    script = MEASURED.format(
        tests=str(Path(__file__).parents[2]), small=str(small), large=str(large), stream=stream
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    large.unlink()
    records, growth = json.loads(done.stdout.splitlines()[-1])
    assert records == count
    assert least < growth < most, f"{growth:.0f} MiB"

"""Records on disk take no memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURED = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from tests.conftest import data_module
from tests.data.test_tokenization import byte_tokenizer

def anonymous():
    # Without the pages of mapped files, which the system takes back when it needs them.
    status = Path("/proc/self/status").read_text()
    return sum(int(n) for n in re.findall(r"(?:RssAnon|VmSwap):\\s+(\\d+)", status)) / 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

def read(path, stream):
    data = data_module(
        sources=[{{"path": path, "stream": stream}}], tokenizer=byte_tokenizer(), max_length=4096,
        cache_dir={cache!r},
    )
    since = time.perf_counter()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    for _ in range(100):
        assert 0 < len(next(batches)["index"]) <= 16
    assert len(next(iter(data.val_dataloader()))["index"]) == 16
    print(f"{{time.perf_counter() - since:.1f}} s", file=sys.stderr)
    return sum(map(len, data._set.train + data._set.val))

read({small!r}, {stream})
peak = before = anonymous()
threading.Thread(target=watch, daemon=True).start()
records = read({large!r}, {stream})
print(json.dumps([records, peak - before]))
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
    [(True, 2_000_000, -1, 90), (False, 40_000, 60, 10_000)],
)
def test_memory_stays_flat_while_a_file_of_two_gigabytes_is_read(
    tmp_path, stream, count, least, most
):
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    write_rows(small, 2000, 1000)
    write_rows(large, count, 1000)
    names = {"small": str(small), "large": str(large), "cache": str(tmp_path / "cache")}
    script = MEASURED.format(**names, stream=stream)
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    records, growth = json.loads(done.stdout.splitlines()[-1])
    assert records == count
    assert least < growth < most, f"{growth:.0f} MiB"

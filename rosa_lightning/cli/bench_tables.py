"""What `bench` measured as a table to print, and the machine it was measured on."""

from __future__ import annotations

import platform
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.console import Group
from rich.table import Table

from rosa_lightning.cli.bench import FLOOR, LORA, LORA_RANK, LORA_TARGETS, OURS, Bench


def machine() -> str:
    """The processors, and the versions that speed depends on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    packages = ("torch", "transformers", "peft", "lightning", "rosa-lightning")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads = f"{cpu}, {torch.get_num_threads()} threads"
    return f"{'; '.join([threads, *devices])}; Python {platform.python_version()}, {versions}"


def bench_tables(bench: Bench) -> Group:
    """What was measured, for `rich` to print."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("Training")
    has_memory = bench.ways[OURS].peak_mib is not None
    names = ("examples/s", "tokens/s", "speed, LoRA = 1", "time, frozen = 1")
    for name in (*names, *(["peak MiB"] if has_memory else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for name, way in bench.ways.items():
        cells = [
            f"{bench.per_second(name, 'examples'):,.1f}",
            f"{bench.per_second(name, 'tokens'):,.0f}",
            "1" if name == LORA else _spread(bench.times(name, LORA)),
            "1" if name == FLOOR else _spread(bench.times(FLOOR, name)),
        ]
        cells += [f"{way.peak_mib:,.0f}"] if way.peak_mib is not None else []
        table.add_row(name, *cells)
    lowest = f"{statistics.mean(bench.lowest):.3g}" if bench.lowest else "none"
    counts = bench.rounds[0]
    notes = (
        f"{len(bench.rounds)} rounds of some {counts['examples']} examples, in turn; median and "
        "(lowest-highest) of the rounds.",
        f"LoRA: rank {LORA_RANK} on {', '.join(LORA_TARGETS)} where there are such, the same "
        "records in random order, padded to the longest. Frozen base: forward and backward, no "
        "optimizer.",
        f"Lowest layer that trained, as configured: {lowest} on average.",
        machine(),
    )
    return Group(table, *notes)


def _spread(values: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*values)

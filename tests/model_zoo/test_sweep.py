from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rosa_lightning.cli.sweep import ModelResult, sweep_tables, try_model
from rosa_lightning.roae.layer import RoAEConfig


def printed(results: list[ModelResult], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(sweep_tables(results))
    return console.file.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_tables_tell_what_became_of_every_model_and_count_them():
    names = ("LlamaConfig", "PhiConfig", "Phi3Config", "GPT2Config", "OPTConfig", "MambaConfig")
    text = printed([try_model(name, RoAEConfig(rank=2)) for name in names])
    lines = [line.split() for line in text.splitlines()]
    assert ["Llama", "2", "8", "6-7,", "14-15", "of", "16", "q_proj,", "k_proj"] in lines
    assert ["Phi3", "2", "8", "6-7,", "14-15", "of", "16", "qkv_proj"] in lines
    assert any(line[:2] == ["GPT2,", "OPT"] for line in lines)
    assert "rotates neither Q nor K" in text
    last = " ".join(text.splitlines()[-1].split())
    assert last.startswith("6 classes of transformers 5.")
    assert last.endswith(": 3 adapted, 3 refused, 0 not built here")


def test_a_reason_with_brackets_and_a_long_name_is_printed_whole():
    name = "MossTranscribeDiarizeAndStillMoreConfig"
    results = [
        ModelResult("AConfig", "AModel", "unbuildable", "AModel: sizes[i] are odd"),
        ModelResult(name, "M", "adapted", "", 2, 8, 16, (6, 7), ("query_key_value",)),
    ]
    text = printed(results)
    assert "sizes[i] are odd" in text
    assert "AModel" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    first_column = [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines()]
    assert name.removesuffix("Config") in "".join(first_column)

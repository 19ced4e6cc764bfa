"""Commonsense records with the text of the right answer as response, in place of its label.

    python tests/benchmarks/answer_texts.py data/train texts

The first folder holds arc_easy.json, arc_challenge.json and openbookqa.json of LLM-Adapters; the
second gets a JSONL file of each, with the fields prompt (the question and the listed answers) and
response. A small model learns to answer so within some hundred records; labels it takes at random.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

NAMES = ("arc_easy", "arc_challenge", "openbookqa")


def with_text(record: dict[str, str]) -> dict[str, str]:
    asked = record["instruction"].partition("\n\nAnswer format")[0].partition("question: ")[2]
    question, _, listed = asked.partition("\n\nAnswer1: ")
    texts = re.split(r" Answer\d: ", listed)
    lines = [question, *(f"- {text}" for text in texts)]
    right = texts[int(record["answer"].removeprefix("answer")) - 1]
    return {"prompt": "\n".join(lines), "response": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        rows = map(with_text, json.loads((options.data / f"{name}.json").read_text()))
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (options.folder / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()

"""Test files of LLM-Adapters as tasks of lm-evaluation-harness: the same questions for both tools.

    python tests/benchmarks/harness_tasks.py data/test [--count 100] [--output harness]

Of `arc_easy`, `arc_challenge` and `piqa` the first questions are written to the output folder: for
`test` as they are, for the harness with `include` of its own tasks, whose prompts and answers they
keep (`harness_piqa`), and with the prompts of `data.prompt_style: plain` (`listed_piqa`).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

TASKS = {"arc_easy": "arc", "arc_challenge": "arc", "piqa": "piqa"}
"""Names in both tools, and the harness's folder."""
LISTED = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{instruction}}\n",
    "target_delimiter": "",
    "doc_to_choice": "responses",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}


def row_of(record: dict[str, str]) -> dict[str, Any]:
    """Question, answers and label apart, in the columns of both of the harness's data sets."""
    asked, _, rest = record["instruction"].partition("\n\n")
    question = asked.partition(": ")[2]
    listed, _, form = rest.rpartition("\n\nAnswer format: ")
    texts = [text.strip() for text in re.split(r"(?:Answer|Solution)\d: ", listed)[1:]]
    labels = form.split("/")
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} answers but {len(labels)} labels: {record['instruction']}")
    return {
        "instruction": record["instruction"],
        "responses": [f"the correct answer is {label}" for label in labels],
        "label": labels.index(record["answer"]),
        "question": question,
        "choices": {"text": texts, "label": labels},
        "answerKey": record["answer"],
        "goal": question,
        "sol1": texts[0],
        "sol2": texts[1],
    }


def write(folder: Path, name: str, records: list[dict[str, str]]) -> None:
    import lm_eval  # which `row_of` does without

    (folder / f"{name}.json").write_text(json.dumps(records))
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps(row_of(record)) + "\n" for record in records))
    data = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    own = Path(lm_eval.__file__).parent / "tasks" / TASKS[name] / f"{name}.yaml"
    for prefix, task in (("harness", {"include": str(own)}), ("listed", LISTED)):
        config = task | data | {"task": f"{prefix}_{name}", "tag": f"{prefix}_questions"}
        (folder / f"{prefix}_{name}.yaml").write_text(yaml.safe_dump(config))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("harness"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        records = json.loads((options.folder / f"{name}.json").read_text())[: options.count]
        write(options.output, name, records)


if __name__ == "__main__":
    main()

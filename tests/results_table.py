"""Tables of docs/results.md, made from the comparisons in docs/results.

    python -m tests.results_table

A table stands between `<!-- results: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from rosa_lightning.comparison.report import quality

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(match: re.Match[str]) -> str:
    """A marked table, made anew."""
    content = json.loads((PAGE.parent / "results" / f"{match[2]}.json").read_text())
    against = f"minus {content['reference']} (95 %)"
    heading = ["method", "parameters", "seed 0 at each learning rate", "mean over seeds", against]
    lines = [f"| {' | '.join(heading)} | p (Holm) |", "|---|---|---|---|---|---|"]
    for name, _, loss, against, p in quality(content).rows:
        method = content["methods"][name]
        tried = sorted(
            (run["learning_rate"], run["val_loss"])
            for run in method["grid"]
            if run["status"] == "finished"
        )
        grid = ", ".join(f"{value:.4f} ({rate:.3g})" for rate, value in tried)
        seeds = f"{loss} ({len(method['runs'])})" if len(method["runs"]) > 1 else ""
        cells = [name, f"{method['trainable_parameters']:,}", grid, seeds, against, p]
        lines.append(f"| {' | '.join(cells)} |")
    return match[1] + "\n" + "\n".join(lines) + "\n\n" + match[3]


def generated(page: str) -> str:
    """The page with all of its tables made anew."""
    return MARKED.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(generated(PAGE.read_text()))

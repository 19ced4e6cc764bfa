"""README.md opens with two commands, stays short and links every page of docs/."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_first_two_shell_blocks_run_the_main_job_and_the_tests():
    first, second = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[:2]
    assert first.strip() == (
        "pip install -e . && python -m rosa_lightning fit --config configs/tiny.yaml"
    )
    assert second.strip() == "pip install -e '.[test]' && pytest"


def test_it_is_short_and_links_every_page():
    assert len(README.splitlines()) <= 220
    for page in {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "index.md"}:
        assert f"](docs/{page.name})" in README, page.name

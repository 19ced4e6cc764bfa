"""``compare``: methods at equal budgets, or two finished tests question by question."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rosa_lightning.cli.commands import CommandContext
from rosa_lightning.comparison.compare import SHARED, Comparison
from rosa_lightning.comparison.data import describe_data, write_general_text
from rosa_lightning.comparison.paired import compare_answers, read_answers
from rosa_lightning.comparison.plan import ComparisonConfig, Method, slug
from rosa_lightning.comparison.progress import ProgressDisplay
from rosa_lightning.comparison.report import comparison_tables, write_report
from rosa_lightning.comparison.runner import Runner, alone, hangup_ends, write_once
from rosa_lightning.comparison.sizing import sized
from rosa_lightning.comparison.speed import METHODS, measure_speed, speed_table
from rosa_lightning.comparison.verdict import verdict
from rosa_lightning.inspection.run_record import RunRecorder
from rosa_lightning.utils.errors import ConfigurationError
from rosa_lightning.utils.strict_json import read_object, write_json
from rosa_lightning.utils.tables import text_table

_TOLERANCE = 0.01
"""Share by which a method may miss the budget without a word."""
_SHOWN = ("enable_model_summary", "enable_progress_bar")
"""Keys of the trainer that say what is shown."""


def add_bare_arguments(parser: LightningArgumentParser) -> list[str]:
    """Add the arguments that are written without a value, or without their name; gives those."""
    runs = "Folders of two finished tests, to compare question by question."
    speed_only = (
        "Measure time and memory alone, of trainings that take turns; without comparison.methods, "
        "of the configuration beside LoRA."
    )
    parser.add_argument("runs", nargs="*", type=str, default=[], help=runs)
    parser.add_argument("--speed_only", action="store_true", help=speed_only)
    return ["runs", "speed_only"]


def compare(
    context: CommandContext,
    *,
    comparison: ComparisonConfig | None = None,
    runs: list[str] | None = None,
    speed_only: bool = False,
    speed_steps: PositiveInt = 8,
    speed_rounds: PositiveInt = 5,
) -> None:
    """Train methods at equal budgets and compare them; or compare two finished tests.

    It goes on where it was stopped: run the same command again.

    Args:
        context: The configuration that all methods share.
        comparison: The methods, budgets, learning rates and seeds.
        runs: Folders of two finished tests.
        speed_only: Measure time and memory alone, of trainings that take turns; without
            ``comparison.methods``, of the configuration beside LoRA.
        speed_steps: Optimizer steps of a turn, with ``speed_only``.
        speed_rounds: Turns of each method, with ``speed_only``; one more goes before.
    """
    if runs:
        _compare_two(runs)
        return
    if speed_only:
        _measure_speed(context, comparison, int(speed_steps), int(speed_rounds))
        return
    if comparison is None:
        raise ConfigurationError(
            "nothing to compare is given. Set comparison.methods, as configs/compare.yaml does, or "
            "name the folders of two finished tests."
        )
    _check_callbacks(context)
    interval = _validation_interval(context, comparison)
    root, console = Path(comparison.folder), Console()
    with alone(root), hangup_ends(), ProgressDisplay(comparison, console) as display:
        content = _run(context, comparison, interval, display)
    report = write_report(content, root / "report.html")
    console.print(comparison_tables(content))
    for line in verdict(content):
        console.print(line, markup=False, highlight=False)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)


def _run(
    context: CommandContext, comparison: ComparisonConfig, interval: int, display: ProgressDisplay
) -> dict[str, Any]:
    """Run what is left of a comparison, in a folder that no other works in."""
    root = Path(comparison.folder).absolute()
    file, whole = root / SHARED, partial(_what_counts, context)
    write_once(file, context.shared(), lambda: whole([file]) == whole())
    runner = Runner(file, whole)
    methods = []
    for name in comparison.methods:
        display.say(f"size of {name}")
        method = _method(context, comparison, name, runner)
        methods.append(method)
        budget = comparison.trainable_parameters
        if budget is not None and abs(method.trainable_parameters / budget - 1) > _TOLERANCE:
            display.note(
                f"{name} trains {method.trainable_parameters:,} parameters, "
                + (f"as near to {budget:,} as it comes." if method.rank else "as it has no rank.")
            )
    texts = None
    if comparison.general_text is not None:
        texts = root / "general_text.jsonl"
        write_general_text(comparison.general_text, texts)
    display.say("test questions in the training data")
    seed = context.data.loading.choice_seed(context.data.seed)
    data = _described(context, root, seed)
    steps: int = context.trainer["max_steps"]
    return Comparison(
        comparison, methods, steps, runner, display, interval, seed, texts, data
    ).run()


def _what_counts(context: CommandContext, files: Sequence[Path | str] = ()) -> str:
    """The configuration of some files, or the one given, without what changes no result."""
    settings = yaml.safe_load(context.shared(files))
    for key in _SHOWN:
        settings["trainer"].pop(key, None)
    return yaml.safe_dump(settings)


def _described(context: CommandContext, root: Path, seed: int) -> dict[str, Any]:
    """What is said of the data, which stay the same, so it is found once."""
    path = root / "contamination.json"
    found = read_object(path)
    if not found:
        found = describe_data(context.data, seed)
        write_json(path, found)
    return found


def _measure_speed(
    context: CommandContext, config: ComparisonConfig | None, steps: int, rounds: int
) -> None:
    """Time and memory of methods; it keeps ``speed.json`` alone."""
    config = config or ComparisonConfig(methods=METHODS, reference=[*METHODS][-1])
    kept = Path(config.folder) / "speed.json"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console()
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with TemporaryDirectory() as folder, bars as progress:
        bar = progress.add_task("count parameters", total=len(config.methods) * (rounds + 1) + 1)
        config = replace(config, folder=folder)
        write_once(Path(folder) / SHARED, context.shared())
        runner = Runner(Path(folder) / SHARED)
        methods = [_method(context, config, name, runner) for name in config.methods]

        def say(text: str) -> None:
            progress.update(bar, description=text, advance=1)
            if not console.is_terminal:
                console.print(f"{text} ...", highlight=False)

        content = measure_speed(config, methods, steps=steps, rounds=rounds, say=say)
    write_json(kept, content)
    console.width = max(console.width, 100)
    console.print(speed_table(content))
    sys.stdout.write(f"{kept}\n")


def _validation_interval(context: CommandContext, comparison: ComparisonConfig) -> int:
    """Optimizer steps between validations; ConfigurationError where the last step has none."""
    steps = 0 if comparison.train_seconds else comparison.max_steps or context.trainer["max_steps"]
    if steps < 1 and not comparison.train_seconds:
        raise ConfigurationError(
            "the runs have no end. Set comparison.max_steps, comparison.train_seconds or "
            "trainer.max_steps."
        )
    every = context.trainer["val_check_interval"]
    accumulated = context.trainer.get("accumulate_grad_batches") or 1
    if not isinstance(every, int) or every % accumulated:
        raise ConfigurationError(
            f"trainer.val_check_interval={every} is no number of optimizer steps, so that the end "
            "of a run may not be validated. Set it to a whole number of batches."
        )
    interval = every // accumulated
    if steps > 0 and steps % interval:
        raise ConfigurationError(
            f"runs of {steps} steps end without a validation, which comes every {interval} steps. "
            "Set comparison.max_steps to a multiple, or trainer.val_check_interval."
        )
    return interval


def _check_callbacks(context: CommandContext) -> None:
    callbacks = context.trainer["callbacks"]
    saved = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor == "val/loss"]
    if any(one.dirpath for one in callbacks if isinstance(one, ModelCheckpoint)):
        raise ConfigurationError(
            "ModelCheckpoint has a dirpath, which all runs would share. Take it out of "
            "trainer.callbacks."
        )
    if any(isinstance(one, RunRecorder) for one in callbacks):
        raise ConfigurationError(
            "each run of a comparison has a RunRecorder of its own. Take it out of "
            "trainer.callbacks."
        )
    if not any(one.save_last for one in saved):
        raise ConfigurationError(
            "a comparison needs the best checkpoint of each run, and the last one to go on from. "
            "Set trainer.callbacks to a ModelCheckpoint with monitor val/loss and save_last true."
        )


def _method(
    context: CommandContext, comparison: ComparisonConfig, name: str, runner: Runner
) -> Method:
    """A method with the rank that the budget gives, which is kept for later calls."""
    overrides, folder = comparison.overrides(name), runner.shared.parent / slug(name)
    given: Any = {"given": overrides, "budget": comparison.trainable_parameters}
    given = json.loads(json.dumps(given))
    files = [runner.shared]
    if overrides:
        files.append(runner.prepare(overrides, folder, "method.yaml"))
    kept = read_object(folder / "method.json")
    if not given.items() <= kept.items():
        method = sized(context.build(files), name, overrides, comparison.trainable_parameters)
        kept = asdict(method) | given
        write_json(folder / "method.json", kept)
    return Method(name, kept["overrides"], kept["rank"], kept["trainable_parameters"])


def _compare_two(runs: list[str]) -> None:
    """Two finished tests, question by question."""
    if len(runs) != 2:
        raise ConfigurationError(f"{len(runs)} folders of tests are given; two can be compared.")
    about = []
    for run in runs:
        results = read_object(Path(run) / "results.json")
        if not results.get("complete"):
            raise ValueError(
                f"{run} holds no finished test: results.json is missing there, or not complete. "
                "Give the folder that `test` has written to."
            )
        about.append(results)
    for key in ("template", "rules", "max_new_tokens", "num_beams", "length_normalized"):
        ours, theirs = (json.dumps(one.get(key)) for one in about)
        if ours != theirs:
            raise ValueError(
                f"the two tests differ in {key}: {ours} and {theirs}. Test both with the same."
            )
    answers = [read_answers(Path(run) / "predictions.jsonl") for run in runs]
    columns = ("Questions", "Difference", "95 % interval", "p (bootstrap)", "p (McNemar)")
    table = text_table(f"{runs[0]} against {runs[1]}", "Task", *columns)
    for row in compare_answers(answers[:1], answers[1:]):
        low, high = 100 * row["low"], 100 * row["high"]
        table.add_row(
            row["metric"],
            f"{row['n']:,}",
            f"{100 * row['mean']:+.1f}",
            f"{low:+.1f} to {high:+.1f}",
            f"{row['p']:.3g}",
            f"{row['p_mcnemar']:.3g}",
        )
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)

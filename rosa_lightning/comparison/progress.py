"""How far a comparison is, in the terminal: the run at hand, and the time left over all runs."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import mean
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from rosa_lightning.comparison.plan import ComparisonConfig, Run

_DOING = {"train": "", "test": "test of ", "text": "general text of ", "time": "time of "}
_PLANNED = {"train": "trainings", "test": "tests", "text": "losses on general text"}
_FIRST_SHARE = 0.02
"""Share of a run from which on its speed tells how long it takes."""


class Remaining:
    """Estimates the time that is left of jobs of several kinds.

    A job that was done in an earlier call counts as done, and its time only as long as none of its
    kind has ended in this call. One of a kind that has not been seen is taken to last as long as
    the others. ``planned`` is the number of jobs of each kind.
    """

    def __init__(self, planned: dict[str, int]) -> None:
        self.left = Counter(planned)
        self._took: defaultdict[str, list[float]] = defaultdict(list)
        self._earlier: defaultdict[str, list[float]] = defaultdict(list)

    def ended(self, kind: str, seconds: float | None, *, known: bool = False) -> None:
        """Note that a job has ended, and how long it took."""
        self.left[kind] = max(0, self.left[kind] - 1)
        if seconds is not None:
            (self._earlier if known else self._took)[kind].append(seconds)

    def seconds(self, kind: str = "", since: float = 0.0, share: float = 0.0) -> float | None:
        """Time left; None where nothing tells.

        Of the job at hand its kind, how long it has gone on, and the share of it that is done.
        """
        of_now = since / share if share >= _FIRST_SHARE else None
        usual = {
            name: mean(took)
            for name in self.left
            if (took := self._took[name] or self._earlier[name])
        }
        if of_now is not None:
            usual.setdefault(kind, of_now)
        if not usual:
            return None
        of_any = mean(usual.values())  # of a kind that has not been seen
        total = sum(number * usual.get(name, of_any) for name, number in self.left.items())
        if kind:  # of the job at hand only the rest
            own = usual.get(kind, of_any)
            total += max(0.0, (of_now or own) - since) - own
        return total


class ProgressDisplay:
    """A bar of the run at hand, and a line for each that has ended; first what is planned.

    Where there is no terminal for a bar, a line says what begins.
    """

    def __init__(self, config: ComparisonConfig, console: Console) -> None:
        self.console = console
        seeds = [len(config.of(name, "seeds")) for name in config.methods]
        rates = [len(config.of(name, "learning_rates")) for name in config.methods]
        self.num_runs = sum(rates) + sum(seeds) - len(seeds)
        planned = {"train": self.num_runs}
        for kind, is_asked in (("test", config.test), ("text", config.general_text is not None)):
            planned |= {kind: sum(seeds) + 1} if is_asked else {}
        self.remaining = Remaining(planned)
        counts = [f"{len(config.methods)} methods"]
        counts += [f"{number} {_PLANNED[kind]}" for kind, number in planned.items()]
        counts += ["more trainings where the best rate is at an edge"] * config.extend_grid
        self._plan = ", ".join(counts)
        whole = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}", table_column=whole, markup=False),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[step]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=None, step="", left="")
        self._num_trained = 0
        self._kind, self._since = "", 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        self.note(f"planned: {self._plan}. First: their sizes, and the data.")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, doing: str) -> None:
        """Say what is done now."""
        self._progress.reset(self._bar, total=None, description=doing, step="", left="")
        if not self.console.is_terminal:
            self.note(f"{doing} ...")

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        whole = not self.console.is_terminal  # for who looks for a line in a file
        self.console.print(line, markup=False, highlight=False, soft_wrap=whole)

    def begin(self, kind: str, run: Run) -> None:
        """Name the job."""
        self._kind, self._since = kind, time.monotonic()
        place = f"{min(self._num_trained + 1, self.num_runs)}/{self.num_runs} "
        where = place if kind == "train" else ""
        self.say(f"{where}{_DOING[kind]}{_named(run)}")
        self.at(0, 0)

    def at(self, step: int, steps: int) -> None:
        """Move the bar."""
        since = time.monotonic() - self._since
        is_whole = steps > 0 and self._kind == "train"
        left = self.remaining.seconds(self._kind, since, step / steps if is_whole else 0.0)
        self._progress.update(
            self._bar,
            total=steps if steps > 0 else None,
            completed=step,
            step=f"{step:,}/{steps:,}" if steps > 0 else "",
            left="" if left is None else f"{duration(left)} left in all",
        )

    def end(self, kind: str, run: Run, result: dict[str, Any], *, known: bool = False) -> None:
        """Say how it ended, and how much is left."""
        if kind == "time":
            self.note(f"{_named(run)}: {result['seconds_per_step']:.3g} s for a step")
            return
        took = result.get("wall_seconds", {}).get(kind)
        if took is None and kind == "train":  # of an earlier release, or it failed
            took = result.get("train_seconds")
        self.remaining.ended(kind, took, known=known)
        self._num_trained += kind == "train"
        error = result.get(f"{kind}_error")
        left = self.remaining.seconds()
        parts = [(error or _SAID[kind](result)).rstrip(".")]
        parts += ["from an earlier call"] if known else []
        parts += [f"{duration(left)} left in all"] if left and not known else []
        self.note(f"{_DOING[kind]}{_named(run)}: {', '.join(parts)}")


def _named(run: Run) -> str:
    rate = f", rate {run.learning_rate:g}" if run.learning_rate else ""
    return run.method if run.method == "base" else f"{run.method}{rate}, seed {run.seed}"


def _trained(result: dict[str, Any]) -> str:
    loss = result.get("val_loss")
    if loss is None:
        return str(result.get("error") or result["status"])
    return f"val/loss {loss:.4f}, {duration(result['train_seconds'])}"


def _tested(result: dict[str, Any]) -> str:
    return ", ".join(_shares(result["tasks"]))


def _shares(tasks: Iterable[dict[str, Any]]) -> list[str]:
    found: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for task in tasks:
        found[task["protocol"]].append((task["accuracy"], task["n"]))
    return [
        f"{protocol} {100 * sum(a * n for a, n in own) / sum(n for _, n in own):.1f} % right"
        for protocol, own in found.items()
    ]


def _read(result: dict[str, Any]) -> str:
    return f"{result['text_loss']['loss']:.4f} nats per token"


_SAID = {"train": _trained, "test": _tested, "text": _read}
"""How each kind of job is summed up."""


def duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"

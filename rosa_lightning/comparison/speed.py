"""``compare --speed_only``: time and memory of methods whose trainings take turns.

Each method is an ordinary ``fit`` in a process of its own, which trains some steps when it is its
turn and waits for the rest of the time, so that whatever else the machine does meets all of them.
"""

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Group

from rosa_lightning.comparison.compare import SHARED
from rosa_lightning.comparison.plan import ComparisonConfig, Method, nested, slug
from rosa_lightning.comparison.runner import LOG, RunFailedError, failure_reason, start_module
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.evaluation.results import versions
from rosa_lightning.inspection.throughput import batch_counts, peak_mib
from rosa_lightning.utils.files import read_text
from rosa_lightning.utils.tables import note, text_table
from rosa_lightning.utils.trainer import callbacks_of

_LORA = {
    "model.peft": {
        "class_path": "peft.LoraConfig",
        "init_args": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    },
    "dls.policy": "all",
}
_PLAIN = {
    **dict.fromkeys(("share_prefix", "recompute_activations", "supervised_only"), False),
    **dict.fromkeys(("loss_chunk", "microbatch_tokens")),
}
METHODS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "LoRA": _LORA,
    "LoRA, plain": {**_LORA, "data.batching": "random", "model.speed": _PLAIN},
}
"""What is measured where no methods are named; the last one has none of the speed levers."""
_POLL_SECONDS = 0.05
_TURNS = "turns.jsonl"

Say = Callable[[str], None]
"""Takes what is done now."""


class TakeTurns(Callback):
    """Trains some steps, writes what they took, and waits for a line on standard input.

    Args:
        path: JSON Lines file; of each turn ``seconds``, ``examples``, ``tokens``, ``peak_mib`` so
            far and ``backward_share`` so far.
        steps: Optimizer steps of a turn.
    """

    def __init__(self, path: str, steps: int) -> None:
        super().__init__()
        self.path, self.steps = Path(path), steps
        self._end = steps
        self._counts: list[dict[str, Any]] = []
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at the end of a turn write what it took, and wait for the next one."""
        self._counts.append(batch_counts(batch))
        if trainer.global_step < self._end:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        turn: dict[str, Any] = {"seconds": time.perf_counter() - self._since}
        for name in ("examples", "tokens"):
            turn[name] = sum(int(count[name]) for count in self._counts)
        shares = [one.backward_share for one in callbacks_of(trainer, DynamicLayerSelection)]
        turn |= {"peak_mib": peak_mib(pl_module.device), "backward_share": min(shares, default=1.0)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(turn) + "\n")
        self._end += self.steps
        self._counts = []
        if self._end <= trainer.max_steps and not sys.stdin.readline():
            trainer.should_stop = True  # the comparison has ended
        self._since = time.perf_counter()


class _Training:
    """The process of a method."""

    def __init__(self, base: Path, overrides: Mapping[str, Any], folder: Path) -> None:
        self.log, self.turns = folder / LOG, folder / _TURNS
        file = folder / "overrides.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(dict(overrides)), encoding="utf-8")
        self.log.unlink(missing_ok=True)
        arguments = ["rosa_lightning", "fit", f"--config={base}", f"--config={file}"]
        self.process = start_module(arguments, self.log)

    def turn(self, number: int) -> dict[str, Any]:
        """Wait for the end of a turn, the first of which is 0, and begins by itself.

        Raises:
            RunFailedError: The training ended with an error.
        """
        pipe = self.process.stdin
        if number and pipe is not None:
            try:
                pipe.write(b"\n")
                pipe.flush()
            except BrokenPipeError:
                self.process.wait()
        while True:
            ended = self.process.poll()
            lines = self.turns.read_text().split("\n") if self.turns.exists() else [""]
            if len(lines) - 1 > number:  # behind the last line break is a line to come
                found: dict[str, Any] = json.loads(lines[number])
                return found
            if ended is not None:
                raise RunFailedError(failure_reason(self.log, 0, ended))
            time.sleep(_POLL_SECONDS)


@contextmanager
def _training(*args: Any) -> Iterator[_Training]:
    """A training that has ended when this has."""
    training = _Training(*args)
    try:
        yield training
    finally:
        training.process.kill()
        training.process.communicate()


def measure_speed(
    config: ComparisonConfig,
    methods: Sequence[Method],
    *,
    steps: int,
    rounds: int,
    say: Say,
) -> dict[str, Any]:
    """Let the methods train in turn; settings, and by method the turns, or why it failed.

    One turn of each goes before and is not counted. All run on one device, at their first learning
    rate and seed, and validate, log and save nothing.

    Args:
        config: Its folder holds the configuration that all share.
        methods: As they are run.
        steps: Optimizer steps of a turn.
        rounds: Turns of each that count.
        say: Told of each turn before it begins.
    """
    root = Path(config.folder)
    rows: dict[str, dict[str, Any]] = {
        one.name: {**asdict(one), "turns": [], "error": None} for one in methods
    }
    trainings = {}
    with ExitStack() as stack:
        for one in methods:
            folder = root / slug(one.name)
            overrides = _overrides(config, one, folder, steps, rounds)
            started = _training(root / SHARED, overrides, folder)
            trainings[one.name] = stack.enter_context(started)
        for number in range(rounds + 1):
            for name, row in rows.items():
                say(f"round {number} of {rounds}: {name}" if number else f"start: {name}")
                try:
                    turn = None if row["error"] else trainings[name].turn(number)
                except RunFailedError as error:
                    turn, row["error"], row["turns"] = None, str(error), []
                if turn and number:
                    row["turns"].append(turn)
    settings = {"steps": steps, "rounds": rounds, "reference": config.compared_with}
    return {**settings, "methods": rows, "machine": machine(), "versions": versions()}


def _overrides(
    config: ComparisonConfig, method: Method, folder: Path, steps: int, rounds: int
) -> dict[str, Any]:
    seed = config.of(method.name, "seeds")[0]
    turns = {"path": str(folder / _TURNS), "steps": steps}
    own = {
        "optimizer.init_args.lr": config.of(method.name, "learning_rates")[0],
        "seed_everything": seed,
        "data.seed": seed,
        "validate_first": False,
    }
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = {
        **dict.fromkeys(off, False),
        "limit_val_batches": 0,
        "max_steps": steps * (rounds + 1),
        "max_epochs": -1,
        "max_time": None,
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "callbacks": [{"class_path": f"{__name__}.{TakeTurns.__name__}", "init_args": turns}],
    }
    return nested({**method.overrides, **own, "trainer": trainer})


def speed_table(content: Mapping[str, Any]) -> Group:
    """What was measured, for `rich` to print, and the machine it was measured on."""
    rows, reference = content["methods"], content["reference"]
    theirs = rows[reference]["turns"]
    columns = ("Trainable", "Examples/s", "Tokens/s", "Speed", "Peak MiB", "Backward")
    table = text_table(f"Speed; {reference} = 1", "Method", *columns)
    failed = []
    for name, row in rows.items():
        turns, trainable = row["turns"], f"{row['trainable_parameters']:,}"
        if not turns:
            table.add_row(name, trainable, "failed")
            failed.append(note(f"{name}: {row['error']}"))
            continue
        peak, share = turns[-1]["peak_mib"], turns[-1]["backward_share"]
        table.add_row(
            name,
            trainable,
            f"{per_second(turns, 'examples'):,.2f}",
            f"{per_second(turns, 'tokens'):,.0f}",
            "1" if name == reference else speed_ratio(turns, theirs) if theirs else "",
            "" if peak is None else f"{peak:,.0f}",
            f"{share:.2f}",
        )
    counted = f"{content['rounds']} rounds of {content['steps']} steps of each, in turn"
    about = f"{counted}; speed in examples/s of all rounds, (lowest to highest of a round)."
    return Group(table, *failed, note(about), note(content["machine"]))


def per_second(turns: Sequence[Mapping[str, Any]], what: str) -> float:
    """Examples or tokens a second, of all turns."""
    found: float = sum(turn[what] for turn in turns) / sum(turn["seconds"] for turn in turns)
    return found


def speed_ratio(turns: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """How many times as many examples a second as the reference: of all, lowest, highest."""
    pairs = zip(turns, theirs, strict=True)
    ratios = [per_second([a], "examples") / per_second([b], "examples") for a, b in pairs]
    whole = per_second(turns, "examples") / per_second(theirs, "examples")
    return f"{whole:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def machine() -> str:
    """The processors, and the threads that torch takes."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (named := re.search(r"model name\s*: (.*)", read_text(info))):
        cpu = named[1]
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return "; ".join([f"{cpu}, {torch.get_num_threads()} threads", *devices])

"""How fast and how large a training is, beside PEFT LoRA under the trainer of transformers.

    python tests/benchmarks/training_speed.py DATA              # some 50 minutes on 2 cores
    python tests/benchmarks/training_speed.py DATA --short      # some 20 minutes
    python tests/benchmarks/training_speed.py --device cuda     # GPU shapes, tokens a second, MFU

DATA is a folder with boolq.json, openbookqa.json, arc_easy.json and arc_challenge.json. A 12-layer,
512-wide Llama with random weights and a tokenizer of 32k entries, made of the records, are written
into a temporary folder. Every contender trains on the same records in a process of its own, which
does some steps when it is its turn, so that whatever else the machine does meets all of them. The
records are drawn from all files alike, so that these are mixed by size. The first epoch
of each is not counted, and each round is an epoch. Ratios are taken in each round; the table has
their median, and in brackets the lowest and the highest. `--only` chooses among trainings, what DLS
selects, the cost of RoAE and of the number of records, and two scripts of their own: roae_cost.py,
which has the cost of scoring, and start_up.py. The last table has all figures with their bars.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

NAMES = ("boolq", "openbookqa", "arc_easy", "arc_challenge")
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
SMALL = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
LORA = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
RANDOM, GROUPED = "LoRA, HF Trainer, random order", "LoRA, HF Trainer, length groups"
UPPER, ALL, DLS = "RoSA, upper half", "RoSA, all layers", "RoSA, DLS defaults"
PACKED = "RoSA, all layers, packed"
FLOOR = "frozen floor by RoAE"
SECTIONS = ["training", "selection", "floor", "size", "scoring", "start"]


# --- the base and the records ---------------------------------------------------------------


def make_records(data: Path, folder: Path, count: int) -> list[str]:
    """Records drawn from all files, as files of their own."""
    pairs = [(n, r) for n in NAMES for r in json.loads((data / f"{n}.json").read_text())]
    drawn = random.Random(0).sample(pairs, count)
    paths = []
    for name in NAMES:
        path = folder / f"{name}.json"
        path.write_text(json.dumps([record for owner, record in drawn if owner == name]))
        paths.append(str(path))
    return paths


def make_base(folder: Path, data: Path, shape: dict[str, int]) -> None:
    """A random Llama and a byte-level BPE made of all records."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    records = (r for name in NAMES for r in json.loads((data / f"{name}.json").read_text()))
    bpe.train_from_iterator(
        (f"{record['instruction']}\n{record['output']}" for record in records),
        trainers.BpeTrainer(
            vocab_size=32_000,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32_000, pad_token_id=0, eos_token_id=1, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)


# --- contenders, each in its process --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is to train."""

    name: str
    base: str
    paths: list[str]
    batch_size: int = 16
    threads: int = 2
    options: dict[str, Any] = field(default_factory=dict)


class StopError(Exception):
    """Ends a training from within."""


class Turns:
    """Lets a training go on by as many steps as the parent says, and tells how long they took."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.left, self.begun = pipe, 0, False
        self.since, self.lowest = 0.0, []

    def before_step(self) -> None:
        if self.left == 0:
            self._answer_and_wait()
        self.left -= 1

    def _answer_and_wait(self) -> None:
        seconds = time.perf_counter() - self.since
        self.pipe.send({"seconds": seconds, "lowest": self.lowest, "rss": peak_rss()})
        self.lowest = []
        self.left = self.pipe.recv()
        if self.left == 0:
            raise StopError
        self.since = time.perf_counter()


def peak_rss() -> float:
    """MiB. Not getrusage's, which begins with what the parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def train_rosa(job: Job, turns: Turns) -> None:
    from lightning.pytorch import Callback, Trainer

    from rosa_lightning import DynamicLayerSelection, ReasoningDataModule, RoSAModule
    from rosa_lightning.dls import PolicyOptions
    from rosa_lightning.inspection.throughput import lowest_active

    class Gate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            turns.before_step()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            turns.lowest.append(lowest_active(pl_module.model.model.layers))

    selection = job.options.get("selection")
    if "fixed_layers" in (selection or {}):
        options = PolicyOptions(fixed_layers=selection["fixed_layers"])
        selection = {"policy": "fixed", "policy_options": options}
    callbacks = [] if selection is None else [DynamicLayerSelection(**selection)]
    module = RoSAModule(job.base, **job.options.get("model", {}))
    data = ReasoningDataModule(
        sources=job.paths,
        batch_size=job.batch_size,
        max_length=1024,
        val_fraction=0,
        **job.options.get("data", {}),
    )
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        max_steps=1_000_000,
        callbacks=[*callbacks, Gate()],
    ).fit(module, data)


def train_lora(job: Job, turns: Turns) -> None:
    import peft
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Gate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            turns.before_step()

    tokenizer = AutoTokenizer.from_pretrained(job.base)
    model = AutoModelForCausalLM.from_pretrained(job.base)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LORA, task_type="CAUSAL_LM")
    Trainer(
        model=peft.get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=job.options["output"],
            per_device_train_batch_size=job.batch_size,
            learning_rate=1e-3,
            num_train_epochs=1_000_000,
            train_sampling_strategy=job.options["order"],
            optim="adamw_torch_fused",
            max_grad_norm=0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=encoded(job.paths, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Gate()],
    ).train()


def encoded(paths: list[str], tokenizer: Any, max_length: int = 1024) -> list[dict[str, list[int]]]:
    """The records as `ReasoningDataModule` encodes them, prompts without loss."""
    from rosa_lightning.data.collators import IGNORE_INDEX
    from rosa_lightning.data.records import load_records
    from rosa_lightning.data.sources import Source
    from rosa_lightning.data.tokenization import Encoder

    records = [r for path in paths for r in load_records(Source(path=path), "train")]
    examples = Encoder(tokenizer, max_length=max_length)(records)
    return [
        {
            "input_ids": [*example.prompt, *example.response],
            "attention_mask": [1] * len(example.prompt + example.response),
            "labels": [IGNORE_INDEX] * len(example.prompt) + list(example.response),
        }
        for example in examples
    ]


def compare_floor(job: Job, turns: Turns) -> None:
    """Forward and backward with RoAE and without, on the same batches, in turn.

    Both in one process: `lowest` carries the ratios, as there is no single time to tell.
    """
    import torch

    from rosa_lightning import ReasoningDataModule, RoSAModule
    from rosa_lightning.cli.bench import frozen_base

    torch.manual_seed(0)
    adapted, floor = RoSAModule(job.base), frozen_base(RoSAModule(job.base))
    adapted.configure_model()
    data = ReasoningDataModule(
        sources=job.paths,
        tokenizer=job.base,
        batch_size=job.batch_size,
        val_fraction=0,
        max_length=1024,
    )
    data.setup("fit")
    while True:
        for batch in data.train_dataloader():
            turns.before_step()
            seconds = []
            for module in (adapted, floor, floor, adapted):  # so that neither is always first
                since = time.perf_counter()
                module.loss(batch).backward()
                module.zero_grad()
                seconds.append(time.perf_counter() - since)
            turns.lowest.append((seconds[0] + seconds[3]) / (seconds[1] + seconds[2]))


def work(kind: Callable[[Job, Turns], None], job: Job, pipe: Connection) -> None:
    import torch

    logging_off()
    torch.set_num_threads(job.threads)
    turns = Turns(pipe)
    try:
        kind(job, turns)
    except (StopError, EOFError):  # told to, or the parent is gone
        pass
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def logging_off() -> None:
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"


class Contender:
    """A process that trains when it is told to."""

    def __init__(self, kind: Callable[[Job, Turns], None], job: Job) -> None:
        context = mp.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(kind, job, other), daemon=True)
        self.process.start()
        self.seconds: list[float] = []
        self.lowest: list[Any] = []
        self.rss = 0.0
        self._receive()

    def _receive(self) -> float:
        while not self.pipe.poll(1):
            if not self.process.is_alive():
                raise SystemExit(f"a process ended with {self.process.exitcode}")
        answer = self.pipe.recv()
        if "error" in answer:
            raise SystemExit(answer["error"])
        self.lowest += answer["lowest"]
        self.rss = answer["rss"]
        return float(answer["seconds"])

    def run(self, steps: int) -> float:
        self.pipe.send(steps)
        return self._receive()

    def stop(self) -> None:
        self.pipe.send(0)
        self.process.join()


# --- the tables -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A line of the last table."""

    name: str
    values: list[float]
    bar: float
    at_most: bool = True

    def row(self) -> str:
        middle = statistics.median(self.values)
        met = middle <= self.bar if self.at_most else middle >= self.bar
        bar = f"at {'most' if self.at_most else 'least'} {self.bar:g}"
        return f"| {self.name} | {spread(self.values)} | {bar} | {'yes' if met else 'no'} |"


BARS = {UPPER: (4.8, 2.6), ALL: (3.5, 1.9)}
"""Times the examples a second of LoRA in random order, and in length groups."""


def interleave(
    contenders: dict[str, Contender], steps: int, rounds: int, turn: int, warm_up: int
) -> None:
    """Seconds of each round of each contender, a turn of some steps after another."""
    for contender in contenders.values():  # the first steps try things out and allocate
        contender.run(warm_up)
        contender.lowest.clear()
    for number in range(rounds):
        for contender in contenders.values():
            contender.seconds.append(0.0)
        left = steps
        while left:
            now = min(turn, left)
            for contender in contenders.values():
                contender.seconds[-1] += contender.run(now)
            left -= now
        told = ", ".join(f"{name} {c.seconds[-1]:.1f} s" for name, c in contenders.items())
        print(f"round {number + 1}: {told}", flush=True)


def spread(values: list[float]) -> str:
    """Median, and the lowest and the highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def contenders_of(options: argparse.Namespace, base: str, paths: list[str]) -> dict[str, Any]:
    layers = SMALL["num_hidden_layers"] if options.small else SHAPE["num_hidden_layers"]
    upper = list(range(layers // 2, layers))
    ours: dict[str, dict[str, Any]] = {
        UPPER: {"selection": {"fixed_layers": upper}},
        ALL: {},
        DLS: {"selection": {}},
        PACKED: {"data": {"batching": "packed"}},
    }
    common = {"base": base, "paths": paths, "threads": options.threads}
    with_output = {"output": f"{base}/trainer"}
    jobs: dict[str, Any] = {
        RANDOM: (train_lora, {**with_output, "order": "random"}),
        GROUPED: (train_lora, {**with_output, "order": "group_by_length"}),
        **{name: (train_rosa, own) for name, own in ours.items()},
    }
    return {
        name: (kind, Job(name=name, batch_size=options.batch_size, options=own, **common))
        for name, (kind, own) in jobs.items()
    }


def compare_trainings(options: argparse.Namespace, base: str, paths: list[str]) -> list[Figure]:
    jobs = contenders_of(options, base, paths)
    contenders = {name: Contender(*job) for name, job in jobs.items()}
    steps = options.records // options.batch_size
    # Rounds begin where epochs do: else one may meet the longest batch twice, and another not.
    interleave(contenders, steps, options.rounds, options.turn, warm_up=steps)
    random_, grouped = contenders[RANDOM], contenders[GROUPED]
    figures: list[Figure] = []
    print("\n| training | examples/s | times random | times length groups | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for name, own in contenders.items():
        rate = statistics.median(options.records / seconds for seconds in own.seconds)
        ratios = [
            [a / b for a, b in zip(rival.seconds, own.seconds, strict=True)]
            for rival in (random_, grouped)
        ]
        memory = own.rss / random_.rss
        told = f"{spread(ratios[0])} | {spread(ratios[1])} | {own.rss:.0f} ({memory:.2f})"
        print(f"| {name} | {rate:.2f} | {told} |")
        for order, values, bar in zip(
            ("random", "grouped"), ratios, BARS.get(name, ()), strict=False
        ):
            figures.append(Figure(f"{name}, examples/s over LoRA, {order}", values, bar, False))
        if name not in (RANDOM, GROUPED):
            figures.append(Figure(f"{name}, peak memory over LoRA", [memory], 0.4))
    for contender in contenders.values():
        contender.stop()
    return figures


def runs(values: list[int]) -> str:
    """Values over time, equal ones in a row told once."""
    told: list[list[int]] = []
    for step, value in enumerate(values):
        if not told or told[-1][1] != value:
            told.append([step, value])
    return ", ".join(f"{value} from step {step}" for step, value in told)


def selection_table(options: argparse.Namespace, base: str, paths: list[str]) -> None:
    """The lowest active layer over several selections, in steps too small to be timed."""
    job = Job(
        name=DLS,
        base=base,
        paths=paths,
        batch_size=4,
        threads=options.threads,
        options={"selection": {}},
    )
    contender = Contender(train_rosa, job)
    contender.run(options.selection_steps)
    contender.stop()
    print(f"\nlowest active layer of {DLS}, batches of 4: {runs(contender.lowest)}")


def floor_table(options: argparse.Namespace, base: str, paths: list[str]) -> list[Figure]:
    job = Job(
        name=FLOOR,
        base=base,
        paths=paths,
        batch_size=options.batch_size,
        threads=options.threads,
    )
    contender = Contender(compare_floor, job)
    contender.run(options.floor_batches + 1)
    contender.stop()
    ratios = contender.lowest[1:]  # without the first, which allocates
    print(
        f"\nRoAE over the frozen floor, forward and backward, {len(ratios)} batches: "
        f"{spread(ratios)}"
    )
    return [Figure("RoAE over the frozen floor", ratios, 1.05)]


def size_table(options: argparse.Namespace, base: str, folder: Path) -> list[Figure]:
    """Seconds an example against the number of records, which are all one record."""
    record = json.loads((folder / "openbookqa.json").read_text())[0]
    contenders = {}
    for count in options.sizes:
        path = folder / f"{count}.json"
        path.write_text(json.dumps([record] * count))
        job = Job(
            name=str(count),
            base=base,
            paths=[str(path)],
            batch_size=options.batch_size,
            threads=options.threads,
        )
        since = time.perf_counter()
        contenders[f"{count} records"] = Contender(train_rosa, job)
        print(f"\nfrom the start of the process to the first batch, {count} records: ", end="")
        print(f"{time.perf_counter() - since:.1f} s", flush=True)
    turn = options.size_steps // 4 or 1
    interleave(contenders, options.size_steps, options.rounds, turn, warm_up=turn)
    first = next(iter(contenders.values())).seconds
    figures = []
    for name, contender in contenders.items():
        ratios = [b / a for a, b in zip(first, contender.seconds, strict=True)]
        print(f"time an example, {name}, by that of the first: {spread(ratios)}")
        figures.append(Figure(f"time an example, {name}, by that of the first", ratios, 1.05))
        contender.stop()
    return figures[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder of the four files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--short", action="store_true", help="fewer records, rounds and batches")
    parser.add_argument("--records", type=int, help="in all; a round is one epoch of them")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--turn", type=int, default=2, help="steps in a row")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--floor-batches", type=int)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--size-steps", type=int)
    parser.add_argument("--selection-steps", type=int, help="of DLS, to see what it selects")
    parser.add_argument(
        "--small", action="store_true", help="tiny models, on the CPU: tries the script out"
    )
    parser.add_argument("--only", choices=SECTIONS, nargs="*")
    options = parser.parse_args()
    logging_off()
    if options.device == "cuda":
        from training_speed_gpu import compare_on_gpu

        compare_on_gpu(options, "cpu" if options.small else "cuda")
        return
    if options.data is None:
        parser.error("DATA, the folder of the four files, is missing")
    for name, value in zip(
        ("records", "rounds", "floor_batches", "size_steps", "selection_steps"),
        (128, 2, 6, 8, 101) if options.short else (256, 3, 16, 16, 301),
        strict=True,
    ):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.records % options.batch_size:
        parser.error("--records is no multiple of a batch, so that rounds would differ")
    on_cpu(options)


def on_cpu(options: argparse.Namespace) -> None:
    from rosa_lightning.cli.bench import machine

    print(f"{machine()}, {options.threads} threads a process")
    print(f"{options.records} records, batches of {options.batch_size}, {options.rounds} rounds")
    wanted = options.only or SECTIONS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        make_base(base, options.data, SMALL if options.small else SHAPE)
        paths = make_records(options.data, folder, options.records)
        figures: list[Figure] = []
        if "training" in wanted:
            figures += compare_trainings(options, str(base), paths)
        if "selection" in wanted:
            selection_table(options, str(base), paths)
        if "floor" in wanted:
            figures += floor_table(options, str(base), paths)
        if "size" in wanted:
            figures += size_table(options, str(base), folder)
    if "scoring" in wanted:
        figures += run_script("roae_cost.py", "--threads", str(options.threads))
    if "start" in wanted:
        figures += run_script("start_up.py", str(options.data / "boolq.json"))
    print("\n| figure | measured | bar | met |\n|---|---|---|---|")
    for figure in figures:
        print(figure.row())


def run_script(name: str, *arguments: str) -> list[Figure]:
    """Run one of the other benchmarks, and show what it prints."""
    print(f"\n{name}", flush=True)
    script = str(Path(__file__).with_name(name))
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "figures.json"
        command = [sys.executable, script, *arguments, "--json", str(found)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if found.exists():
            return [Figure(**figure) for figure in json.loads(found.read_text())]
    told = "\n".join(done.stderr.splitlines()[-3:])
    print(f"{name} ended with {done.returncode}\n{told}", flush=True)
    return []


if __name__ == "__main__":
    main()

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
selects, the cost of RoAE and of the number of records, and a script of its own: roae_cost.py, which
has the cost of scoring. The last table has all figures with their bars. A real model: speed.py.
"""

from __future__ import annotations

import argparse
import itertools
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from timing import (
    LORA_TARGETS,
    SHAPE,
    Figure,
    encoded,
    hf_trainer,
    lightning_trainer,
    lora_on,
    quiet,
    random_llama,
    ratios,
    spread,
)

NAMES = ("boolq", "openbookqa", "arc_easy", "arc_challenge")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
RANDOM, GROUPED = "LoRA, HF Trainer, random order", "LoRA, HF Trainer, length groups"
UPPER, ALL, DLS = "RoSA, upper half", "RoSA, all layers", "RoSA, DLS defaults"
PACKED = "RoSA, all layers, packed"
SECTIONS = ["training", "selection", "floor", "size", "scoring"]
BARS = {UPPER: (4.8, 2.6), ALL: (3.5, 1.9)}
"""Times the examples a second of LoRA in random order, and in length groups."""


# --- the base and the records ---------------------------------------------------------------


def make_records(data: Path, folder: Path, count: int) -> list[str]:
    """Records drawn from all files, as files of their own."""
    pairs = [(n, r) for n in NAMES for r in json.loads((data / f"{n}.json").read_text())]
    drawn = random.Random(0).sample(pairs, count)
    for name in NAMES:
        own = [record for owner, record in drawn if owner == name]
        (folder / f"{name}.json").write_text(json.dumps(own))
    return [str(folder / f"{name}.json") for name in NAMES]


def make_base(folder: Path, data: Path, shape: dict[str, int]) -> None:
    """A random Llama and a byte-level BPE made of all records."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    random_llama(pad_token_id=0, eos_token_id=1, **shape).save_pretrained(folder)


# --- contenders, each in its process --------------------------------------------------------


class StopError(Exception):
    """Ends a training from within."""


class Turns:
    """Lets a training continue by as many steps as the parent says; tells how long they took."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.left, self.since = pipe, 0, 0.0
        self.seen: list[Any] = []
        """What the training noted of each step."""

    def before_step(self) -> None:
        if self.left == 0:
            seconds = time.perf_counter() - self.since
            self.pipe.send({"seconds": seconds, "seen": self.seen, "rss": peak_rss()})
            self.seen = []
            self.left = self.pipe.recv()
            if self.left == 0:
                raise StopError
            self.since = time.perf_counter()
        self.left -= 1


def peak_rss() -> float:
    """MiB. Not getrusage's, which begins with what the parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def data_module(base: str, paths: list[str], batch_size: int, **more: Any) -> Any:
    from rosa_lightning import ReasoningDataModule

    size = {"batch_size": batch_size, "max_length": 1024, "val_fraction": 0}
    return ReasoningDataModule(sources=paths, tokenizer=base, **size, **more)


def train_rosa(
    turns: Turns,
    base: str,
    paths: list[str],
    batch_size: int,
    selection: dict[str, Any] | None = None,
    **data: Any,
) -> None:
    from lightning.pytorch import Callback

    from rosa_lightning import DynamicLayerSelection, RoSAModule
    from rosa_lightning.inspection.throughput import lowest_active

    class Gate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            turns.before_step()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            turns.seen.append(lowest_active(pl_module.model.model.layers))

    callbacks = [Gate()] if selection is None else [DynamicLayerSelection(**selection), Gate()]
    trainer = lightning_trainer(max_epochs=-1, max_steps=1_000_000, callbacks=callbacks)
    trainer.fit(RoSAModule(base), data_module(base, paths, batch_size, **data))


def train_lora(turns: Turns, base: str, paths: list[str], batch_size: int, order: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Gate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            turns.before_step()

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    hf_trainer(
        lora_on(model, r=16, lora_alpha=32, target_modules=LORA_TARGETS),
        f"{base}/trainer",
        encoded(paths, tokenizer),
        tokenizer,
        Gate(),
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        num_train_epochs=1_000_000,
        train_sampling_strategy=order,
        optim="adamw_torch_fused",
        max_grad_norm=0,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    ).train()


def frozen_base(base: str) -> Any:
    """A module in which nothing trains, with a backward pass down to its first layer."""
    from rosa_lightning import RoSAModule
    from rosa_lightning.roae.inject import remove_roae

    module = RoSAModule(base)
    module.configure_model()
    remove_roae(module.model)
    module.model.requires_grad_(False)
    module.model.enable_input_require_grads()
    return module


def compare_floor(turns: Turns, base: str, paths: list[str], batch_size: int) -> None:
    """Note the time of forward and backward with RoAE over that without, on the same batches."""
    import torch

    from rosa_lightning import RoSAModule

    torch.manual_seed(0)
    adapted, floor = RoSAModule(base), frozen_base(base)
    adapted.configure_model()
    data = data_module(base, paths, batch_size)
    data.setup("fit")
    for batch in itertools.chain.from_iterable(itertools.repeat(data.train_dataloader())):
        turns.before_step()
        seconds = []
        for module in (adapted, floor, floor, adapted):  # so that neither is always first
            since = time.perf_counter()
            module.loss(batch).backward()
            module.zero_grad()
            seconds.append(time.perf_counter() - since)
        turns.seen.append((seconds[0] + seconds[3]) / (seconds[1] + seconds[2]))


def work(train: Callable[..., None], pipe: Connection, threads: int, job: dict[str, Any]) -> None:
    import torch

    quiet()
    torch.set_num_threads(threads)
    try:
        train(Turns(pipe), **job)
    except (StopError, EOFError):  # told to, or the parent is gone
        pass
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


class Contender:
    """A process that trains when it is told to."""

    def __init__(self, train: Callable[..., None], *, threads: int, **job: Any) -> None:
        context = mp.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(train, other, threads, job), daemon=True)
        self.process.start()
        self.seconds: list[float] = []
        self.seen: list[Any] = []
        self.before: list[Any] = []
        """What was noted of the steps that are not timed."""
        self.rss = 0.0
        self.is_ready = False

    def wait(self) -> None:
        """Until it stands before its first step."""
        if not self.is_ready:
            self._receive()
            self.is_ready = True

    def _receive(self) -> float:
        while not self.pipe.poll(1):
            if not self.process.is_alive():
                raise SystemExit(f"a process ended with {self.process.exitcode}")
        answer = self.pipe.recv()
        if "error" in answer:
            raise SystemExit(answer["error"])
        self.seen += answer["seen"]
        self.rss = answer["rss"]
        return float(answer["seconds"])

    def run(self, steps: int) -> float:
        self.wait()
        self.pipe.send(steps)
        return self._receive()

    def stop(self) -> None:
        self.wait()
        self.pipe.send(0)
        self.process.join()


# --- the tables -----------------------------------------------------------------------------


def interleave(
    contenders: dict[str, Contender], steps: int, rounds: int, turn: int, warm_up: int
) -> None:
    """Seconds of each round of each contender, a turn of some steps after another."""
    for contender in contenders.values():
        contender.wait()
    for contender in contenders.values():  # the first steps try things out and allocate
        if not contender.seconds:
            contender.run(warm_up)
            contender.before, contender.seen = contender.seen, []
    for number in range(rounds):
        for contender in contenders.values():
            contender.seconds.append(0.0)
        for begun in range(0, steps, turn):
            for contender in contenders.values():
                contender.seconds[-1] += contender.run(min(turn, steps - begun))
        told = ", ".join(f"{name} {c.seconds[-1]:.1f} s" for name, c in contenders.items())
        print(f"round {number + 1}: {told}", flush=True)


def compare_trainings(options: argparse.Namespace, job: dict[str, Any]) -> list[Figure]:
    from rosa_lightning.dls import PolicyOptions

    layers = (SMALL if options.small else SHAPE)["num_hidden_layers"]
    upper = PolicyOptions(fixed_layers=list(range(layers // 2, layers)))
    contenders = {
        RANDOM: Contender(train_lora, order="random", **job),
        GROUPED: Contender(train_lora, order="group_by_length", **job),
        UPPER: Contender(train_rosa, selection={"policy": "fixed", "policy_options": upper}, **job),
        ALL: Contender(train_rosa, **job),
        DLS: Contender(train_rosa, selection={}, **job),
        PACKED: Contender(train_rosa, batching="packed", **job),
    }
    steps = options.records // options.batch_size
    # Rounds begin where epochs do: else one may meet the longest batch twice, and another not.
    interleave(contenders, steps, options.rounds, options.turn, warm_up=steps)
    figures: list[Figure] = []
    print("\n| training | examples/s | times random | times length groups | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for name, own in contenders.items():
        rate = statistics.median(options.records / seconds for seconds in own.seconds)
        times = {
            "random": ratios(contenders[RANDOM].seconds, own.seconds),
            "grouped": ratios(contenders[GROUPED].seconds, own.seconds),
        }
        memory = own.rss / contenders[RANDOM].rss
        told = f"{' | '.join(map(spread, times.values()))} | {own.rss:.0f} ({memory:.2f})"
        print(f"| {name} | {rate:.2f} | {told} |")
        for (order, values), bar in zip(times.items(), BARS.get(name, ()), strict=False):
            figures.append(Figure(f"{name}, examples/s over LoRA, {order}", values, bar, False))
        if name not in (RANDOM, GROUPED):
            figures.append(Figure(f"{name}, peak memory over LoRA", [memory], 0.4))
        own.stop()
    return figures


def selection_table(options: argparse.Namespace, job: dict[str, Any]) -> list[Figure]:
    """The lowest active layer over several selections, in steps too small to be timed."""
    contender = Contender(train_rosa, selection={}, **{**job, "batch_size": 4})
    contender.run(options.selection_steps)
    contender.stop()
    values, told = contender.seen, []
    for step, value in enumerate(values):
        if step == 0 or values[step - 1] != value:
            told.append(f"{value} from step {step}")
    print(f"\nlowest active layer of {DLS}, batches of 4: {', '.join(told)}")
    return []


def floor_table(options: argparse.Namespace, job: dict[str, Any]) -> list[Figure]:
    contender = Contender(compare_floor, **job)
    contender.run(options.floor_batches + 1)
    contender.stop()
    values = contender.seen[1:]  # without the first, which allocates
    name = "RoAE over the frozen floor"
    print(f"\n{name}, forward and backward, {len(values)} batches: {spread(values)}")
    return [Figure(name, values, 1.05)]


def size_table(options: argparse.Namespace, job: dict[str, Any]) -> list[Figure]:
    """Seconds an example against the number of records, which are all one record."""
    source = next(Path(path) for path in job["paths"] if "openbookqa" in path)
    record = json.loads(source.read_text())[0]
    contenders = {}
    for count in options.sizes:
        path = source.with_name(f"{count}.json")
        path.write_text(json.dumps([record] * count))
        since = time.perf_counter()
        contender = Contender(train_rosa, **{**job, "paths": [str(path)]})
        contender.wait()
        contenders[f"{count} records"] = contender
        print(f"\nfrom the start of the process to the first batch, {count} records: ", end="")
        print(f"{time.perf_counter() - since:.1f} s", flush=True)
    turn = options.size_steps // 4 or 1
    interleave(contenders, options.size_steps, options.rounds, turn, warm_up=turn)
    first = next(iter(contenders.values())).seconds
    figures = []
    for name, contender in contenders.items():
        figure = f"time an example, {name}, by that of the first"
        figures.append(Figure(figure, ratios(contender.seconds, first), 1.05))
        print(f"{figure}: {spread(figures[-1].values)}")
        contender.stop()
    return figures[1:]


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


def on_cpu(options: argparse.Namespace) -> None:
    from rosa_lightning.comparison.speed import machine

    print(f"{machine()}, {options.threads} threads a process")
    print(f"{options.records} records, batches of {options.batch_size}, {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        make_base(base, options.data, SMALL if options.small else {})
        paths = make_records(options.data, Path(name), options.records)
        job = {"base": str(base), "paths": paths, "batch_size": options.batch_size}
        job["threads"] = options.threads
        tables: dict[str, Callable[[], list[Figure]]] = {
            "training": lambda: compare_trainings(options, job),
            "selection": lambda: selection_table(options, job),
            "floor": lambda: floor_table(options, job),
            "size": lambda: size_table(options, job),
            "scoring": lambda: run_script("roae_cost.py", "--threads", str(options.threads)),
        }
        wanted = options.only or SECTIONS
        figures = [figure for name, make in tables.items() if name in wanted for figure in make()]
    print("\n| figure | measured | bar | met |\n|---|---|---|---|")
    for figure in figures:
        print(figure.row())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder of the four files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--short", action="store_true", help="fewer records, rounds and batches")
    parser.add_argument("--small", action="store_true", help="tiny models: tries the script out")
    parser.add_argument("--only", choices=SECTIONS, nargs="*")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    defaults = {"turn": 2, "batch-size": 16, "threads": os.cpu_count()}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    whole = {"records": 256, "rounds": 3, "floor-batches": 16, "size-steps": 16}
    short = {"records": 128, "rounds": 2, "floor-batches": 6, "size-steps": 8}
    whole["selection-steps"], short["selection-steps"] = 301, 101
    for name, count in whole.items():
        parser.add_argument(f"--{name}", type=int, help=f"{count}; --short: {short[name]}")
    options = parser.parse_args()
    quiet()
    if options.device == "cuda":
        from training_speed_gpu import compare_on_gpu

        compare_on_gpu(options, "cpu" if options.small else "cuda")
        return
    if options.data is None:
        parser.error("DATA, the folder of the four files, is missing")
    for name, count in (short if options.short else whole).items():
        name = name.replace("-", "_")
        if getattr(options, name) is None:
            setattr(options, name, count)
    if options.records % options.batch_size:
        parser.error("--records is no multiple of a batch, so that rounds would differ")
    on_cpu(options)


if __name__ == "__main__":
    main()

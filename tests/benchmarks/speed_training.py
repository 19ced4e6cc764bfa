"""Trainings of SmolLM2-135M-Instruct for `speed.py`, beside PEFT LoRA under other trainers.

Batches are those that length groups give: 50 batches of records are drawn and sorted by length, and
some of the batches are kept, evenly spread. All contenders have the same batches, but TRL, which
has as many records in its default, a random order. A round is an epoch; the first is not counted.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import LORA_TARGETS, Figure, encoded, hf_trainer, lightning_trainer, lora_on, ratios
from training_speed import NAMES, Contender, Turns, interleave

BATCH_SIZES = {"commonsense": 16, "gsm8k": 8}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS}
TARGETS = ["q", "k", "v", "o", "up", "down"]
PLUS = {"targets": TARGETS}
HALF = {"layer_ratio": 0.5}
HF, TRL, OURS = "LoRA, HF Trainer, length groups", "LoRA, TRL, random order (default)", "LoRA"
ALL, UPPER = ("RoAE", "RoAE+"), ("RoAE, upper half", "RoAE+, upper half")
NO_PROMPTS = {"prompt_gradients": False}
IN_HALF = {"dtype": "bfloat16"}
HF_HALF = "LoRA, HF Trainer, base in bfloat16"
METHODS: dict[str, dict[str, Any]] = {
    OURS: {"peft": LORA},
    "RoAE": {},
    "RoAE, upper half": HALF,
    "RoAE+": PLUS,
    "RoAE+, upper half": {"targets": ["q", "k", "v", "up", "down"], **HALF},
    "LoRA, no gradients through prompts": {"peft": LORA, **NO_PROMPTS},
    "RoAE+, no gradients through prompts": {**PLUS, **NO_PROMPTS},
    "RoAE, base in bfloat16": IN_HALF,
    "RoAE, upper half, base in bfloat16": {**HALF, **IN_HALF},
}
"""All but the last two start from the float32 that the file holds."""
GROUPS = (*zip(ALL, UPPER, strict=True), tuple(METHODS)[-4:-2])
"""What is in memory at once, beside the two that others are set against."""
GROUP_IN_HALF = (HF_HALF, *tuple(METHODS)[-2:])
OVER_HF = {
    ("commonsense", "32-true"): (2.5, 3.5),
    ("commonsense", "bf16-mixed"): (3.3, 4.6),
    ("gsm8k", "32-true"): (1.6, 2.4),
    ("gsm8k", "bf16-mixed"): (1.6, 2.4),
}
OVER_TRL = {"commonsense": (5.0, 7.0)}
MEMORY = {"commonsense": (0.35, 0.25), "gsm8k": (0.5, 0.5)}
"""Bars with all layers and with the upper half."""
LIMITS = {"32-true": 1.15, "bf16-mixed": 1.5}


def rows_of(data: Path, task: str) -> list[dict[str, str]]:
    """Of GSM8K those of at most 600 characters, as most that the comparison trains on."""
    if task == "commonsense":
        files = (json.loads((data / "train" / f"{name}.json").read_text()) for name in NAMES)
        return [row for rows in files for row in rows]
    lines = (data / "train" / "gsm8k.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if sum(map(len, row.values())) <= 600]


def write_batches(
    data: Path, task: str, batch_size: int, count: int, folder: Path
) -> tuple[str, str]:
    """A file with some batches of length groups, one after another, and one of random batches."""
    from rosa_lightning.models.loading import load_tokenizer

    path = folder / "records.json"
    drawn = random.Random(0).sample(rows_of(data, task), 50 * batch_size)
    path.write_text(json.dumps(drawn))
    lengths = [len(row["input_ids"]) for row in encoded([str(path)], load_tokenizer("smollm2"))]
    order = sorted(range(len(drawn)), key=lambda number: lengths[number])
    starts = [(2 * i + 1) * 50 // (2 * count) * batch_size for i in range(count)]
    path.write_text(json.dumps([drawn[n] for s in starts for n in order[s : s + batch_size]]))
    mixed = folder / "mixed.json"
    mixed.write_text(json.dumps(drawn[: count * batch_size]))
    return str(path), str(mixed)


# --- what contenders run ----------------------------------------------------------------------


def train_ours(
    turns: Turns, base: str, paths: list[str], batch_size: int, precision: str, **method: Any
) -> None:
    """Train; with `count` batches, the second epoch notes its products' floating operations."""
    from lightning.pytorch import Callback
    from torch.utils.flop_counter import FlopCounterMode

    from rosa_lightning import PeftMethod, ReasoningDataModule, RoAEConfig, RoSAModule
    from rosa_lightning.training.speed import SpeedConfig

    count = method.pop("count", 0)

    class Gate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            turns.before_step()
            # Not in the first epoch, in which models are tried out.
            counted = count <= trainer.global_step < 2 * count
            self.counter = FlopCounterMode(display=False) if counted else None
            if self.counter:
                self.counter.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if self.counter:
                self.counter.__exit__(None, None, None)
                turns.seen.append(self.counter.get_total_flops())

    speed = SpeedConfig(prompt_gradients=method.pop("prompt_gradients", True))
    dtype = method.pop("dtype", "auto")
    if lora := method.pop("peft", None):
        options: dict[str, Any] = {"peft": PeftMethod("peft.LoraConfig", lora)}
    else:
        options = {"roae": RoAEConfig(rank=4, alpha=8, low_freq_ratio=0.25, **method)}
    module = RoSAModule("smollm2", dtype=dtype, speed=speed, **options)
    data = ReasoningDataModule(
        sources=paths, tokenizer="smollm2", batch_size=batch_size, max_length=1024, val_fraction=0
    )
    trainer = lightning_trainer(
        precision=precision, max_epochs=-1, max_steps=1_000_000, callbacks=[Gate()]
    )
    trainer.fit(module, data)


def settings(batch_size: int, precision: str, order: str) -> dict[str, Any]:
    """Of the trainers of transformers and TRL."""
    return {
        "per_device_train_batch_size": batch_size,
        "learning_rate": 1e-3,
        "num_train_epochs": 1_000_000,
        "train_sampling_strategy": order,
        "bf16": precision == "bf16-mixed",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def train_theirs(
    turns: Turns,
    base: str,
    paths: list[str],
    batch_size: int,
    precision: str,
    trl: bool = False,
    dtype: str = "auto",
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Gate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            turns.before_step()

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = lora_on(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), **LORA)
    rows = encoded(paths, tokenizer)
    # Its own length groups need hundreds of records: these lie in such groups.
    more = settings(batch_size, precision, "random" if trl else "sequential")
    with TemporaryDirectory() as folder:
        if not trl:
            hf_trainer(model, folder, rows, tokenizer, Gate(), **more).train()
            return
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(output_dir=folder, report_to="none", use_cpu=True, **more)
        given = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
        SFTTrainer(model, args, callbacks=[Gate()], **given).train()


def multiply(turns: Turns, precision: str, **_: Any) -> None:
    """Note the operations a second of a large product."""
    import torch

    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    factors = [torch.randn(2048, 2048, dtype=dtype) for _ in range(2)]
    product = torch.empty(2048, 2048, dtype=dtype)
    while True:
        turns.before_step()
        for _ in range(5):
            since = time.perf_counter()
            torch.mm(*factors, out=product)
            turns.seen.append(2 * 2048**3 / (time.perf_counter() - since))


# --- sections ---------------------------------------------------------------------------------


class Race:
    """Contenders on the same batches; those of one group take turns.

    Args:
        options: As `speed.py` has them.
        task: Of `BATCH_SIZES`.
        precision: Of the trainer.
        folder: A temporary one.
    """

    def __init__(self, options: Any, task: str, precision: str, folder: Path) -> None:
        from rosa_lightning.models.gguf import gguf_folder

        self.options = options
        self.batch_size = 2 if options.try_out else BATCH_SIZES[task]
        size = (self.batch_size, options.batches)
        path, self.mixed = write_batches(options.data, task, *size, folder)
        self.job = {"base": str(gguf_folder("smollm2")), "paths": [path], "precision": precision}
        self.job |= {"batch_size": self.batch_size, "threads": options.threads}

    @property
    def setting(self) -> dict[str, int]:
        named = {"batch_size": self.batch_size, "batches": self.options.batches}
        return {**named, "rounds": self.options.rounds}

    def start(self, train: Callable[..., None], **more: Any) -> Contender:
        return Contender(train, **{**self.job, **more})

    def start_as(self, name: str) -> Contender:
        """One of `METHODS`, or of other trainers."""
        if name in METHODS:
            return self.start(train_ours, **METHODS[name])
        if name == TRL:
            return self.start(train_theirs, trl=True, paths=[self.mixed])
        return self.start(train_theirs, **(IN_HALF if name == HF_HALF else {}))

    def run(self, contenders: dict[str, Contender]) -> None:
        interleave(contenders, self.options.batches, self.options.rounds, 1, self.options.batches)


def training(options: Any, task: str, precision: str) -> dict[str, Any]:
    """Speed and memory, by the two kinds of LoRA in the same group."""
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as name:
        race = Race(options, task, precision, Path(name))
        examples = race.batch_size * options.batches
        both = {name: race.start_as(name) for name in (HF, OURS)}
        groups: list[tuple[str, ...]] = list(GROUPS)
        if precision == "bf16-mixed":
            groups.append(GROUP_IN_HALF)
        if find_spec("trl"):
            groups.append((TRL,))
        for group in groups:
            if group == (TRL,):
                both.pop(OURS).stop()  # for its memory
            own = {name: race.start_as(name) for name in group}
            race.run(both | own)
            for name, one in (both | own).items():
                row = rows.setdefault(name, {"seconds": [], "over_hf": [], "time_of_lora_here": []})
                new = one.seconds[-options.rounds :]
                row["seconds"] += new
                row["over_hf"] += ratios(both[HF].seconds[-options.rounds :], new)
                if OURS in both:
                    row["time_of_lora_here"] += ratios(new, both[OURS].seconds[-options.rounds :])
                row["peak_mib"], row["memory_of_hf"] = one.rss, one.rss / both[HF].rss
            for one in own.values():
                one.stop()
        both[HF].stop()
    for row in rows.values():
        row["examples_per_s"] = [examples / seconds for seconds in row.pop("seconds")]
    return {"setting": race.setting, "rows": rows, "figures": bars(rows, task, precision)}


def bars(rows: dict[str, dict[str, Any]], task: str, precision: str) -> list[Figure]:
    figures = []
    for place, names in enumerate((ALL, UPPER)):
        for name in names:
            row = rows[name]
            over_hf = OVER_HF[task, precision][place]
            figures.append(Figure(f"{name}: times HF", row["over_hf"], over_hf, False))
            if TRL in rows and task in OVER_TRL:
                middle = statistics.median(rows[TRL]["over_hf"])
                over_trl = [value / middle for value in row["over_hf"]]
                bar = OVER_TRL[task][place]
                figures.append(Figure(f"{name}: times TRL", over_trl, bar, False))
            memory = [row["memory_of_hf"]]
            figures.append(Figure(f"{name}: memory by HF's", memory, MEMORY[task][place]))
    return figures


def limit(options: Any, precision: str) -> dict[str, Any]:
    """A step's time over that of its products at the peak, measured in turn."""
    rows, names = {}, (*ALL, UPPER[0])
    with TemporaryDirectory() as name:
        race = Race(options, "commonsense", precision, Path(name))
        running = {
            name: race.start(train_ours, count=options.batches, **METHODS[name]) for name in names
        }
        peak = race.start(multiply)
        warm_up = 2 * options.batches
        interleave({**running, "peak": peak}, options.batches, options.rounds, 1, warm_up)
        highest = max(peak.seen)
        for name, one in running.items():
            products = sum(one.before) / highest
            rows[name] = {
                "step_seconds": [seconds / options.batches for seconds in one.seconds],
                "products_seconds": products / options.batches,
                "over_products": [seconds / products for seconds in one.seconds],
            }
        for one in (*running.values(), peak):
            one.stop()
    setting = {**race.setting, "peak_gflops": highest / 1e9}
    figures = [
        Figure(f"{name}: step over its products", row["over_products"], LIMITS[precision])
        for name, row in rows.items()
    ]
    return {"setting": setting, "rows": rows, "figures": figures}

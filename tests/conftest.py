from __future__ import annotations

import gc
import os

# Before transformers or datasets are imported: tests never reach out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import docstring_parser
import hypothesis
import pytest
import torch
import transformers

from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.data.settings import LoadingConfig
from rosa_lightning.models.quantization import quiet_libraries
from tests.hub import Hub

# How long an example takes says nothing on a machine that others use too.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Leave out what torchao logs when a module of tests has it imported, beside the results."""
    with quiet_libraries():
        return (yield)


SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SLIDING_FULL = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
YARN["original_max_position_embeddings"] = 32
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "layer_types": SLIDING_FULL}),
    "cohere": ("CohereConfig", {}),
    "glm": ("GlmConfig", {"head_dim": 32}),
    "phi": ("PhiConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "phi3": ("Phi3Config", {}),
    "neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "persimmon": ("PersimmonConfig", {}),
    "yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
}


@pytest.fixture(autouse=True, scope="session")
def _what_is_imported_stays() -> None:
    """Half a million objects, which the collector need not look through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Workers share the cores; more threads than cores only slow small models down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _docstrings_are_parsed_once() -> None:
    """A command line reads those of all that it can configure, which takes half of its time."""
    for name in ("parse", "parse_from_object"):
        setattr(docstring_parser, name, functools.cache(getattr(docstring_parser, name)))


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is left in the user's cache folder, nor found there."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(
    family: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> transformers.PreTrainedModel:
    """A small random model of a family, in evaluation mode."""
    name, special = FAMILIES[family]
    config = getattr(transformers, name)(**{**SMALL, **special, **changes})
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype
    )
    return model.eval()


def data_module(**settings: Any) -> ReasoningDataModule:
    """A data module; settings of `data.loading` are given like the others."""
    names = {field.name for field in dataclasses.fields(LoadingConfig)}
    loading = {name: settings.pop(name) for name in names & settings.keys()}
    return ReasoningDataModule(**settings, loading=LoadingConfig(**loading))


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What `Support` says of what is left out or cannot be."""
    from rosa_lightning.training import support

    lines: list[str] = []
    monkeypatch.setattr(support, "rank_zero_info", lines.append)
    return lines


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(3, 96, (2, 9))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, with train/ and test/."""
    folder = os.environ.get("ROSA_DATA")
    if not folder:
        pytest.skip("ROSA_DATA is not set: no folder of real data")
    return Path(folder)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, an end-of-sequence and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*alphabet, "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )


def save_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A small random Llama of four layers with a byte tokenizer, as a folder."""
    torch.manual_seed(seed)
    config = {"vocab_size": 258, "num_hidden_layers": 4, "max_position_embeddings": 512}
    ends = {"pad_token_id": 257, "bos_token_id": None, "eos_token_id": 256}
    model = build("llama", **{**config, **ends, **changes})
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def write_records(path: Path, count: int, output: str = "{}", answer: str = "{}") -> Path:
    records = [
        {"instruction": f"Say {n}.", "output": output.format(n), "answer": answer.format(n)}
        for n in range(count)
    ]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two sources of 40 and 31 records, a number and a label task."""
    folder = tmp_path_factory.mktemp("data")
    numbers = write_records(folder / "numbers.json", 40)
    labels = write_records(folder / "labels.json", 31, "the correct answer is true", "true")
    return [
        {"path": str(numbers), "task": "gsm8k", "weight": 0.4},
        {"path": str(labels), "task": "boolq", "weight": 0.6},
    ]


def rosa_module(base: Any, *args: Any, kind: Any = None, **options: Any) -> Any:
    """A `RoSAModule` whose settings of `speed`, and others, are given as plain options."""
    from dataclasses import replace

    from rosa_lightning import EvaluationConfig, RoSAModule
    from rosa_lightning.training.speed import SpeedConfig

    names = [name for name in options if name in SpeedConfig.__dataclass_fields__]
    speed = SpeedConfig(**{name: options.pop(name) for name in names})
    attributes = {"optimizer": "make_optimizer", "lr_scheduler": "make_lr_scheduler"}
    attributes["max_nonfinite_steps"] = "max_nonfinite_steps"
    given = {attributes[name]: options.pop(name) for name in attributes if name in options}
    if "max_new_tokens" in options:
        evaluation = options.pop("evaluation", EvaluationConfig())
        length = options.pop("max_new_tokens")
        options["evaluation"] = replace(evaluation, max_new_tokens=length)
    module = (kind or RoSAModule)(str(base), *args, speed=speed, **options)
    for name, value in given.items():
        setattr(module, name, value)
    return module


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    """The hub's client, replaced by one that keeps what it is asked for."""
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "fails", {})
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub

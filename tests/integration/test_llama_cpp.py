"""An exported adapter in llama.cpp: through its converters, and where it is installed, its logits.

`LLAMA_CPP` names a folder of llama.cpp's sources, as in the source package of llama-cpp-python
(`vendor/llama.cpp`). The converters know the tokenizer of SmolLM2, which all bases here take.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosa_lightning import RoAEConfig, export_adapter, inject_roae
from rosa_lightning.models.gguf import gguf_folder
from rosa_lightning.roae.inject import roae_layers
from tests.conftest import build

SOURCE = os.environ.get("LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE, reason="LLAMA_CPP names no folder of llama.cpp's sources"),
]
BASES = {
    "halves, reordered by the converter": "llama",
    "halves, as they are": "olmo2",
    "adjacent pairs": "cohere",
}
"""Families by how their q and k are laid out, in transformers and in llama.cpp."""
IDS = [[1, 504, 3575, 282, 4649, 314, 260, 2240, 351, 253, 1343, 30, 1116, 1303, 355, 1165]]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("gguf", reason="gguf is missing, which reads SmolLM2")
    try:
        return gguf_folder("smollm2")
    except (ValueError, ImportError) as error:
        pytest.skip(f"SmolLM2, whose tokenizer is needed, is missing: {error}")


@pytest.fixture(scope="module", params=[*BASES, "SmolLM2"])
def exported(request, smollm2, tmp_path_factory) -> dict[str, Path]:
    """A base, an adapter for PEFT, and both merged, as folders."""
    folder = tmp_path_factory.mktemp("exported")
    found = {name: folder / name for name in ("base", "adapter", "merged")}
    if request.param == "SmolLM2":
        found["base"] = smollm2
    else:
        torch.manual_seed(0)
        build(BASES[request.param], vocab_size=49_152).save_pretrained(found["base"])
        AutoTokenizer.from_pretrained(smollm2).save_pretrained(found["base"])
    model = AutoModelForCausalLM.from_pretrained(found["base"], dtype=torch.float32)
    inject_roae(model, RoAEConfig(rank=4, low_freq_ratio=0.5))
    for _, layer in roae_layers(model):
        torch.nn.init.normal_(layer.roae_B, std=0.1)
    export_adapter(model, found["adapter"], "peft")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    export_adapter(model, found["merged"], "merged", tokenizer=tokenizer)
    return found


def converted(script: str, folder: Path, target: Path, *options: str) -> Path:
    command = [sys.executable, str(Path(SOURCE, script)), str(folder), "--outtype", "f32"]
    done = subprocess.run(
        [*command, "--outfile", str(target), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.fixture(scope="module")
def files(exported, tmp_path_factory) -> dict[str, Path]:
    """Base, adapter and merged model as GGUF files."""
    folder = tmp_path_factory.mktemp("gguf")
    found = {
        name: converted("convert_hf_to_gguf.py", exported[name], folder / f"{name}.gguf")
        for name in ("base", "merged")
    }
    base = f"--base={exported['base']}"
    found["adapter"] = converted(
        "convert_lora_to_gguf.py", exported["adapter"], folder / "adapter.gguf", base
    )
    return found


def tensors(file: Path) -> tuple[dict[str, np.ndarray], float]:
    """The float32 tensors of a file, and the alpha of an adapter."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    alpha = reader.get_field("adapter.lora.alpha")
    own = {t.name: np.array(t.data) for t in reader.tensors if t.data.dtype == np.float32}
    return own, 0.0 if alpha is None else float(alpha.contents())


def test_the_converted_adapter_is_the_difference_of_the_converted_models(files):
    base, _ = tensors(files["base"])
    merged, _ = tensors(files["merged"])
    adapter, alpha = tensors(files["adapter"])
    names = [name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")]
    assert {name.split(".")[2] for name in names} == {"attn_q", "attn_k"}
    for name in names:
        a, b = adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]
        term = alpha / len(a) * (b @ a)
        assert np.abs(term).max() > 0.01
        np.testing.assert_allclose(base[name] + term, merged[name], atol=1e-5)
    others = base.keys() - set(names)
    assert all(np.array_equal(base[name], merged[name]) for name in others)


def logits_of(base: Path, adapter: Path | None) -> np.ndarray:
    from llama_cpp import Llama

    lora = None if adapter is None else str(adapter)
    # Keys and values in float32, where 16 bits are usual.
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}
    own = Llama(
        str(base), lora_path=lora, n_ctx=64, logits_all=True, n_threads=1, verbose=False, **exact
    )
    own.eval(IDS[0])
    return np.array(own.scores[: len(IDS[0])])


def test_its_logits_are_those_of_peft(exported, files):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is missing")
    peft = pytest.importorskip("peft")
    plain = AutoModelForCausalLM.from_pretrained(exported["base"], dtype=torch.float32).eval()
    with torch.no_grad():
        before = plain(torch.tensor(IDS)).logits[0].numpy()
        adapted = peft.PeftModel.from_pretrained(plain, str(exported["adapter"])).eval()
        wanted = adapted(torch.tensor(IDS)).logits[0].numpy()
    off = np.abs(logits_of(files["base"], None) - before).max()
    found = logits_of(files["base"], files["adapter"])
    effect = np.abs(wanted - before).max()
    assert np.abs(found - wanted).max() < max(3 * off, 1e-5)
    assert effect > 10 * np.abs(found - wanted).max()
    np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))

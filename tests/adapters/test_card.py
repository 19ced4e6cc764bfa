from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from rosa_lightning.adapters.card import CardDetails
from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.adapters.metadata import Conditions
from rosa_lightning.adapters.methods import FullFinetuning, apply_method, as_method
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.roae.inject import inject_roae, roae_layers
from rosa_lightning.roae.layer import RoAEConfig
from tests.adapters.test_export import adapted
from tests.conftest import build


def card(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def code(content: str, language: str = "python") -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", content, re.DOTALL)
    return found


def test_the_metadata_are_those_that_the_hub_reads(tmp_path):
    score = EvalResult(
        task_type="text-generation",
        dataset_type="openai/gsm8k",
        dataset_name="gsm8k",
        metric_type="accuracy",
        metric_value=0.5,
    )
    details = CardDetails(
        name="ann/reader", license="mit", datasets=("openai/gsm8k",), scores=(score,)
    )
    model = adapted()
    model.config.name_or_path = "ann/base"
    export_adapter(model, tmp_path / "out", card=details)
    found = card(tmp_path / "out").data
    assert (found.base_model, found.base_model_relation) == ("ann/base", "adapter")
    assert (found.library_name, found.license, found.datasets) == ("peft", "mit", ["openai/gsm8k"])
    assert found.eval_results == [score]
    export_adapter(model, tmp_path / "merged", "merged")
    found = card(tmp_path / "merged").data
    assert (found.library_name, found.base_model_relation) == ("transformers", "finetune")
    assert found.license is None


@pytest.mark.parametrize("format", ["peft", "rosa", "merged"])
def test_the_code_that_loads_it_runs(format, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    model = load_base("tiny")
    inject_roae(model, RoAEConfig(rank=2))
    for _, layer in roae_layers(model):
        torch.nn.init.normal_(layer.roae_B, std=0.2)
    monkeypatch.chdir(tmp_path)
    export_adapter(model, "out", format, tokenizer=load_tokenizer("tiny"))
    names: dict = {}
    exec(code(card(tmp_path / "out").content), names)
    ids_BT = torch.tensor([names["tokenizer"]("Ada has 12 apples.").input_ids])
    logits = names["model"](ids_BT).logits
    torch.testing.assert_close(logits, model(ids_BT).logits, atol=1e-4, rtol=1e-4)


def test_vllm_is_given_a_rank_that_it_takes(tmp_path):
    model = adapted(config=RoAEConfig(rank=20))
    model.config.name_or_path = "ann/base"
    export_adapter(model, tmp_path / "out", card=CardDetails(name="ann/reader"))
    assert code(card(tmp_path / "out").content, "bash").split() == [
        *("vllm", "serve", "ann/base", "--enable-lora", "--max-lora-rank", "32", "\\"),
        *("--lora-modules", "reader=ann/reader"),
    ]


def test_no_folder_of_the_machine_is_named(tmp_path):
    (tmp_path / "secret" / "base").mkdir(parents=True)
    model = adapted()
    model.config.name_or_path = str(tmp_path / "secret" / "base")
    export_adapter(model, tmp_path / "out")
    found = card(tmp_path / "out")
    assert found.data.base_model is None
    assert "path/to/base" in found.content
    assert "secret" not in found.content


def test_names_break_no_table_and_no_metadata(tmp_path):
    name = "a|b: <script> \udcff"
    export_adapter(adapted(), tmp_path / "out", card=CardDetails(name=name, results="| fine |"))
    found = card(tmp_path / "out")
    assert "# a\\|b: &lt;script> " in found.content
    assert found.data.model_name == "a|b: <script> \\udcff"


@pytest.mark.parametrize(
    ("style", "shown"),
    [
        ("alpaca", "### Instruction:\nQUESTION\n\n### Response:\n"),
        ("plain", "QUESTION\n"),
        ("chat", "chat template"),
        (None, "# "),
    ],
)
def test_it_says_how_prompts_were_put(style, shown, tmp_path):
    trained = Conditions(prompt_style=style)
    export_adapter(adapted(), tmp_path / "out", trained=trained)
    content = card(tmp_path / "out").content
    assert shown in content
    assert ("## Prompts" in content) == (style is not None)


def test_other_methods_are_named(tmp_path):
    peft = pytest.importorskip("peft")
    model = build("llama")
    apply_method(model, as_method(peft.LoraConfig(r=3, target_modules=["q_proj"])))
    export_adapter(model, tmp_path / "lora")
    assert "trained with Lora by" in card(tmp_path / "lora").content
    assert "--max-lora-rank 8" in card(tmp_path / "lora").content
    model = build("llama")
    apply_method(model, FullFinetuning())
    export_adapter(model, tmp_path / "full", "merged")
    assert "trained with Full fine-tuning by" in card(tmp_path / "full").content

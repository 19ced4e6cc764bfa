"""The model card of an export: its README.md, with the fields that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa_lightning.adapters.lora import CONFIG_FILE
from rosa_lightning.adapters.metadata import Conditions
from rosa_lightning.adapters.methods import FullFinetuning, method_report, trained_otherwise
from rosa_lightning.data.prompts import STYLES
from rosa_lightning.models.gguf import is_gguf
from rosa_lightning.models.loading import hub_commit
from rosa_lightning.models.location import base_name, is_hub_id
from rosa_lightning.roae.inject import roae_report
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.utils.files import printable
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers import PreTrainedModel

CARD_FILE = "README.md"
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` of vLLM may be."""
_LIBRARIES = {"peft": "peft", "merged": "transformers", "rosa": "rosa-lightning"}
_PAPER = "https://doi.org/10.1609/aaai.v40i18.38589"
_UNKNOWN = "Not known."


@dataclass(frozen=True, kw_only=True)
class CardDetails:
    """What a model card says beside what the model itself tells; Markdown where it is text."""

    name: str | None = None
    """Title, and what the commands to load it call it: a hub id; by default the folder's name."""
    license: str | None = None
    """Identifier of the licence, such as apache-2.0."""
    data: str = _UNKNOWN
    training: str = _UNKNOWN
    results: str = _UNKNOWN
    datasets: tuple[str, ...] = ()
    """Hub data sets that were trained on."""
    scores: tuple[EvalResult, ...] = field(default=())
    """The results for the card's metadata."""


def write_card(
    model: PreTrainedModel,
    folder: Path,
    format: str,
    details: CardDetails,
    trained: Conditions | None = None,
) -> None:
    """Write the model card of an export of `export_adapter` into its folder, as the last file."""
    from huggingface_hub import ModelCard

    base, other = base_name(model), trained_otherwise(model)
    method: Any = roae_report(model) if other is None else method_report(model)
    title = details.name or folder.name
    peft_config = folder / CONFIG_FILE
    config = json.loads(peft_config.read_text()) if peft_config.exists() else {}
    rows = [("base model", _shown_base(model)), ("method", str(method))]
    rows += _method_rows(method.config)
    licence = "None was given" if details.license is None else _cell(details.license)
    sections = {
        "Model": markdown_table(("", ""), rows),
        "Load": _loading(model, format, title, config),
        "Prompts": _prompts(trained),
        "Training data": details.data,
        "Training": details.training,
        "Results": details.results,
        "Licence": f"{licence}. The base model has a licence of its own.",
    }
    what = "A fine-tuned model" if format == "merged" else "An adapter"
    how = f"RoSA ([RoPE-aware Selective Adaptation]({_PAPER}))" if other is None else method.name
    text = f"# {_cell(title)}\n\n{what} of {_cell(_plain_base(base))}, trained with {how} by "
    text += "rosa_lightning.\n\n"
    text += "\n\n".join(f"## {name}\n\n{content}" for name, content in sections.items() if content)
    metadata = _metadata(base, format, title, details, is_roae=other is None)
    card = ModelCard(f"---\n{metadata}\n---\n\n{text}\n")
    (folder / CARD_FILE).write_text(printable(card), encoding="utf-8")


def _metadata(base: str, format: str, title: str, details: CardDetails, *, is_roae: bool) -> str:
    from huggingface_hub import ModelCardData

    relation = "finetune" if format == "merged" else "adapter"
    return ModelCardData(
        base_model=base if is_hub_id(base) else None,
        base_model_relation=relation if is_hub_id(base) else None,
        datasets=list(details.datasets) or None,
        eval_results=list(details.scores) or None,
        library_name=_LIBRARIES[format],
        license=details.license,
        model_name=printable(title),
        pipeline_tag="text-generation",
        tags=["rosa-lightning", *(["rosa", "roae"] if is_roae else [])],
    ).to_yaml()


def _plain_base(base: str) -> str:
    """A base without the folders of the machine that it lies on."""
    return Path(base).name if Path(base).is_absolute() else base


def _shown_base(model: PreTrainedModel) -> str:
    base, commit = base_name(model), hub_commit(model)
    kind = f"{type(model).__name__}, {model.dtype}".replace("torch.", "")
    where = f", commit {commit}" if commit and is_hub_id(base) else ""
    return f"{_plain_base(base)}{where} ({kind})"


def _method_rows(config: Any) -> list[tuple[str, str]]:
    """The settings of a method."""
    if isinstance(config, FullFinetuning):
        return []
    if isinstance(config, RoAEConfig):
        dims = f"dimensions {config.dims}, {config.low_freq_ratio:g} of the RoPE pairs"
        about = f"rank {config.rank}, alpha {config.alpha:g}, on {', '.join(config.targets)}"
        share = "" if config.layer_ratio == 1 else f", last {config.layer_ratio:g} of the layers"
        return [("RoAE", f"{about}; {dims}{share}; placement {config.placement}")]
    return [(config.class_path, ", ".join(f"{k} {v}" for k, v in config.init_args.items()))]


def _loading(model: PreTrainedModel, format: str, name: str, config: dict[str, Any]) -> str:
    """How to load the export, as Python, and as a command where vLLM takes it."""
    base, commit = base_name(model), hub_commit(model)
    name = printable(name)
    at = f', revision="{commit}"' if commit and is_hub_id(base) else ""
    is_local = Path(base).is_absolute()
    path = printable(f"path/to/{_plain_base(base)}" if is_local else base)
    auto = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    own = f'model = AutoModelForCausalLM.from_pretrained("{path}"{at})\n'
    if is_ours := base == "tiny" or is_gguf(base):
        auto = "from rosa_lightning.models.loading import load_base\n"
        auto += "from transformers import AutoTokenizer\n"
        own = f'model = load_base("{path}")\n'
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    if format == "merged":
        library, kind = type(model).__module__.partition(".")[0], type(model).__name__
        loader = "AutoModelForCausalLM" if loads_as_auto(model) else kind
        names = f"{loader}, AutoTokenizer" if library == "transformers" else "AutoTokenizer"
        code = f"from transformers import {names}\n\n"
        code += f'model = {loader}.from_pretrained("{name}")\n{tokenizer}'
        return f"```python\n{code}\n```\n\nWith vLLM:\n\n```bash\nvllm serve {name}\n```"
    if format == "rosa":
        code = (
            f'from rosa_lightning import load_adapter\n{auto}\n{own}load_adapter(model, "{name}")'
        )
        return f"With rosa_lightning, from a folder:\n\n```python\n{code}\n{tokenizer}\n```"
    code = f"from peft import PeftModel\n{auto}\n{own}"
    code += f'model = PeftModel.from_pretrained(model, "{name}")\n{tokenizer}'
    text = f"With PEFT:\n\n```python\n{code}\n```"
    if config.get("peft_type") != "LORA" or is_ours:
        return text
    rank = next((one for one in _VLLM_RANKS if one >= config["r"]), config["r"])
    serve = f"vllm serve {path} --enable-lora --max-lora-rank {rank} \\\n"
    serve += f"    --lora-modules {name.rpartition('/')[2]}={name}"
    return f"{text}\n\nWith vLLM:\n\n```bash\n{serve}\n```"


def loads_as_auto(model: PreTrainedModel) -> bool:
    """Whether AutoModelForCausalLM loads a saved model; it does not for some with vision."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    known: Any = CAUSAL.get(type(model.config), ())
    own_code = "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {})
    return own_code or type(model) in (known if isinstance(known, tuple) else (known,))


def _prompts(trained: Conditions | None) -> str:
    style = None if trained is None else trained.prompt_style
    if style == "chat":
        return "Conversations, written with the chat template of the tokenizer."
    if style not in STYLES:
        return ""
    text = STYLES[style](None).apply("QUESTION", "")
    return f"Style {style}; the answer follows the last line break:\n\n```text\n{text}```"


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: object) -> str:
    """Text on one line that ends no cell and begins no HTML."""
    return one_line(printable(text)).replace("|", "\\|").replace("<", "&lt;")

"""RoSA (RoPE-aware Selective Adaptation) fine-tuning for PyTorch Lightning.

Names are imported at first use, so that RoAE works without importing Lightning.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosa_lightning.adapters.export import export_adapter
    from rosa_lightning.adapters.files import load_adapter
    from rosa_lightning.adapters.peft_method import PeftMethod
    from rosa_lightning.data.datamodule import ReasoningDataModule
    from rosa_lightning.dls.callback import DynamicLayerSelection
    from rosa_lightning.evaluation.evaluator import EvaluationConfig
    from rosa_lightning.evaluation.writers import ResultWriter
    from rosa_lightning.inspection.run_monitor import RunMonitor
    from rosa_lightning.inspection.run_record import RunRecorder
    from rosa_lightning.inspection.text_loss import TextLoss
    from rosa_lightning.inspection.throughput import TokenThroughputMonitor
    from rosa_lightning.module import RoSAModule
    from rosa_lightning.roae.inject import RoAEReport, inject_roae, merge_roae
    from rosa_lightning.roae.layer import RoAEConfig, RoAELinear
    from rosa_lightning.training.schedule import WarmupCosine

__all__ = [
    "DynamicLayerSelection",
    "EvaluationConfig",
    "PeftMethod",
    "ReasoningDataModule",
    "ResultWriter",
    "RoAEConfig",
    "RoAELinear",
    "RoAEReport",
    "RoSAModule",
    "RunMonitor",
    "RunRecorder",
    "TextLoss",
    "TokenThroughputMonitor",
    "WarmupCosine",
    "export_adapter",
    "inject_roae",
    "load_adapter",
    "merge_roae",
]

__version__ = version("rosa-lightning")

_HOMES = {
    "DynamicLayerSelection": "dls.callback",
    "EvaluationConfig": "evaluation.evaluator",
    "PeftMethod": "adapters.peft_method",
    "ReasoningDataModule": "data.datamodule",
    "ResultWriter": "evaluation.writers",
    "RoAEConfig": "roae.layer",
    "RoAELinear": "roae.layer",
    "RoAEReport": "roae.inject",
    "RoSAModule": "module",
    "RunMonitor": "inspection.run_monitor",
    "RunRecorder": "inspection.run_record",
    "TextLoss": "inspection.text_loss",
    "TokenThroughputMonitor": "inspection.throughput",
    "WarmupCosine": "training.schedule",
    "export_adapter": "adapters.export",
    "inject_roae": "roae.inject",
    "load_adapter": "adapters.files",
    "merge_roae": "roae.inject",
}

_RENAMED = {
    "ThroughputMonitor": "rosa_lightning.TokenThroughputMonitor",
    "schedule": "rosa_lightning.WarmupCosine for rosa_lightning.schedule.WarmupCosine",
}
"""Names of earlier versions, and what to write now."""


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name in _RENAMED:
        raise AttributeError(f"{__name__}.{name} is renamed: write {_RENAMED[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

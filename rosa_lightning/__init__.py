"""RoSA (RoPE-aware Selective Adaptation) fine-tuning for PyTorch Lightning.

Names are imported at first use, so that RoAE works without importing Lightning.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosa_lightning.adapter import load_adapter
    from rosa_lightning.data import ReasoningDataModule
    from rosa_lightning.dls import DynamicLayerSelection
    from rosa_lightning.evaluate import EvaluationConfig
    from rosa_lightning.export import export_adapter
    from rosa_lightning.module import RoSAModule
    from rosa_lightning.monitor import RunMonitor
    from rosa_lightning.predictions import ResultWriter
    from rosa_lightning.roae import RoAEConfig, RoAELinear
    from rosa_lightning.surgery import RoAEReport, inject_roae, merge_roae
    from rosa_lightning.throughput import ThroughputMonitor

__all__ = [
    "DynamicLayerSelection",
    "EvaluationConfig",
    "ReasoningDataModule",
    "ResultWriter",
    "RoAEConfig",
    "RoAELinear",
    "RoAEReport",
    "RoSAModule",
    "RunMonitor",
    "ThroughputMonitor",
    "export_adapter",
    "inject_roae",
    "load_adapter",
    "merge_roae",
]

__version__ = version("rosa-lightning")

_HOMES = {
    "DynamicLayerSelection": "dls",
    "EvaluationConfig": "evaluate",
    "ReasoningDataModule": "data",
    "ResultWriter": "predictions",
    "RoAEConfig": "roae",
    "RoAELinear": "roae",
    "RoAEReport": "surgery",
    "RoSAModule": "module",
    "RunMonitor": "monitor",
    "ThroughputMonitor": "throughput",
    "export_adapter": "export",
    "inject_roae": "surgery",
    "load_adapter": "adapter",
    "merge_roae": "surgery",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

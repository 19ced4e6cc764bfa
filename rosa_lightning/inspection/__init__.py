"""What a model, a training step and a run look like.

Parameters and memory before a run (`parameters`, `memory`, `activations`), throughput and curves
during it (`throughput`, `run_monitor`, `run_record`, `text_loss`), and one HTML page after it
(`report`, `charts`, `page`).
"""

from rosa_lightning.utils.lazy import lazy_names

_HOMES = {
    "MemoryEstimate": "memory",
    "RunMonitor": "run_monitor",
    "TokenThroughputMonitor": "throughput",
    "estimate_memory": "memory",
    "rotated_norms": "activations",
    "write_report": "report",
}

__all__ = [
    "MemoryEstimate",
    "RunMonitor",
    "TokenThroughputMonitor",
    "estimate_memory",
    "rotated_norms",
    "write_report",
]

__getattr__ = lazy_names(__name__, _HOMES)

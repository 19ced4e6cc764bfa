"""What a model, a training step and a run look like.

Parameters and memory before a run (`parameters`, `memory`, `activations`). During it the terminal
(`progress`, `run_summary`), its record (`run_record`), and what loggers get (`throughput`,
`run_monitor`, `updates`, `layer_log`, `loggers`, `text_loss`). One HTML page after it (`report`,
`run_facts`, `curves`, `charts`, `page`).
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

__all__ = [*_HOMES]

__getattr__ = lazy_names(__name__, _HOMES)

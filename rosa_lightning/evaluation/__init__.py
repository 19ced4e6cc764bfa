"""Answers and their scores.

`Evaluation` answers prompts by generation or by likelihood and counts what is right; `ResultWriter`
and `PredictionWriter` write answers and results.
"""

from rosa_lightning.utils.lazy import lazy_names

_HOMES = {
    "Evaluation": "evaluator",
    "EvaluationConfig": "evaluator",
    "PredictionWriter": "writers",
    "ResultWriter": "writers",
    "TaskCounts": "metrics",
    "generate": "generation",
    "log_likelihoods": "likelihood",
    "wilson_interval": "metrics",
}

__all__ = [*_HOMES]

__getattr__ = lazy_names(__name__, _HOMES)

"""Methods compared on one base with the same data, at equal budgets.

`ComparisonConfig` says what is compared and `plan` which runs that makes; `sizing` finds ranks of
equal budgets, `runner` trains and tests each run in a process of its own (`child`), and `compare`
goes through the plan and writes ``comparison.json``; `progress` shows how far it is, and `hparams`
tells TensorBoard. `data` counts test questions in the training data. `statistics` holds the paired
tests, and `paired` applies them to methods, to forgetting and to two finished tests. `report`,
`verdict` and `figures` make tables, sentences and figures of the results. `speed` measures time and
memory alone.
"""

from rosa_lightning.utils.lazy import lazy_names

_HOMES = {
    "Comparison": "compare",
    "ComparisonConfig": "plan",
    "compare_answers": "paired",
    "holm": "statistics",
    "mcnemar": "statistics",
    "paired_bootstrap": "statistics",
    "paired_t": "statistics",
    "paired_tests": "paired",
    "write_report": "report",
}

__all__ = [*_HOMES]

__getattr__ = lazy_names(__name__, _HOMES)

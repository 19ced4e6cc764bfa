"""From records to batches.

`ReasoningDataModule` reads sources (`sources`, `rows`, `records`), writes prompts in a style and
tokenizes them (`prompts`, `tokenization`), mixes and batches them (`sampling`, `loaders`,
`collators`), and finds test questions in the training data (`contamination`, `audit`).
"""

from rosa_lightning.utils.lazy import lazy_names

_HOMES = {
    "LoadingConfig": "settings",
    "PromptStyle": "prompts",
    "ReasoningDataModule": "datamodule",
    "Source": "sources",
    "TextInfo": "text_info",
}

__all__ = [*_HOMES]

__getattr__ = lazy_names(__name__, _HOMES)

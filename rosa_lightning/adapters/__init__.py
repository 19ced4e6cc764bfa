"""Adapters on disk: checkpoints, adapter folders, PEFT LoRA and merged models.

`load_adapter` and `export_adapter` read and write adapters of a model; `metadata` says what an
adapter was trained on, `checkpoint` what a Lightning checkpoint remembers of it.
"""

from rosa_lightning.utils.lazy import lazy_names

_HOMES = {
    "AdapterMetadata": "metadata",
    "BaseFingerprint": "fingerprint",
    "Conditions": "metadata",
    "export_adapter": "export",
    "fingerprint": "fingerprint",
    "load_adapter": "files",
    "read_metadata": "files",
}

__all__ = [*_HOMES]

__getattr__ = lazy_names(__name__, _HOMES)

"""The frozen base model.

How it is found by its name (`location`), loaded with its tokenizer (`loading`), quantised
(`quantization`), checked (`finite`, `vocabulary`), and read with a cache (`kv_cache`); `tiny` is
the embedded demonstration model.
"""

from rosa_lightning.utils.lazy import lazy_names

_HOMES = {
    "load_base": "loading",
    "load_skeleton": "loading",
    "load_tokenizer": "loading",
    "num_embeddings": "vocabulary",
}

__all__ = [*_HOMES]

__getattr__ = lazy_names(__name__, _HOMES)

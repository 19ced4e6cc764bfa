"""From a batch to its loss and gradients.

`LossComputer` computes the loss with the levers of `SpeedConfig`, a file each (`shared_prefix`,
`prompts`, `pack_attention`, `head`, `attention`, `microbatches`, `recompute`, `compile`); `support`
says which of them a model allows, by `probes` of the model itself and by `packing`. The others
keep a run right: `guard`, `resume`, `sharding`, `checkpoint_io`.
"""

from rosa_lightning.utils.lazy import lazy_names

_HOMES = {
    "LossComputer": "loss",
    "SpeedConfig": "speed",
    "WarmupCosine": "schedule",
}

__all__ = ["LossComputer", "SpeedConfig", "WarmupCosine"]

__getattr__ = lazy_names(__name__, _HOMES)

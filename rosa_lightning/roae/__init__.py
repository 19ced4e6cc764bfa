"""RoAE: low-rank terms on the slowest RoPE dimensions of Q and K; needs no Lightning."""

from rosa_lightning.roae.inject import RoAEReport, inject_roae, merge_roae
from rosa_lightning.roae.layer import RoAEConfig, RoAELinear
from rosa_lightning.roae.targets import AdaptedProjection

__all__ = [
    "AdaptedProjection",
    "RoAEConfig",
    "RoAELinear",
    "RoAEReport",
    "inject_roae",
    "merge_roae",
]

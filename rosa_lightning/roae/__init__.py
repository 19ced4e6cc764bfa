"""RoAE, RoPE-aware Attention Enhancement: which dimensions of Q and K train.

The term itself (`layer`), the pair table that is measured from a model's own rotation (`rope`,
`tracing`, `geometry`), and what puts terms into a model (`targets`, `inject`). Works without
Lightning.
"""

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

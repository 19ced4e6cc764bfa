"""DLS, Dynamic Layer Selection: which layers train.

`DynamicLayerSelection` scores layers by the gradients of their norm weights and freezes all others
between optimizer steps. Imports torch and Lightning alone: copied elsewhere, the folder works as it
is.
"""

from .callback import DynamicLayerSelection
from .selector import PolicyOptions

__all__ = ["DynamicLayerSelection", "PolicyOptions"]

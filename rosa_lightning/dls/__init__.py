"""DLS, Dynamic Layer Selection: which layers train.

`DynamicLayerSelection` scores layers by the gradients of their norm weights and freezes all others
between optimizer steps. Needs torch and Lightning alone.
"""

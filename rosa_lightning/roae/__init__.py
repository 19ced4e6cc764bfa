"""RoAE, RoPE-aware Attention Enhancement: which dimensions of Q and K train.

The term itself (`layer`), the pair table that is measured from a model's own rotation (`rope`,
`geometry`), and what puts terms into a model (`targets`, `inject`). Works without Lightning.
"""

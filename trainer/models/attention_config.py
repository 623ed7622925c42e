"""The `model.attention` section. Imports no torch."""

from trainer.config.base import Config
from trainer.config.numbers import Width


class AttentionConfig(Config):
    """Attention beyond the numbers of heads, which are keys of `model`."""

    head_dim: Width | None = None
    """Width of one head, d, which is even. Null: d_model / num_heads."""

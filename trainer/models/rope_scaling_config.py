"""The `model.rope_scaling` section: rotary frequencies of a model that reads longer texts. Imports no torch.

The kinds and their numbers are those of transformers' `rope_parameters`.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, Problem
from trainer.config.numbers import Factor, Length

Stretch = Annotated[float, Field(ge=1, le=1e6)]
"""How many times longer texts become."""


class LinearRopeScaling(Config):
    """All frequencies divided by `factor` (arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    """Every position counts as one over `factor`."""
    factor: Stretch
    """Multiple of the original length."""


class DynamicRopeScaling(Config):
    """NTK-aware scaling: a larger base, chosen by the length of the text.

    Here that length is `model.seq_len`, always, so that a token's rotation depends neither on the batch nor on what is
    generated after it. transformers takes the longest text so far, and agrees on texts of `seq_len` tokens, and on all
    texts if `seq_len` is at most `original_length`.
    """

    kind: Literal["dynamic"] = "dynamic"
    """The base grows with model.seq_len beyond `original_length`, and up to it is unchanged."""
    factor: Stretch
    """Multiple of the original length."""
    original_length: Length
    """Tokens of a text before any scaling (transformers' max_position_embeddings)."""


class YarnRopeScaling(Config):
    """YaRN: low frequencies are divided by `factor`, high ones kept, those between interpolated (arXiv 2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    """By frequency, and with sharper attention."""
    factor: Stretch
    """Multiple of the original length."""
    original_length: Length
    """Tokens of a text before any scaling (original_max_position_embeddings)."""
    beta_fast: Factor = 32.0
    """Frequencies with at least so many turns in the original length are kept."""
    beta_slow: Factor = 1.0
    """Frequencies with at most so many turns are divided."""
    truncate: bool = True
    """Round the bounds of the range between both to whole pairs of a head's values (false for GPT-OSS)."""
    attention_factor: Factor | None = None
    """Multiplies the rotated queries and keys. Null: from the next two, or 0.1 ln(factor) + 1."""
    mscale: Factor | None = None
    """With `mscale_all_dim`, attention_factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: Factor | None = None
    """See `mscale`; in latent attention it also scales the scores (DeepSeek-V2 and V3)."""

    def problems(self) -> Iterator[Problem]:
        """Check that the range of frequencies is not empty."""
        if self.beta_fast <= self.beta_slow:
            yield Problem("beta_fast", f"{self.beta_fast} must be greater than beta_slow {self.beta_slow}")


class Llama3RopeScaling(Config):
    """Scaling of Llama 3.1 (arXiv 2407.21783): as YaRN, but interpolated by wavelength and with plain attention."""

    kind: Literal["llama3"] = "llama3"
    """By wavelength."""
    factor: Stretch
    """Multiple of the original length."""
    original_length: Length
    """Tokens of a text before any scaling (original_max_position_embeddings)."""
    low_freq_factor: Factor = 1.0
    """Frequencies with at most so many turns in the original length are divided."""
    high_freq_factor: Factor = 4.0
    """Frequencies with at least so many turns are kept."""

    def problems(self) -> Iterator[Problem]:
        """Check that the range of frequencies is not empty."""
        if self.high_freq_factor <= self.low_freq_factor:
            what = f"{self.high_freq_factor} must be greater than low_freq_factor {self.low_freq_factor}"
            yield Problem("high_freq_factor", what)


RopeScaling = Annotated[
    LinearRopeScaling | DynamicRopeScaling | YarnRopeScaling | Llama3RopeScaling, Field(discriminator="kind")
]

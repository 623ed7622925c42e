"""Rotary positions as a config describes them: base, rotated width and scaling.

# S tokens, r rotated width of a head.
"""

import torch
from torch import Tensor

from trainer.models.config import ModelConfig
from trainer.models.rope_scaling_config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    YarnRopeScaling,
)
from trainer.ops.rope_scaling import dynamic_ntk_theta, llama3_rates, yarn_mscale, yarn_rates
from trainer.ops.rotary import rotary_rates, rotary_table


def rotary_embedding(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (2, ..., S, r): cosines and sines of every layer, at positions (..., S)."""
    return rotary_table(positions, scaled_rates(config, positions.device), dtype, rotary_scale(config))


def scaled_rates(config: ModelConfig, device: torch.device) -> Tensor:
    """Return the angle per position of each pair, (r/2,) float64 in radians."""
    theta, width, scaling = config.rope_theta, config.rotary_width, config.rope_scaling
    if isinstance(scaling, DynamicRopeScaling):
        options = scaling.model_dump(exclude={"kind"})
        theta = dynamic_ntk_theta(theta, width, length=config.seq_len, **options)
    rates = rotary_rates(width, theta, device)
    match scaling:
        case LinearRopeScaling():
            return rates / scaling.factor
        case YarnRopeScaling():
            options = scaling.model_dump(exclude={"kind", "attention_factor", "mscale", "mscale_all_dim"})
            return yarn_rates(rates, theta, **options)
        case Llama3RopeScaling():
            return llama3_rates(rates, **scaling.model_dump(exclude={"kind"}))
        case _:
            return rates


def rotary_scale(config: ModelConfig) -> float:
    """Return the factor of rotated queries and of rotated keys."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return yarn_mscale(scaling.factor)
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def latent_score_scale(config: ModelConfig) -> float:
    """Return the factor of the scores of latent attention: with YaRN, the square of what it scales all widths by."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnRopeScaling) or scaling.mscale_all_dim is None:
        return 1.0
    return yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2

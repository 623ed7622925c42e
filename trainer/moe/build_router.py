"""Build the router of a MoE layer, built-in or a plug-in."""

from typing import get_args

from trainer.config.build_plugin import build_plugin
from trainer.errors import ConfigError
from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routing import Causality, Router


def build_router(
    config: RouterOptions, *, d_model: int, num_experts: int, layer: int, key: str = "model.moe.router"
) -> Router:
    """Build a router; `key` is that of its section.

    Raises:
        ConfigError: if a plug-in cannot be built, or declares an unknown causality.
    """
    router = build_plugin(config, Router, key, d_model=d_model, num_experts=num_experts, layer=layer)
    for name in ("causal", "causal_in_evaluation"):
        if (value := getattr(router, name)) not in get_args(Causality):
            where = f"{f'{key}: ' if key else ''}{config.kind}"
            raise ConfigError(f"{where}: its router's {name} is {value!r}; use {', '.join(get_args(Causality))}")
    return router

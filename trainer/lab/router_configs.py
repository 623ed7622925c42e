"""Configs of every registered router for a given number of experts and k. Imports no torch."""

from collections.abc import Sequence
from typing import Any, get_args

from trainer.config.nodes import shown
from trainer.config.plugins import PluginError
from trainer.errors import ConfigError
from trainer.moe.routers.config.options import NonCausalOptions, RouterOptions
from trainer.moe.routers.registry import ROUTER_MODULES, ROUTER_PLUGINS, RouterConfig

ROUTERS: dict[str, type[RouterOptions]] = {
    config.model_fields["kind"].default: config for config in get_args(get_args(RouterConfig)[0])
}
"""Config class of every kind, in registry order."""
MIXTURE_OF_DEPTHS = "mixture_of_depths"
"""The router that has a single network and no experts to choose between."""
_MAX_GROUPS = 4


def router_config(
    kind: str, *, num_experts: int, top_k: int, capacity_factor: float = 1.0, top_k_choices: Sequence[int] | None = None
) -> RouterOptions:
    """Return the config of a kind of router with those of these options that it has; others keep their defaults.

    `mixture_of_depths` gets the share k / E of all tokens; `top_k_choices` are limited to E.

    Raises:
        ConfigError: if the router does not support this number of experts.
    """
    section = router_class(kind)
    fields = section.model_fields
    divisors = [number for number in range(2, _MAX_GROUPS + 1) if num_experts % number == 0 and num_experts > number]
    groups = max(divisors, default=1)  # of at least two experts each
    most = min(num_experts, max(top_k_choices or [top_k]))
    options: dict[str, Any] = {
        "top_k": top_k,
        "top_k_choices": None if top_k_choices is None else [min(k, num_experts) for k in top_k_choices],
        "capacity_factor": float(capacity_factor),
        "bias_update_rate": 0.001,  # group_limited has no bias by default
        "groups": groups,
        "groups_kept": max(-(-groups // 2), -(-most * groups // num_experts)),  # half, or as many as k experts need
        "capacity": min(1.0, top_k / num_experts),
        "d_proj": max(64, num_experts),  # enough directions to tell the experts apart
    }
    if most == 1:  # a single normalised weight is always 1: the router would never learn
        options |= {"normalize": False, "random_second": False}
    config = section(**{key: value for key, value in options.items() if key in fields})
    for problem in config.problems_among(1 if kind == MIXTURE_OF_DEPTHS else num_experts):
        raise ConfigError(f"{kind}.{problem.key}: {problem.message}")
    return config


def router_kinds() -> list[str]:
    """Return every kind of the registry, those that are imported lazily last."""
    return [*ROUTERS, *ROUTER_MODULES]


def router_class(kind: str) -> type[RouterOptions]:
    """Return the config class of a kind of the registry or a plug-in.

    Raises:
        ConfigError: if it is a plug-in that cannot be used.
    """
    if kind in ROUTERS:
        return ROUTERS[kind]
    try:
        section = ROUTER_PLUGINS.section(kind)
    except PluginError as error:
        raise ConfigError(f"--only: {error}") from None
    assert issubclass(section, RouterOptions), "ROUTER_PLUGINS accepts no others"
    return section


def looks_ahead(config: RouterOptions) -> str:
    """Return when a token's experts depend on later tokens: `no`, `in training`, or `always` (in evaluation too)."""
    if not isinstance(config, NonCausalOptions):
        return "no"
    return "always" if config.evaluation_routing == "as_trained" else "in training"


def select_kinds(text: str | None, available: Sequence[str]) -> list[str]:
    """Return the router kinds named by `--only`, by commas (None: all), in registry order, then plug-ins as given.

    Raises:
        ConfigError: if a name is unknown.
    """
    if text is None:
        return list(available)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name == MIXTURE_OF_DEPTHS and MIXTURE_OF_DEPTHS not in available:
            raise ConfigError(f"--only: {name} has one network and no choice between experts; --train compares it")
        if ROUTER_PLUGINS.has(name):
            router_class(name)
        elif name not in available:
            raise ConfigError(f"--only: {shown(name)} is not a router; use some of {', '.join(available)}, by commas")
    return [kind for kind in available if kind in names] + [name for name in names if name not in available]

"""Every router of the registry, with options that suit so many experts and choices. Imports no torch."""

from collections.abc import Sequence
from typing import Any, get_args

from trainer.config.nodes import shown
from trainer.errors import ConfigError
from trainer.moe.routers.config.options import NonCausalOptions, RouterOptions
from trainer.moe.routers.registry import RouterConfig

ROUTERS: dict[str, type[RouterOptions]] = {
    config.model_fields["kind"].default: config for config in get_args(get_args(RouterConfig)[0])
}
"""Config class of every kind, in the order of the registry."""
ALONE = "mixture_of_depths"
"""The router that has one network to send tokens to, and none to choose between."""
_MOST_GROUPS = 4


def router_config(
    kind: str, *, num_experts: int, top_k: int, room: float = 1.0, top_k_choices: Sequence[int] | None = None
) -> RouterOptions:
    """Return a router's config; options that are not named here have their defaults.

    Args:
        kind: its name in the registry.
        num_experts: E.
        top_k: k, of routers that have the option. `mixture_of_depths` computes the share k / E of all tokens.
        room: of routers that have the option.
        top_k_choices: of routers that have the option, as far as there are so many experts.

    Raises:
        ConfigError: if the router cannot be with so many experts.
    """
    known = ROUTERS[kind].model_fields
    cuts = [number for number in range(2, _MOST_GROUPS + 1) if num_experts % number == 0 and num_experts > number]
    groups = max(cuts, default=1)  # of two experts at least: a group of one would be no group
    most = min(num_experts, max(top_k_choices or [top_k]))
    options: dict[str, Any] = {
        "top_k": top_k,
        "top_k_choices": None if top_k_choices is None else [min(k, num_experts) for k in top_k_choices],
        "capacity_factor": float(room),
        "bias_update_rate": 0.001,  # by default group_limited has no bias
        "groups": groups,
        "groups_kept": max(-(-groups // 2), -(-most * groups // num_experts)),  # half, or as many as k experts need
        "capacity": min(1.0, top_k / num_experts),
        "d_proj": max(64, num_experts),  # as many directions as experts can be told apart
    }
    if most == 1:  # one normalised weight is always 1, and the router would never learn
        options |= {"normalize": False, "random_second": False}
    config = ROUTERS[kind](**{key: value for key, value in options.items() if key in known})
    for problem in config.problems_among(1 if kind == ALONE else num_experts):
        raise ConfigError(f"{kind}.{problem.key}: {problem.message}")
    return config


def looks_ahead(config: RouterOptions) -> str:
    """Say when a token's experts depend on later tokens: `no`, `in training`, or `always` (in evaluation as well)."""
    if not isinstance(config, NonCausalOptions):
        return "no"
    return "always" if config.evaluation_routing == "as_trained" else "in training"


def chosen_kinds(text: str | None, known: Sequence[str]) -> list[str]:
    """Return the kinds that `--only` names, in the order of the registry; None: all of them.

    Args:
        text: names by commas.
        known: kinds that can be named.

    Raises:
        ConfigError: if one is unknown.
    """
    if text is None:
        return list(known)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name == ALONE and ALONE not in known:
            raise ConfigError(f"--only: {ALONE} has one network and no choice between experts; --train compares it")
        if name not in known:
            raise ConfigError(f"--only: {shown(name)} is not a router; use some of {', '.join(known)}, by commas")
    return [kind for kind in known if kind in names]

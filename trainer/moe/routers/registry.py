"""The union of the routers' configs that `model.moe.router` accepts. Imports no torch.

To add a router: one file beside this one with its config class and its implementation, and a line in `ROUTER_MODULES`.
"""

from typing import Annotated, Final

from pydantic import Field

from trainer.config.plugins import Pluggable
from trainer.moe.routers.config.fixed import HashRouterConfig, RandomRouterConfig, RoundRobinRouterConfig
from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routers.config.sequence_choice import (
    BASELayerRouterConfig,
    ExpertChoiceRouterConfig,
    GreedyRouterConfig,
    LinearProgramRouterConfig,
    MixtureOfDepthsRouterConfig,
    SinkhornRouterConfig,
)
from trainer.moe.routers.config.token_choice import (
    BiasBalancedRouterConfig,
    CosineRouterConfig,
    DenseRouterConfig,
    GroupLimitedRouterConfig,
    GShardRouterConfig,
    NoisyTopKRouterConfig,
    SwitchRouterConfig,
    TopKRouterConfig,
    TopPRouterConfig,
)

ROUTER_MODULES: Final[dict[str, str]] = {}
"""Kinds that are imported, with torch, when a configuration names them: "x": "trainer.moe.routers.x:XRouterConfig"."""

ROUTER_PLUGINS: Final = Pluggable("routers", RouterOptions, ROUTER_MODULES)

RouterConfig = Annotated[
    TopKRouterConfig
    | BiasBalancedRouterConfig
    | GroupLimitedRouterConfig
    | SwitchRouterConfig
    | GShardRouterConfig
    | NoisyTopKRouterConfig
    | CosineRouterConfig
    | TopPRouterConfig
    | ExpertChoiceRouterConfig
    | SinkhornRouterConfig
    | BASELayerRouterConfig
    | LinearProgramRouterConfig
    | GreedyRouterConfig
    | MixtureOfDepthsRouterConfig
    | HashRouterConfig
    | RandomRouterConfig
    | DenseRouterConfig
    | RoundRobinRouterConfig,
    Field(discriminator="kind"),
    ROUTER_PLUGINS,
]

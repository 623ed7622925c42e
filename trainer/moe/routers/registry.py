"""The union of the routers' configs that `model.moe.router` accepts. Imports no torch.

To add a router: one file beside this one with its config class and its implementation, and a line in `ROUTER_MODULES`.
"""

from typing import Annotated, Final

from pydantic import Field

from trainer.config.plugins import Pluggable
from trainer.moe.routers.config import fixed, sequence_choice, token_choice
from trainer.moe.routers.config.options import RouterOptions

ROUTER_MODULES: Final[dict[str, str]] = {}
"""Kinds that are imported, with torch, when a configuration names them: "x": "trainer.moe.routers.x:XRouterConfig"."""

ROUTER_PLUGINS: Final = Pluggable("routers", RouterOptions, ROUTER_MODULES)

RouterConfig = Annotated[
    token_choice.TopKRouterConfig
    | token_choice.BiasBalancedRouterConfig
    | token_choice.GroupLimitedRouterConfig
    | token_choice.SwitchRouterConfig
    | token_choice.GShardRouterConfig
    | token_choice.NoisyTopKRouterConfig
    | token_choice.CosineRouterConfig
    | token_choice.TopPRouterConfig
    | sequence_choice.ExpertChoiceRouterConfig
    | sequence_choice.SinkhornRouterConfig
    | sequence_choice.BASELayerRouterConfig
    | sequence_choice.LinearProgramRouterConfig
    | sequence_choice.GreedyRouterConfig
    | sequence_choice.MixtureOfDepthsRouterConfig
    | fixed.HashRouterConfig
    | fixed.RandomRouterConfig
    | token_choice.DenseRouterConfig
    | fixed.RoundRobinRouterConfig,
    Field(discriminator="kind"),
    ROUTER_PLUGINS,
]

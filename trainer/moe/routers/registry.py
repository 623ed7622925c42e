"""The union of the routers' configs that `model.moe.router` accepts. Imports no torch.

To add a router: an implementation file beside this one, a config class in config/, and its name here.
"""

from typing import Annotated

from pydantic import Field

from trainer.moe.routers.config.fixed import HashRouterConfig, RandomRouterConfig, RoundRobinRouterConfig
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
]

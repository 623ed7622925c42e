"""Configs of every router for any number of experts, and the check of names."""

import pytest

from trainer.errors import ConfigError
from trainer.lab.router_configs import MIXTURE_OF_DEPTHS, ROUTERS, looks_ahead, router_config, select_kinds
from trainer.moe.config import MoEConfig
from trainer.moe.routers.config.sequence_choice import BASELayerRouterConfig
from trainer.moe.routers.config.token_choice import TopKRouterConfig


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_config_is_accepted(kind: str) -> None:
    for num_experts, top_k in ((1, 1), (2, 1), (3, 3), (5, 2), (8, 2), (8, 7), (64, 6), (100, 1)):
        router = router_config(kind, num_experts=num_experts, top_k=top_k, capacity_factor=1.25)
        config = MoEConfig.model_validate(
            {"num_experts": 1 if kind == MIXTURE_OF_DEPTHS else num_experts, "router": router.model_dump()}
        )
        assert config.router == router
        assert getattr(router, "top_k", top_k) == top_k and getattr(router, "capacity_factor", 1.25) == 1.25


def test_group_limited_has_groups_to_choose_between() -> None:
    for num_experts, top_k, groups, kept in ((8, 2, 4, 2), (8, 7, 4, 4), (4, 2, 2, 1), (6, 1, 3, 2), (5, 2, 1, 1)):
        options = router_config("group_limited", num_experts=num_experts, top_k=top_k).model_dump()
        assert (options["groups"], options["groups_kept"]) == (groups, kept)


def test_mixture_of_depths_computes_as_large_a_share_of_tokens_as_others_visit_of_experts() -> None:
    assert router_config(MIXTURE_OF_DEPTHS, num_experts=8, top_k=2).model_dump()["capacity"] == 0.25


def test_kinds_are_selected_in_registry_order() -> None:
    assert select_kinds(None, ["a", "b"]) == ["a", "b"]
    assert select_kinds("hash, top_k", list(ROUTERS)) == ["top_k", "hash"]
    with pytest.raises(ConfigError, match=r"^--only: 'topk' is not a router; use some of top_k, bias_balanced, .*by"):
        select_kinds("hash,topk", list(ROUTERS))
    with pytest.raises(ConfigError, match="one network and no choice between experts; --train compares it"):
        select_kinds(MIXTURE_OF_DEPTHS, ["top_k"])


def test_look_ahead_depends_on_the_router_and_its_evaluation() -> None:
    assert looks_ahead(TopKRouterConfig()) == "no"
    assert looks_ahead(BASELayerRouterConfig()) == "in training"
    assert looks_ahead(BASELayerRouterConfig(evaluation_routing="as_trained")) == "always"

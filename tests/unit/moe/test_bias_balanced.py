"""The selection bias, with and without null experts."""

import torch

from trainer.moe.routers.bias_balanced import BiasBalancedRouter
from trainer.moe.routers.config.token_choice import BiasBalancedRouterConfig
from trainer.moe.routing import RoutingContext


def make(**options: object) -> BiasBalancedRouter:
    config = BiasBalancedRouterConfig.model_validate({"bias_update_rate": 0.01, **options})
    torch.manual_seed(0)
    router = config.build(d_model=6, num_experts=4, layer=0)
    assert isinstance(router, BiasBalancedRouter)
    return router


def test_it_rises_for_the_underused_and_stays_where_the_load_is_even() -> None:
    router = make()
    router.update(torch.tensor([5, 9, 7, 7]))
    torch.testing.assert_close(router.bias, torch.tensor([0.01, -0.01, 0.0, 0.0]))


def test_null_experts_share_one_bias_whose_target_is_the_load_of_as_many_experts() -> None:
    router = make(null_experts=3, top_k=3)
    router.update(torch.tensor([4, 4, 5, 3, 12]))  # 28 choices of 7 experts: 4 each, and 12 of the null experts
    torch.testing.assert_close(router.bias, torch.tensor([0.0, 0.0, -0.01, 0.01, 0.0]))
    router.update(torch.tensor([3, 3, 3, 3, 16]))
    torch.testing.assert_close(router.bias, torch.tensor([0.01, 0.01, 0.0, 0.02, -0.01]))
    assert router.selection_scores(torch.zeros(1, 7)).tolist()[0][4:] == [float(router.bias[4])] * 3


def test_it_evens_out_how_many_experts_tokens_have() -> None:
    router = make(null_experts=4, top_k=2)
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1.0
    with torch.no_grad():
        router.get_parameter("gate.weight")[4:, 0] = 3.0  # every token prefers null experts
    n, zeros = len(x), torch.zeros(len(x), dtype=torch.int64)
    context = RoutingContext(
        token_ids=zeros,
        valid=torch.ones(n, dtype=torch.bool),
        position=torch.arange(n),
        sequence_index=zeros,
        num_sequences=1,
    )

    def counts() -> torch.Tensor:
        chosen = router(x, context).decision.expert_index
        real = torch.bincount(chosen[chosen < 4], minlength=4)
        return torch.cat([real, (chosen >= 4).sum()[None]])

    assert float(counts()[4]) / (2 * n) > 0.9
    for _ in range(300):
        router.update(counts())
    share = counts().double() / (2 * n)
    assert abs(float(share[4]) - 0.5) < 0.05, share
    assert float(share[:4].max()) < 1.3 * 0.125, share

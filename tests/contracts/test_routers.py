"""Every router, built-in or from a plug-in, meets the contract; the checks detect routers that do not."""

from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests.added_router import ThresholdRouter, ThresholdRouterConfig
from tests.laws.test_router_oracles import VARIANTS
from tests.registries import ROUTERS, num_experts_of
from trainer.contracts import router as router_contract
from trainer.contracts.ensure import DoesNotApply
from trainer.moe.routers.config.options import TopKOptions
from trainer.moe.routers.registry import RouterConfig
from trainer.moe.routing import Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.select import stable_top_k

ADAPTER: TypeAdapter[Any] = TypeAdapter(RouterConfig)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("check", router_contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("router", VARIANTS, ids=str)
def test_a_router_meets_the_contract(router: dict[str, Any], check: Any) -> None:
    config = ADAPTER.validate_python(router)
    has_all = "top_k" in type(config).model_fields and config.replays_experts
    with nullcontext() if has_all else suppress(DoesNotApply):
        check(config, num_experts_of(router["kind"]))


@pytest.mark.parametrize("check", router_contract.CHECKS, ids=lambda check: check.__name__)
def test_a_plugin_router_meets_the_contract(check: Any) -> None:
    with suppress(DoesNotApply):  # it has no top_k
        check(ThresholdRouterConfig(), 4)


class WrongRouterConfig(TopKOptions):
    """Options of a top-k router with one defect."""

    wrong: str

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        return WrongRouter(wrong=self.wrong, top_k=self.top_k, d_model=d_model, num_experts=num_experts)


class WrongRouter(ThresholdRouter):
    def __init__(self, *, wrong: str, top_k: int, d_model: int, num_experts: int) -> None:
        super().__init__(d_model=d_model, num_experts=num_experts, threshold=0.6)
        self.wrong, self.top_k, self.calls = wrong, top_k, 0

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        wrong, valid = self.wrong, context.valid
        self.calls += 1
        with torch.autocast(x.device.type, enabled=wrong == "bfloat16 scores", dtype=torch.bfloat16):
            logits = self.gate(x.to(self.gate.weight.dtype))
        if wrong == "looks ahead":
            logits = logits - logits.view(context.num_sequences, -1, 4).mean(1, keepdim=True).expand(
                context.num_sequences, logits.shape[0] // context.num_sequences, 4
            ).reshape(logits.shape) * (context.position[:, None] % 2)
        if wrong == "sees other rows":
            logits = logits - logits.mean(0)
        if wrong == "decides by rounding":  # 0 up to rounding if all tokens of a row are equal
            logits = (rows := logits.view(context.num_sequences, -1, 4)) - rows.mean(1, keepdim=True)
            logits = logits.view(-1, 4)
        if wrong == "noise of its own":
            logits = logits + torch.linspace(-1, 1, 4) * self.calls
        scores = logits.softmax(-1)
        asked = None if wrong == "ignores top_k" else context.top_k
        top_k = asked or self.top_k
        expert_index = stable_top_k(scores.detach(), top_k)
        live = expert_index
        if wrong != "ignores given experts":
            expert_index = context.chosen(live)
        if wrong == "repeats an expert":
            expert_index = expert_index[:, :1].expand(-1, top_k)
        weight = scores.gather(-1, expert_index)
        weight = weight if wrong == "not normalised" else weight / weight.sum(-1, keepdim=True)
        if wrong == "no gradient":
            weight = weight.detach() + 0 * self.gate.weight.sum()
        if wrong == "routes padding":
            valid = torch.ones_like(valid)
        num_valid = context.num_valid
        if wrong == "keeps fewer rows than it says":
            valid = valid & (context.position > 0)
        decision = RoutingDecision.from_top_k(expert_index, weight, num_experts=4, valid=valid, num_valid=num_valid)
        if wrong == "chooses what is given":
            live = expert_index
        return RouterOutput(decision=decision, logits=logits, probs=scores, live_choice=live)


WRONG = {
    "looks ahead": "causality_is_as_declared",
    "sees other rows": "rows_do_not_see_each_other",
    "noise of its own": "noise_is_a_function_of_its_key",
    "repeats an expert": "is_well_formed",
    "not normalised": "is_well_formed",
    "no gradient": "everything_learns",
    "routes padding": "is_well_formed",
    "keeps fewer rows than it says": "is_well_formed",
    "bfloat16 scores": "scores_are_wide",
    "ignores top_k": "k_of_one_call_is_k_of_the_config",
    "decides by rounding": "rounding_chooses_no_expert",
    "ignores given experts": "given_experts_are_used",
    "chooses what is given": "given_experts_are_used",
}


@pytest.mark.parametrize(("wrong", "check"), WRONG.items(), ids=WRONG.keys())
def test_a_violation_of_the_contract_is_detected(wrong: str, check: str) -> None:
    with pytest.raises(AssertionError):
        getattr(router_contract, check)(WrongRouterConfig(wrong=wrong), 4)


def test_the_router_without_a_defect_passes() -> None:
    """Control for the tests above."""
    for check in set(WRONG.values()):
        getattr(router_contract, check)(WrongRouterConfig(wrong="nothing"), 4)


def test_every_registered_router_is_checked() -> None:
    assert {router["kind"] for router in VARIANTS} == set(ROUTERS)

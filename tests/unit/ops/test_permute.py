"""Copies of tokens as rows and sums of rows: gradients against autograd, empty rows and slots, order of the sum."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.expert_order import order_by_expert
from trainer.ops.permute import gather_rows, sum_rows


@st.composite
def _decisions(draw: st.DrawFn) -> RoutingDecision:
    tokens, num_experts = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    is_regular = draw(st.booleans())
    width = draw(st.integers(1, num_experts))
    per_token = [width if is_regular else draw(st.integers(0, num_experts)) for _ in range(tokens)]
    pairs = [(t, e) for t, n in enumerate(per_token) for e in draw(st.permutations(range(num_experts)))[:n]]
    weights = torch.linspace(0.1, 1.0, len(pairs), dtype=torch.float64, requires_grad=True)
    return RoutingDecision(
        token_index=torch.tensor([t for t, _ in pairs], dtype=torch.int64),
        expert_index=torch.tensor([e for _, e in pairs], dtype=torch.int64),
        combine_weight=weights,
        kept=torch.tensor([draw(st.booleans()) for _ in pairs], dtype=torch.bool),
        num_tokens=tokens,
        num_experts=num_experts,
        top_k=width if is_regular else None,
    )


@settings(max_examples=150)
@given(_decisions())
def test_slots_are_the_kept_assignments_in_order(decision: RoutingDecision) -> None:
    slots = TokenSlots.of(decision)
    found = [
        (t, e, w)
        for t, (experts, weights) in enumerate(zip(slots.expert_index.tolist(), slots.weight.tolist(), strict=True))
        for e, w in zip(experts, weights, strict=True)
        if e < decision.num_experts
    ]
    columns = (decision.token_index, decision.expert_index, decision.combine_weight, decision.kept)
    assert found == [(t, e, w) for t, e, w, kept in zip(*(c.tolist() for c in columns), strict=True) if kept]


@settings(max_examples=150)
@given(_decisions())
def test_output_and_gradients_equal_a_dense_matrix_product(decision: RoutingDecision) -> None:
    """With experts that multiply by (e + 1), gather and sum together are a diagonal (T, T) matrix."""
    x = torch.randn(decision.num_tokens, 3, dtype=torch.float64, requires_grad=True)

    def experts(x: torch.Tensor, expert_index: torch.Tensor, weight: torch.Tensor, **sizes: None) -> torch.Tensor:
        order = order_by_expert(expert_index, decision.num_experts)
        factor = torch.arange(1.0, decision.num_experts + 1).double().repeat_interleave(order.rows_per_expert)
        return sum_rows(gather_rows(x, order) * (factor * order.of_rows(weight))[:, None], order)

    y = LocalDispatcher().forward(x, decision, experts)
    weight = decision.combine_weight * decision.kept * (decision.expert_index + 1)
    dense = torch.zeros(decision.num_tokens, dtype=torch.float64).index_add(0, decision.token_index, weight)
    torch.testing.assert_close(y, x * dense[:, None])
    if decision.kept.any():
        inputs = (x, decision.combine_weight)
        mine = torch.autograd.grad(y.square().sum(), inputs)
        theirs = torch.autograd.grad((x * dense[:, None]).square().sum(), inputs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_pass_gradcheck_with_dropped_slots_and_empty_rows() -> None:
    for multiple in (1, 2):
        order = order_by_expert(torch.tensor([[1, 0], [2, 1], [0, 2]]), 2, multiple=multiple)  # 2: no expert
        x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        rows = torch.randn(len(order.slot_of_row), 2, dtype=torch.float64, requires_grad=True)
        is_row = (order.slot_of_row < 6)[:, None]
        assert torch.autograd.gradcheck(lambda x, o=order, m=is_row: gather_rows(x, o) * m, (x,))
        assert torch.autograd.gradcheck(lambda r, o=order: sum_rows(r, o), (rows,))
        (gradient,) = torch.autograd.grad(sum_rows(rows, order).sum(), rows)
        assert torch.equal(gradient, is_row.expand_as(rows).double())


def test_a_token_s_rows_are_summed_in_slot_order() -> None:
    """1e16 + 1 - 1e16 is 0 or 1 in float64, depending on the order, which must be that of the slots."""
    order = order_by_expert(torch.tensor([[2, 0, 1]]), 3)
    by_slot = torch.tensor([[1e16], [-1e16], [1.0]], dtype=torch.float64)  # experts 2, 0, 1
    assert float(sum_rows(by_slot[[1, 2, 0]], order)) == 1.0  # in expert order


def test_no_rows_at_all_give_zeros_and_zero_gradients() -> None:
    order = order_by_expert(torch.tensor([[2], [2]]), 2)
    x = torch.randn(2, 3, requires_grad=True)
    y = sum_rows(gather_rows(x, order), order)
    y.sum().backward()
    assert y.shape == (2, 3) and not y.any() and x.grad is not None and not x.grad.any()

"""Gather and combine: gradients against autograd, empty slots, order of the sum."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.dispatch.order import group_by_expert
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import combine_rows, gather_rows, permute_rows, unpermute_rows


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
def test_dispatch_groups_rows_by_expert_and_keeps_token_order_inside(decision: RoutingDecision) -> None:
    x = torch.arange(decision.num_tokens, dtype=torch.float64)[:, None]
    sent = LocalDispatcher().dispatch(x, decision)
    kept = [
        (int(e), int(t))
        for t, e, k in zip(decision.token_index, decision.expert_index, decision.kept, strict=True)
        if k
    ]
    assert sent.x[:, 0].tolist() == [float(t) for _, t in sorted(kept)]
    assert sent.rows_per_expert.tolist() == [sum(e == i for e, _ in kept) for i in range(decision.num_experts)]
    assert int(sent.rows_per_expert.sum()) == len(sent.x)


@settings(max_examples=150)
@given(_decisions())
def test_output_and_gradients_equal_a_dense_matrix_product(decision: RoutingDecision) -> None:
    """With experts that multiply by (e + 1), gather and combine together are a diagonal (T, T) matrix."""
    x = torch.randn(decision.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    dispatcher = LocalDispatcher()
    sent = dispatcher.dispatch(x, decision)
    factor = torch.repeat_interleave(torch.arange(1, decision.num_experts + 1).double(), sent.rows_per_expert)
    y = dispatcher.combine(sent.x * factor[:, None], sent).y

    weight = decision.combine_weight * decision.kept * (decision.expert_index + 1)
    dense = torch.zeros(decision.num_tokens, dtype=torch.float64).index_add(0, decision.token_index, weight)
    torch.testing.assert_close(y, x * dense[:, None])
    if decision.kept.any():
        inputs = (x, decision.combine_weight)
        mine = torch.autograd.grad(y.square().sum(), inputs)
        theirs = torch.autograd.grad((x * dense[:, None]).square().sum(), inputs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_pass_gradcheck_with_dropped_slots() -> None:
    token_of_row = torch.tensor([2, 0, 1, 0])
    row_of_slot = torch.tensor([[1, 3], [4, 2], [0, 4]])  # 4: no row
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, token_of_row, row_of_slot), (x,))
    assert torch.autograd.gradcheck(lambda r, w: combine_rows(r, w, token_of_row, row_of_slot), (rows, weight))


def test_a_token_s_rows_are_summed_in_slot_order() -> None:
    """1e16 + 1 - 1e16 is 0 or 1 in float64, depending on the order, which must be that of the slots."""
    decision = RoutingDecision.from_top_k(
        torch.tensor([[2, 0, 1]]), torch.ones(1, 3, dtype=torch.float64), num_experts=3, valid=torch.tensor([True])
    )
    order = group_by_expert(decision)
    by_slot = torch.tensor([[1e16], [-1e16], [1.0]], dtype=torch.float64)  # experts 2, 0, 1
    rows = by_slot[[1, 2, 0]]  # in expert order
    assert float(combine_rows(rows, order.weight, order.token_of_row, order.row_of_slot)) == 1.0


def test_no_rows_at_all_gives_zeros_and_zero_gradients() -> None:
    decision = RoutingDecision.from_top_k(
        torch.tensor([[0], [1]]),
        torch.ones(2, 1, requires_grad=True),
        num_experts=2,
        valid=torch.zeros(2, dtype=torch.bool),
    )
    x = torch.randn(2, 3, requires_grad=True)
    dispatcher = LocalDispatcher()
    sent = dispatcher.dispatch(x, decision)
    y = dispatcher.combine(sent.x, sent).y
    y.sum().backward()
    assert y.shape == (2, 3) and not y.any() and x.grad is not None and not x.grad.any()


def test_a_permutation_and_its_inverse_have_the_gradients_of_indexing() -> None:
    """For an order that is not its own inverse."""
    order = torch.tensor([2, 0, 3, 1])
    for moved_by, expected in ((permute_rows, order), (unpermute_rows, order.argsort())):
        x, like = (torch.arange(8.0).view(4, 2).requires_grad_() for _ in range(2))
        weight = torch.arange(8.0).view(4, 2).square()
        moved, indexed = moved_by(x, order), like[expected]
        assert torch.equal(moved, indexed)
        grads = [torch.autograd.grad((y * weight).sum(), leaf)[0] for y, leaf in ((moved, x), (indexed, like))]
        assert torch.equal(*grads)

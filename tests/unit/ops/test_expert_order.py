"""Order of rows by expert, its inverse, and groups padded to a multiple."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.ops.expert_order import order_by_expert, rows_of_slots


@st.composite
def _choices(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Experts of each slot of each token; the number of experts, or more, is none."""
    tokens, num_slots, num_experts = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    one = st.integers(0, num_experts + 1)
    return [draw(st.lists(one, min_size=num_slots, max_size=num_slots)) for _ in range(tokens)], num_experts


@settings(max_examples=200)
@given(_choices(), st.sampled_from([1, 4]), st.booleans())
def test_rows_are_ordered_by_expert_then_token_then_slot(
    choices: tuple[list[list[int]], int], multiple: int, is_counted: bool
) -> None:
    per_token, num_experts = choices
    index, num_slots = torch.tensor(per_token), len(per_token[0])
    wanted = [
        [(t, s) for t, e in enumerate(per_token) for s in range(num_slots) if e[s] == x] for x in range(num_experts)
    ]
    num_rows = None if is_counted else sum(map(len, wanted))
    order = order_by_expert(index, num_experts, num_rows=num_rows, multiple=multiple)

    assert all(
        n % multiple == 0 and 0 <= n - len(w) < multiple for n, w in zip(order.rows_per_expert, wanted, strict=True)
    )
    empty = index.numel()
    groups = order.slot_of_row.split(
        [*order.rows_per_expert.tolist(), len(order.slot_of_row) - int(order.rows_per_expert.sum())]
    )
    for rows, slots in zip(groups, [*wanted, []], strict=True):
        expected = [t * num_slots + s for t, s in slots]
        assert rows.tolist() == expected + [empty] * (len(rows) - len(expected))
    for t in range(len(per_token)):
        for s in range(num_slots):
            row = int(order.row_of_slot[t, s])
            if per_token[t][s] < num_experts:
                assert int(order.slot_of_row[row]) == t * num_slots + s and int(order.token_of_row[row]) == t
            else:
                assert row == len(order.slot_of_row)
    assert torch.equal(rows_of_slots(order.slot_of_row, order.row_of_slot.shape), order.row_of_slot)
    assert order.is_full == (sum(map(len, wanted)) == index.numel())
    assert order.has_empty_rows == (multiple > 1)


def test_values_of_rows_are_those_of_their_slots_and_zero_in_empty_rows() -> None:
    order = order_by_expert(torch.tensor([[1, 0], [2, 1]]), 2, multiple=2)
    values = torch.tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True)
    assert order.of_rows(values).tolist() == torch.tensor([0.2, 0, 0.1, 0.4, 0]).tolist()
    order.of_rows(values).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[1, 1], [0, 1]]

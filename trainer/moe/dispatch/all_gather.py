"""Every rank gets every token: the reference for the dispatchers that send only what is needed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Sent
from trainer.moe.dispatch.base import Dispatched
from trainer.moe.dispatch.order import group_by_expert, plan_exchange
from trainer.moe.routing import RoutingDecision
from trainer.ops.permute import inverse_permute, permute

# T tokens, R rows here, E experts, G ranks that share the experts, D d_model.


class AllGatherDispatcher(AllToAllDispatcher):
    """Gives every token to every rank, which takes what its experts need: the simplest to trust, for few ranks."""

    def dispatch(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        """Gather all ranks' tokens and pick the rows of the experts that are here."""
        order = group_by_expert(decision)
        counts = self.group.gather(order.rows_per_expert)  # (G, E)
        self.check(counts, order)
        plan = plan_exchange(counts, self.bounds, self.group.index)
        rows_of = counts.sum(1).tolist()
        tokens_of = self.group.gather(torch.tensor([len(x)], device=x.device)).flatten().tolist()
        tokens = self._to_all(x, tokens_of)  # (all T, D)
        token_of_row = self._to_all(order.token_of_row[:, None], rows_of).flatten()  # in expert order, sender by sender
        first, end = self.bounds[self.group.index]
        before, until = counts[:, :first].sum(1).tolist(), counts[:, :end].sum(1).tolist()
        picked, row, token = [], 0, 0
        for sender in range(self.group.size):
            picked.append(token_of_row[row + before[sender] : row + until[sender]] + token)
            row, token = row + rows_of[sender], token + tokens_of[sender]
        arrived = permute(tokens.index_select(0, torch.cat(picked)), plan.order)
        return Dispatched(x=arrived, rows_per_expert=plan.rows_per_expert, handle=Sent(order, plan))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Gather all experts' rows, take those of this rank's tokens and sum them in slot order."""
        sent: Sent = dispatched.handle
        order, sizes, me = sent.order, sent.plan.sizes, self.group.index
        rows_at = [sum(row[rank] for row in sizes) for rank in range(self.group.size)]
        everything = self._to_all(inverse_permute(y, sent.plan.order), rows_at)  # by rank, there by sender
        mine = []
        for rank, rows in enumerate(everything.split(rows_at)):
            start = sum(row[rank] for row in sizes[:me])
            mine.append(rows[start : start + sizes[me][rank]])
        return order.combine(torch.cat(mine), is_compiled=self.is_compiled)

    def _to_all(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Return all ranks' x one below the other; its gradient is the sum over ranks, in their order."""
        copies = x.repeat(self.group.size, *(1 for _ in x.shape[1:]))
        sizes = [[n] * self.group.size for n in rows]
        return self.send(copies, sizes) if x.is_floating_point() else self.travel(copies, sizes)

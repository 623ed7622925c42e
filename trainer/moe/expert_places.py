"""Places of experts in the order of ranks, by which dispatchers number them; everything else goes by their numbers.

    3 ranks, owner of each expert 2 0 1 0 1 2       order of ranks, 1 copy each      1 3 +0 | 2 4 +0 | 0 5 +2
    places 6 0 3 1 4 7; expert 0 also 2 and 5, expert 2 also 8

# A assignments, E experts, P places, m experts with several places, c places of one at most.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from trainer.moe.routing import RoutingDecision


class ExpertPlaces:
    """Places of the experts of a layer; those with several take turns within the assignments of each rank's tokens."""

    def __init__(self, places: Sequence[Sequence[int]], *, first_turn: int = 0) -> None:
        """Keep the places of each expert, its own rank's first.

        `first_turn` is the index of this rank, so that ranks do not all begin with the same place.
        """
        self._own = torch.tensor([of_expert[0] for of_expert in places])  # (E,)
        self.num_places, self._first_turn = sum(map(len, places)), first_turn
        several = [list(of_expert) for of_expert in places if len(of_expert) > 1]
        most = max(map(len, several), default=0)
        filled = [of_expert + of_expert[:1] * (most - len(of_expert)) for of_expert in several]
        self._table = torch.tensor(filled, dtype=torch.int64)  # (m, c)
        self._count = torch.tensor([len(of_expert) for of_expert in several])  # (m,)
        self._copied = torch.tensor([expert for expert, of_expert in enumerate(places) if len(of_expert) > 1])  # (m,)

    def placed(self, decision: RoutingDecision) -> RoutingDecision:
        """Return the decision with places for numbers; null experts come after the places."""
        device = decision.expert_index.device
        if self._own.device != device:  # they move once
            self._own, self._table = self._own.to(device), self._table.to(device)
            self._count, self._copied = self._count.to(device), self._copied.to(device)
        expert, num_experts = decision.expert_index, decision.num_experts
        placed = decision.renumbered(self._own)
        if self.num_places == num_experts:
            return placed
        is_copied = (expert[:, None] == self._copied) & decision.kept[:, None]  # (A, m)
        turn = is_copied.cumsum(0) + (self._first_turn - 1)
        place = self._table.gather(1, (turn % self._count).T).T  # (A, m)
        new = torch.where(is_copied.any(1), (place * is_copied).sum(1), placed.expert_index)
        new = torch.where(expert < num_experts, new, expert + self.num_places - num_experts)
        return replace(placed, expert_index=new, num_experts=self.num_places)
